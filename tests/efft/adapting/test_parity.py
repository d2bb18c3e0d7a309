"""Compare adapted models with the paper's dense formulation (``paper_code.py``), with and without factor dropout.

The tests compare outputs and the gradients of the input, the factors and the head. Other tests cover the masks of
factor dropout, and an MLP with a gate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import TTFactors
from efft_kernels.nn.factors import Masks
from tests.efft.adapting.paper_code import Draw, Kept, Train, attach_efft1, attach_efft2

Make = Callable[..., nn.Module]

# Tolerances for rounding only, relative to the largest element of each tensor.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}
S = (0.7, 1.9)  # the scales of attention and MLP differ, so a mix-up would be visible
P = 0.3
#: For each kind of group, its places in the dense formulation. For each place, the index of the draw of masks for U and
#: V, and the indices of the cores in this library.
PLACES = {
    "mhsa": {"mhsa": (0, (0, 1, 2, 3))},
    "ffn": {"fc1": (0, (0,)), "fc2": (1, (1,))},
    "joint": {"qkvo": (0, (0,)), "fc1": (1, (1,)), "fc2": (2, (2,))},
}
#: In Swin, ranks double with the width, and the MLP has rectangular cores [m, 2 m], as in the paper's code.
SWIN_RANKS = {f"stage{i + 1}_mhsa": 3 << i for i in range(4)} | {
    f"stage{i + 1}_ffn": (2 << i, 4 << i) for i in range(4)
}


def stages(model: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Return (prefix of the group names, blocks) of each stage. A ViT has one stage."""
    if hasattr(model, "layers"):
        return [(f"stage{i + 1}_", list(stage.blocks)) for i, stage in enumerate(model.layers)]
    return [("", list(model.blocks))]


def to_paper(factors: TTFactors, layout: str) -> Train:
    """Return copies of the factors in the paper's storage layout, as leaves of autograd."""
    cores = factors.C.detach().flatten(0, 1)  # [n_layers * n_cores, r1, r2]
    cores = cores.permute(1, 2, 0) if layout == "last" else cores
    U, C, V = (t.detach().clone().contiguous().requires_grad_() for t in (factors.U, cores, factors.V))
    return Train(U, C, V, layout)


def gradients_of(train: Train, like: TTFactors) -> dict[str, Tensor]:
    """Return the gradients of a tensor train in the storage layout of ``like``."""
    assert train.C.grad is not None
    C = train.C.grad.permute(2, 0, 1) if train.layout == "last" else train.C.grad
    return {"U": train.U.grad, "C": C.reshape(like.C.shape), "V": train.V.grad}


def draw_of(masks: dict[str, Masks], prefix: str, kinds: tuple[str, ...], keep: float, dtype: torch.dtype) -> Draw:
    """Return a function that returns the masks of one stage in the form that the dense formulation expects."""

    def draw(block: int, place: str) -> Kept:
        kind = next(kind for kind in kinds if place in PLACES[kind])
        scope, cores = PLACES[kind][place]
        U, C, V = (mask.to(dtype) for mask in masks[prefix + kind])
        return Kept(U[block, scope] / keep, [C[block, core] / keep for core in cores], V[block, scope] / keep)

    return draw


def dense_twin(
    base: nn.Module, adapted: nn.Module, masks: dict[str, Masks] | None, layout: str
) -> tuple[nn.Module, dict[str, Train]]:
    """Return ``base`` with dense updates from the adapted model's factors, and its tensor trains by group name."""
    config, keep = adapted.efft.config, 1 - adapted.efft.config.dropout
    trains = {name: to_paper(factors, layout) for name, factors in adapted.efft.items()}
    head = base.get_submodule(adapted.efft.head[0])
    dtype = next(head.parameters()).dtype
    base.requires_grad_(False)
    head.requires_grad_(True)
    for prefix, blocks in stages(base):
        if config.variant == "efft1":
            draw = None if masks is None else draw_of(masks, prefix, ("joint",), keep, dtype)
            attach_efft1(blocks, trains[prefix + "joint"], config.scale, draw=draw)
        else:
            draw = None if masks is None else draw_of(masks, prefix, ("mhsa", "ffn"), keep, dtype)
            pair = trains[prefix + "mhsa"], trains[prefix + "ffn"]
            attach_efft2(blocks, *pair, S, per_block=config.core_sharing == "per_layer", draw=draw)
    return base, trains


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (output, gradient of the input) for a loss in which every output has a different weight."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos()
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def assert_close(what: str, ours: Tensor | None, dense: Tensor | None) -> None:
    assert ours is not None, what
    assert dense is not None, what
    assert dense.abs().max() > 0, f"{what}: the expected tensor is zero"
    error = ((ours - dense).abs().max() / dense.abs().max()).item()
    assert error < TOLERANCE[ours.dtype], f"{what}: relative error {error:.1e}"


def configuration(architecture: str, variant: str, **changes: Any) -> efft.EfftConfig:
    if variant == "efft1":
        return efft.EfftConfig(variant="efft1", rank=(3, 5), scale=S[0], **changes)
    rank: Any = {"mhsa": (4, 4), "ffn": (3, 5)} if architecture == "vit" else SWIN_RANKS
    return efft.EfftConfig(rank=rank, scale={"mhsa": S[0], "ffn": S[1]}, **changes)


CASES = [
    ("vit", "efft2", "shared"),
    ("vit", "efft2", "per_layer"),
    ("vit", "efft1", "per_layer"),
    ("swin", "efft2", "shared"),
    ("swin", "efft2", "per_layer"),
]


