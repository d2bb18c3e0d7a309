"""Compare tt_mlp with formulas in fp64, which multiply by the dense sums of weights and updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efft_kernels import Backend, tt_mlp, use_backend
from efft_kernels.testing import LAYOUTS, assert_close_budget, make_inputs, poisoned_empty, with_layout

Inputs = dict[str, Any]
FACTORS = ("D1", "G1", "D2", "G2")
TRAINED = ("x", "gamma", "beta", "b1", "D1", "G1", "b2", "D2", "G2")
#: The operations before and between the layers: a norm with parameters, one without, or none, and the two GELUs.
CASES = {
    "norm": {"approximate": "none"},
    "plain norm, tanh": {"gamma": None, "beta": None, "approximate": "tanh"},
    "no norm": {"gamma": None, "beta": None, "eps": None, "approximate": "none"},
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Inputs:
    return CASES[request.param]


def inputs_of(case: Inputs, **options: Any) -> Inputs:
    return {**make_inputs("tt_mlp", **options), **case}


def present(inputs: Inputs, names: tuple[str, ...] = TRAINED) -> tuple[str, ...]:
    return tuple(name for name in names if inputs[name] is not None)


def formula(inputs: Inputs, layer: Callable[..., Tensor]) -> Tensor:
    """Compute the MLP with torch's norm and GELU, where ``layer`` computes one linear layer."""
    n = inputs["x"]
    if inputs["eps"] is not None:
        n = F.layer_norm(n, n.shape[-1:], inputs["gamma"], inputs["beta"], inputs["eps"])
    z = layer(n, *(inputs[f"{name}1"] for name in "WbDG"))
    a = F.gelu(z, approximate=inputs["approximate"])
    return layer(a, *(inputs[f"{name}2"] for name in "WbDG"))


def dense_layer(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
    return x @ (W.t() + D @ G) + (0 if b is None else b)


def plain_layer(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
    """Compute one product after the other in the precision of ``x``."""
    return F.linear(x, W, b) + (x @ D.to(x.dtype)) @ G.to(x.dtype)


def with_gradients(op: Callable[..., Tensor], need: tuple[str, ...], inputs: Inputs, gy: Tensor) -> Inputs:
    leaves = {
        key: value.detach().requires_grad_(key in need) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }
    y = op(**leaves)
    return {"y": y, **dict(zip(need, torch.autograd.grad(y, [leaves[key] for key in need], gy), strict=True))}


def unfused(**inputs: Any) -> Tensor:
    return formula(inputs, plain_layer)


def dense(need: tuple[str, ...], inputs: Inputs, gy: Tensor) -> Inputs:
    """Return y and the gradients in fp64."""
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return with_gradients(lambda **leaves: formula(leaves, dense_layer), need, wide, gy.double())


def upstream(inputs: Inputs) -> Tensor:
    shape = (*inputs["x"].shape[:-1], inputs["W2"].shape[0])
    generator = torch.Generator().manual_seed(1)  # the same numbers in every example of a test
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs["W2"].device, inputs["W2"].dtype)


def test_output_and_gradients(backend: Backend, device: str, low: torch.dtype, case: Inputs) -> None:
    inputs = inputs_of(case, tokens=61, r1=17, dtype=low, factor_dtype=torch.float32, device=device)
    need, gy = present(inputs), upstream(inputs)
    with use_backend(backend):
        got = with_gradients(tt_mlp, need, inputs, gy)
    exact, peer = dense(need, inputs, gy), with_gradients(unfused, need, inputs, gy)
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


def test_updates_alone(backend: Backend, device: str, low: torch.dtype, case: Inputs) -> None:
    """Without base weights and biases, y is the effect of the updates. Small updates must not be lost."""
    inputs = inputs_of(case, update=1e-2, dtype=low, factor_dtype=torch.float32, device=device)
    inputs |= {name: torch.zeros_like(inputs[name]) for name in ("W1", "W2")} | {"b1": None, "b2": None}
    need, gy = present(inputs, ("x", *FACTORS)), upstream(inputs)
    with use_backend(backend):
        got = with_gradients(tt_mlp, need, inputs, gy)
    exact, peer = dense(need, inputs, gy), with_gradients(unfused, need, inputs, gy)
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


@given(
    lead=st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 0, 3)]),
    sizes=st.tuples(st.integers(2, 33), st.integers(1, 60), st.integers(1, 33)),
    rank=st.one_of(st.integers(1, 9), st.integers(10, 128)),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    absent=st.sets(st.sampled_from(["b1", "b2", "gamma", "beta"])),
    chosen=st.sampled_from(sorted(CASES)),
    need=st.sets(st.sampled_from(TRAINED), min_size=1),
)
def test_any_shape_layout_and_gradient(
    backend: Backend,
    device: str,
    exact: torch.dtype,
    assert_exact: Callable[..., None],
    lead: tuple[int, ...],
    sizes: tuple[int, int, int],
    rank: int,
    layouts: tuple[str, ...],
    absent: set[str],
    chosen: str,
    need: set[str],
) -> None:
    d_in, d_hidden, d_out = sizes
    tokens = torch.Size(lead).numel()
    inputs = inputs_of(
        CASES[chosen], tokens=max(tokens, 1), d_in=d_in, d_hidden=d_hidden, d_out=d_out, r1=rank, dtype=exact
    )
    inputs |= dict.fromkeys(absent)
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    inputs["x"] = inputs["x"][:tokens].reshape(*lead, d_in)
    for key, layout in zip(("x", "W1", "D1", "W2", "D2"), layouts, strict=True):
        if inputs[key].numel() and not (layout == "expanded" and key == "x"):
            inputs[key] = with_layout(inputs[key], layout)
    gy = upstream(inputs)
    wanted = present(inputs, tuple(sorted(need))) or ("G2",)
    with use_backend(backend), poisoned_empty():
        got = with_gradients(tt_mlp, wanted, inputs, gy)
    expected = dense(wanted, inputs, gy)
    terms = sizes_of_summands(inputs, gy)
    for key, value in got.items():
        assert value.shape == expected[key].shape
        assert_exact(value, expected[key], key, terms=terms.get(key, 0.0))


