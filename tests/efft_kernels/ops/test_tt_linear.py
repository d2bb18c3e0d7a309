"""Compare tt_linear with y = x (Wᵀ + D G) + b in fp64 (D G built densely), and with gradients written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efft_kernels import Backend, tt_linear, use_backend
from efft_kernels.testing import LAYOUTS, assert_close_budget, make_inputs, poisoned_empty, with_layout

LEAVES = ("x", "W", "b", "D", "G")
ADAPTED = ("x", "D", "G")


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in inputs.items()}


def dense(inputs: dict[str, Any], gy: Tensor) -> dict[str, Tensor]:
    """Return y and every gradient, computed from the dense matrix and its gradient."""
    x, W, b, D, G = (wide(inputs)[k] for k in LEAVES)
    gy = gy.double()
    M = W.t() + D @ G  # [d_in, d_out]
    dM = x.reshape(-1, x.shape[-1]).t() @ gy.reshape(-1, gy.shape[-1])  # [d_in, d_out]
    y = x @ M if b is None else x @ M + b
    grads = {"x": gy @ M.t(), "W": dM.t(), "D": dM @ G.t(), "G": D.t() @ dM}
    return {"y": y, "b": gy.reshape(-1, gy.shape[-1]).sum(0), **grads}


def unfused(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
    """Compute the plain formula in the precision of x. Its errors are the yardstick for the errors of the op."""
    return F.linear(x, W, b) + (x @ D.to(x.dtype)) @ G.to(x.dtype)


def merged(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
    """Add the update to the weight in the weight's dtype before the product; the tests must reject this method."""
    return F.linear(x, W + (D @ G).t().to(W.dtype), b)


def run(
    op: Callable[..., Tensor], inputs: dict[str, Any], gy: Tensor, need: tuple[str, ...] = ADAPTED
) -> dict[str, Any]:
    """Return y and the gradients of the arguments that ``need`` names."""
    leaves = {k: inputs[k].detach().requires_grad_(k in need) if inputs[k] is not None else None for k in LEAVES}
    y = op(**leaves)
    grads = torch.autograd.grad(y, [leaves[k] for k in need], gy)
    return {"y": y, **dict(zip(need, grads, strict=True))}


def upstream(inputs: dict[str, Any]) -> Tensor:
    x, W = inputs["x"], inputs["W"]
    generator = torch.Generator().manual_seed(1)  # the same numbers in every example of a test
    return torch.randn(*x.shape[:-1], W.shape[0], generator=generator, dtype=torch.float64).to(x.device, x.dtype)


@pytest.mark.parametrize("narrow_factors", [False, True], ids=["fp32 factors", "factors like x"])
def test_output_and_gradients(backend: Backend, device: str, low: torch.dtype, narrow_factors: bool) -> None:
    factor_dtype = low if narrow_factors else torch.float32
    inputs = make_inputs("tt_linear", tokens=61, r1=17, dtype=low, factor_dtype=factor_dtype, device=device)
    gy = upstream(inputs)
    with use_backend(backend):
        got = run(tt_linear, inputs, gy, LEAVES)
    exact, peer = dense(inputs, gy), run(unfused, inputs, gy, LEAVES)
    for name, value in got.items():
        assert_close_budget(value, exact[name], peer[name], name=name)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_computes_in_fp32_and_rounds_once(half: torch.dtype) -> None:
    inputs = make_inputs("tt_linear", dtype=half, factor_dtype=torch.float32)
    gy = upstream(inputs)
    with use_backend("reference"):
        got = run(tt_linear, inputs, gy, LEAVES)
        wide = run(tt_linear, {k: v.float() for k, v in inputs.items()}, gy.float(), LEAVES)
    for name, value in got.items():
        assert torch.equal(value, wide[name].to(value.dtype)), name


