"""Reduce the ranks of trained factors to the number of directions that the updates of their layers use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from efft.adapting.inject import Adapter, adapted_layers, adapter_of
from efft.adapting.sharding import check_whole
from efft.config import is_number, quote
from efft.methods.efft import EfftConfig
from efft_kernels import TTFactors

Rank = tuple[int, int]

#: Singular values are regarded as rounding errors if their norm, divided by the norm of all singular values, is below
#: this number times the machine epsilon.
_ROUNDING = 32


@dataclass(frozen=True)
class PruneReport:
    """Report the effect of :func:`prune` on each group. Printing the report gives one line per group.

    Attributes:
        before, ranks: (r1, r2) of each group before and after.
        relative_error: the Frobenius norm of the change of all updates of the group, divided by the norm of these
            updates. The norm of the change is the root of the sum of the squared singular values that were dropped. The
            updates are computed with all columns of V, even if a weight uses only a part of them.
    """

    before: dict[str, Rank]
    ranks: dict[str, Rank]
    relative_error: dict[str, float]

    def __str__(self) -> str:
        return "\n".join(
            f"{name}: rank {self.before[name]} to {rank}, {self.relative_error[name]:.1e} of the update lost"
            for name, rank in self.ranks.items()
        )


@torch.no_grad()
def prune(model: nn.Module, keep: float = 0.99) -> PruneReport:
    """Reduce the ranks of the factors of a trained model to the ranks that its update needs, one group at a time.

    With ``U = Q_U R_U`` and ``Vᵀ = Q_V R_V``, the update of matrix i is ``Q_U K_i Q_Vᵀ``, where ``K_i = s_i R_U C_i
    R_Vᵀ``. The singular values of all K_i side by side belong to the directions that the updates use on the input side.
    The singular values of all K_i stacked vertically belong to the directions on the output side. The smallest singular
    values of both sides are dropped. The input side may lose half of the allowed squared norm, and the output side may
    lose the rest. The error is the root of the sum of the squared singular values that were dropped. If only one side
    is reduced, no other basis of the same rank has a smaller error. If both sides are reduced, no other bases of the
    same ranks have an error that is smaller by more than a factor of √2.

    The configuration gets the new ranks, so the adapter is saved and loaded like any other. U, C and V become new
    parameters. U and V keep their root mean square, so the learning rate still fits. **An existing optimizer refers to
    the old parameters, so create a new one.** The moments of the new optimizer start at zero.

    Args:
        model: a model adapted by EFFT that is not merged, not sharded, and not yet wrapped by anything that collects
            its parameters (DDP).
        keep: the share of the squared norm of each group's update to keep, in (0, 1]. With 1, the ranks become the
            numerical ranks of the update.

    Raises:
        ValueError: ``keep`` is out of range, the model is not as described above, its weights have diagonals
            (``layer_scale``), or an update is zero or not finite. Nothing is changed.
    """
    if not is_number(keep) or not 0 < keep <= 1:
        raise ValueError(f"prune: keep must be a share in (0, 1], got {quote(keep)}")
    check_whole(model, "prune")
    adapter = adapter_of(model)
    if _config(adapter).layer_scale is not None:
        raise ValueError(
            "prune: the weights have diagonals of their own (layer_scale), so the shared factors alone do not tell "
            "which directions the updates need; train with layer_scale=None to prune"
        )
    trains = _trains(adapter)
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise ValueError("the update is merged into this model's weights; call efft.unmerge(model) before pruning it")
    cuts = {name: _cut(name, factors, keep) for name, factors in trains.items()}
    before = {name: (factors.r1, factors.r2) for name, factors in trains.items()}
    ranks = {name: cut.rank for name, cut in cuts.items()}
    for name, factors in trains.items():
        if ranks[name] != before[name]:
            factors.replace(*cuts[name].factors)
    _note_ranks(adapter, ranks)
    return PruneReport(before, ranks, {name: cut.relative_error for name, cut in cuts.items()})


def set_ranks(model: nn.Module, ranks: Mapping[str, Rank]) -> None:
    """Replace the factors of a model by zeros of these ranks, so that the factors of a pruned model can be loaded."""
    adapter = adapter_of(model)
    for name, factors in _trains(adapter).items():
        r1, r2 = ranks[name]
        C = torch.zeros(*factors.C.shape[:2], r1, r2)
        factors.replace(torch.zeros(factors.d_in, r1), C, torch.zeros(r2, factors.d_out))
    _note_ranks(adapter, ranks)


def _note_ranks(adapter: Adapter, ranks: Mapping[str, Rank]) -> None:
    """Record the ranks in the configuration and the plan, which adapter files contain."""
    _config(adapter).rank = dict(ranks)
    for group in adapter.plan:
        group["rank"] = list(ranks[group["name"]])


def _config(adapter: Adapter) -> EfftConfig:
    if not isinstance(adapter.config, EfftConfig):
        raise ValueError(
            f"expected a model adapted by EFFT, got one of method {adapter.config.method!r}: it has no cores"
        )
    return adapter.config


def _trains(adapter: Adapter) -> dict[str, TTFactors]:
    return {name: factors for name, factors in adapter.items() if isinstance(factors, TTFactors)}


class _Cut(NamedTuple):
    rank: Rank
    relative_error: float
    factors: tuple[Tensor, Tensor, Tensor]


def _cut(name: str, train: TTFactors, keep: float) -> _Cut:
    """Compute factors of lower rank that keep the share ``keep`` of the squared norm of the group's update."""
    U, C, V = (factor.detach().to("cpu", torch.float64) for factor in (train.U, train.C, train.V))
    (QU, RU), (QV, RV) = torch.linalg.qr(U), torch.linalg.qr(V.t())
    each = (RU @ C @ RV.t()).expand(train.n_layers, -1, -1, -1)  # [n_layers, n_cores, r1, r2]
    scales = torch.as_tensor(train.scale).to("cpu", torch.float64).expand(train.n_layers, train.n_cores)
    used = sorted({(binding.site.layer, core) for binding in train.bindings for core in binding.site.cores})
    K = torch.stack([scales[layer, core] * each[layer, core] for layer, core in used])  # [n, r1, r2]
    energy = K.square().sum()
    if not energy.isfinite() or energy == 0:
        what = "is zero: prune it after training" if energy == 0 else "has NaN or infinite entries"
        raise ValueError(f"the update of group {name!r} {what}; nothing was pruned")
    noise = (_ROUNDING * torch.finfo(train.U.dtype).eps) ** 2 * energy
    allowed = (1 - keep) * energy
    left, values, _ = torch.linalg.svd(K.transpose(0, 1).flatten(1), full_matrices=False)
    left, lost = _leading(left, values, allowed / 2 + noise)
    _, values, right = torch.linalg.svd((left.t() @ K).flatten(0, 1), full_matrices=False)
    right, lost_right = _leading(right.t(), values, (allowed - lost).clamp_min(0) + noise)
    new_U, new_V = QU @ left, (QV @ right).t()
    new_C = left.t() @ RU @ C @ RV.t() @ right
    # U and V keep their sizes, because these determine how far an optimizer step moves the update.
    grow_U, grow_V = (_size(old) / _size(new) for old, new in ((U, new_U), (V, new_V)))
    factors = (grow_U * new_U, new_C / (grow_U * grow_V), grow_V * new_V)
    rank = (left.shape[1], right.shape[1])
    return _Cut(rank, float(((lost + lost_right) / energy).sqrt()) if rank != (train.r1, train.r2) else 0.0, factors)


def _leading(vectors: Tensor, values: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading columns of ``vectors`` to keep, and the sum of the squared ``values`` of all other columns.

    The fewest columns are kept for which this sum is at most ``allowed``.
    """
    tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    rank = max(int((tails > allowed).sum()), 1)
    return vectors[:, :rank], tails[rank]


def _size(factor: Tensor) -> Tensor:
    return factor.square().mean().sqrt()