def sizes_of_summands(inputs: Inputs, gy: Tensor) -> dict[str, float]:
    """Return the sizes of the summands of y and the gradients. The sums can be small because summands cancel.

    The function computes the same products as the MLP and its backward pass, from absolute values.
    """
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    n, gamma = wide["x"], wide["gamma"]
    slope = torch.ones((), dtype=torch.float64)
    if wide["eps"] is not None:
        slope = ((n - n.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + wide["eps"]).rsqrt()
        n = F.layer_norm(n, n.shape[-1:], gamma, wide["beta"], wide["eps"])
    n = n.reshape(-1, n.shape[-1]).abs()
    b1, b2 = (0 if wide[key] is None else wide[key].abs() for key in ("b1", "b2"))
    D1, G1, D2, G2 = (wide[key].abs() for key in FACTORS)
    M1, M2 = (W.abs().t() + D @ G for W, D, G in ((wide["W1"], D1, G1), (wide["W2"], D2, G2)))
    rows = gy.double().reshape(-1, gy.shape[-1]).abs()
    z = n @ M1 + b1
    dz = 1.2 * rows @ M2.t()  # the slope of a GELU is less than 1.13
    dn = dz @ M1.t()
    found = {
        "y": z @ M2 + b2,
        "x": dn * (1.0 if gamma is None else gamma.abs()) * slope.reshape(-1, 1),
        "gamma": dn.t() @ n,
        "beta": dn.sum(0),
        "b1": dz.sum(0),
        "D1": n.t() @ (dz @ G1.t()),
        "G1": (n @ D1).t() @ dz,
        "D2": z.t() @ (rows @ G2.t()),
        "G2": (z @ D2).t() @ rows,
    }
    return {key: value.max().item() if value.numel() else 0.0 for key, value in found.items()}


@pytest.mark.parametrize("need", TRAINED)
def test_one_argument_alone_is_trained(
    backend: Backend, exact: torch.dtype, assert_exact: Callable[..., None], case: Inputs, need: str
) -> None:
    inputs = inputs_of(case, tokens=300, dtype=exact)
    if inputs[need] is None:
        pytest.skip("this case has no such argument")
    gy = upstream(inputs)
    with use_backend(backend), poisoned_empty():
        got = with_gradients(tt_mlp, (need,), inputs, gy)
    assert_exact(got[need], dense((need,), inputs, gy)[need], need, terms=16.0)


def test_gradcheck(fp64: Backend, case: Inputs) -> None:
    inputs = inputs_of(case, tokens=3, d_in=4, d_hidden=5, d_out=3, r1=2, dtype=torch.float64)
    names = present(inputs)
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*values: Tensor) -> Tensor:
        return tt_mlp(**inputs | dict(zip(names, values, strict=True)), backend=fp64)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(lambda *values: function(*values).sin(), leaves)


