"""Compare tt_gelu_linear and tt_norm_linear with formulas in fp64 (dense update, gradients written by hand).

A *producer* is the GELU or the norm before the linear layer. The last tests also cover in-place changes with tt_linear.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efft_kernels import Backend, tt_gelu_linear, tt_linear, tt_norm_linear, use_backend
from efft_kernels.testing import LAYOUTS, assert_close_budget, make_inputs, poisoned_empty, with_layout

Inputs = dict[str, Any]
OPS = {
    "gelu": (tt_gelu_linear, "z", {"approximate": "none"}),
    "gelu_tanh": (tt_gelu_linear, "z", {"approximate": "tanh"}),
    "norm": (tt_norm_linear, "x", {"eps": 1e-3}),
}


@pytest.fixture(params=OPS)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], str, dict[str, Any]]:
    return OPS[request.param]


def inputs_of(op: Callable[..., Tensor], **options: Any) -> Inputs:
    return make_inputs(op.__name__, **options)


def output(op: Callable[..., Tensor], inputs: Inputs, approximate: str = "none", eps: float = 0.0) -> Tensor:
    """Return the output of the producer, computed by torch."""
    if op is tt_gelu_linear:
        return F.gelu(inputs["z"], approximate=approximate)
    return F.layer_norm(inputs["x"], inputs["x"].shape[-1:], inputs["gamma"], inputs["beta"], eps)


def slope(
    op: Callable[..., Tensor], inputs: Inputs, upstream: Tensor, approximate: str = "", eps: float = 0.0
) -> Tensor:
    """Return the result of the producer's backward formula."""
    if op is tt_norm_linear:
        x, g = inputs["x"], upstream if inputs["gamma"] is None else upstream * inputs["gamma"]
        # torch.var would warn about an input without rows.
        deviation = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps).sqrt()
        n = (x - x.mean(-1, keepdim=True)) / deviation
        return (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) / deviation
    z = inputs["z"]
    if approximate == "none":
        density = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
        return upstream * ((1 + torch.erf(z / 2**0.5)) / 2 + z * density)
    u = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    du = (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * z**2)
    return upstream * ((1 + u.tanh()) / 2 + z / 2 * du / u.cosh() ** 2)


def dense(op: Callable[..., Tensor], name: str, inputs: Inputs, gy: Tensor, options: dict[str, Any]) -> Inputs:
    """Return y and the gradients from the dense matrix in fp64."""
    wide = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    a, gy = output(op, wide, **options), gy.double()
    matrix = wide["W"].t() + wide["D"] @ wide["G"]
    da, rows = gy @ matrix.t(), gy.reshape(-1, gy.shape[-1])
    by_matrix = a.reshape(-1, a.shape[-1]).t() @ rows
    of_norm = {}
    if op is tt_norm_linear:
        n = output(op, {**wide, "gamma": None, "beta": None}, **options)
        of_norm = {"gamma": (da * n).reshape(-1, n.shape[-1]).sum(0), "beta": da.reshape(-1, n.shape[-1]).sum(0)}
    return {
        "y": a @ matrix + (0 if wide["b"] is None else wide["b"]),
        name: slope(op, wide, da, **options),
        "D": by_matrix @ wide["G"].t(),
        "G": wide["D"].t() @ by_matrix,
        "b": rows.sum(0),
        **of_norm,
    }


def trained(op: Callable[..., Tensor], name: str) -> tuple[str, ...]:
    """Return the names of all arguments that get a gradient."""
    return (name, "D", "G", "b", *(("gamma", "beta") if op is tt_norm_linear else ()))