@pytest.mark.parametrize("op", [tt_linear, merged])
def test_update_under_a_weight_1000_times_its_size(
    backend: Backend,
    device: str,
    low: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
    op: Callable[..., Tensor],
) -> None:
    """The base product is zero, so y and dx consist of the update only. A merged half-precision weight must fail."""
    factors = {"update": 1e-3, "factor_dtype": torch.float32}
    inputs = make_inputs("tt_linear", d_out=48, base_cancels=True, dtype=low, device=device, **factors)
    half = torch.randn(29, 24).to(device, low)
    gy = torch.cat([half, -half], 1)
    with use_backend(backend):
        got = run(op, inputs, gy, ("x",))
    exact = dense(inputs, gy)
    x, W, D, G = (inputs[name].to(low) for name in ("x", "W", "D", "G"))
    peer = {
        "y": product(x, W.t()) + product(product(x, D), G),
        "x": product(gy, W) + product(product(gy, G.t()), D.t()),
    }
    if op is merged and low != torch.float32:
        for name in ("y", "x"):
            with pytest.raises(AssertionError, match=r"error .* more than 2 times"):
                assert_close_budget(got[name], exact[name], peer[name])
    elif op is tt_linear:
        for name in ("y", "x"):
            assert_close_budget(got[name], exact[name], peer[name], name=name)


@given(
    lead=st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (3, 1), (2, 3, 2)]),
    sizes=st.tuples(st.integers(1, 33), st.integers(1, 33), st.one_of(st.integers(1, 9), st.integers(10, 128))),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 6),
    has_bias=st.booleans(),
    need=st.sets(st.sampled_from(ADAPTED), min_size=1),
)
def test_any_shape_and_layout(
    backend: Backend,
    device: str,
    exact: torch.dtype,
    assert_exact: Callable[..., None],
    lead: tuple[int, ...],
    sizes: tuple[int, int, int],
    layouts: tuple[str, ...],
    has_bias: bool,
    need: set[str],
) -> None:
    d_in, d_out, r1 = sizes
    inputs = make_inputs("tt_linear", d_in=d_in, d_out=d_out, r1=r1, dtype=exact, device=device)
    inputs["x"] = torch.randn(*lead, d_in, dtype=exact, device=device)
    inputs["b"] = inputs["b"] if has_bias else None
    for name, layout in zip(LEAVES, layouts, strict=False):
        inputs[name] = with_layout(inputs[name], layout) if inputs[name] is not None else None
    gy = with_layout(upstream(inputs), layouts[5])
    names = (*(name for name in ADAPTED if name in need), *(["b"] if has_bias else []))
    with use_backend(backend):
        got = run(tt_linear, inputs, gy, names)
    formula = dense(inputs, gy)
    terms = dense({k: v if v is None else v.abs() for k, v in inputs.items()}, gy.abs())
    assert got["y"].shape == (*lead, d_out)
    for name, value in got.items():
        assert_exact(value, formula[name], name, terms=terms[name].max().item() if terms[name].numel() else 0.0)


@pytest.mark.parametrize("lead", [(0,), (1,), (4, 0)])
def test_no_token_and_one_token_in_half_precision(backend: Backend, device: str, lead: tuple[int, ...]) -> None:
    inputs = make_inputs("tt_linear", dtype=torch.bfloat16, factor_dtype=torch.float32, device=device)
    inputs["x"] = torch.randn(*lead, 24, device=device, dtype=torch.bfloat16)
    gy = upstream(inputs)
    with use_backend(backend):
        got = run(tt_linear, inputs, gy)
    exact, peer = dense(inputs, gy), run(unfused, inputs, gy)
    for name, value in got.items():
        assert_close_budget(value, exact[name], peer[name], name=name)


def test_factors_as_the_bank_makes_them(
    backend: Backend, device: str, exact: torch.dtype, assert_exact: Callable[..., None]
) -> None:
    """D is a transposed column slice of V, and G is one layer of a stacked tensor, as tt_contract returns it."""
    inputs = make_inputs("tt_linear", dtype=exact, device=device)
    V = torch.randn(5, 60, dtype=exact, device=device)
    inputs["D"] = V[:, 24:48].t()
    inputs["G"] = torch.randn(3, 5, 40, dtype=exact, device=device)[1]
    gy = upstream(inputs)
    with use_backend(backend):
        got = run(tt_linear, inputs, gy)
    for name, value in got.items():
        assert_exact(value, dense(inputs, gy)[name], name)


