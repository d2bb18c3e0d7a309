"""What says which layers are adapted and how, as adapter files store it: ``AdapterConfig`` and that of EFFT."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import numbers
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import nn

from efft.patterns import MOST_CHARACTERS, are_short
from efft_kernels import EfftLinear
from efft_kernels.nn.initialization import CORE_LAYOUTS

if TYPE_CHECKING:
    from efft.planning.plan import Group
    from efft.planning.structure import Weight
    from efft.planning.targets import Target

Config = TypeVar("Config", bound="AdapterConfig")

#: Version of the JSON form; raised when a reader of the old form would misread the new one.
FORMAT_VERSION = 1

#: What ``targets`` may be instead of names.
TARGETS = ("all", "all-linear", "mhsa", "ffn")

#: Beyond these a setting is a mistake: no layer that is adapted is as wide, and no 16-bit update holds such numbers.
_LARGEST_SIZE, _LARGEST_NUMBER = 2**16, 10**6


class AdapterConfig:
    """What the configurations of all methods have in common; each is a dataclass with these fields and its own."""

    method: ClassVar[str]
    """The method's name in adapter files."""

    training_only: ClassVar[frozenset[str]] = frozenset({"freeze_statistics"})
    """Fields that only matter while training: an adapter may be loaded into a model that sets them differently."""

    meant_before: ClassVar[Mapping[str, Any]] = {"freeze_statistics": False}
    """Of fields that the method did not always have: what an adapter meant that was saved without them."""

    layer: ClassVar[type[EfftLinear]] = EfftLinear
    """What a linear layer becomes."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution", "attention", "parameter", "embedding"})
    """Kinds of weights that the method can adapt (:class:`efft.planning.structure.Weight`)."""

    why_not: ClassVar[str] = "the method has no update for weights of this kind"
    """Why weights of other kinds stay untouched."""

    targets: str | list[str]
    exclude: list[str]
    head: list[str] | None
    freeze_statistics: bool

    def groups(self, model: nn.Module, targets: list[Target]) -> Sequence[Group]:
        """The banks of factors for the layers that were selected, not allocated yet.

        Raises:
            ValueError: layers that this method cannot adapt together; it says which and what to do.
        """
        raise NotImplementedError

    def group_of_file(self, model: nn.Module, saved: dict[str, Any], weights: list[Weight]) -> Group:
        """The bank that an adapter file describes (a group's ``to_dict``), for these weights.

        Raises:
            ValueError: the description is damaged, or does not fit the weights.
        """
        raise NotImplementedError

    def settle(self, groups: Sequence[Any], banks: Mapping[str, Any]) -> None:
        """Replace, in place, what the configuration left to the library by what it came to in these groups, and connect
        their banks."""

    def summary(self) -> str:
        """The settings in a line, for a model card."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with the format version."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"format_version": FORMAT_VERSION, "method": self.method, **copy.deepcopy(fields)}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The config a :meth:`to_dict` came from. Keys this version does not know are reported by a warning and
        ignored; those that an earlier version did not know have the meaning they had then (:attr:`meant_before`).

        Raises:
            ValueError: a value out of range, or another method's config.
        """
        values = {**cls.meant_before, **values} if "format_version" in values else dict(values)
        version, method = values.pop("format_version", FORMAT_VERSION), values.pop("method", cls.method)
        cls._check(type(version) is int, "format_version", "an integer", version)
        if method != cls.method:
            raise ValueError(f"expected a config of method {cls.method!r}, got method {method!r}")
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [k for k in values if k not in names]
        if unknown or version > FORMAT_VERSION:
            hints = {k: difflib.get_close_matches(k[:50], names, 1) for k in unknown[:10]}
            listed = ", ".join(f"{k[:50]!r}" + (f" (near {h[0]!r})" if h else "") for k, h in hints.items())
            listed += f", ... ({len(unknown)} in all)" if len(unknown) > 10 else ""
            warnings.warn(
                f"{cls.__name__} of format version {version} (this library reads {FORMAT_VERSION}): "
                f"ignored unknown keys: {listed or 'none'}",
                stacklevel=2,
            )
        return cls(**{k: v for k, v in values.items() if k in names})

    def _check_layers(self) -> None:
        self.exclude = _names(self.exclude)
        self.head = _names(self.head)
        if self.targets not in TARGETS:
            self.targets = _names(self.targets)
        self._check(_is_names(self.exclude), "exclude", "a list of layer names or patterns", self.exclude)
        self._check(self.head is None or _is_names(self.head), "head", "None or a list of module names", self.head)
        self._check(isinstance(self.freeze_statistics, bool), "freeze_statistics", "a bool", self.freeze_statistics)
        known = isinstance(self.targets, str) and self.targets in TARGETS
        self._check(
            known or _is_names(self.targets),
            "targets",
            f"{', '.join(map(repr, TARGETS))} or a list of layer names or patterns",
            self.targets,
        )
        for name in ("targets", "exclude"):
            patterns = getattr(self, name)
            ok = isinstance(patterns, str) or are_short(patterns)
            self._check(ok, name, f"of at most {MOST_CHARACTERS} characters of regular expressions", patterns)

    def _check_sizes(self, *names: str, largest: int = _LARGEST_SIZE) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(is_size(value, largest), name, f"an integer from 1 to {largest}", value)

    def _check_numbers(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(is_setting(value), name, f"a number from -{_LARGEST_NUMBER} to {_LARGEST_NUMBER}", value)

    @classmethod
    def _check(cls, ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{cls.__name__}.{name} must be {expected}, got {shown(got)}")


@dataclass
class EfftConfig(AdapterConfig):
    """How to adapt a model. Factors come in groups (for a ViT ``mhsa`` and ``ffn``, or ``joint`` under efft1; for
    Swin one of each per stage, ``stage1_mhsa`` ...; layers given by name outside the tables ``linear_<in>x<out>``).
    Where a field may be a dict, its keys are group names or, for every stage at once, ``mhsa``, ``ffn``, ``joint``
    and ``linear``.
    """

    method: ClassVar[str] = "efft"
    training_only: ClassVar[frozenset[str]] = AdapterConfig.training_only | {"init", "core_init", "dropout"}
    kinds: ClassVar[frozenset[str]] = AdapterConfig.kinds | {"experts"}

    variant: Literal["efft1", "efft2"] = "efft2"
    """efft2: one train for attention and one for the MLP. efft1: one train for both, [Wq|Wk|Wv|Wo] taken as one d x
    4d matrix."""

    rank: int | tuple[int, int] | dict[str, int | tuple[int, int]] = 32
    """TT rank r, or (r1, r2) for rectangular cores, or either per group."""

    scale: float | Literal["auto"] | dict[str, float | Literal["auto"]] = 1.0
    """s, a plain multiplier of the update (not divided by the rank). "auto": as much as moves the weights like full
    fine-tuning does (see :meth:`auto`); ``efft.apply`` replaces it by the number."""

    trainable_scale: bool | Literal["global", "group", "matrix"] = False
    """Train s too, as a multiple of ``scale`` that starts at 1: one multiple for all groups ("global"), for each group
    ("group", or True), or for each core of each block ("matrix")."""

    init: str = "v"
    """The side that starts at zero: "v" or "u"; for efft2 also two letters, attention and MLP ("vu")."""

    core_init: Literal["last", "first", "matrix"] = "last"
    """Layout that the Xavier bound of the cores is taken from: that of the paper's ViT code (last), of its Swin code
    (first), or each core a matrix of its own."""

    dropout: float = 0.1
    """Probability of zeroing an element of a factor in training (activations are never dropped)."""

    targets: str | list[str] = "all"
    """"all": every weight of the repeated blocks, of any architecture. "all-linear": every linear layer and 1 x 1
    convolution outside the head. "mhsa" or "ffn": those of "all" in attentions or in MLPs. Or names of layers or
    parameters, or their endings (after a dot), as they are or as regular expressions; what names no linear layer may
    name a convolution, a parameter or an embedding."""

    exclude: list[str] = dataclasses.field(default_factory=list)
    """Layers to leave alone, named in the same ways."""

    core_sharing: Literal["per_layer", "shared"] = "per_layer"
    """per_layer: a core per matrix of every block, as the paper counts. shared: the same cores in all blocks, as its
    code does."""

    head: list[str] | None = None
    """Modules trained and saved beside the factors; None finds the head of the task, [] trains none."""

    freeze_statistics: bool = False
    """Keep batch norms, and whatever else updates buffers in training, in eval mode. Otherwise these buffers change as
    usual, are saved with the adapter, and ``efft.remove`` puts them back."""

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
            of_size = f"an integer from 1 to {_LARGEST_SIZE}"
            self._check(ok, "rank", f"{of_size}, a pair of them, or a dict of these", self.rank)
        for scale in _values(self.scale):
            of_scale = f"a number from -{_LARGEST_NUMBER} to {_LARGEST_NUMBER}"
            ok = scale == "auto" or is_setting(scale)
            self._check(ok, "scale", f"{of_scale}, 'auto' or a dict of these", self.scale)
        self._check(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        known = isinstance(self.trainable_scale, bool) or self.trainable_scale in ("global", "group", "matrix")
        of_scales = "False, 'global', 'group' (or True) or 'matrix'"
        self._check(known, "trainable_scale", of_scales, self.trainable_scale)
        self.trainable_scale = "group" if self.trainable_scale is True else self.trainable_scale
        self._check_layers()

    def rank_of(self, group: str, kind: str) -> tuple[int, int]:
        """(r1, r2) of a group."""
        rank: int | tuple[int, int] = _of_group(self.rank, "rank", group, kind)
        return (rank, rank) if isinstance(rank, int) else rank

    def scale_of(self, group: str, kind: str) -> float | Literal["auto"]:
        """s of a group, or who decides it."""
        scale: float | Literal["auto"] = _of_group(self.scale, "scale", group, kind)
        return scale if isinstance(scale, str) else float(scale)

    def init_of(self, kind: str) -> str:
        """'u' or 'v' for a kind of group."""
        return self.init[-1] if kind == "ffn" else self.init[0]

    @classmethod
    def auto(cls, **fields: Any) -> EfftConfig:
        """A configuration that needs no search: ``scale="auto"``, the other fields as usual.

        The paper searches s between 0.01 and 100 for every task. What decides is how far a step of the optimizer moves
        the weights, and that depends on s, the width, the ranks and the number of cores together;
        :func:`efft_kernels.nn.initialization.automatic_scale` solves it for s. Meant for learning rates around 1e-3.
        """
        return cls(**{"scale": "auto", **fields})

    def groups(self, model: nn.Module, targets: list[Target]) -> Sequence[Group]:
        """The trains of ``variant`` for these layers."""
        from efft.planning.trains import efft_groups  # which needs this class

        return efft_groups(self, targets)

    def group_of_file(self, model: nn.Module, saved: dict[str, Any], weights: list[Weight]) -> Group:
        """The train that the file describes."""
        from efft.planning.trains import group_of_file  # which needs this class

        return group_of_file(self, saved)

    def settle(self, groups: Sequence[Any], banks: Mapping[str, Any]) -> None:
        """Write down the scales of a plan, so that an adapter file holds numbers; the first bank owns a global one."""
        if "auto" in _values(self.scale):
            self.scale = {group.name: group.scale for group in groups}
        if self.trainable_scale == "global":
            leader, *others = banks.values()
            for bank in others:
                bank.follow_scale(leader)

    def summary(self) -> str:
        """The settings in a line, for a model card."""
        return (
            f"{self.variant} ([arXiv 2311.06749](https://arxiv.org/abs/2311.06749)), rank {self.rank}, scale\n"
            f"{self.scale}, targets {self.targets}, cores {self.core_sharing}"
        )


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_size(value: object, largest: int = _LARGEST_SIZE) -> bool:
    """Whether ``value`` is an integer from 1 to ``largest``, and no bool."""
    return type(value) is int and 1 <= value <= largest


def is_setting(value: Any) -> bool:
    """Whether ``value`` is a number of a size that settings have."""
    return is_number(value) and abs(value) <= _LARGEST_NUMBER


def shown(value: object) -> str:
    """A value for an error message: as Python writes it, as far as that is readable."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of thousands of digits"
    return text if len(text) <= 500 else f"{text[:500]}..."


def _names(value: Any) -> Any:
    """One name, or names in a tuple, as a list; anything else as it is."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _values(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _pairs(rank: Any) -> Any:
    """JSON has no tuples: turn lists into pairs, and what counts as an integer (NumPy's) into one."""

    def pair(value: Any) -> Any:
        return tuple(map(_integer, value)) if isinstance(value, (list, tuple)) else _integer(value)

    return {k: pair(v) for k, v in rank.items()} if isinstance(rank, dict) else pair(rank)


def _integer(value: Any) -> Any:
    kind = type(value)
    return int(value) if kind is not bool and issubclass(kind, numbers.Integral) else value


def _number(value: Any) -> Any:
    """A float for another library's real number; anything else as it is."""
    kind = type(value)
    return float(value) if kind is not int and kind is not bool and issubclass(kind, numbers.Real) else value


def _of_group(value: Any, field: str, group: str, kind: str) -> Any:
    if not isinstance(value, dict):
        return value
    for key in (group, kind):
        if key in value:
            return value[key]
    raise ValueError(
        f"EfftConfig.{field} names the groups {sorted(value)} but not {group!r}: add it, or {kind!r} for all stages"
    )
