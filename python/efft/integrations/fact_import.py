"""Import the checkpoints of FacT's authors exactly (https://github.com/JieShibo/PETL-ViT, FacT-TT and FacT-TK)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from efft.adapting.inject import adapter_of, apply, check_plain
from efft.adapting.sharding import check_whole
from efft.methods.base import MethodGroup
from efft.methods.fact_tt import FacTTTBank, FacTTTConfig
from efft.planning.plan import make_plan
from efft.saving.io import check_numbers, head_tensors, misfits

# Names of tensors: U [r, d] and V [d, r]. Only the Tucker form has the core K [r, r, r] and P [r, 12 * blocks].
_U, _V, _K, _P = "FacTu.weight", "FacTv.weight", "FacTc", "FacTp"

_ATTENTION = ("q", "k", "v", "proj")
#: Number of matrices per block: four of the attention, and four each of fc1 and fc2.
_MATRICES = 12


@torch.no_grad()
def import_fact(model: nn.Module, tensors: Mapping[str, Tensor], scale: float) -> nn.Module:
    """Adapt a ViT by FacT-TT (:class:`efft.methods.FacTTTConfig`) with the factors and head of a checkpoint of FacT.

    The import is exact. A checkpoint of FacT-TK (the Tucker form) is converted to FacT-TT: its core is multiplied by P,
    because the authors' code arranges the cores of fc1 and fc2 in a way that :class:`efft.methods.FacTTKConfig` cannot
    express. The model computes the same function, and further training uses FacT-TT.

    Args:
        model: the timm ViT on which the checkpoint was trained, with the same number of classes. It must not be
            adapted.
        tensors: content of the checkpoint, from ``torch.load(path, weights_only=True)``. This library does not read
            pickles.
        scale: the scale s, by which the update is multiplied. The checkpoint does not contain it. In the authors' code
            it is the value of ``scale`` in the configuration of the task or in the command.

    Returns:
        The same ``model``.

    Raises:
        TypeError: ``tensors`` is not a mapping from names to tensors.
        ValueError: names or shapes do not fit this model, an entry is not a finite number, the model is already adapted
            or sharded, or it is not a ViT with q, k, v, an output projection and an MLP four times as wide in every
            block. The model is then unchanged.
    """
    check_plain(model)
    check_whole(model, "import_fact")
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TypeError("expected the tensors of a FacT checkpoint by name: torch.load(path, weights_only=True)")
    check_numbers(tensors, "the FacT checkpoint")
    if _U not in tensors or tensors[_U].dim() != 2:
        raise ValueError(f"expected the tensors of a FacT checkpoint, among them {_U!r} [r, d], got {sorted(tensors)}")
    config = FacTTTConfig(rank=tensors[_U].shape[0], scale=scale)
    plan = make_plan(model, config)
    group, *others = plan.groups
    blocks = dict.fromkeys(layer.target.block for layer in group.layers)
    matrices = [(site.last - site.first, site.last) for site in group.sites.values()]
    whole = sum(n for n, _ in matrices) == _MATRICES * len(blocks) == len(blocks) * max(last for _, last in matrices)
    if others or not whole:
        raise ValueError(
            f"a FacT checkpoint is for ViTs with q, k, v, o and an MLP four times as wide in every block, which this "
            f"{type(model).__name__} is not"
        )
    names, wrong = misfits(tensors, _shapes(model, group, plan.head, tucker=_K in tensors))
    if names or wrong:
        problems = "\n- ".join(names + wrong)
        raise ValueError(f"the FacT checkpoint does not fit this {type(model).__name__}:\n- {problems}")
    cores = _tucker(tensors) if _K in tensors else [_train(tensors, block) for block in blocks]
    apply(model, config)
    factors = adapter_of(model)[group.name]
    assert isinstance(factors, FacTTTBank)
    factors.U.copy_(tensors[_U].t())
    factors.V.copy_(tensors[_V].t())
    for block, core in zip(factors.C, cores, strict=True):
        block.copy_(core)
    for name, tensor in head_tensors(model, plan.head).items():
        tensor.copy_(tensors[name])
    return model


def _shapes(model: nn.Module, group: MethodGroup, head: list[str], tucker: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a checkpoint for ``model``."""
    r, d = group.config.rank, min(layer.d_in for layer in group.layers)
    blocks = dict.fromkeys(layer.target.block for layer in group.layers)
    shapes: dict[str, tuple[int, ...]] = {_U: (r, d), _V: (d, r)}
    if tucker:
        shapes |= {_K: (r, r, r), _P: (r, _MATRICES * len(blocks))}
    else:
        for block in blocks:
            shapes |= {f"{block}.attn.{part}_FacTs.weight": (r, r) for part in _ATTENTION}
            shapes |= {f"{block}.mlp.fc1_FacTs.weight": (4 * r, r), f"{block}.mlp.fc2_FacTs.weight": (r, 4 * r)}
    return shapes | {name: tuple(tensor.shape) for name, tensor in head_tensors(model, head).items()}


def _train(tensors: Mapping[str, Tensor], block: str) -> Tensor:
    """Return the cores ``[12, r, r]`` of a block from the weights of the linear layers between FacTu and FacTv."""
    attention = [tensors[f"{block}.attn.{part}_FacTs.weight"].t() for part in _ATTENTION]
    up, down = (tensors[f"{block}.mlp.fc{i}_FacTs.weight"] for i in (1, 2))  # [4 r, r], [r, 4 r]
    r = len(down)
    return torch.cat([torch.stack(attention), up.view(4, r, r).mT, down.t().reshape(4, r, r)])


def _tucker(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the cores ``[12, r, r]`` of every block from the product K P, which has 12 columns per block.

    In the authors' code, fc1 and fc2 each use a slice [r, r, 4] of the product as a matrix [r, 4 r].
    """
    K, P = tensors[_K], tensors[_P]
    r = len(K)
    cores = []
    for columns in P.split(_MATRICES, dim=1):
        product = K @ columns  # [r, r, 12]
        up, down = (product[:, :, first : first + 4].reshape(r, 4 * r) for first in (4, 8))
        attention = product[:, :, :4].permute(2, 0, 1)
        cores.append(torch.cat([attention, up.view(r, 4, r).transpose(0, 1), down.t().reshape(4, r, r)]))
    return cores