def test_reads_nothing_it_did_not_write(backend: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear", device=device)
    gy = upstream(inputs)
    with use_backend(backend):
        clean = run(tt_linear, inputs, gy)
        with poisoned_empty():
            poisoned = run(tt_linear, inputs, gy)
    for name, value in poisoned.items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("need", [("b",), ("G", "b"), ("D", "b"), ("x", "b")], ids="".join)
def test_a_trained_bias_beside_frozen_arguments(
    backend: Backend, device: str, exact: torch.dtype, assert_exact: Callable[..., None], need: tuple[str, ...]
) -> None:
    inputs = make_inputs("tt_linear", tokens=300, dtype=exact, device=device)
    gy = upstream(inputs)
    with use_backend(backend), poisoned_empty():
        got = run(tt_linear, inputs, gy, need)
    formula = dense(inputs, gy)
    for name, value in got.items():
        assert_exact(value, formula[name], name, terms=16.0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "as it is"])
def test_a_bias_in_fp32_gets_its_gradient_in_fp32(backend: Backend, device: str, half: torch.dtype, how: str) -> None:
    """The weight has half precision, but a sum over 1000 tokens in half precision would not be accurate."""
    if backend is Backend.CPU and half == torch.float16:
        pytest.skip("the cpu backend does not support float16")
    inputs = make_inputs("tt_linear", tokens=1000, dtype=half, factor_dtype=torch.float32, device=device)
    inputs["b"] = make_inputs("tt_linear", device=device)["b"]
    gy = torch.ones_like(upstream(inputs))
    gy[::7] = 0.125  # every value is exact in half precision, but the sum is not
    with use_backend(backend), torch.autocast(device, half, enabled=how == "autocast"):
        got = run(tt_linear, inputs, gy, ("G", "b"))
    exact = dense(inputs, gy)
    assert got["y"].dtype == half
    assert got["b"].dtype == torch.float32
    # On a CPU, the vendor's product returns the sum in half precision.
    rounds = backend is Backend.EAGER and device == "cpu"
    torch.testing.assert_close(got["b"].double(), exact["b"], rtol=torch.finfo(half).eps if rounds else 1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["fast", "slow"])
def test_gradcheck(fp64: Backend, scheme: str) -> None:
    inputs = make_inputs("tt_linear", tokens=3, d_in=4, d_out=5, r1=2, dtype=torch.float64)
    leaves = [inputs[k].requires_grad_() for k in LEAVES]
    with use_backend(fp64):
        assert torch.autograd.gradcheck(tt_linear, leaves, fast_mode=scheme == "fast")


@pytest.mark.parametrize("need", [("x",), ("D",), ("G",), ("D", "G"), ("x", "G"), ADAPTED], ids="".join)
def test_only_what_is_asked_for_is_computed_and_saved(
    backend: Backend, device: str, exact: torch.dtype, own: bool, record: Callable[[], Any], need: tuple[str, ...]
) -> None:
    """The shapes identify the tensors: h and dh [11, 5], x and dx [11, 24], W [40, 24], D [24, 5], G [5, 40]."""
    inputs = make_inputs("tt_linear", tokens=11, dtype=exact, device=device)
    leaves = {k: inputs[k].requires_grad_(k in need) for k in LEAVES}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = tt_linear(**leaves)
    given = {leaf.data_ptr(): name for name, leaf in leaves.items()}
    kept = {given[t.data_ptr()] for t in saved if t.data_ptr() in given}
    assert ("x" in kept) == ("D" in need)
    assert ("W" in kept) == ("x" in need)
    new = [tuple(sorted(t.shape)) for t in saved if t.data_ptr() not in given]
    assert new == [(5, 11)] * ("G" in need), "of the new tensors, only h is saved, and only for dG"

    with record() as seen:
        y.backward(torch.ones_like(y))
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in need), name
    products = sorted(tuple(sorted(shape)) for shape in seen.products)
    expected = [(5, 11)] * ("x" in need or "D" in need) + [(11, 24)] * 2 * ("x" in need)
    expected += [(5, 24)] * ("D" in need) + [(5, 40)] * ("G" in need)
    if backend is Backend.REFERENCE:  # autograd guarantees neither an order of products nor their fusion
        assert set(products) == set(expected)
    else:
        assert products == ([] if own else sorted(expected))


