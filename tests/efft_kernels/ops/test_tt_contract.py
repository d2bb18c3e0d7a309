"""Compare tt_contract with loops over layers and cores in fp64, and with gradients written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efft_kernels import Backend, tt_contract, use_backend
from efft_kernels.testing import LAYOUTS, assert_close_budget, make_inputs, poisoned_empty, with_layout

RANKS = st.one_of(st.integers(1, 9), st.integers(10, 128))
Arguments = dict[str, Any]


def dropped(inputs: Arguments) -> tuple[Tensor, Tensor]:
    """Return C and V of every layer, [n_layers, n_cores, r1, r2] and [n_layers, r2, d_out], with dropped entries 0."""
    C, V = inputs["C"], inputs["V"].expand(len(inputs["C"]), *inputs["V"].shape)
    C = C if inputs["keep_C"] is None else torch.where(inputs["keep_C"], C, 0)
    V = V if inputs["keep_V"] is None else torch.where(inputs["keep_V"], V, 0)
    return C, V


def dense(inputs: Arguments, dG: Tensor) -> dict[str, Tensor]:
    """Return G and the gradients of C, V and scale, computed one matrix at a time."""
    inputs = {
        k: v.detach().double() if isinstance(v, Tensor) and v.dtype != torch.bool else v for k, v in inputs.items()
    }
    C, V = dropped(inputs)
    scale, d_out = float(inputs["scale"]), V.shape[2]
    blocks = dG.double().unflatten(2, (C.shape[1], d_out))  # [n_layers, r1, n_cores, d_out]
    G, dC, dV = torch.empty_like(blocks), torch.zeros_like(C), torch.zeros_like(inputs["V"])
    dscale = torch.zeros((), dtype=torch.float64, device=C.device)
    for layer in range(C.shape[0]):
        dV_layer = torch.zeros_like(dV)
        for core in range(C.shape[1]):
            product, d = C[layer, core] @ V[layer], blocks[layer, :, core]
            G[layer, :, core] = scale * product
            dC[layer, core] = scale * (d @ V[layer].t())
            dV_layer += scale * (C[layer, core].t() @ d)
            dscale += (product * d).sum()
        dV += dV_layer if inputs["keep_V"] is None else torch.where(inputs["keep_V"][layer], dV_layer, 0)
    if inputs["keep_C"] is not None:
        dC = torch.where(inputs["keep_C"], dC, 0)
    return {"G": G.flatten(2), "C": dC, "V": dV, "scale": dscale}


def plain(**inputs: Any) -> Tensor:
    """Return the formula in the factors' own precision, with one product for all matrices that share V."""
    C, V = dropped(inputs)
    rows = C.flatten(1, 2)  # [n_layers, n_cores * r1, r2]
    product = rows.flatten(0, 1) @ inputs["V"] if inputs["keep_V"] is None else rows @ V
    blocks = product.reshape(*C.shape[:3], V.shape[2])  # [n_layers, n_cores, r1, d_out]
    return inputs["scale"] * blocks.transpose(1, 2).flatten(2)


def run(
    op: Callable[..., Tensor], inputs: Arguments, dG: Tensor, need: tuple[str, ...] = ("C", "V")
) -> dict[str, Tensor]:
    """Return G and the gradients of the arguments that ``need`` names."""
    inputs = {**inputs, **{name: inputs[name].detach().requires_grad_() for name in need}}
    G = op(**inputs)
    return {"G": G, **dict(zip(need, torch.autograd.grad(G, [inputs[name] for name in need], dG), strict=True))}


def upstream(inputs: Arguments) -> Tensor:
    n_layers, n_cores, r1, _ = inputs["C"].shape
    shape = (n_layers, r1, n_cores * inputs["V"].shape[1])
    generator = torch.Generator().manual_seed(1)  # the same numbers in every example of a test
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs["C"].device, inputs["C"].dtype)


@pytest.mark.parametrize("masks", [False, True], ids=["all kept", "dropout"])
def test_output_and_gradients(backend: Backend, device: str, low: torch.dtype, masks: bool) -> None:
    inputs = make_inputs("tt_contract", r1=17, r2=33, masks=masks, dtype=low, device=device)
    dG = upstream(inputs)
    with use_backend(backend):
        got = run(tt_contract, inputs, dG)
    exact, peer = dense(inputs, dG), run(plain, inputs, dG)
    for name, value in got.items():
        assert_close_budget(value, exact[name], peer[name], name=name)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_computes_in_fp32_and_rounds_once(half: torch.dtype) -> None:
    inputs = make_inputs("tt_contract", masks=True, dtype=half)
    dG = upstream(inputs)
    with use_backend("reference"):
        got = run(tt_contract, inputs, dG)
        wide = run(tt_contract, {**inputs, "C": inputs["C"].float(), "V": inputs["V"].float()}, dG.float())
    for name, value in got.items():
        assert torch.equal(value, wide[name].to(half)), name