def run(op: Callable[..., Tensor], need: tuple[str, ...], inputs: Inputs, gy: Tensor, **options: Any) -> Inputs:
    leaves = {
        k: v.detach().requires_grad_(k in need) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    y = op(**leaves, **options)
    return {"y": y, **dict(zip(need, torch.autograd.grad(y, [leaves[k] for k in need], gy), strict=True))}


def unfused(op: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Return a function that computes one operation after the other in the precision of its inputs.

    The tests compare the errors of the op with the errors of this function.
    """

    def layers(W: Tensor, b: Tensor | None, D: Tensor, G: Tensor, **producer: Any) -> Tensor:
        a = output(op, producer, **options)
        return F.linear(a, W, b) + (a @ D.to(a.dtype)) @ G.to(a.dtype)

    return layers


def upstream(inputs: Inputs, name: str) -> Tensor:
    shape = (*inputs[name].shape[:-1], inputs["W"].shape[0])
    generator = torch.Generator().manual_seed(1)  # the same numbers in every example of a test
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs["W"].device, inputs["W"].dtype)


def test_output_and_gradients(backend: Backend, device: str, low: torch.dtype, case: Any) -> None:
    op, name, options = case
    need = trained(op, name)
    inputs = inputs_of(op, tokens=61, r1=17, dtype=low, factor_dtype=torch.float32, device=device)
    gy = upstream(inputs, name)
    with use_backend(backend):
        got = run(op, need, inputs, gy, **options)
    exact, peer = dense(op, name, inputs, gy, options), run(unfused(op, **options), need, inputs, gy)
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


def test_update_alone(backend: Backend, device: str, low: torch.dtype, case: Any) -> None:
    """Without a base, y is the update. An update of a thousandth of the usual size must not be lost."""
    op, name, options = case
    need = (name, "D", "G")
    inputs = inputs_of(op, update=1e-3, dtype=low, factor_dtype=torch.float32, device=device)
    inputs |= {"W": torch.zeros_like(inputs["W"]), "b": None}
    gy = upstream(inputs, name)
    with use_backend(backend):
        got = run(op, need, inputs, gy, **options)
    exact, peer = dense(op, name, inputs, gy, options), run(unfused(op, **options), need, inputs, gy)
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


@given(
    lead=st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 0, 3)]),
    sizes=st.tuples(st.integers(2, 33), st.integers(1, 33), st.one_of(st.integers(1, 9), st.integers(10, 128))),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    present=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    chosen=st.sampled_from(sorted(OPS)),
    need=st.sets(st.sampled_from(["producer", "D", "G", "b", "gamma", "beta"]), min_size=1),
)
def test_any_shape_layout_and_gradient(
    backend: Backend,
    device: str,
    exact: torch.dtype,
    assert_exact: Callable[..., None],
    lead: tuple[int, ...],
    sizes: tuple[int, int, int],
    layouts: tuple[str, ...],
    present: tuple[bool, ...],
    chosen: str,
    need: set[str],
) -> None:
    op, name, options = OPS[chosen]
    d_in, d_out, r1 = sizes
    inputs = inputs_of(op, tokens=max(torch.Size(lead).numel(), 1), d_in=d_in, d_out=d_out, r1=r1, dtype=exact)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    inputs[name] = inputs[name][: torch.Size(lead).numel()].reshape(*lead, d_in)
    for key, is_there in zip(("b", "gamma", "beta"), present, strict=True):
        if key in inputs and not is_there:
            inputs[key] = None
    for key, layout in zip((name, "W", "D"), layouts, strict=True):
        if inputs[key].numel() and not (layout == "expanded" and key == name):
            inputs[key] = with_layout(inputs[key], layout)
    gy = upstream(inputs, name)
    wanted = tuple(name if n == "producer" else n for n in sorted(need))
    wanted = tuple(key for key in wanted if inputs.get(key) is not None) or ("G",)
    with use_backend(backend), poisoned_empty():
        got = run(op, wanted, inputs, gy, **options)
    expected = dense(op, name, inputs, gy, options)
    terms = summed_around_norm(inputs, gy, **options) if chosen == "norm" else {}
    for key, value in got.items():
        assert value.shape == expected[key].shape
        assert_exact(value, expected[key], key, terms=terms.get(key, 0.0))


def summed_around_norm(inputs: dict[str, Tensor], gy: Tensor, eps: float) -> dict[str, float]:
    """Return the sizes of the summands of the gradients of x and G. The sums can be small because summands cancel.

    The backward pass of a norm subtracts from the received gradient its mean and its component along the norm's output.
    Without gamma and beta, each row of the norm's output sums to zero, so its product with D is zero if all rows of D
    are equal.
    """
    wide = {key: None if t is None else t.double() for key, t in inputs.items()}
    x, W, D, G, gamma = (wide[key] for key in ("x", "W", "D", "G", "gamma"))
    upstream = gy.double() @ (W + (D @ G).t()) * (1.0 if gamma is None else gamma)
    scaled = upstream * ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + eps).rsqrt()
    n = F.layer_norm(x, x.shape[-1:], gamma, wide["beta"], eps).reshape(-1, x.shape[-1])
    of_G = (n.abs() @ D.abs()).t() @ gy.double().abs().reshape(-1, gy.shape[-1])
    return {key: t.abs().max().item() if t.numel() else 0.0 for key, t in (("x", scaled), ("G", of_G))}


def test_gradcheck(fp64: Backend, case: Any) -> None:
    op, name, options = case
    inputs = inputs_of(op, tokens=4, d_in=5, d_out=6, r1=3, dtype=torch.float64)
    leaves = [inputs[k].requires_grad_() for k in trained(op, name)]

    def function(*values: Tensor) -> Tensor:
        return op(**inputs | dict(zip(trained(op, name), values, strict=True)), **options, backend=fp64)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(lambda *values: function(*values).sin(), leaves)


@pytest.mark.parametrize("need", [("D",), ("G",), ("producer",)], ids=str)
def test_a_second_derivative(
    backend: Backend, exact: torch.dtype, assert_exact: Callable[..., None], case: Any, need: tuple[str, ...]
) -> None:
    """Differentiate one gradient with respect to all trained arguments, with no argument or one argument frozen."""
    op, name, options = case
    (of,) = (name if n == "producer" else n for n in need)
    inputs = inputs_of(op, tokens=6, d_in=8, d_out=5, r1=3, dtype=exact)
    for frozen in (None, *(k for k in (name, "D", "G") if k != of)):
        leaves = [inputs[k].detach().requires_grad_(k != frozen) for k in (name, "D", "G")]
        results = []
        for layer, arguments in (
            (functools.partial(op, backend=backend, **options), inputs),
            (unfused(op, **options), {k: v.double() for k, v in inputs.items()}),
        ):
            given = dict(zip((name, "D", "G"), leaves, strict=True))
            if arguments is not inputs:
                given = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in given.items()}
            y = layer(**arguments | given)
            (grad,) = torch.autograd.grad(y.sin().sum(), given[of], create_graph=True)
            wanted = [v for v in given.values() if v.requires_grad]
            results.append(torch.autograd.grad(grad.square().sum(), wanted))
        for value, formula in zip(*results, strict=True):
            assert_exact(value, formula, terms=10 * formula.abs().max().item())


@pytest.mark.parametrize("need", ["b", "gamma", "beta"])
def test_second_derivatives_of_trained_vectors(
    backend: Backend, exact: torch.dtype, assert_exact: Callable[..., None], case: Any, need: str
) -> None:
    """Differentiate one gradient, once with only its argument trained, and once with all arguments trained."""
    op, name, options = case
    names = trained(op, name)
    if need not in names:
        pytest.skip("a GELU has no parameters")
    inputs = inputs_of(op, tokens=6, d_in=8, d_out=5, r1=3, dtype=exact)
    for leaves in ((need,), names):
        results = []
        for layer, arguments in (
            (functools.partial(op, backend=backend, **options), inputs),
            (unfused(op, **options), {k: v.double() for k, v in inputs.items()}),
        ):
            given = {k: arguments[k].detach().requires_grad_() for k in leaves}
            y = layer(**arguments | given)
            (grad,) = torch.autograd.grad(y.sin().sum(), given[need], create_graph=True)
            results.append(torch.autograd.grad(grad.square().sum(), list(given.values())))
        for value, formula in zip(*results, strict=True):
            assert_exact(value, formula, terms=10 * formula.abs().max().item())


@pytest.mark.parametrize("need", ["b", "gamma", "beta"])
def test_one_vector_alone_is_trained(
    backend: Backend, exact: torch.dtype, assert_exact: Callable[..., None], case: Any, need: str
) -> None:
    """All other arguments are frozen, including the input, as in the first layer of a model."""
    op, name, options = case
    if need not in trained(op, name):
        pytest.skip("a GELU has no parameters")
    inputs = inputs_of(op, tokens=300, dtype=exact)
    gy = upstream(inputs, name)
    with use_backend(backend), poisoned_empty():
        got = run(op, (need,), inputs, gy, **options)
    assert_exact(got[need], dense(op, name, inputs, gy, options)[need], need, terms=16.0)


def test_what_is_kept_for_backward(kernels: Backend, case: Any) -> None:
    """Of the new tensors, only h and the statistics of a norm are saved."""
    op, name, options = case
    inputs = inputs_of(op, tokens=50, d_in=24, d_out=40, r1=5)
    known = {inputs[k].untyped_storage().data_ptr() for k in inputs}
    inputs[name].requires_grad_()
    inputs["G"].requires_grad_()
    new: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            new.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op(**inputs, **options, backend=kernels)
    assert sorted(new) == [*([(50,)] * 2 if op is tt_norm_linear else []), (50, 5)]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: Backend, device: str, autocast: torch.dtype, case: Any) -> None:
    """The producer's input keeps its dtype, y has the autocast dtype, and gradients have their arguments' dtypes."""
    op, name, options = case
    need = (name, "D", "G")
    inputs = inputs_of(op, tokens=33, device=device)
    gy = upstream(inputs, name).to(autocast)
    with torch.autocast(device, autocast), use_backend(backend):
        got = run(op, need, inputs, gy, **options)
    with torch.autocast(device, autocast):
        peer = run(unfused(op, **options), need, inputs, gy)
    half = {**inputs, "W": inputs["W"].to(autocast), "b": inputs["b"].to(autocast)}
    exact = dense(op, name, half, gy, options)
    assert got["y"].dtype == autocast
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


NARROW, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtypes", [*itertools.product((NARROW, WIDE), repeat=4)], ids=lambda d: " ".join(map(str, d)))
def test_dtypes_mixed(backend: Backend, device: str, case: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """The producer computes in fp32 and rounds once to the weight's dtype; gradients have their arguments' dtypes."""
    op, name, options = case
    need = (name, "D", "G")
    inputs = inputs_of(op, device=device)
    of = dict(
        zip(
            (name, "gamma", "beta", "W", "b", "D", "G"),
            (dtypes[0], *dtypes[1:2] * 2, *dtypes[2:3] * 2, *dtypes[3:] * 2),
            strict=True,
        )
    )
    inputs = {key: tensor.to(of[key]) for key, tensor in inputs.items()}
    gy = upstream(inputs, name)
    with use_backend(backend):
        got = run(op, need, inputs, gy, **options)
    exact = dense(op, name, inputs, gy, options)
    product = {key: inputs[key].to(of["W"]) for key in ("W", "b", "D", "G")}

    def once_rounded(**leaves: Tensor) -> Tensor:
        a = output(op, {key: tensor.float() for key, tensor in leaves.items()}, **options).to(of["W"])
        D, G = (leaves[key].to(of["W"]) for key in ("D", "G"))
        return F.linear(a, product["W"], product["b"]) + (a @ D) @ G

    peer = run(once_rounded, need, inputs, gy)
    assert got["y"].dtype == of["W"]
    for key, value in got.items():
        assert_close_budget(value, exact[key], peer[key], name=key)


@pytest.mark.parametrize("absent", ["gamma", "beta"])
def test_dtypes_mixed_of_a_norm_with_one_parameter(backend: Backend, device: str, absent: str) -> None:
    inputs = inputs_of(tt_norm_linear, device=device) | {absent: None}
    given = next(key for key in ("gamma", "beta") if key != absent)
    inputs[given] = inputs[given].bfloat16()
    gy = upstream(inputs, "x")
    with use_backend(backend):
        got = run(tt_norm_linear, ("x", "D", "G"), inputs, gy)
    formulas = dense(tt_norm_linear, "x", inputs, gy, {"eps": 1e-5})
    for key, value in got.items():
        assert (value.double() - formulas[key]).norm() < 1e-5 * formulas[key].norm(), key


def test_registered_ops(kernels: Backend, device: str) -> None:
    options = {"device": device, "tokens": 9}
    gelu, norm = make_inputs("tt_gelu_linear", **options), make_inputs("tt_norm_linear", **options)
    z, W, b, D, G = gelu.values()
    overload = {n: getattr(getattr(torch.ops.efft, n), kernels.value) for n in dir(torch.ops.efft) if "_linear_" in n}
    y, h = overload["tt_gelu_linear_fwd"](z, W, b, D, G, "tanh")
    torch.library.opcheck(overload["tt_gelu_linear_fwd"], (z, W, b, D, G, "tanh"))
    x, gamma, beta = norm["x"], norm["gamma"], norm["beta"]
    torch.library.opcheck(overload["tt_norm_linear_fwd"], (x, gamma, beta, 1e-5, W, b, D, G))
    _, h, mean, rstd = overload["tt_norm_linear_fwd"](x, gamma, beta, 1e-5, W, b, D, G)
    one_each = [tuple(i == j for j in range(6)) for i in range(6)]
    for needs in ((True,) * 6, *one_each):
        torch.library.opcheck(overload["tt_gelu_linear_bwd"], (y, z, W, h, D, G, "none", *needs[:4]))
        torch.library.opcheck(overload["tt_norm_linear_bwd"], (y, x, gamma, beta, 1e-5, mean, rstd, W, h, D, G, *needs))
    plain = (y, x.bfloat16(), None, None, 1e-5, mean, rstd, W, h, D, G, *(True,) * 4, False, False)
    torch.library.opcheck(overload["tt_norm_linear_bwd"], plain)


def test_compiled_without_a_break(backend: Backend, case: Any) -> None:
    torch.compiler.reset()  # the compilation limit per function is lower than the number of cases
    op, name, options = case
    inputs = inputs_of(op, tokens=9)
    leaves = [inputs[k].requires_grad_() for k in trained(op, name)]
    compiled = torch.compile(lambda: op(**inputs, **options, backend=backend), fullgraph=True, backend="aot_eager")
    got, expected = compiled(), op(**inputs, **options, backend=backend)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (got, expected)]
    torch.testing.assert_close(*grads)


def test_wrong_calls(backend: Backend, case: Any) -> None:
    op, name, options = case
    inputs = inputs_of(op)
    for changes, message in (
        ({name: inputs[name][:, 1:]}, rf"{op.__name__}: {name} must be \[..., d_in=24\], got shape \[29, 23\]"),
        ({"b": inputs["b"].double()}, r"b must have the dtype of W, got W torch.float32, b torch.float64"),
        ({"b": inputs["b"][1:]}, r"b must be \[d_out\] = \[40\]"),
        ({"D": inputs["D"][1:]}, r"D must be \[d_in, r1\] = \[24, 5\]"),
        ({"W": inputs["W"].clone().requires_grad_()}, "W must be frozen, got requires_grad=True"),
    ):
        with pytest.raises(ValueError, match=message):
            op(**{**inputs, **changes}, **options, backend=backend)
    if op is tt_gelu_linear:
        with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', got 'no'"):
            op(**inputs, approximate="no", backend=backend)
    else:
        with pytest.raises(ValueError, match=r"gamma must be \[d_in\] = \[24\], got shape \[3\]"):
            op(**{**inputs, "gamma": inputs["gamma"][:3]}, backend=backend)


#: The ops that flatten the leading dimensions in code that autograd does not see.
every_op = pytest.mark.parametrize("op", [tt_linear, tt_gelu_linear, tt_norm_linear], ids=lambda op: op.__name__)


def batch_of(op: Callable[..., Tensor]) -> tuple[Inputs, Tensor]:
    """Return the keyword arguments for a batch [2, 3, d_in], and the activation among them."""
    inputs = make_inputs(op.__name__, tokens=6, d_in=8, d_out=5, r1=2, dtype=torch.float64)
    name = next(iter(inputs))
    inputs[name] = inputs[name].reshape(2, 3, 8).requires_grad_()
    return inputs, inputs[name]


@every_op
def test_an_output_can_be_changed_in_place(op: Callable[..., Tensor]) -> None:
    inputs, x = batch_of(op)
    (expected,) = torch.autograd.grad((2 * op(**inputs, backend="eager")).exp().sum(), x)
    y = op(**inputs, backend="eager")
    assert y.shape == (2, 3, 5)
    (got,) = torch.autograd.grad(y.mul_(2).exp_().sum(), x)
    torch.testing.assert_close(got, expected)


@every_op
def test_an_input_that_was_changed_in_place_is_noticed(op: Callable[..., Tensor]) -> None:
    inputs, x = batch_of(op)
    name = next(iter(inputs))
    changed = x * 1
    y = op(**(inputs | {name: changed, "D": inputs["D"].requires_grad_()}), backend="eager")
    changed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