def test_nothing_is_saved_without_gradients(backend: Backend) -> None:
    inputs = make_inputs("tt_linear")
    saved: list[Tensor] = []
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = tt_linear(**inputs)
    assert not saved
    assert not y.requires_grad


def test_no_dense_delta_is_ever_built(
    backend: Backend, device: str, exact: torch.dtype, record: Callable[[], Any]
) -> None:
    """With fewer tokens than features, every new tensor is smaller than a weight."""
    inputs = make_inputs("tt_linear", tokens=11, dtype=exact, device=device)
    with use_backend(backend), record() as seen:
        run(tt_linear, inputs, upstream(inputs))
    assert seen.allocated
    assert max(torch.Size(shape).numel() for shape in seen.allocated) < 24 * 40
    assert bool(seen.registered) == (backend is not Backend.REFERENCE), (
        "forward and backward are one registered op each, or plain torch"
    )
    assert len(seen.registered) in (0, 2)


@pytest.mark.parametrize("frozen", [(), ("D",), ("G",), ("x",), ("W", "b"), ("D", "W", "b"), ("x", "D")], ids=str)
def test_gradients_of_gradients(fp64: Backend, frozen: tuple[str, ...]) -> None:
    """Second derivatives are correct for any choice of frozen arguments, although the op then saves fewer tensors."""
    inputs = make_inputs("tt_linear", tokens=2, d_in=3, d_out=4, r1=2, dtype=torch.float64)
    names = [k for k in LEAVES if k not in frozen]

    def function(*values: Tensor) -> Tensor:
        return tt_linear(**inputs | dict(zip(names, values, strict=True)), backend=fp64).sin()

    assert torch.autograd.gradgradcheck(function, [inputs[k].requires_grad_() for k in names])


def repeated(layer: Callable[..., Tensor], inputs: dict[str, Any], names: list[str], times: int) -> tuple[Tensor, ...]:
    """Return higher derivatives of two layers in sequence that share their factors.

    The function replaces the loss ``times`` times by the sum of the squares of its gradients, and returns the gradients
    of the last loss.
    """
    leaves = [inputs[k].requires_grad_() for k in names]
    value = layer(**inputs | {"x": layer(**inputs).tanh()}).sin().sum()
    for _ in range(times):
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        value = torch.stack([grad.to(inputs["G"].dtype).square().sum() for grad in grads]).sum()
    return torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("frozen", [(), ("D",)], ids=str)