def test_gradient_of_a_trained_scale(backend: Backend, device: str, low: torch.dtype) -> None:
    """The loss is |G|²/2, because its sums do not cancel. The test uses 16 draws, as one could be exact by chance."""
    results: list[list[Tensor]] = [[], [], []]
    for seed in range(16):
        inputs = make_inputs("tt_contract", r1=17, r2=33, masks=True, dtype=low, device=device, seed=seed)
        inputs["scale"] = torch.tensor(0.75, dtype=low, device=device)
        dG = plain(**inputs)
        with use_backend(backend):
            got = run(tt_contract, inputs, dG, ("scale",))
        for result, grads in zip(results, (got, dense(inputs, dG), run(plain, inputs, dG, ("scale",))), strict=True):
            result.append(grads["scale"])
    assert_close_budget(*map(torch.stack, results))


@given(
    sizes=st.tuples(
        *[st.integers(1, 4)] * 2, *[st.one_of(st.integers(1, 9), st.integers(10, 128))] * 2, st.integers(1, 33)
    ),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 5),
    masks=st.sampled_from([(), ("keep_C",), ("keep_V",), ("keep_C", "keep_V")]),
    scale=st.sampled_from([1.0, -0.3, 0.0, 100, torch.tensor(2.5), torch.tensor([2.5])]),
    need=st.sets(st.sampled_from(["C", "V"]), min_size=1),
)
def test_any_shape_and_layout(
    backend: Backend,
    device: str,
    exact: torch.dtype,
    assert_exact: Callable[..., None],
    sizes: tuple[int, ...],
    layouts: tuple[str, ...],
    masks: tuple[str, ...],
    scale: float | Tensor,
    need: set[str],
) -> None:
    """``expanded`` means that all layers share one core, or one draw of masks."""
    n_layers, n_cores, r1, r2, d_out = sizes
    inputs = make_inputs(
        "tt_contract",
        n_layers=n_layers,
        n_cores=n_cores,
        r1=r1,
        r2=r2,
        d_out=d_out,
        masks=True,
        dtype=exact,
        device=device,
    )
    inputs.update({name: None for name in ("keep_C", "keep_V") if name not in masks})
    for name, layout in zip(("C", "V", "keep_C", "keep_V"), layouts, strict=False):
        inputs[name] = with_layout(inputs[name], layout) if inputs[name] is not None else None
    names = tuple(sorted(need))
    if isinstance(scale, Tensor):
        scale, names = scale.to(device, exact), (*names, "scale")
    inputs["scale"] = scale
    dG = with_layout(upstream(inputs), layouts[4])
    with use_backend(backend):
        got = run(tt_contract, inputs, dG, names)
    formula = dense(inputs, dG)
    sizes_of = {k: abs(v) if k in ("C", "V", "scale") else v for k, v in inputs.items()}
    terms = dense(sizes_of, dG.abs())  # the results may cancel
    for name, value in got.items():
        assert_exact(value, formula[name].reshape(value.shape), name, terms=terms[name].max().item())


def test_layers_get_views_and_one_backward(
    backend: Backend,
    device: str,
    exact: torch.dtype,
    own: bool,
    assert_exact: Callable[..., None],
    record: Callable[[], Any],
) -> None:
    """The layers get G.unbind(0) without a copy, and dC and dV need two products for any number of layers."""
    inputs = make_inputs("tt_contract", n_layers=6, dtype=exact, device=device)
    C, V = inputs["C"].requires_grad_(), inputs["V"].requires_grad_()
    with use_backend(backend), record() as forward:
        G = tt_contract(**inputs)
    layers = G.unbind(0)
    assert all(
        layer.is_contiguous() and layer.untyped_storage().data_ptr() == G.untyped_storage().data_ptr()
        for layer in layers
    )
    loss = sum(((i + 1) * layer.square()).sum() for i, layer in enumerate(layers))
    with record() as backward:
        loss.backward()
    assert (len(forward.products), len(backward.products)) == ((0, 0) if own else (1, 2))
    if backend is not Backend.REFERENCE:
        assert len(forward.registered) == len(backward.registered) == 1
    formula = dense(inputs, 2 * torch.arange(1, 7, device=device)[:, None, None] * G.detach())
    assert_exact(C.grad, formula["C"])
    assert_exact(V.grad, formula["V"])


