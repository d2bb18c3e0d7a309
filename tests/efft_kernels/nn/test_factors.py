"""Test TTFactors: the operands (D, G) of each site, with and without dropout, composed together or one by one.

A site is the part of the factors that one layer uses, and D G is the update of this layer. A pass is a forward pass
from ``prepare`` to ``release``. Other tests cover parameter counts, trainable scales and diagonals, copies, and errors.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efft_kernels import Site, TTFactors
from efft_kernels.nn.factors import Masks


def parameters(bank: TTFactors) -> int:
    return sum(p.numel() for p in bank.parameters())


def test_parameter_counts_of_the_paper() -> None:
    """At rank 32, ViT-B/16 has 245,760 parameters for EFFT2, 178,176 with shared cores, and 159,744 for EFFT1.

    EFFT2 has one tensor train for attention and one for the MLPs. EFFT1 has one tensor train for both.
    """

    def efft2(sharing: str) -> int:
        attention = TTFactors(768, 768, 32, n_layers=12, n_cores=4, core_sharing=sharing)
        return parameters(attention) + parameters(
            TTFactors(768, 3072, 32, n_layers=12, n_cores=2, core_sharing=sharing)
        )

    assert efft2("per_layer") == 245_760
    assert efft2("shared") == 178_176
    assert parameters(TTFactors(768, 3072, 32, n_layers=12, n_cores=3)) == 159_744


def test_shapes() -> None:
    bank = TTFactors(6, 10, (2, 4), n_layers=3, n_cores=5, trainable_scale=True, scale=2.5)
    assert {name: tuple(p.shape) for name, p in bank.named_parameters()} == {
        "U": (6, 2),
        "C": (3, 5, 2, 4),
        "V": (4, 10),
        "log_scale": (1, 1),
    }
    assert bank.scale.item() == bank.scale_value == 2.5
    bank = TTFactors(6, 10, 3, n_layers=3, n_cores=5, core_sharing="shared", trainable_scale="matrix", scale=-2.0)
    assert bank.log_scale.shape == (3, 5)
    assert (bank.scale == -2).all()
    with torch.no_grad():
        bank.log_scale.add_(1)
    assert bank.scale_value == pytest.approx(-5.43656366)
    bank.reset_parameters()
    assert (bank.scale == -2).all()
    bank = TTFactors(6, 10, 3, n_layers=3, core_sharing="shared", device="meta", dtype=torch.bfloat16)
    assert bank.C.shape == (1, 1, 3, 3)
    assert {p.device.type for p in bank.parameters()} == {"meta"}
    assert {p.dtype for p in bank.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prepared", [False, True])
def test_factors_of_every_site(
    make_bank: Callable[..., Any], update: Callable[..., Tensor], kind: str, core_sharing: str, prepared: bool
) -> None:
    bank, sites = make_bank(kind, core_sharing=core_sharing)
    bindings = [bank.bind(site) for site in sites]
    if prepared:
        bank.prepare()
    for binding, site in zip(bindings, sites, strict=True):
        D, G = bank.down_up(binding)
        assert (D.shape[0], G.shape[1]) == bank.sizes(site)
        torch.testing.assert_close(D @ G, update(bank, site))
    bank.release()


def test_sites_in_any_order_and_number(make_bank: Callable[..., Any], update: Callable[..., Tensor]) -> None:
    """A model may skip layers, adapt them twice or bind them in reverse order, and cores need not be neighbors."""
    bank, _ = make_bank("attention", n_layers=4)
    sites = [Site(3, (0,)), Site(1, (0,)), Site(3, (0,)), Site(1, (3, 0)), Site(2, (2,), columns=(2, 7))]
    bindings = [bank.bind(site) for site in sites]
    bank.prepare()
    for binding, site in zip(bindings, sites, strict=True):
        D, G = bank.down_up(binding)
        torch.testing.assert_close(D @ G, update(bank, site))


@pytest.mark.parametrize("trainable_scale", [False, True, "matrix"])
def test_contracting_at_once_or_one_by_one(
    make_stack: Callable[..., Any], kind: str, core_sharing: str, trainable_scale: bool | str
) -> None:
    stack = make_stack(kind, core_sharing=core_sharing, trainable_scale=trainable_scale)
    at_once = stack.gradients()
    stack.prepare = False
    one_by_one = stack.gradients()
    assert ("log_scale" in at_once) == bool(trainable_scale)
    for name, value in at_once.items():
        torch.testing.assert_close(value, one_by_one[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("trainable_scale", [True, "matrix"])
def test_gradients(
    make_stack: Callable[..., Any],
    update: Callable[..., Tensor],
    kind: str,
    core_sharing: str,
    trainable_scale: bool | str,
) -> None:
    """The ops return the same gradients of every factor and of the scale as autograd through dense updates."""
    stack = make_stack(kind, core_sharing=core_sharing, trainable_scale=trainable_scale)
    got = stack.gradients()
    dense = stack.gradients(lambda layer, x: x @ (layer.stored.t() + update(stack.bank, layer.site)) + layer.bias)
    for name, value in got.items():
        torch.testing.assert_close(value, dense[name], msg=lambda text, name=name: f"{name}: {text}")


#: The sides of the update, inputs or outputs, that trainable diagonals scale.
SIDES = pytest.mark.parametrize("scaled", [("in",), ("out",), ("in", "out")], ids="+".join)


@SIDES
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_with_diagonals(
    make_stack: Callable[..., Any],
    update: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    core_sharing: str,
    scaled: tuple[str, ...],
    dropout: float,
) -> None:
    """Compare with autograd through dense updates. Without dropout, the sites are also composed one by one."""
    stack = make_stack(kind, core_sharing=core_sharing, dropout=dropout, scaled=scaled, trainable_scale="matrix")
    masks = given_masks(stack.bank, [layer.site for layer in stack.layers], monkeypatch) if dropout else None
    got = stack.gradients()
    sides = {name: rows for name, rows in (("a", stack.bank.a), ("b", stack.bank.b)) if rows is not None}
    assert sides
    assert set(sides) <= set(got)
    dense = stack.gradients(
        lambda layer, x: x @ (layer.stored.t() + update(stack.bank, layer.site, masks)) + layer.bias
    )
    for name, value in got.items():
        torch.testing.assert_close(value, dense[name], msg=lambda text, name=name: f"{name}: {text}")
    if not dropout:
        stack.prepare = False
        for name, value in stack.gradients().items():
            torch.testing.assert_close(value, dense[name], msg=lambda text, name=name: f"{name} alone: {text}")


@SIDES
def test_diagonals_belong_to_one_site_each(make_bank: Callable[..., Any], kind: str, scaled: tuple[str, ...]) -> None:
    """Diagonals start at one. Each element belongs to one site, or to none if the sites use only some columns of V."""
    bank, sites = make_bank(kind, scaled=scaled)
    bank.reset_parameters()
    used = {name: torch.zeros_like(rows) for name, rows in (("a", bank.a), ("b", bank.b)) if rows is not None}
    for site in sites:
        sizes = bank.sizes(site)
        for rows, size, side, layers in zip(bank.diagonals(site), sizes, ("in", "out"), ((0, 2), (1, 2)), strict=True):
            assert (rows is not None) == (side in scaled and site.layer in layers)
            if rows is None:
                continue
            assert torch.equal(rows, torch.ones(size, dtype=rows.dtype))
            of = "b" if site.transpose == (side == "in") else "a"
            used[of] += torch.autograd.grad(rows.sum(), getattr(bank, of))[0]
    for name, count in used.items():
        assert count.max() == 1, name
        narrow = kind == "whole block" and name == "b" and "out" in scaled
        assert count.min() == (0 if narrow else 1), name


@pytest.mark.filterwarnings("error")
def test_layers_are_scaled_in_one_view(make_stack: Callable[..., Any], kind: str) -> None:
    """The diagonals of sites that are composed together are adjacent rows of one parameter.

    The bank can therefore use a view of the parameter. It does not need to stack rows or to scatter gradients.
    """
    stack = make_stack(kind, n_layers=4)
    sites = [layer.site for layer in stack.layers]
    bank = TTFactors(8, stack.bank.d_out, (3, 5), n_layers=4, n_cores=stack.bank.n_cores, scaled_inputs=sites)
    for of in {site.cores: [s for s in sites if s.cores == site.cores] for site in sites}.values():
        for kind_of in {(s.transpose, s.columns): None for s in of}:
            alike = [s for s in of if (s.transpose, s.columns) == kind_of]
            rows = bank._diagonals(alike)[0]
            owner = bank.b if alike[0].transpose else bank.a
            assert rows.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()


def test_a_layer_with_diagonals_compiles(make_stack: Callable[..., Any], kind: str) -> None:
    stack = make_stack(kind, scaled=("in", "out"))
    leaves = list(stack.bank.parameters())

    def run() -> Tensor:
        return sum(layer(x).square().sum() for layer, x in zip(stack.layers, stack.inputs, strict=True))

    grads = [torch.autograd.grad(f(), leaves) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)]
    torch.testing.assert_close(*grads)


def test_diagonals_against_finite_differences(make_stack: Callable[..., Any]) -> None:
    stack = make_stack("mlp", scaled=("in", "out"))
    gradients, step = stack.gradients(), 1e-5
    for name in ("a", "b"):
        flat = getattr(stack.bank, name).detach().view(-1)
        for i in range(0, len(flat), 7):
            losses = []
            for change in (step, -2 * step):
                flat[i] += change
                losses.append(stack.gradients()["loss"])
            flat[i] += step
            slope = (losses[0] - losses[1]) / (2 * step)
            torch.testing.assert_close(slope, gradients[name].flatten()[i], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trainable_scale", [True, "matrix"])
def test_scales_against_finite_differences(make_stack: Callable[..., Any], kind: str, trainable_scale: Any) -> None:
    stack = make_stack(kind, trainable_scale=trainable_scale)
    gradient, step = stack.gradients()["log_scale"].flatten(), 1e-5
    flat = stack.bank.log_scale.detach().view(-1)
    for i in range(len(flat)):
        losses = []
        for change in (step, -2 * step):
            flat[i] += change
            losses.append(stack.gradients()["loss"])
        flat[i] += step
        torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), gradient[i], rtol=1e-6, atol=1e-8)


def test_a_scale_that_follows_another(make_bank: Callable[..., Any], update: Callable[..., Tensor]) -> None:
    """One bank owns the scale, which multiplies the updates of both banks and gets the gradients of both."""
    leader, sites = make_bank("mlp", trainable_scale=True)
    bank, _ = make_bank("mlp", scale=-3.0)
    bank.follow_scale(leader)
    assert [name for name, _ in bank.named_parameters()] == ["U", "C", "V"]
    assert bank.scale.item() == pytest.approx(-3 * leader.log_scale.exp().item())
    of_both = [one.down_up(one.bind(sites[0])) for one in (leader, bank)]
    (together,) = torch.autograd.grad(sum((D @ G).square().sum() for D, G in of_both), leader.log_scale)
    dense = sum(update(one, sites[0]).square().sum() for one in (leader, bank))
    torch.testing.assert_close(together, torch.autograd.grad(dense, leader.log_scale)[0])
    copied_leader, copied = copy.deepcopy(torch.nn.ModuleList([leader, bank]))
    with torch.no_grad():
        copied_leader.log_scale.add_(1)
    assert copied.scale_value == pytest.approx(bank.scale_value * 2.718281828)


def test_one_launch_for_each_kind_of_site(make_stack: Callable[..., Any]) -> None:
    """qkv, proj, fc1 and fc2 need four calls of tt_contract forward and four backward, for any number of layers."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name().partition(".")[0])
            return func(*args, **(kwargs or {}))

    for n_layers in (2, 5):
        stack, names = make_stack("whole block", n_layers=n_layers, dropout=0.1), []
        with Count():
            stack.run().backward()
        assert names.count("efft::tt_contract_fwd") == names.count("efft::tt_contract_bwd") == 4
        assert names.count("efft::tt_linear_fwd") == names.count("efft::tt_linear_bwd") == 4 * n_layers