@pytest.mark.parametrize(("half", "times"), [(False, 1), (False, 2), (True, 1)])
def test_higher_derivatives(
    backend: Backend, device: str, exact: torch.dtype, frozen: tuple[str, ...], half: bool, times: int
) -> None:
    dtypes = {"dtype": torch.bfloat16, "factor_dtype": torch.float32} if half else {"dtype": exact}
    inputs = make_inputs("tt_linear", tokens=5, d_in=24, d_out=24, **dtypes, device=device)
    names = [k for k in ADAPTED if k not in frozen]
    tolerance = 0.05 if half else 1e-10 if exact == torch.float64 else 1e-4
    with use_backend(backend):
        got = repeated(tt_linear, inputs, names, times)
    for name, value, formula in zip(names, got, repeated(unfused, wide(inputs), names, times), strict=True):
        assert value.dtype == inputs[name].dtype
        assert (value.double() - formula).norm() < tolerance * formula.norm()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_like_linear_and_keeps_factor_gradients_wide(
    backend: Backend, device: str, half: torch.dtype
) -> None:
    inputs = make_inputs("tt_linear", tokens=61, device=device)

    def autocast(**leaves: Any) -> Tensor:
        with torch.autocast(device, half):
            return tt_linear(**leaves, backend=backend)

    def cast(x: Tensor, W: Tensor, b: Tensor, **factors: Tensor) -> Tensor:
        return unfused(x.to(half), W.to(half), b.to(half), **factors)

    gy = upstream(inputs).to(half)
    got, peer, exact = run(autocast, inputs, gy), run(cast, inputs, gy), dense(inputs, gy)
    with torch.autocast(device, half):
        assert got["y"].dtype == F.linear(inputs["x"], inputs["W"]).dtype
    assert {got[name].dtype for name in ADAPTED} == {torch.float32}
    for name, value in got.items():
        assert_close_budget(value, exact[name], peer[name], name=name)


def test_backward_under_autocast(kernels: Backend) -> None:
    inputs = make_inputs("tt_linear", tokens=61)
    gy = upstream(inputs)
    with use_backend(kernels):
        expected = run(tt_linear, inputs, gy)
        leaves = {k: v.detach().requires_grad_(k in ADAPTED) for k, v in inputs.items()}
        y = tt_linear(**leaves)
        with torch.autocast("cpu", torch.bfloat16):
            grads = torch.autograd.grad(y, [leaves[k] for k in ADAPTED], gy)
    for name, grad in zip(ADAPTED, grads, strict=True):
        assert torch.equal(grad, expected[name]), name


def test_autocast_leaves_fp64_alone(fp64: Backend) -> None:
    inputs = make_inputs("tt_linear", dtype=torch.float64)
    plain = tt_linear(**inputs, backend=fp64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tt_linear(**inputs, backend=fp64), plain)


def test_meta_tensors_give_shapes(backend: Backend) -> None:
    inputs = {k: v.to("meta") for k, v in make_inputs("tt_linear", tokens=6).items()}
    y = tt_linear(**{**inputs, "x": inputs["x"].view(2, 3, 24).requires_grad_()}, backend=backend)
    assert y.shape == (2, 3, 40)
    assert y.is_meta
    y.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(29, 23)}, r"x must be \[\.\.\., d_in=24\], got shape \[29, 23\]"),
        ({"x": torch.ones(())}, r"x must be \[\.\.\., d_in=24\], got shape \[\]"),
        ({"W": torch.ones(24)}, r"W must be \[d_out, d_in\], got shape \[24\]"),
        ({"W": torch.ones(40, 25)}, r"D must be \[d_in, r1\] = \[25, 5\], got shape \[24, 5\]"),
        ({"b": torch.ones(39)}, r"b must be \[d_out\] = \[40\], got shape \[39\]"),
        ({"b": torch.ones(1, 40)}, r"b must be \[d_out\] = \[40\], got shape \[1, 40\]"),
        ({"D": torch.ones(24)}, r"D must be \[d_in, r1\], got shape \[24\]"),
        ({"D": torch.ones(5, 24)}, r"D must be \[d_in, r1\] = \[24, 24\], got shape \[5, 24\]"),
        ({"D": torch.ones(24, 6)}, r"G must be \[r1, d_out\] = \[6, 40\], got shape \[5, 40\]"),
        ({"G": torch.ones(40, 5)}, r"G must be \[r1, d_out\] = \[5, 40\], got shape \[40, 5\]"),
        ({"W": torch.ones(40, 24).double()}, "dtype of x, got x torch.float32, W torch.float64, .* use torch.autocast"),
        ({"b": torch.ones(40).bfloat16()}, r"got x torch.float32, W torch.float32, b torch.bfloat16; cast one"),
    ],
)
def test_wrong_arguments(backend: Backend, changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match="^tt_linear: .*" + message):
        tt_linear(**{**make_inputs("tt_linear"), **changed}, backend=backend)


