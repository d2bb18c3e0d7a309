"""Compare tt_linear_grouped with one dense matrix per sample in fp64.

The argument ``adapter`` holds the index of each sample's adapter (its factors D and G). A negative index selects none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efft_kernels import Backend, tt_linear, tt_linear_grouped
from efft_kernels.testing import LAYOUTS, assert_close_budget, make_inputs, poisoned_empty, with_layout


def dense(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, adapter: Tensor) -> Tensor:
    x, W, D, G = (t.double() for t in (x, W, D, G))
    matrices = [W.t() + D[a] @ G[a] if a >= 0 else W.t() for a in adapter.tolist()]
    y = torch.stack([sample @ matrix for sample, matrix in zip(x, matrices, strict=True)])
    if b is not None and b.dim() == 2:
        return y + torch.stack([b[a] if a >= 0 else torch.zeros_like(b[0]) for a in adapter.tolist()])[:, None].double()
    return y if b is None else y + b.double()


@pytest.mark.parametrize(
    "sizes", [(29, 24, 40, 5), (1, 33, 17, 1), (70, 100, 130, 33), (197, 16, 16, 128), (64, 64, 64, 16)]
)
def test_output(
    backend: Backend,
    device: str,
    low: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
    sizes: tuple[int, ...],
) -> None:
    tokens, d_in, d_out, r1 = sizes
    options: dict[str, Any] = {"tokens": tokens, "d_in": d_in, "d_out": d_out, "r1": r1, "dtype": low}
    inputs = make_inputs("tt_linear_grouped", **options, factor_dtype=torch.float32, device=device)
    inputs["adapter"] = torch.tensor([2, -1, 0, 2, 1], device=device)
    with poisoned_empty():
        got = tt_linear_grouped(**inputs, backend=backend)
    one_by_one = [
        product(x, inputs["W"].t())
        + inputs["b"]
        + (0 if a < 0 else product(product(x, inputs["D"][a].to(low)), inputs["G"][a].to(low)))
        for x, a in zip(inputs["x"], inputs["adapter"].tolist(), strict=True)
    ]
    assert_close_budget(got, dense(**inputs), torch.stack(one_by_one))


def test_same_adapter_everywhere(backend: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.ones(5, dtype=torch.int64, device=device)
    single = {**inputs, "D": inputs["D"][1], "G": inputs["G"][1]}
    del single["adapter"]
    expected = tt_linear(**single, backend=backend)
    torch.testing.assert_close(tt_linear_grouped(**inputs, backend=backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend: Backend, device: str, layout: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    for name in ("x", "W", "b", "D", "G"):
        inputs[name] = with_layout(inputs[name], layout)
    inputs["adapter"] = torch.tensor([2, 9, 0, 9, -1, 9, 0, 9, 1], device=device)[::2]
    torch.testing.assert_close(
        tt_linear_grouped(**inputs, backend=backend).double(), dense(**inputs), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("samples", "tokens"), [(0, 7), (3, 0)])
def test_nothing(backend: Backend, device: str, samples: int, tokens: int) -> None:
    inputs = make_inputs("tt_linear_grouped", samples=samples, tokens=tokens, device=device)
    assert tt_linear_grouped(**inputs, backend=backend).shape == (samples, tokens, 40)


def test_only_factors_in_use_are_read(backend: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([2, -1, 2, 2, -1], device=device)
    inputs["D"][:2] = inputs["G"][:2] = float("nan")
    assert tt_linear_grouped(**inputs, backend=backend).isfinite().all()


@pytest.mark.parametrize("factor", ["D", "G"])
def test_one_factor_that_is_not_finite_stays_with_its_adapter(backend: Backend, device: str, factor: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([0, -1, 2, -7, 1], device=device)
    expected = dense(**inputs)
    inputs[factor][0] = float("inf")
    y = tt_linear_grouped(**inputs, backend=backend).double()
    torch.testing.assert_close(y[1:], expected[1:], rtol=1e-5, atol=1e-4)
    assert not y[0].isfinite().any()


def test_autocast(backend: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["D"].requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = tt_linear_grouped(**inputs, backend=backend)
    assert y.dtype == torch.bfloat16
    (dD,) = torch.autograd.grad(y.sum(), inputs["D"])
    assert dD.dtype == torch.float32
    with torch.no_grad():
        assert not tt_linear_grouped(**inputs, backend=backend).requires_grad


@pytest.mark.parametrize(
    "need", [("x", "W", "b", "D", "G"), ("x",), ("D",), ("G",), ("W",), ("x", "G"), ("b",)], ids=str
)
def test_gradients(
    backend: Backend, device: str, exact: torch.dtype, assert_exact: Callable[..., None], need: tuple[str, ...]
) -> None:
    inputs = make_inputs("tt_linear_grouped", dtype=exact, device=device)
    inputs["adapter"] = torch.tensor([2, -1, 0, 2, -3], device=device)
    wide = {k: v.double().requires_grad_(k in need) if v.is_floating_point() else v for k, v in inputs.items()}
    narrow = {k: v.requires_grad_(k in need) if v.is_floating_point() else v for k, v in inputs.items()}
    y, formula = tt_linear_grouped(**narrow, backend=backend), dense(**wide)
    gy = torch.randn(formula.shape, dtype=exact, device=device)
    got = torch.autograd.grad(y, [narrow[k] for k in need], gy)
    expected = torch.autograd.grad(formula, [wide[k] for k in need], gy.double())
    for name, value, right in zip(need, got, expected, strict=True):
        assert_exact(value, right, name)


def one_by_one(
    product: Callable[[Tensor, Tensor], Tensor], gy: Tensor, x: Tensor, W: Tensor, D: Tensor, G: Tensor, adapter: Tensor
) -> dict[str, Tensor]:
    """Return the gradients by plain products of one sample after the other, in the precision of ``gy``."""
    n = len(D)
    D, G = D.to(gy.dtype), G.to(gy.dtype)
    dx, dD, dG, db = [], torch.zeros(D.shape), torch.zeros(G.shape), torch.zeros(n, G.shape[2])
    dD, dG, db = (t.to(gy.device) for t in (dD, dG, db))
    for i, a in enumerate(adapter.tolist()):
        dx.append(product(gy[i], W))
        if a < 0:
            continue
        h, dh = product(x[i], D[a]), product(gy[i], G[a].t())
        dx[-1] = dx[-1] + product(dh, D[a].t())
        dD[a] += product(x[i].t(), dh)
        dG[a] += product(h.t(), gy[i])
        db[a] += gy[i].sum(0)
    return {"x": torch.stack(dx), "D": dD, "G": dG, "b": db}


@pytest.mark.parametrize(
    ("sizes", "adapter"),
    [
        ((29, 24, 40, 5), [2, -1, 0, 2, 0]),
        ((1, 33, 17, 1), [0, 0, 0, 0]),
        ((70, 100, 130, 33), [1, 1, 0, 0, 3]),
        ((197, 16, 16, 128), [0]),
        ((64, 64, 64, 16), [-1, -4, -1]),
    ],
    ids=str,
)
def test_gradients_within_the_error_budget(
    backend: Backend,
    device: str,
    low: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
    sizes: tuple[int, ...],
    adapter: list[int],
) -> None:
    """The gradients of adapters without samples are zero."""
    tokens, d_in, d_out, r1 = sizes
    options: dict[str, Any] = {"tokens": tokens, "d_in": d_in, "d_out": d_out, "r1": r1, "dtype": low}
    options |= {"samples": len(adapter), "n_adapters": 4, "factor_dtype": torch.float32, "device": device}
    inputs = make_inputs("tt_linear_grouped", **options)
    inputs["adapter"] = torch.tensor(adapter, device=device)
    inputs["b"] = torch.randn(4, d_out).to(device, low)
    names = ("x", "D", "G", "b")
    for name in names:
        inputs[name].requires_grad_()
    gy = torch.randn(len(adapter), tokens, d_out).to(device, low)
    with poisoned_empty():
        y = tt_linear_grouped(**inputs, backend=backend)
        got = dict(zip(names, torch.autograd.grad(y, [inputs[n] for n in names], gy), strict=True))
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
    formula = dense(**{k: v.requires_grad_(k in names) for k, v in wide.items()})
    leaves = [wide[n] for n in names]
    exact_grads = torch.autograd.grad(formula, leaves, gy.double(), materialize_grads=True, allow_unused=True)
    exact = dict(zip(names, exact_grads, strict=True))
    detached = {k: v.detach() for k, v in inputs.items() if k != "b"}
    peers = one_by_one(product, gy, **detached)
    for name in names:
        assert_close_budget(got[name], exact[name], peers[name].to(got[name].dtype), name=name)
        if name != "x":
            unused = [i for i in range(4) if i not in adapter]
            assert not got[name][unused].any(), name


def test_gradient_of_x_where_the_base_cancels(
    backend: Backend, device: str, low: torch.dtype, product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    inputs = make_inputs("tt_linear", base_cancels=True, update=1e-3, dtype=low, factor_dtype=torch.float32)
    inputs = {k: v if v is None else v.to(device) for k, v in inputs.items()}
    D, G = (torch.stack([inputs[k], -inputs[k] / 2]) for k in ("D", "G"))
    x = inputs["x"].expand(3, *inputs["x"].shape).contiguous().requires_grad_()
    adapter = torch.tensor([1, 0, 1], device=device)
    y = tt_linear_grouped(x, inputs["W"], None, D, G, adapter, backend=backend)
    half = torch.randn(29, 20).to(device, low)
    gy = torch.cat([half, -half], 1).expand(3, 29, 40)
    (dx,) = torch.autograd.grad(y, x, gy)
    exact = torch.stack([gy[i].double() @ (D[a].double() @ G[a].double()).t() for i, a in enumerate([1, 0, 1])])
    peer = one_by_one(product, gy, x.detach(), inputs["W"], D, G, adapter)["x"]
    assert_close_budget(dx, exact, peer, name="update of dx")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_with_any_strides(
    backend: Backend, device: str, exact: torch.dtype, assert_exact: Callable[..., None], layout: str
) -> None:
    inputs = make_inputs("tt_linear_grouped", dtype=exact, device=device)
    names = ("x", "W", "b", "D", "G")
    for name in names:
        inputs[name] = with_layout(inputs[name], layout).requires_grad_()
    inputs["adapter"] = torch.tensor([2, 9, 0, 9, -1, 9, 0, 9, 1], device=device)[::2]
    wide = {k: v.detach().double().requires_grad_() if k in names else v for k, v in inputs.items()}
    y, formula = tt_linear_grouped(**inputs, backend=backend), dense(**wide)
    gy = with_layout(torch.randn(formula.shape, dtype=exact, device=device), layout)
    got = torch.autograd.grad(y, [inputs[k] for k in names], gy)
    expected = torch.autograd.grad(formula, [wide[k] for k in names], gy.double())
    for name, value, right in zip(names, got, expected, strict=True):
        assert_exact(value, right, name)


@pytest.mark.parametrize(("samples", "tokens"), [(0, 7), (3, 0)])
def test_gradients_of_nothing(backend: Backend, device: str, samples: int, tokens: int) -> None:
    inputs = make_inputs("tt_linear_grouped", samples=samples, tokens=tokens, device=device)
    names = ("x", "b", "D", "G")
    with poisoned_empty():
        y = tt_linear_grouped(**{k: v.requires_grad_(k in names) for k, v in inputs.items()}, backend=backend)
        got = torch.autograd.grad(y, [inputs[n] for n in names], torch.ones_like(y))
    for name, value in zip(names, got, strict=True):
        assert value.shape == inputs[name].shape, name
        assert not value.any(), name


def test_gradients_that_are_not_finite_stay_with_their_adapter(backend: Backend, device: str) -> None:
    """A sample changes only the gradients of its own adapter, even if its values are not finite."""
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([0, -1, 2, 0, 1], device=device)
    inputs["x"][1] = float("nan")
    inputs["x"][4] = float("inf")
    inputs["b"] = torch.zeros(3, 40, device=device)
    names = ("b", "D", "G")
    y = tt_linear_grouped(**{k: v.requires_grad_(k in names) for k, v in inputs.items()}, backend=backend)
    gy = torch.ones_like(y)
    gy[1] = float("nan")
    for name, value in zip(names, torch.autograd.grad(y, [inputs[n] for n in names], gy), strict=True):
        assert value[[0, 2]].isfinite().all(), name


@pytest.mark.parametrize("adapter", [[2, -1, 0, 2, 1], [0, 0, 0, 0, 0]], ids=str)
def test_a_bias_per_adapter(
    backend: Backend, device: str, exact: torch.dtype, assert_exact: Callable[..., None], adapter: list[int]
) -> None:
    inputs = make_inputs("tt_linear_grouped", dtype=exact, device=device)
    inputs["adapter"] = torch.tensor(adapter, device=device)
    inputs["b"] = torch.randn(3, 40, dtype=exact, device=device)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert_exact(tt_linear_grouped(**inputs, backend=backend), dense(**wide), "without gradients")
    inputs["b"].requires_grad_()
    wide["b"].requires_grad_()
    y, formula = tt_linear_grouped(**inputs, backend=backend), dense(**wide)
    assert_exact(y, formula.detach(), "y")
    gy = torch.randn(formula.shape, dtype=exact, device=device)
    (db,), (expected,) = torch.autograd.grad(y, inputs["b"], gy), torch.autograd.grad(formula, wide["b"], gy.double())
    assert_exact(db, expected, "db")


@pytest.mark.parametrize("own", [False, True], ids=["shared bias", "own biases"])
def test_a_wide_bias_under_autocast(backend: Backend, device: str, own: bool) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["b"] = (torch.randn(3, 40) if own else inputs["b"]).to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = tt_linear_grouped(**inputs, backend=backend)
    assert y.dtype == torch.bfloat16
    (db,) = torch.autograd.grad(y.sum(), inputs["b"])
    counts = torch.bincount(inputs["adapter"].clamp(-1) + 1, minlength=4)
    expected = 29.0 * (counts[1:, None].expand(3, 40) if own else counts.sum().expand(40))
    torch.testing.assert_close(db, expected.float(), rtol=0, atol=0)


def test_the_cpu_computes_each_adapter_as_alone(kernels: Backend, device: str) -> None:
    """The results for an adapter whose samples are consecutive are exactly those of tt_linear."""
    if kernels is not Backend.CPU:
        pytest.skip("only the cpu backend guarantees exact equality with tt_linear")
    for dtype in (torch.float32, torch.bfloat16):
        options: dict[str, Any] = {"tokens": 37, "d_in": 100, "d_out": 130, "r1": 9, "samples": 7, "n_adapters": 4}
        inputs = make_inputs("tt_linear_grouped", **options, dtype=dtype, factor_dtype=torch.float32)
        inputs["adapter"] = torch.tensor([2, 2, 2, 0, 0, 3, -1])
        inputs["b"] = torch.randn(4, 130)
        gy = torch.randn(7, 37, 130).to(dtype)
        names = ("x", "D", "G", "b")
        together = {k: v.clone().requires_grad_(k in names) if k != "adapter" else v for k, v in inputs.items()}
        y = tt_linear_grouped(**together, backend=kernels)
        got = dict(zip(names, torch.autograd.grad(y, [together[n] for n in names], gy), strict=True))
        for a, rows in ((2, slice(0, 3)), (0, slice(3, 5)), (3, slice(5, 6))):
            alone = {k: inputs[k][rows if k == "x" else a].clone().requires_grad_() for k in names}
            y_alone = tt_linear(alone["x"], inputs["W"], alone["b"], alone["D"], alone["G"], backend=kernels)
            assert torch.equal(y[rows], y_alone)
            expected = torch.autograd.grad(y_alone, [alone[n] for n in names], gy[rows])
            for name, value in zip(names, expected, strict=True):
                assert torch.equal(got[name][rows if name == "x" else a], value), name


def test_the_order_of_samples_does_not_matter(backend: Backend, device: str, exact: torch.dtype) -> None:
    """If the samples are reordered, the gradients of the factors stay equal, and all other results are reordered."""
    inputs = make_inputs("tt_linear_grouped", dtype=exact, samples=8, device=device)
    order = torch.tensor([3, 0, 7, 5, 1, 6, 2, 4])
    adapter = torch.tensor([-1, 0, 0, 1, 1, 1, 2, 2])
    gy = torch.randn(8, 29, 40, dtype=exact, device=device)

    def run(at: Tensor) -> tuple[Tensor, ...]:
        names = ("x", "D", "G")
        mine = {**inputs, "x": inputs["x"][at], "adapter": adapter[at].to(device)}
        leaves = [mine[n].detach().requires_grad_() for n in names]
        mine |= dict(zip(names, leaves, strict=True))
        y = tt_linear_grouped(**mine, backend=backend)
        return y.detach(), *torch.autograd.grad(y, leaves, gy[at])

    y, dx, dD, dG = run(torch.arange(8))
    y_moved, dx_moved, dD_moved, dG_moved = run(order)
    tolerance: dict[str, float] = {"rtol": 0, "atol": 1e-4 if exact == torch.float32 else 1e-12}
    torch.testing.assert_close(y_moved, y[order], **tolerance)
    torch.testing.assert_close(dx_moved, dx[order], **tolerance)
    torch.testing.assert_close(dD_moved, dD, **tolerance)
    torch.testing.assert_close(dG_moved, dG, **tolerance)


def test_gradients_of_gradients(fp64: Backend) -> None:
    sizes: dict[str, Any] = {"tokens": 2, "d_in": 3, "d_out": 2, "r1": 2, "samples": 3, "n_adapters": 2}
    inputs = make_inputs("tt_linear_grouped", **sizes, dtype=torch.float64)
    inputs["adapter"] = torch.tensor([1, -1, 1])
    names = ("x", "W", "b", "D", "G")
    leaves = [inputs[k].requires_grad_() for k in names]

    def function(*values: Tensor) -> Tensor:
        return tt_linear_grouped(*values, inputs["adapter"], backend=fp64).sin()

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    leaves[2] = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)  # a bias per adapter
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_an_adapter_that_does_not_exist(kernels: Backend, device: str) -> None:
    """The registered ops return NaN or fail for a wrong index; they never use the factors of another adapter.

    Only the public function checks the indices, because a check waits for the GPU.
    """
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([0, 3, -1, 2, 10**12], device=device)
    op = getattr(torch.ops.efft.tt_linear_grouped, kernels.value)
    if kernels is Backend.CPU:
        with pytest.raises(RuntimeError, match="there are 3 adapters"):
            op(*inputs.values())
        return
    y = op(*inputs.values())
    assert y[[1, 4]].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_gradients_with_an_adapter_that_does_not_exist(kernels: Backend, device: str) -> None:
    """A wrong index results in NaN for its own sample, or in an error. It must not change any adapter's gradient."""
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["adapter"] = torch.tensor([0, 3, -1, 2, 10**12], device=device)
    gy, h = torch.ones(5, 29, 40, device=device), torch.ones(5, 29, 5, device=device)
    arguments = (gy, inputs["x"], inputs["W"], h, inputs["D"], inputs["G"], inputs["adapter"], *[True] * 4)
    op = getattr(torch.ops.efft.tt_linear_grouped_bwd, kernels.value)
    if kernels is Backend.CPU:
        with pytest.raises(RuntimeError, match="there are 3 adapters"):
            op(*arguments)
        return
    dx, *sums = op(*arguments)
    assert dx[[1, 4]].isnan().all()
    assert dx[[0, 2, 3]].isfinite().all()
    for total in sums:
        assert total.isfinite().all()
        assert not total[1].any()


