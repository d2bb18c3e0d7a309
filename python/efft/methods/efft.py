"""Implement EFFT (arXiv 2311.06749): the updates ``s U C V`` of weights are tensor trains.

Weights of many blocks share the outer factors U and V, and each weight has its own cores C.
"""

from __future__ import annotations

import copy
import dataclasses
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from efft.adapting.heads import find_head
from efft.config import LARGEST_NUMBER, LARGEST_SIZE, AdapterConfig, check_rates, is_number, is_setting, is_size
from efft.hints import nearest
from efft.planning.budget import fit_budget
from efft.planning.extras import Extras, find_extras
from efft.planning.roles import trains_by_role
from efft.planning.shapes import TensorTrain, trains_by_shape
from efft.planning.structure import Weight, structure_of
from efft.planning.targets import Target, select
from efft_kernels import Site, TTFactors
from efft_kernels.nn.initialization import CORE_LAYOUTS, MOVEMENT, automatic_scale

#: The settings of :meth:`EfftConfig.auto`.
AUTOMATIC: Mapping[str, Any] = {
    "rank": 16,
    "scale": "auto",
    "movement": 0.1,
    "dropout": 0.0,
    "bias": "auto",
    "rates": {"cores": 3.0, "biases": 3.0},
}
#: :meth:`EfftConfig.auto` uses this dropout for trainings of at least :data:`LONG_TRAINING` epochs.
LONG_TRAINING, DROPOUT_OF_LONG_TRAINING = 30, 0.1