@pytest.mark.parametrize("name", LEAVES)
def test_tensors_of_another_device_or_kind(backend: Backend, name: str) -> None:
    inputs = make_inputs("tt_linear")
    with pytest.raises(RuntimeError, match=r"one device, got (cpu and meta|meta and cpu)"):
        tt_linear(**{**inputs, name: inputs[name].to("meta")}, backend=backend)
    changed = {k: inputs[k].long() for k in ("x", "W", "b")} if name in "xWb" else {name: inputs[name].long()}
    with pytest.raises(RuntimeError, match=f"'{backend.value}' was requested but cannot run: .* got torch.int64"):
        tt_linear(**{**inputs, **changed}, backend=backend)


@pytest.mark.parametrize("need", ["", "x", "D", "G", "b", "xD", "xDG", "Gb", "xDGb"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered_ops_are_well_behaved(kernels: Backend, layout: str, need: str) -> None:
    """torch's opcheck tests the schema, autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    narrow = torch.bfloat16 if need.startswith("xDG") else torch.float32
    inputs = make_inputs("tt_linear", tokens=4, d_in=6, d_out=8, r1=3, dtype=narrow, factor_dtype=torch.float32)
    x, W, b, D, G = (with_layout(inputs[k], layout) for k in LEAVES)
    gy, h = (with_layout(torch.randn(4, n, dtype=narrow), layout) for n in (8, 3))
    forward = getattr(torch.ops.efft.tt_linear_fwd, kernels.value)
    backward = getattr(torch.ops.efft.tt_linear_bwd, kernels.value)
    if need == "":
        torch.library.opcheck(forward, (x, W, b, D, G))
        torch.library.opcheck(forward, (x[:0], W, None, D, G))
    needs = [name in need for name in "xDGb"]
    kept = (x if needs[1] else None, W if needs[0] else None, h if needs[2] else None)
    torch.library.opcheck(backward, (gy, *kept, D, G, *needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(backend: Backend, exact: torch.dtype, dynamic: bool) -> None:
    compiled = torch.compile(tt_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (4, 9) if dynamic else (4,):
        inputs = make_inputs("tt_linear", tokens=tokens, dtype=exact)
        gy = upstream(inputs)
        with use_backend(backend):
            got, expected = (run(op, inputs, gy, (*ADAPTED, "b")) for op in (compiled, tt_linear))
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3), (0, 3), (2, 0)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_any_leading_dimensions_and_strides(
    backend: Backend, device: str, leading: tuple[int, ...], layout: str
) -> None:
    """The operators view activations as matrices. The results equal those of a call with a matrix."""
    inputs = {name: t.to(device) for name, t in make_inputs("tt_linear", tokens=6, d_in=8, d_out=4, r1=3).items()}
    if layout == "sliced":
        x = torch.randn(*leading, 8 + 3)[..., 2:-1]
    elif layout == "transposed":
        x = torch.randn(*reversed(leading), 8)
        x = x.permute(*reversed(range(len(leading))), len(leading))
    elif layout == "expanded":
        x = torch.randn(8).expand(*leading, -1)
    else:
        x = torch.randn(*leading, 8)
    D, G = (inputs[name].requires_grad_() for name in ("D", "G"))
    results = []
    x = x.to(device)
    for rows in (False, True):
        leaf = x.reshape(-1, 8) if rows else x
        leaf = leaf.detach().requires_grad_()
        y = tt_linear(leaf, inputs["W"], inputs["b"], D, G, backend=backend)
        gy = torch.ones((), device=device).expand_as(y)  # all strides are zero
        results.append([y, *torch.autograd.grad(y, (leaf, D, G), gy)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.reshape(expected.shape), expected)
    assert results[0][0].shape == (*leading, 4)
    assert results[0][1].shape == x.shape