@pytest.mark.parametrize("dropout", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("architecture", "variant", "sharing"), CASES, ids=["-".join(c) for c in CASES])
def test_outputs_and_gradients_equal_dense_formulation(
    architecture: str,
    variant: str,
    sharing: str,
    dtype: torch.dtype,
    dropout: bool,
    tiny_vit: Make,
    tiny_swin: Make,
    randomize: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = (tiny_vit(depth=3) if architecture == "vit" else tiny_swin()).to(dtype).train(dropout)
    adapted = copy.deepcopy(base)
    efft.apply(adapted, configuration(architecture, variant, core_sharing=sharing, dropout=P))
    randomize(adapted, std=0.5 if architecture == "vit" else 0.2)
    masks = None
    if dropout:
        masks = {name: factors.draw_masks(factors.n_layers) for name, factors in adapted.efft.items()}
        recorded = {id(factors): masks[name] for name, factors in adapted.efft.items()}
        monkeypatch.setattr(TTFactors, "draw_masks", lambda self, n_layers: recorded[id(self)])
    side = 16 if architecture == "vit" else 32
    x = torch.randn(2, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(3))
    plain = base(x).detach()
    layout = "last" if architecture == "vit" else "first"
    dense, trains = dense_twin(base, adapted, masks, layout)

    y, dx = run(adapted, x)
    y_dense, dx_dense = run(dense, x)

    assert (y_dense - plain).norm() > 0.1 * plain.norm(), "the update is too small to compare"
    assert_close("output", y, y_dense)
    assert_close("input", dx, dx_dense)
    for name, factors in adapted.efft.items():
        for factor, dense_gradient in gradients_of(trains[name], factors).items():
            assert_close(f"{name}.{factor}", getattr(factors, factor).grad, dense_gradient)
    head = adapted.efft.head[0]
    for name, parameter in dense.get_submodule(head).named_parameters():
        assert_close(f"head.{name}", adapted.get_submodule(head).get_parameter(name).grad, parameter.grad)


def test_dropout_draws_follow_the_paper(tiny_vit: Make) -> None:
    """Every pass draws masks of U and V once per block for q, k, v and o, once for fc1 and once for fc2.

    Each core has one mask.
    """
    expected_scopes = {"efft2": {"mhsa": 1, "ffn": 2}, "efft1": {"joint": 3}}
    for variant, scopes in expected_scopes.items():
        model = efft.apply(tiny_vit(), efft.EfftConfig(variant=variant, rank=8, dropout=0.3)).train()
        for name, factors in model.efft.items():
            first, second = factors.draw_masks(2), factors.draw_masks(2)
            assert first.U.shape == (2, scopes[name], 16, 8)
            assert first.V.shape == (2, scopes[name], *factors.V.shape)
            assert first.C.shape == (2, factors.n_cores, 8, 8)
            for drawn in (torch.cat([first.U, second.U]).flatten(0, 1), torch.cat([first.V, second.V]).flatten(0, 1)):
                assert len(drawn.unique(dim=0)) == len(drawn), "two draws are equal"
            kept = torch.cat([m.flatten() for m in first]).double().mean().item()
            assert abs(kept - 0.7) < 0.05
            assert factors.eval().draw_masks(2) is None


def test_dropout_keeps_the_mean_of_the_update(tiny_vit: Make, randomize: Make) -> None:
    model = randomize(efft.apply(tiny_vit(), efft.EfftConfig(rank=4, dropout=0.2)))
    layers = [model.blocks[1].attn.qkv, model.blocks[0].attn.proj, model.blocks[1].mlp.fc1, model.blocks[0].mlp.fc2]
    n = 800
    sums = [torch.zeros(()) for _ in layers]
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(n):
            for i, layer in enumerate(layers):
                D, G = layer.factors.down_up(layer.binding)
                sums[i] = sums[i] + (D @ G).t()
        for layer, total in zip(layers, sums, strict=True):
            expected = layer.delta_weight()
            assert ((total / n - expected).norm() / expected.norm()).item() < 0.1


def test_gated_mlp_has_one_core_for_each_half_of_fc1(tiny_vit: Make, randomize: Make, images: Tensor) -> None:
    """In DINOv2's packed SwiGLU, the update of fc1 is [U C_0 V | U C_1 V], and that of fc2 is (U C_2 V)ᵀ."""
    layers = pytest.importorskip("timm", reason="needs timm: pip install 'efft-kernels[vision]'").layers
    base = tiny_vit(mlp_layer=layers.SwiGLUPacked, mlp_ratio=4).double().eval()
    model = randomize(efft.apply(copy.deepcopy(base), efft.EfftConfig(rank=4, targets="ffn", scale=0.6)))
    factors = model.efft["ffn"]
    assert factors.V.shape == (4, 32)
    assert factors.C.shape == (2, 3, 4, 4)
    with torch.no_grad():
        for i, block in enumerate(base.blocks):
            gate, up, down = (factors.U @ factors.C[i, k] @ factors.V for k in range(3))
            block.mlp.fc1.weight += 0.6 * torch.cat((gate, up), dim=1).t()
            # fc2 has the transposed update, so its weight [out, in] changes by U C V.
            block.mlp.fc2.weight += 0.6 * down
        torch.testing.assert_close(model(images.double()), base(images.double()), rtol=1e-10, atol=1e-10)