@pytest.mark.parametrize("needs", [(True,) * 4, (False, True, False, True), (True, False, True, False)], ids=str)
def test_registered_ops_for_training(kernels: Backend, device: str, needs: tuple[bool, ...]) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    forward, backward = (
        getattr(op, kernels.value)
        for op in (torch.ops.efft.tt_linear_grouped_fwd, torch.ops.efft.tt_linear_grouped_bwd)
    )
    torch.library.opcheck(forward, tuple(inputs.values()))
    y, h = forward(*inputs.values())
    x, W, D, G, adapter = (inputs[name] for name in ("x", "W", "D", "G", "adapter"))
    torch.library.opcheck(backward, (torch.ones_like(y), x, W, h, D, G, adapter, *needs))


def test_training_compiled_without_graph_break(kernels: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    inputs["b"] = torch.randn(3, 40, device=device)
    names = ("x", "b", "D", "G")
    for name in names:
        inputs[name].requires_grad_()
    compiled = torch.compile(tt_linear_grouped, fullgraph=True, backend="aot_eager")
    got, expected = (
        torch.autograd.grad(f(**inputs, backend=kernels).square().sum(), [inputs[n] for n in names])
        for f in (compiled, tt_linear_grouped)
    )
    torch.testing.assert_close(got, expected)


def test_registered_op(kernels: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    torch.library.opcheck(getattr(torch.ops.efft.tt_linear_grouped, kernels.value), tuple(inputs.values()))


def test_compiled_without_graph_break(kernels: Backend, device: str) -> None:
    inputs = make_inputs("tt_linear_grouped", device=device)
    compiled = torch.compile(tt_linear_grouped, fullgraph=True, backend="aot_eager")
    for adapter in ([2, -1, 0, 2, 1], [0, 0, 1, -1, -1]):
        inputs["adapter"] = torch.tensor(adapter, device=device)
        expected = tt_linear_grouped(**inputs, backend=kernels)
        torch.testing.assert_close(compiled(**inputs, backend=kernels), expected)
    if device == "cpu":
        inputs["adapter"][0] = 3
        with pytest.raises(RuntimeError, match="an index in adapter is too large"):
            compiled(**inputs, backend=kernels)


def test_wrong_calls(backend: Backend) -> None:
    inputs = make_inputs("tt_linear_grouped")
    for changes, message in (
        ({"x": inputs["x"][0]}, r"expected x \[samples, tokens, d_in\]"),
        ({"D": inputs["D"][1:]}, r"got shapes .* \[2, 24, 5\] and \[3, 5, 40\]"),
        ({"D": inputs["D"][:0], "G": inputs["G"][:0]}, "n_adapters >= 1"),
        ({"adapter": inputs["adapter"][1:]}, r"adapter must be \[samples\] = \[5\], got shape \[4\]"),
        ({"adapter": inputs["adapter"].int()}, "adapter must be int64, got torch.int32"),
        ({"adapter": torch.full((5,), 3)}, "there are 3 adapters, got index 3"),
        ({"b": torch.zeros(2, 40)}, r"b must be \[n_adapters, d_out\] = \[3, 40\], got shape \[2, 40\]"),
        ({"W": inputs["W"].double()}, "W and b must have the dtype of x"),
    ):
        with pytest.raises(ValueError, match=message):
            tt_linear_grouped(**{**inputs, **changes}, backend=backend)