# Dropout


def test_masks(make_bank: Callable[..., Any]) -> None:
    """A fraction p of the entries is dropped, independently for every layer, scope, factor and pass."""
    bank, sites = make_bank("mlp", n_layers=2, rank=(40, 50), dropout=0.3)
    for site in sites:
        bank.bind(site)
    one, two = bank.draw_masks(2), bank.draw_masks(2)
    assert [tuple(m.shape) for m in one] == [(2, 2, 8, 40), (2, 2, 40, 50), (2, 2, 50, 32)]
    draws = [mask.double().flatten(2).flatten(0, 1) for masks in (one, two) for mask in masks]
    for kept in (row for draw in draws for row in draw):
        assert abs(kept.mean() - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    for a, b in combinations([row[:320] for draw in draws for row in draw], 2):
        assert abs((a - 0.7) @ (b - 0.7) / 0.21) < 5 * 320**0.5, "two draws are correlated"


def test_nothing_is_dropped_in_eval_mode_or_without_dropout(make_bank: Callable[..., Any]) -> None:
    bank, sites = make_bank("mlp", dropout=0.3)
    bank.bind(sites[0])
    assert bank.draw_masks(1) is not None
    assert bank.eval().draw_masks(1) is None
    bank, _ = make_bank("mlp", dropout=0.0)
    assert bank.draw_masks(1) is None


def given_masks(bank: TTFactors, sites: list[Site], monkeypatch: pytest.MonkeyPatch) -> Masks:
    """Draw and return masks for all layers. From now on, ``bank`` uses these masks."""
    n_scopes, n_layers = 1 + max(site.mask_scope for site in sites), bank.n_layers
    shapes = (n_layers, n_scopes, *bank.U.shape), (n_layers, *bank.C.shape[1:]), (n_layers, n_scopes, *bank.V.shape)
    masks = Masks(*(torch.rand(shape) > 0.4 for shape in shapes))

    def draw(n: int) -> Masks:
        assert n == n_layers
        return masks

    monkeypatch.setattr(bank, "draw_masks", draw)
    return masks


@pytest.mark.parametrize("trainable_scale", [True, "matrix"])
def test_dropout_on_every_site(
    make_stack: Callable[..., Any],
    update: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    core_sharing: str,
    trainable_scale: bool | str,
) -> None:
    """Each site uses the masks of its layer, its scope and its cores, rescaled by 1/(1-p), forward and backward."""
    stack = make_stack(kind, core_sharing=core_sharing, dropout=0.4, trainable_scale=trainable_scale)
    masks = given_masks(stack.bank, [layer.site for layer in stack.layers], monkeypatch)
    got = stack.gradients()
    dense = stack.gradients(
        lambda layer, x: x @ (layer.stored.t() + update(stack.bank, layer.site, masks)) + layer.bias
    )
    for name, value in got.items():
        torch.testing.assert_close(value, dense[name], msg=lambda text, name=name: f"{name}: {text}")


def test_layers_of_one_scope_share_a_draw(make_bank: Callable[..., Any]) -> None:
    """Sites with the same layer and mask_scope share one mask of U. Other sites have other masks.

    Each pass draws new masks.
    """
    bank, sites = make_bank("attention", dropout=0.5)
    for site in sites:
        bank.bind(site)
    bank.prepare()
    downs = [bank.down_up(binding)[0] for binding in bank.bindings]
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2]), "another layer"
    assert bank.down_up(bank.bindings[0])[0] is downs[0]
    bank.prepare()
    assert not torch.equal(bank.down_up(bank.bindings[0])[0], downs[0])

    bank, _ = make_bank("attention", dropout=0.5)
    for scope in (0, 1, 1):
        bank.bind(Site(0, (0,), mask_scope=scope))
    bank.prepare()
    downs = [bank.down_up(binding)[0] for binding in bank.bindings]
    assert not torch.equal(downs[0], downs[1])
    assert torch.equal(downs[1], downs[2])