@pytest.mark.parametrize("need", ["C", "V"])
@pytest.mark.parametrize("masks", [False, True])
def test_frozen_factors_cost_no_product(
    backend: Backend, device: str, own: bool, record: Callable[[], Any], need: str, masks: bool
) -> None:
    inputs = make_inputs("tt_contract", masks=masks, device=device)
    inputs[need].requires_grad_()
    G = tt_contract(**inputs, backend=backend)
    with record() as seen:
        G.backward(torch.ones_like(G))
    assert len(seen.products) == (not own)
    assert inputs[need].grad.shape == inputs[need].shape
    assert inputs["V" if need == "C" else "C"].grad is None


def test_without_gradients_none_are_recorded(backend: Backend) -> None:
    assert not tt_contract(**make_inputs("tt_contract"), backend=backend).requires_grad
    inputs = make_inputs("tt_contract", masks=True)
    inputs["scale"] = torch.tensor(2.0, requires_grad=True)
    with torch.no_grad():
        assert not tt_contract(**inputs, backend=backend).requires_grad


@pytest.mark.parametrize("masks", [False, True])
def test_reads_nothing_it_did_not_write(backend: Backend, device: str, masks: bool) -> None:
    inputs = make_inputs("tt_contract", masks=masks, device=device)
    dG = upstream(inputs)
    with use_backend(backend):
        clean = run(tt_contract, inputs, dG)
        with poisoned_empty():
            poisoned = run(tt_contract, inputs, dG)
    for name, value in poisoned.items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("masks", [False, True])
def test_gradcheck(fp64: Backend, masks: bool) -> None:
    inputs = make_inputs("tt_contract", n_layers=2, r1=2, r2=3, d_out=4, masks=masks, dtype=torch.float64)
    keep = {name: inputs[name] for name in ("keep_C", "keep_V")}
    leaves = (inputs["C"].requires_grad_(), inputs["V"].requires_grad_(), torch.tensor(0.7).double().requires_grad_())
    with use_backend(fp64):
        assert torch.autograd.gradcheck(lambda C, V, scale: tt_contract(C, V, scale=scale, **keep), leaves)


@pytest.mark.parametrize("masks", [False, True])
def test_gradients_of_gradients(fp64: Backend, masks: bool) -> None:
    sizes = {"n_layers": 2, "n_cores": 2, "r1": 2, "r2": 3, "d_out": 2}
    inputs = make_inputs("tt_contract", **sizes, masks=masks, dtype=torch.float64)
    keep = {name: inputs[name] for name in ("keep_C", "keep_V")}
    leaves = (inputs["C"].requires_grad_(), inputs["V"].requires_grad_(), torch.tensor(0.7).double().requires_grad_())

    def function(C: Tensor, V: Tensor, scale: Tensor) -> Tensor:
        return tt_contract(C, V, scale=scale, **keep, backend=fp64).sin()

    assert torch.autograd.gradgradcheck(function, leaves)


def test_a_second_derivative(backend: Backend, exact: torch.dtype, assert_exact: Callable[..., None]) -> None:
    inputs = make_inputs("tt_contract", dtype=exact, masks=True)
    C, V = inputs["C"].requires_grad_(), inputs["V"].requires_grad_()
    (dC,) = torch.autograd.grad(tt_contract(**inputs, backend=backend).square().sum(), C, create_graph=True)
    got = torch.autograd.grad(dC.square().sum(), (C, V))
    wide_C, wide_V = (t.detach().double().requires_grad_() for t in (C, V))
    G = 0.75 * torch.einsum("lnab,lbd->land", wide_C * inputs["keep_C"], wide_V * inputs["keep_V"])
    (dC,) = torch.autograd.grad(G.square().sum(), wide_C, create_graph=True)
    for name, value, formula in zip("CV", got, torch.autograd.grad(dC.square().sum(), (wide_C, wide_V)), strict=True):
        assert_exact(value, formula, name)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend: Backend, device: str, half: torch.dtype) -> None:
    """The factors are multiplied in their own precision. Autocast lowers only the precision of activations."""

    def autocast(**inputs: Any) -> Tensor:
        with torch.autocast(device, half):
            return tt_contract(**inputs)

    inputs = make_inputs("tt_contract", masks=True, device=device)
    inputs["scale"] = torch.tensor(0.75, device=device)
    dG = upstream(inputs)
    with use_backend(backend):
        got, expected = (run(op, inputs, dG, ("C", "V", "scale")) for op in (autocast, tt_contract))
    for name, value in got.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


