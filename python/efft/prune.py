"""Ranks from training: shared factors cut down to the directions that the updates of their layers use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from efft.adapting.inject import Bank, adapted_layers, bank_of
from efft.adapting.sharding import check_whole
from efft.config import is_number, quote
from efft.methods.efft import EfftConfig
from efft_kernels import TTFactors

Rank = tuple[int, int]

#: Singular values whose sum of squares is below this many machine epsilons, squared, of the whole are rounding errors.
_ROUNDING = 32


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did, by group; printing it gives a line for each.

    Attributes:
        before, ranks: (r1, r2) of each group before and now.
        relative_error: what all updates of the group together have lost, over their Frobenius norm (with every column
            of V): the root of the sum of the squared singular values that were dropped.
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
    """Lower the ranks of a trained model to what its update needs, a group at a time.

    With ``U = Q_U R_U`` and ``Vᵀ = Q_V R_V`` the update of matrix i is ``Q_U K_i Q_Vᵀ``, ``K_i = s_i R_U C_i R_Vᵀ``.
    The singular values of all K_i beside each other are those of all updates as seen from the basis that they share on
    the input side; those below each other, from the output side. The smallest are dropped on either side, half of what
    may be lost on each. The error is then the root of the sum of their squares; on one side no other basis of that
    rank has a smaller one, on both none has one smaller than by the factor √2.

    The configuration gets the new ranks, so that the adapter is saved and loaded as any other. U, C and V are new
    parameters, each as large as before in the root mean square, so that the learning rate still fits. **An optimizer
    made before holds the old ones: make a new one.** Its moments start at zero.

    Args:
        model: adapted by EFFT, not merged, not sharded, and not wrapped yet by what collects its parameters (DDP).
        keep: share of the squared norm of each group's update to keep, in (0, 1]. At 1 the ranks go down to those that
            the update has, up to rounding.

    Raises:
        ValueError: ``keep`` out of range, a model that is not as above, or an update that is zero or not finite.
            Nothing is changed then.
    """
    if not is_number(keep) or not 0 < keep <= 1:
        raise ValueError(f"prune: keep must be a share in (0, 1], got {quote(keep)}")
    check_whole(model, "prune")
    bank = bank_of(model)
    _config(bank)
    trains = _trains(bank)
    if any(layer.merged for layer in adapted_layers(model).values()):
        raise ValueError("the update is merged into this model's weights; call efft.unmerge(model) before pruning it")
    cuts = {name: _cut(name, factors, keep) for name, factors in trains.items()}
    before = {name: (factors.r1, factors.r2) for name, factors in trains.items()}
    ranks = {name: cut.rank for name, cut in cuts.items()}
    for name, factors in trains.items():
        if ranks[name] != before[name]:
            factors.replace(*cuts[name].factors)
    _note_ranks(bank, ranks)
    return PruneReport(before, ranks, {name: cut.relative_error for name, cut in cuts.items()})


def set_ranks(model: nn.Module, ranks: Mapping[str, Rank]) -> None:
    """Give the groups of a model these ranks, with zeros for factors: room for a pruned model's, which come next."""
    bank = bank_of(model)
    for name, factors in _trains(bank).items():
        r1, r2 = ranks[name]
        C = torch.zeros(*factors.C.shape[:2], r1, r2)
        factors.replace(torch.zeros(factors.d_in, r1), C, torch.zeros(r2, factors.d_out))
    _note_ranks(bank, ranks)


def _note_ranks(bank: Bank, ranks: Mapping[str, Rank]) -> None:
    """Write down the ranks where adapter files take them from."""
    _config(bank).rank = dict(ranks)
    for group in bank.plan:
        group["rank"] = list(ranks[group["name"]])


def _config(bank: Bank) -> EfftConfig:
    if not isinstance(bank.config, EfftConfig):
        raise ValueError(f"expected a model adapted by EFFT, got one of method {bank.config.method!r}: it has no cores")
    return bank.config


def _trains(bank: Bank) -> dict[str, TTFactors]:
    return {name: factors for name, factors in bank.items() if isinstance(factors, TTFactors)}


class _Cut(NamedTuple):
    rank: Rank
    relative_error: float
    factors: tuple[Tensor, Tensor, Tensor]


def _cut(name: str, train: TTFactors, keep: float) -> _Cut:
    """The factors of lower rank that keep this share of the train's update."""
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
    # As large as they were: how far a step of the optimizer moves the update depends on that.
    grow_U, grow_V = (_size(old) / _size(new) for old, new in ((U, new_U), (V, new_V)))
    factors = (grow_U * new_U, new_C / (grow_U * grow_V), grow_V * new_V)
    rank = (left.shape[1], right.shape[1])
    return _Cut(rank, float(((lost + lost_right) / energy).sqrt()) if rank != (train.r1, train.r2) else 0.0, factors)


def _leading(vectors: Tensor, values: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The first columns of ``vectors`` without which at most ``allowed`` of the sum of squares is lost, and what is."""
    tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    rank = max(int((tails > allowed).sum()), 1)
    return vectors[:, :rank], tails[rank]


def _size(factor: Tensor) -> Tensor:
    return factor.square().mean().sqrt()