@pytest.mark.parametrize("transpose", [False, True])
def test_dropout_leaves_the_expected_update_alone(
    make_bank: Callable[..., Any], update: Callable[..., Tensor], transpose: bool
) -> None:
    """The mean over 4,000 layers with shared factors differs from the update by at most 5 standard errors."""
    n = 4000
    bank, _ = make_bank("attention", n_layers=n, core_sharing="shared", dropout=0.3)
    sites = [Site(layer, (1,), transpose=transpose) for layer in range(n)]
    for site in sites:
        bank.bind(site)
    with torch.no_grad():
        bank.prepare()
        deltas = torch.stack([D @ G for D, G in map(bank.down_up, bank.bindings)])
        error = deltas.mean(0) - update(bank, sites[0])
    assert (error.abs() < 5 * deltas.std(0) / n**0.5).all()
    assert deltas.std(0).min() > 0.1 * deltas.mean(0).abs().min()


# Start and end of a pass


def test_a_pass_ends_with_release(make_bank: Callable[..., Any]) -> None:
    bank, sites = make_bank("mlp")
    bank.bind(sites[0])
    bank.prepare()
    before = bank.down_up(bank.bindings[0])[1]
    with torch.no_grad():
        bank.C.mul_(2)
    assert bank.down_up(bank.bindings[0])[1] is before
    bank.release()
    torch.testing.assert_close(bank.down_up(bank.bindings[0])[1], 2 * before)