@dataclass
class EfftConfig(AdapterConfig):
    """Configure EFFT for a model.

    The weights that share one tensor train form a group. A ViT has the groups ``mhsa`` and ``ffn``, or the single group
    ``joint`` with the variant efft1. A Swin has these groups in each stage (``stage1_mhsa``, ...). In other models, and
    for layers whose role in a block is unknown, the name of a group contains the shape of its weights, as in
    ``linear_<in>x<out>``. If the value of a field is a dict, its keys are names of groups, or the kinds ``mhsa``,
    ``ffn``, ``joint`` and ``linear`` for all groups of that kind. ``print(efft.inspect(model, config))`` shows the
    groups of a model.
    """

    method: ClassVar[str] = "efft"
    training_only: ClassVar[frozenset[str]] = AdapterConfig.training_only | {
        "init",
        "core_init",
        "dropout",
        "movement",
        "rates",
    }
    meant_before: ClassVar[Mapping[str, Any]] = {
        **AdapterConfig.meant_before,
        **Extras().as_fields(),
        "layer_scale": None,
        "movement": MOVEMENT,
        "rates": {},
    }
    kinds: ClassVar[frozenset[str]] = AdapterConfig.kinds | {"experts"}

    variant: Literal["efft1", "efft2"] = "efft2"
    """With efft2, attention and MLP have one tensor train each. With efft1, they share one train, which treats
    [Wq|Wk|Wv|Wo] as one d x 4d matrix."""

    rank: int | tuple[int, int] | dict[str, int | tuple[int, int]] = 32
    """The rank r of the tensor train, (r1, r2) for rectangular cores, or a dict with one of these per group."""

    scale: float | Literal["auto"] | dict[str, float | Literal["auto"]] = 1.0
    """The multiplier s of the update (it is not divided by the rank), or a dict with one per group. With "auto", s is
    computed from :attr:`movement`, and ``efft.apply`` replaces "auto" by the number."""

    movement: float = MOVEMENT
    """The size of the first optimizer step for which an automatic scale is computed. It is the root mean square of the
    change of the update's entries, as a multiple of the learning rate. With 0.3 and a learning rate of 1e-3, the step
    moves a weight by 3e-4, about as far as in full fine-tuning."""

    trainable_scale: bool | Literal["global", "group", "matrix"] = False
    """Whether s is trained too, as a multiple of ``scale`` that starts at 1. There is one multiple for all groups
    ("global"), one per group ("group", or True), or one per core and block ("matrix")."""

    init: str = "v"
    """The factor that starts at zero, "v" or "u". With efft2, two letters set it for attention and for the MLP, as in
    "vu"."""

    core_init: Literal["last", "first", "matrix"] = "last"
    """The layout of the cores from which the Xavier bound of their initialization is computed: the layout in the
    paper's code for ViT ("last") or for Swin ("first"), or separate matrices ("matrix")."""

    dropout: float = 0.1
    """Probability of zeroing an element of a factor in training (activations are never dropped)."""

    targets: str | list[str] = "all"
    """The weights to adapt. "all" selects every weight of the repeated blocks, in any architecture. "all-linear"
    selects every linear layer and 1 x 1 convolution outside the head. "mhsa" or "ffn" selects the weights of "all" that
    are in attentions or in MLPs. A list contains names of layers or parameters, endings of names (after a dot), or
    regular expressions for names or endings. An entry that matches no linear layer may match a convolution, a parameter
    or an embedding."""

    exclude: list[str] = dataclasses.field(default_factory=list)
    """Layers that are not adapted: names, endings or regular expressions as in a list of ``targets``."""

    core_sharing: Literal["per_layer", "shared"] = "per_layer"
    """With "per_layer", every matrix of every block has its own core, which agrees with the number of parameters in the
    paper. With "shared", all blocks use the same cores, as in the paper's code."""

    head: list[str] | None = None
    """Names of the modules that are trained and saved in addition to the factors. With None, they are the head of the
    task, which the library finds. With [], there are none."""

    freeze_statistics: bool = False
    """Whether batch norms, and all other modules that update buffers in training, stay in eval mode. Otherwise their
    buffers change as usual. They are then saved with the adapter, and ``efft.remove`` restores them."""

    bias: Literal["none", "all", "adapted", "auto"] = "none"
    """Biases that are trained and saved in addition to the factors: "all" (those of the whole model outside the head,
    including those of normalization layers, but not those that the model itself does not train), "adapted" (those of
    the adapted layers), or "auto". "auto" is like "adapted", but it also accepts layers without biases, and it leaves
    out the biases of queries, keys and values if the library knows the roles of the layers: a softmax does not depend
    on the bias of the keys, and a bias of the values has the same effect as a bias of the output projection."""

    norms: bool = False
    """Whether the weights and biases of all normalization layers are trained and saved in addition to the factors."""

    layer_scale: Literal["in", "out", "both"] | None = None
    """The sides on which each weight has its own trained diagonal: its inputs ("in"), its outputs ("out") or "both".
    The update is s diag(a) U C V diag(b). Diagonals start at one. They are included when the factors are composed, so
    they add no cost per token. The experts of a mixture share both sides, so they have no diagonals. If a weight uses
    only a part of a train's columns (attention with efft1), its output diagonal still has one entry per column of the
    train."""

    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Learning rates by kind of parameters, as multiples of the learning rate. :func:`efft.parameter_groups` uses them.
    The kinds are ``sides`` (U and V), ``cores``, ``diagonals``, ``biases``, ``norms``, ``head`` and ``scales``. The
    first step of an optimizer that ignores them issues a UserWarning."""

    def __post_init__(self) -> None:
        self.rank = _pairs(self.rank)
        scales = self.scale
        self.scale = {k: _number(v) for k, v in scales.items()} if isinstance(scales, dict) else _number(scales)
        for name, allowed in (
            ("variant", ("efft1", "efft2")),
            ("core_init", CORE_LAYOUTS),
            ("core_sharing", ("per_layer", "shared")),
        ):
            self._check(getattr(self, name) in allowed, name, f"one of {allowed}", getattr(self, name))
        letters = (1, 2) if self.variant == "efft2" else (1,)
        self._check(
            isinstance(self.init, str) and len(self.init) in letters and set(self.init) <= {"u", "v"},
            "init",
            "'u' or 'v'" + (", or two of them (attention and MLP)" if self.variant == "efft2" else ""),
            self.init,
        )
        for rank in _values(self.rank):
            pair = rank if isinstance(rank, tuple) else (rank, rank)
            ok = len(pair) == 2 and all(map(is_size, pair))
            of_size = f"an integer from 1 to {LARGEST_SIZE}"
            self._check(ok, "rank", f"{of_size}, a pair of them, or a dict of these", self.rank)
        for scale in _values(self.scale):
            of_scale = f"a number from -{LARGEST_NUMBER} to {LARGEST_NUMBER}"
            ok = scale == "auto" or is_setting(scale)
            self._check(ok, "scale", f"{of_scale}, 'auto' or a dict of these", self.scale)
        self._check(is_number(self.movement) and self.movement > 0, "movement", "a positive number", self.movement)
        self._check(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        known = isinstance(self.trainable_scale, bool) or self.trainable_scale in ("global", "group", "matrix")
        of_scales = "False, 'global', 'group' (or True) or 'matrix'"
        self._check(known, "trainable_scale", of_scales, self.trainable_scale)
        self.trainable_scale = "group" if self.trainable_scale is True else self.trainable_scale
        self._check_layers()
        self._check_extras(self.bias, self.norms)
        sides = ("in", "out", "both")
        self._check(self.layer_scale in (None, *sides), "layer_scale", f"None or one of {sides}", self.layer_scale)
        check_rates(self.rates, "EfftConfig.rates")

    @property
    def extras(self) -> Extras:
        return Extras(self.bias, self.norms)

    def rank_of(self, group: str, kind: str) -> tuple[int, int]:
        """Return (r1, r2) of the group with the name ``group`` and the given kind."""
        rank: int | tuple[int, int] = _of_group(self.rank, "rank", group, kind)
        return (rank, rank) if isinstance(rank, int) else rank

    def scale_of(self, group: str, kind: str) -> float | Literal["auto"]:
        """Return s of the group with the name ``group`` and the given kind, or "auto"."""
        scale: float | Literal["auto"] = _of_group(self.scale, "scale", group, kind)
        return scale if isinstance(scale, str) else float(scale)

    def init_of(self, kind: str) -> str:
        """Return 'u' or 'v' for a kind of group."""
        return self.init[-1] if kind == "ffn" else self.init[0]

    @classmethod
    def auto(
        cls,
        *,
        budget: int | None = None,
        model: nn.Module | None = None,
        epochs: float | None = None,
        **fields: Any,
    ) -> EfftConfig:
        """Return a configuration that needs no search (:data:`AUTOMATIC`), for learning rates around 1e-3.

        It differs from the paper's configuration, ``EfftConfig()``, in these ways:

        - The scale is computed. The paper searches s between 0.01 and 100 for every task. The distance by which an
          optimizer step moves the weights depends on s, the width, the ranks and the number of cores.
          :func:`efft_kernels.nn.initialization.automatic_scale` computes the s for which this distance has a fixed
          value (:attr:`movement`).
        - Biases of the adapted layers are trained in addition to the factors (``bias="auto"``).
        - Cores and biases have higher learning rates than U and V (:attr:`rates`).
        - No elements of the factors are dropped in a training of fewer than 30 epochs. Longer trainings keep the
          paper's dropout of 0.1, without which the model would fit its training examples too closely.

        With ``budget``, the result has the highest rank for which the factors and the trained biases and norms together
        have at most ``budget`` parameters in ``model``. The head is not counted. Unless ``bias`` is given, biases are
        trained only if the rest of the budget still allows rank 4.

        Args:
            budget: the largest number of parameters.
            model: the model that will be adapted, for ``budget``; it may be on the meta device, and is not changed.
            epochs: how many times the training will use each example. Without it, the configuration is the one for
                fewer than 30 epochs.
            **fields: fields of the configuration.

        Raises:
            ValueError: a field or ``epochs`` is out of range, no rank fits the budget, or ``budget`` is given with
                ``rank`` or without ``model``.
        """
        automatic = copy.deepcopy(dict(AUTOMATIC))
        if epochs is not None:
            cls._check(is_number(epochs) and epochs > 0, "auto: epochs", "a positive number", epochs)
            automatic["dropout"] = DROPOUT_OF_LONG_TRAINING if epochs >= LONG_TRAINING else 0.0
        if budget is None and model is None:
            return cls(**{**automatic, **fields})
        if budget is None or model is None:
            lacking = "the model to count in (model=...)" if model is None else "a number of parameters (budget=...)"
            raise ValueError(f"EfftConfig.auto: budget and model go together; {lacking} is missing")
        chosen = {name: value for name, value in automatic.items() if name not in ("rank", "bias")}
        config: EfftConfig = fit_budget(cls, model, budget, {**chosen, **fields})
        return config

    def planner(self, model: nn.Module) -> Callable[[EfftConfig], tuple[Sequence[EfftGroup], int]]:
        """Return a function that plans other configurations for ``model``.

        The other configurations may differ from this one only in the rank, ``bias`` and ``norms``. The function returns
        the groups of a configuration, and the number of entries of all biases and norms that the configuration trains
        in addition to factors and head.
        """
        head = find_head(model, self.head)
        structure = structure_of(model, head, share_tied=True)
        targets = select(model, structure, self.targets, self.exclude, self.kinds)

        def plan(config: EfftConfig) -> tuple[Sequence[EfftGroup], int]:
            groups = config.groups(model, targets)
            weights, _ = structure.with_tied({n: structure.weights[n] for group in groups for n in group.sites})
            return groups, sum(find_extras(model, config.extras, weights, head).values())

        return plan

    def groups(self, model: nn.Module, targets: list[Target]) -> Sequence[EfftGroup]:
        """Return the groups for these weights, one per tensor train.

        If the roles of the weights in their blocks are known, the tensor trains are those of the paper. Otherwise
        weights of equal shape share a tensor train. If ``targets`` is a keyword and the roles are unknown, the rank of
        a group is reduced until the group has fewer parameters than its weights have entries. If this is impossible,
        the group is left out (except with "all-linear").

        Raises:
            ValueError: the weights cannot share trains, ``rank`` or ``scale`` does not fit the groups, or no group is
                left.
        """
        by_shape = isinstance(self.targets, str) and all(t.role == "linear" for t in targets)
        if by_shape:
            trains = trains_by_shape(targets)
        else:
            trains = trains_by_role((t for t in targets if not t.weight.n_experts), self.variant == "efft1")
            trains += trains_by_shape(t for t in targets if t.weight.n_experts)
        self._check_group_names(trains)
        scales: dict[Any, bool | Literal["matrix"]] = {"group": True, "matrix": "matrix", "global": True}
        trained = scales.get(self.trainable_scale, False)
        entries = {target.name: target.weight.numel for target in targets}
        groups: list[EfftGroup] = []
        for train in trains:
            rank = self.rank_of(train.name, train.kind)
            scale = False if groups and self.trainable_scale == "global" else trained
            group = EfftGroup(**vars(train), rank=rank, config=self, trainable_scale=scale)
            if by_shape:
                size = sum(entries[name] for name in train.sites)
                group.cut_rank(size)
                if group.n_parameters >= size and self.targets != "all-linear":  # the weights are almost vectors
                    continue
            groups.append(group)
        if not groups:
            raise ValueError(
                f"targets={self.targets!r} finds only weights that have fewer entries than an update of them would "
                "have parameters"
            )
        return groups

    def _check_group_names(self, trains: Sequence[TensorTrain]) -> None:
        """Raise ValueError if a dict of ranks or scales names groups that do not exist."""
        known = sorted({name for train in trains for name in (train.name, train.kind)})
        for field in ("rank", "scale"):
            value = getattr(self, field)
            wrong = sorted(set(value) - set(known), key=str) if isinstance(value, dict) else []
            if wrong:
                near = nearest(wrong[0], known, 1)
                raise ValueError(
                    f"EfftConfig.{field} names {wrong}, but the groups of this model are {known}"
                    + (f"; did you mean {near[0]!r}?" if near else "")
                )

    def group_of_file(self, model: nn.Module, saved: dict[str, Any], weights: list[Weight]) -> EfftGroup:
        """Return the group for which :meth:`EfftGroup.to_dict` returned ``saved``, a part of an adapter file.

        Raises:
            ValueError: the description is damaged.
        """
        kind: Any = saved.get("kind")
        sizes: Any = saved.get("sizes")
        rank: Any = saved.get("rank")
        trained: Any = saved.get("trainable_scale")
        fine = _are_sizes(sizes, 4) and _are_sizes(rank, 2) and trained in (False, True, "matrix")
        if not fine or not isinstance(kind, str):
            raise ValueError(f"the plan of group {saved['name']!r} is damaged")
        d_in, d_out, n_layers, n_cores = sizes
        if n_cores > _MOST_CORES:
            raise ValueError(f"the plan of group {saved['name']!r} is damaged: {n_cores} cores for each layer")
        sites = {name: _site_from_text(text, n_cores) for name, text in saved["weights"].items()}
        return EfftGroup(saved["name"], kind, d_in, d_out, n_layers, n_cores, sites, (rank[0], rank[1]), self, trained)

    def unreached(self, targets: Sequence[Target], groups: Sequence[Any]) -> dict[str, str]:
        """Return the names of the weights that are in no group, because their update would be larger than they are."""
        reached = {name for group in groups for name in group.sites}
        reason = "an update would have more parameters than the weight has entries"
        return {target.name: reason for target in targets if target.name not in reached}

    def settle(self, groups: Sequence[Any], banks: Mapping[str, Any]) -> None:
        """Replace automatic settings by their values. If the scale is global, all banks follow the first one."""
        if "auto" in _values(self.scale):
            self.scale = {group.name: group.scale for group in groups}
        if self.trainable_scale == "global":
            leader, *others = banks.values()
            for bank in others:
                bank.follow_scale(leader)

    def summary(self) -> str:
        """Return the settings in one line, for a model card."""
        return (
            f"{self.variant} ([arXiv 2311.06749](https://arxiv.org/abs/2311.06749)), rank {self.rank}, scale "
            f"{self.scale}, targets {self.targets}, cores {self.core_sharing}{self.extras.describe()}"
            + ("" if self.layer_scale is None else f", layer scales {self.layer_scale}")
        )


@dataclass
class EfftGroup(TensorTrain):
    """Describe one tensor train of EFFT with its settings from the configuration."""

    rank: tuple[int, int]
    config: EfftConfig
    trainable_scale: bool | Literal["matrix"]

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters of the bank."""
        r1, r2 = self.rank
        scales = self.n_layers * self.n_cores if self.trainable_scale == "matrix" else int(self.trainable_scale)
        a, b = self._rows_of_diagonals
        return (r1 + a) * self.d_in + self._all_cores * r1 * r2 + (r2 + b) * self.d_out + scales

    @property
    def _scaled_sites(self) -> tuple[list[Site], list[Site]]:
        """The sites with diagonals on their input side, and the sites with diagonals on their output side."""
        places = [site for site in dict.fromkeys(self.sites.values()) if not site.experts]
        sides = self.config.layer_scale
        return (places if sides in ("in", "both") else []), (places if sides in ("out", "both") else [])

    @property
    def _rows_of_diagonals(self) -> tuple[int, int]:
        """The number of diagonals of length d_in, and the number of diagonals of length d_out."""
        inputs, outputs = self._scaled_sites
        a = sum(not site.transpose for site in inputs) + sum(site.transpose for site in outputs)
        b = sum(site.transpose for site in inputs) + sum(site.blocks for site in outputs if not site.transpose)
        return a, b

    @property
    def _all_cores(self) -> int:
        return self.n_cores * (self.n_layers if self.config.core_sharing == "per_layer" else 1)

    def cut_rank(self, size: int) -> None:
        """Reduce the rank to at most the sizes of the matrices, until the group has fewer than ``size`` parameters.

        If the group has at least ``size`` parameters even at rank 1, the rank becomes 1.
        """
        r1, r2 = self.rank
        for r in range(max(r1, r2), 0, -1):
            self.rank = min(r, r1, self.d_in), min(r, r2, self.d_out)
            if self.n_parameters < size:
                return

    def describe(self) -> str:
        """Describe the group in one line."""
        r1, r2 = self.rank
        asked = self.config.rank_of(self.name, self.kind)
        a, b = self._rows_of_diagonals
        diagonals = "".join(f", {_count(n, 'diagonal')} [{d}]" for n, d in ((a, self.d_in), (b, self.d_out)) if n)
        return (
            f"{self.name}: {_count(len(self.sites), 'weight')}; U [{self.d_in}, {r1}], "
            f"{_count(self._all_cores, 'core')} [{r1}, {r2}], V [{r2}, {self.d_out}]{diagonals}; "
            f"{self.n_parameters:,} parameters" + ("" if asked == self.rank else f" (rank cut from {asked})")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the description of the group for an adapter file."""
        return {
            "name": self.name,
            "kind": self.kind,
            "sizes": [self.d_in, self.d_out, self.n_layers, self.n_cores],
            "rank": list(self.rank),
            "trainable_scale": self.trainable_scale,
            "weights": {name: _text_of_site(site) for name, site in self.sites.items()},
        }

    @property
    def scale(self) -> float:
        """The scale s. If the configuration has "auto", the scale is computed."""
        scale = self.config.scale_of(self.name, self.kind)
        if not isinstance(scale, str):
            return scale
        init = self.config.init_of(self.kind)
        config = self.config
        sizes = (self.d_in, self.d_out, self._all_cores, *self.rank)
        return automatic_scale(*sizes, init, config.core_init, config.movement)

    def build(self, device: torch.device, dtype: torch.dtype) -> TTFactors:
        """Allocate and initialize the bank."""
        inputs, outputs = self._scaled_sites
        return TTFactors(
            self.d_in,
            self.d_out,
            self.rank,
            n_layers=self.n_layers,
            n_cores=self.n_cores,
            core_sharing=self.config.core_sharing,
            scale=self.scale,
            trainable_scale=self.trainable_scale,
            dropout=self.config.dropout,
            init=self.config.init_of(self.kind),
            core_init=self.config.core_init,
            scaled_inputs=inputs,
            scaled_outputs=outputs,
            device=device,
            dtype=dtype,
        )


#: The largest number of cores per layer in a valid file. A mixture has three cores for each of its experts, of which
#: there are at most thousands.
_MOST_CORES = 2**16


def _are_sizes(values: Any, n: int) -> bool:
    return isinstance(values, list) and len(values) == n and all(is_size(value, 2**24) for value in values)


def _text_of_site(site: Site) -> str:
    """Write a site as ``layer=3 cores=0:3 ...``, with those other attributes that do not have their default values."""
    first, n = site.cores[0], len(site.cores)
    assert site.cores == tuple(range(first, first + n)), "the cores of a site follow one another"
    words = [f"layer={site.layer}", f"cores={first}:{first + n}"]
    words += [f"columns={site.columns[0]}:{site.columns[1]}"] if site.columns else []
    words += [f"mask_scope={site.mask_scope}"] if site.mask_scope else []
    words += [f"experts={site.experts}"] if site.experts else []
    words += [name for name in ("transpose", "interleaved") if getattr(site, name)]
    return " ".join(words)


_SITE = re.compile(
    r"layer=(?P<layer>\d{1,7}) cores=(?P<first>\d{1,7}):(?P<end>\d{1,7})"
    r"(?: columns=(?P<left>\d{1,7}):(?P<right>\d{1,7}))?"
    r"(?: mask_scope=(?P<mask_scope>\d))?(?: experts=(?P<experts>\d{1,7}))?(?P<transpose> transpose)?"
    r"(?P<interleaved> interleaved)?"
)


def _site_from_text(text: str, n_cores: int) -> Site:
    match = _SITE.fullmatch(text)
    if match is None or int(match["end"]) > n_cores:
        raise ValueError(f"'plan' has no valid place in its tensor train for a weight: {text[:80]!r}")
    numbers = {name: int(value or 0) for name, value in match.groupdict().items() if not (value or "").startswith(" ")}
    return Site(
        numbers["layer"],
        tuple(range(numbers["first"], numbers["end"])),
        bool(match["transpose"]),
        (numbers["left"], numbers["right"]) if match["left"] else None,
        numbers["mask_scope"],
        numbers["experts"],
        bool(match["interleaved"]),
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _values(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _pairs(rank: Any) -> Any:
    """Convert lists to tuples, because JSON has no tuples, and integers of any type (such as NumPy's) to ``int``."""

    def pair(value: Any) -> Any:
        return tuple(map(_integer, value)) if isinstance(value, (list, tuple)) else _integer(value)

    return {k: pair(v) for k, v in rank.items()} if isinstance(rank, dict) else pair(rank)


def _integer(value: Any) -> Any:
    kind = type(value)
    return int(value) if kind is not bool and issubclass(kind, numbers.Integral) else value


def _number(value: Any) -> Any:
    """Convert real numbers of other libraries (such as NumPy's) to ``float``. Return any other value unchanged."""
    kind = type(value)
    return float(value) if kind is not int and kind is not bool and issubclass(kind, numbers.Real) else value


def _of_group(value: Any, field: str, group: str, kind: str) -> Any:
    if not isinstance(value, dict):
        return value
    for key in (group, kind):
        if key in value:
            return value[key]
    keys = repr(group) if kind == group else f"{group!r}, or {kind!r} for all stages"
    raise ValueError(f"EfftConfig.{field} names the groups {sorted(value)} but not {group!r}: add {keys}")