@pytest.mark.parametrize("of", TRAINED)
@pytest.mark.parametrize("others", ["frozen", "trained"])
def test_a_second_derivative(
    backend: Backend, exact: torch.dtype, assert_exact: Callable[..., None], case: Inputs, of: str, others: str
) -> None:
    inputs = inputs_of(case, tokens=6, d_in=8, d_hidden=9, d_out=5, r1=3, dtype=exact)
    if inputs[of] is None:
        pytest.skip("this case has no such argument")
    names = present(inputs) if others == "trained" else (of,)
    results = []
    for op, dtype in ((tt_mlp, exact), (unfused, torch.float64)):
        values = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        with use_backend(backend):
            y = op(**values | leaves)
        (grad,) = torch.autograd.grad(y.sin().sum(), leaves[of], create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), list(leaves.values())))
    for value, expected in zip(*results, strict=True):
        assert_exact(value, expected, terms=20 * expected.abs().max().item())


def test_tensors_saved_for_backward(kernels: Backend, case: Inputs) -> None:
    """Of the new tensors, only z, h1, h2 and the statistics of a norm are saved."""
    inputs = inputs_of(case, tokens=50, d_in=24, d_hidden=56, d_out=40, r1=5)
    known = {value.untyped_storage().data_ptr() for value in inputs.values() if isinstance(value, Tensor)}
    for name in present(inputs):
        inputs[name].requires_grad_()
    new: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in known:
            new.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tt_mlp(**inputs, backend=kernels)
    assert sorted(new) == [*([(50,)] * 2 if inputs["eps"] is not None else []), (50, 5), (50, 5), (50, 56)]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: Backend, device: str, autocast: torch.dtype, case: Inputs) -> None:
    """The output has the autocast dtype, and gradients have the dtypes of their arguments."""
    inputs = inputs_of(case, tokens=33, device=device)
    need, gy = present(inputs), upstream(inputs).to(autocast)
    with torch.autocast(device, autocast), use_backend(backend):
        got = with_gradients(tt_mlp, need, inputs, gy)
    with torch.autocast(device, autocast):
        peer = with_gradients(unfused, need, inputs, gy)
    half = {**inputs, **{name: inputs[name].to(autocast) for name in ("W1", "b1", "W2", "b2")}}
    exact = dense(need, half, gy)
    assert got["y"].dtype == autocast
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


NARROW, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtypes", [*itertools.product((NARROW, WIDE), repeat=4)], ids=lambda d: " ".join(map(str, d)))
def test_dtypes_mixed(backend: Backend, device: str, case: Inputs, dtypes: tuple[torch.dtype, ...]) -> None:
    """The norm and the GELU compute in fp32 and round once to the weights' dtype."""
    of_x, of_norm, of_W, of_factors = dtypes
    if case.get("eps", 0) is None:
        of_x = of_W
    inputs = inputs_of(case, device=device)
    of = {"x": of_x, "gamma": of_norm, "beta": of_norm, **dict.fromkeys(("W1", "b1", "W2", "b2"), of_W)}
    inputs = {
        key: value.to(of.get(key, of_factors)) if isinstance(value, Tensor) else value for key, value in inputs.items()
    }
    need, gy = present(inputs), upstream(inputs)
    with use_backend(backend):
        got = with_gradients(tt_mlp, need, inputs, gy)

    def once_rounded(**leaves: Any) -> Tensor:
        def layer(x: Tensor, W: Tensor, b: Tensor, D: Tensor, G: Tensor) -> Tensor:
            x = x.to(of_W)
            return (F.linear(x, W, b) + (x @ D.to(of_W)) @ G.to(of_W)).float()

        wide = {
            key: value.float() if key in ("x", "gamma", "beta") and value is not None else value
            for key, value in leaves.items()
        }
        return formula(wide, layer).to(of_W)

    exact, peer = dense(need, inputs, gy), with_gradients(once_rounded, need, inputs, gy)
    assert got["y"].dtype == of_W
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


def test_biases_in_fp32_of_layers_in_half_precision(backend: Backend, device: str) -> None:
    inputs = inputs_of({}, dtype=torch.bfloat16, factor_dtype=torch.float32, device=device)
    inputs |= {name: inputs[name].float() for name in ("b1", "b2")}
    need, gy = present(inputs), upstream(inputs)
    with use_backend(backend):
        got = with_gradients(tt_mlp, need, inputs, gy)
    exact = dense(need, inputs, gy)
    assert (got["b1"].dtype, got["b2"].dtype) == (torch.float32, torch.float32)
    for key, value in got.items():
        assert (value.double() - exact[key]).norm() < 2e-2 * exact[key].norm(), key