def test_meta_tensors_give_shapes(backend: Backend) -> None:
    inputs = make_inputs("tt_contract", masks=True)
    inputs = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    G = tt_contract(**{**inputs, "C": inputs["C"].requires_grad_()}, backend=backend)
    assert G.shape == (3, 5, 80)
    assert G.is_meta
    G.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"C": torch.ones(3, 5, 7)},
            r"expected C \[n_layers, n_cores, r1, r2\] and V \[r2, d_out\] .* got shapes \[3, 5, 7\]",
        ),
        ({"V": torch.ones(40, 7)}, r"with equal r2, got shapes \[3, 2, 5, 7\] and \[40, 7\]"),
        ({"V": torch.ones(7)}, r"got shapes \[3, 2, 5, 7\] and \[7\]"),
        ({"V": torch.ones(7, 40).double()}, "C and V must have the same dtype, got torch.float32 and torch.float64"),
        (
            {"keep_C": torch.ones(2, 5, 7, dtype=torch.bool)},
            r"keep_C must be \[n_layers, n_cores, r1, r2\] = \[3, 2, 5, 7\], got shape \[2, 5, 7\]",
        ),
        (
            {"keep_V": torch.ones(7, 40, dtype=torch.bool)},
            r"keep_V must be \[n_layers, r2, d_out\] = \[3, 7, 40\], got shape \[7, 40\]",
        ),
        ({"keep_C": torch.ones(3, 2, 5, 7)}, r"keep_C must be a bool mask \(True keeps\), got torch.float32"),
        ({"keep_V": torch.ones(3, 7, 40).byte()}, r"keep_V must be a bool mask \(True keeps\), got torch.uint8"),
        ({"scale": torch.ones(7)}, r"scale must be .*one element.* got shape \[7\]"),
        ({"scale": torch.ones(1, 1, 1, 1, 2)}, r"scale must be .*one element.* got shape \[1, 1, 1, 1, 2\]"),
    ],
)
def test_wrong_arguments(backend: Backend, changed: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match="^tt_contract: .*" + message):
        tt_contract(**{**make_inputs("tt_contract"), **changed}, backend=backend)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_a_scale_of_one_element_has_no_say_in_shape_and_dtype(
    backend: Backend, shape: tuple[int, ...], wide: torch.dtype
) -> None:
    inputs = make_inputs("tt_contract")
    expected = tt_contract(**inputs, backend=backend)
    scale = torch.full(shape, 0.75, dtype=wide, requires_grad=True)
    G = tt_contract(**{**inputs, "scale": scale}, backend=backend)
    torch.testing.assert_close(G, expected)
    G.sum().backward()
    assert scale.grad.shape == shape


@pytest.mark.parametrize("name", ["C", "V", "keep_C", "keep_V", "scale"])
def test_tensors_of_another_device(backend: Backend, name: str) -> None:
    inputs = make_inputs("tt_contract", masks=True)
    inputs["scale"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"one device, got (cpu and meta|meta and cpu)"):
        tt_contract(**{**inputs, name: inputs[name].to("meta")}, backend=backend)


def test_tensors_of_another_kind(backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=f"'{backend.value}' was requested but cannot run: .* got torch.int32"):
        tt_contract(torch.ones(1, 1, 2, 2).int(), torch.ones(2, 2).int(), backend=backend)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registered_ops_are_well_behaved(kernels: Backend, layout: str, masks: bool) -> None:
    inputs = make_inputs("tt_contract", n_layers=2, r1=3, r2=4, d_out=6, masks=masks)
    C, V, keep_C, keep_V = (
        with_layout(inputs[k], layout) if inputs[k] is not None else None for k in ("C", "V", "keep_C", "keep_V")
    )
    dG = with_layout(upstream(inputs), layout)
    forward = getattr(torch.ops.efft.tt_contract_fwd, kernels.value)
    backward = getattr(torch.ops.efft.tt_contract_bwd, kernels.value)
    torch.library.opcheck(forward, (C, V, keep_C, keep_V, 0.5))
    for need in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(backward, (dG, C, V, keep_C, keep_V, 0.5, *need))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_graph_breaks(backend: Backend, exact: torch.dtype, dynamic: bool) -> None:
    compiled = torch.compile(tt_contract, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for d_out in (8, 12) if dynamic else (8,):
        inputs = make_inputs("tt_contract", d_out=d_out, masks=True, dtype=exact)
        inputs["scale"] = torch.tensor(0.75, dtype=exact)
        dG = upstream(inputs)
        with use_backend(backend):
            got, expected = (run(op, inputs, dG, ("C", "V", "scale")) for op in (compiled, tt_contract))
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name])