def test_copies_in_the_middle_of_a_pass(make_bank: Callable[..., Any]) -> None:
    """A deepcopy or pickle copies the factors but not the current pass."""
    bank, sites = make_bank("mlp", dropout=0.5)
    for site in sites:
        bank.bind(site)
    bank.prepare()
    (bank.down_up(bank.bindings[0])[1].sum() + bank.down_up(bank.bindings[1])[1].sum()).backward()
    for made in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert [b.site for b in made.bindings] == [b.site for b in bank.bindings]
        for name, value in bank.named_parameters():
            assert torch.equal(value, dict(made.named_parameters())[name])
        made.eval()
        with torch.no_grad():
            made.C.zero_()
        assert not made.down_up(made.bindings[0])[1].any(), "the copy computes with its own factors"
    assert bank.C.any()


def test_a_bank_that_nothing_is_bound_to() -> None:
    bank = TTFactors(4, 4, 2, dropout=0.1)
    bank.prepare()
    bank.release()


# Errors


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, r"sizes and ranks must be at least 1, got {'r1': 0, 'r2': 0}"),
        ({"rank": (2, 0)}, r"must be at least 1, got {'r2': 0}"),
        ({"d_in": 0}, r"must be at least 1, got {'d_in': 0}"),
        ({"n_layers": 0, "n_cores": -1}, r"must be at least 1, got {'n_layers': 0, 'n_cores': -1}"),
        ({"core_sharing": "layers"}, "core_sharing must be 'per_layer' or 'shared', got 'layers'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"trainable_scale": "group"}, "trainable_scale must be False, True or 'matrix', got 'group'"),
        ({"scaled_inputs": [Site(1)]}, r"Site\(layer=1, .* does not fit a bank of 1 layers"),
        ({"scaled_outputs": [Site(experts=1)]}, "a site of experts cannot have diagonals"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TTFactors(**{"d_in": 4, "d_out": 4, "rank": 2, **changed})


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site(2), r"Site\(layer=2, .* does not fit a bank of 2 layers with 3 cores each"),
        (Site(-1), r"does not fit a bank of 2 layers"),
        (Site(0, (0, 3)), r"cores=\(0, 3\), .* does not fit a bank of 2 layers with 3 cores each"),
        (Site(0, ()), "has no cores: expected one per column block"),
        (Site(0, columns=(4, 9)), r"columns=\(4, 9\), .* does not fit a tensor train with 8 output columns"),
        (Site(0, columns=(4, 4)), "does not fit a tensor train with 8 output columns"),
        (Site(0, columns=(-1, 4)), "does not fit a tensor train with 8 output columns"),
        (Site(0, (0, 1), transpose=True), "a transposed tensor train has one core"),
        (Site(0, mask_scope=-1), "mask_scope must be 0 or more"),
    ],
)
def test_wrong_sites(site: Site, message: str) -> None:
    bank = TTFactors(4, 8, 2, n_layers=2, n_cores=3)
    with pytest.raises(ValueError, match=message):
        bank.bind(site)
    assert bank.bindings == []


@pytest.mark.filterwarnings("error")
def test_repr() -> None:
    bank = TTFactors(4, 8, (2, 3), n_layers=2, n_cores=3, scale=0.5, dropout=0.1, trainable_scale=True)
    sizes = "d_in=4, d_out=8, rank=(2, 3), n_layers=2, n_cores=3"
    assert repr(bank) == f"TTFactors({sizes}, core_sharing='per_layer', scale=0.5, dropout=0.1)"