def test_layers_of_different_ranks(backend: Backend, device: str, exact: torch.dtype, assert_exact: Any) -> None:
    inputs = inputs_of({}, dtype=exact, device=device)
    inputs |= {"D2": inputs["D2"][:, :2].contiguous(), "G2": inputs["G2"][:2]}
    need, gy = present(inputs), upstream(inputs)
    with use_backend(backend):
        got = with_gradients(tt_mlp, need, inputs, gy)
    for key, value in dense(need, inputs, gy).items():
        assert_exact(got[key], value, key, terms=16.0)


def test_registered_ops(kernels: Backend, device: str, case: Inputs) -> None:
    inputs = inputs_of(case, device=device, tokens=9)
    x, gamma, beta, eps, W1, b1, D1, G1, W2, b2, D2, G2, approximate = inputs.values()
    forward, backward = (getattr(getattr(torch.ops.efft, f"tt_mlp_{way}"), kernels.value) for way in ("fwd", "bwd"))
    arguments = (x, gamma, beta, eps, W1, b1, D1, G1, W2, b2, D2, G2, approximate)
    torch.library.opcheck(forward, arguments)
    y, z, h1, h2, mean, rstd = forward(*arguments)
    for needs in ((True,) * 9, *(tuple(i == j for j in range(9)) for i in range(9))):
        needs = (*needs[:7], *(need and gamma is not None for need in needs[7:]))
        saved = (y, x, z, gamma, beta, eps, mean, rstd, W1, W2, h1, h2, D1, G1, D2, G2, approximate)
        torch.library.opcheck(backward, (*saved, *needs))


def test_compiled_without_a_break(backend: Backend, case: Inputs) -> None:
    torch.compiler.reset()  # the compilation limit per function is lower than the number of cases
    inputs = inputs_of(case, tokens=9)
    leaves = [inputs[name].requires_grad_() for name in present(inputs)]
    compiled = torch.compile(lambda: tt_mlp(**inputs, backend=backend), fullgraph=True, backend="aot_eager")
    got, expected = compiled(), tt_mlp(**inputs, backend=backend)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_functional_transforms(case: Inputs) -> None:
    """Inside torch.func, ``auto`` chooses the reference."""
    inputs = inputs_of(case, tokens=6, dtype=torch.float64)
    x = inputs.pop("x")
    got = torch.func.grad(lambda x: tt_mlp(x, **inputs).sin().sum())(x)
    leaf = x.requires_grad_()
    (expected,) = torch.autograd.grad(unfused(x=leaf, **inputs).sin().sum(), leaf)
    torch.testing.assert_close(got, expected)


def test_an_input_that_was_changed_in_place_is_noticed() -> None:
    inputs = inputs_of({}, dtype=torch.float64)
    inputs["D1"].requires_grad_()
    y = tt_mlp(**inputs, backend="eager")
    inputs["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wrong_calls(backend: Backend) -> None:
    inputs = inputs_of({"approximate": "none"})
    for changes, message in (
        ({"x": inputs["x"][:, 1:]}, r"tt_mlp: x must be \[..., d_in=24\], got shape \[29, 23\]"),
        ({"b1": inputs["b1"].double()}, "must have the dtype of W1, got W1 torch.float32, .*b1 torch.float64"),
        ({"W2": inputs["W2"].double()}, "must have the dtype of W1, got W1 torch.float32, W2 torch.float64"),
        ({"b2": inputs["b2"][1:]}, r"b2 must be \[d_out\] = \[40\]"),
        ({"D1": inputs["D1"][1:]}, r"D1 must be \[d_in, r1\] = \[24, 5\]"),
        ({"G2": inputs["G2"][1:]}, r"G2 must be \[r1, d_out\] = \[5, 40\]"),
        ({"W2": inputs["W2"][:, 1:], "D2": inputs["D2"][1:]}, r"W2 must be \[d_out, d_hidden=56\], got .*\[40, 55\]"),
        ({"W1": inputs["W1"].clone().requires_grad_()}, "W1 must be frozen, got requires_grad=True"),
        ({"approximate": "no"}, "approximate must be 'none' or 'tanh', got 'no'"),
        ({"gamma": inputs["gamma"][:3]}, r"gamma must be \[d_in\] = \[24\], got shape \[3\]"),
        ({"gamma": inputs["gamma"].double()}, "gamma and beta must have the same dtype, got torch.float64 and"),
        ({"eps": None}, "without eps there is no norm, got gamma and beta; pass eps, or leave them out"),
        (
            {"eps": None, "gamma": None, "beta": None, "x": inputs["x"].bfloat16()},
            "x must have the dtype of W1, got W1 torch.float32, x torch.bfloat16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tt_mlp(**{**inputs, **changes}, backend=backend)
