"""Define the base class of the configurations of all methods, and checks of settings.

A configuration states which weights of a model a method adapts and how. Adapter files contain it. A *bank* is a module
that owns trained factors. The weights that share a bank form a *group*. The *head* consists of the modules of a model
that are new for its task and are trained completely.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn

from efft.hints import nearest
from efft.planning.extras import Extras
from efft.planning.names import MOST_CHARACTERS, are_short
from efft.planning.structure import KINDS, Weight
from efft.planning.targets import TARGETS, Target
from efft_kernels import EfftLinear, FactorBank

Config = TypeVar("Config", bound="AdapterConfig")

#: Version of the JSON form. It is raised when code for the old form would misread the new form.
FORMAT_VERSION = 1

#: The largest size (such as a rank) and the largest absolute value of a number that a setting can have. A larger value
#: is a mistake.
LARGEST_SIZE, LARGEST_NUMBER = 2**16, 10**6


class Group(Protocol):
    """One bank of factors, not allocated yet, and the weights that use it.

    ``sites`` maps the names of the weights to the part of the bank that each of them uses.
    """

    name: str
    sites: dict[str, Any]

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters of the bank."""

    def build(self, device: torch.device, dtype: torch.dtype) -> FactorBank:
        """Allocate and initialize the bank."""

    def describe(self) -> str:
        """Describe the group in one line."""

    def to_dict(self) -> dict[str, Any]:
        """Return the group as an adapter file contains it: its name, its weights, and data that its method needs."""


class AdapterConfig:
    """Serve as the base class of the configurations of all methods.

    Each configuration is a dataclass with the fields ``targets``, ``exclude``, ``head`` and ``freeze_statistics`` and
    with the fields of its method.
    """

    method: ClassVar[str]
    """The method's name in adapter files."""

    training_only: ClassVar[frozenset[str]] = frozenset({"freeze_statistics"})
    """Fields that only affect training. A model whose configuration sets them differently can load the adapter."""

    meant_before: ClassVar[Mapping[str, Any]] = {"freeze_statistics": False}
    """The values of fields that adapter files of earlier versions do not contain, because the fields did not exist."""

    layer: ClassVar[type[EfftLinear]] = EfftLinear
    """The class that replaces a linear layer."""

    kinds: ClassVar[frozenset[str]] = KINDS - {"experts"}
    """The kinds of weights that the method can adapt (:attr:`efft.planning.structure.Weight.kind`)."""

    why_not: ClassVar[str] = "the method has no update for weights of this kind"
    """The reason that plans state for weights of other kinds, which the method leaves out."""

    targets: str | list[str]
    exclude: list[str]
    head: list[str] | None
    freeze_statistics: bool

    @property
    def extras(self) -> Extras:
        """The settings for biases and norms to train in addition to factors and head. By default none are trained."""
        return Extras()

    def groups(self, model: nn.Module, targets: list[Target]) -> Sequence[Group]:
        """Return the groups of the selected weights. Their banks are not allocated yet.

        Raises:
            ValueError: the method cannot adapt these weights together. The error names them and states what to do.
        """
        raise NotImplementedError

    def group_of_file(self, model: nn.Module, saved: dict[str, Any], weights: list[Weight]) -> Group:
        """Return the group for which :meth:`Group.to_dict` returned ``saved``, a part of an adapter file.

        Args:
            model: the model to adapt.
            saved: the description of the group.
            weights: the weights of ``model`` that the description names.

        Raises:
            ValueError: the description is damaged, or does not fit the weights.
        """
        raise NotImplementedError

    def unreached(self, targets: Sequence[Target], groups: Sequence[Any]) -> dict[str, str]:
        """Return the names of the selected weights that these groups do not change, each with the reason."""
        return {}

    def settle(self, groups: Sequence[Any], banks: Mapping[str, Any]) -> None:
        """Connect the banks of a model where they depend on each other, and fill in automatic settings.

        An automatic setting is one whose value the library chooses for the groups.
        """

    def summary(self) -> str:
        """Return the settings in one line, for a model card."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict with the format version."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"format_version": FORMAT_VERSION, "method": self.method, **copy.deepcopy(fields)}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Return the configuration whose :meth:`to_dict` returned ``values``.

        Keys that this version does not know are ignored with a warning. If ``values`` come from an earlier version that
        did not have a key, the value of this key comes from :attr:`meant_before`.

        Raises:
            ValueError: a value is out of range, or the configuration belongs to another method.
        """
        values = {**cls.meant_before, **values} if "format_version" in values else dict(values)
        version, method = values.pop("format_version", FORMAT_VERSION), values.pop("method", cls.method)
        cls._check(type(version) is int, "format_version", "an integer", version)
        if method != cls.method:
            raise ValueError(f"expected a config of method {cls.method!r}, got method {method!r}")
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = [k for k in values if k not in names]
        if unknown or version > FORMAT_VERSION:
            hints = {k: nearest(k, names, 1) for k in unknown[:10]}
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

    def _check_extras(self, bias: Any, norms: Any) -> None:
        biases = ("none", "all", "adapted", "auto")
        self._check(bias in biases, "bias", f"one of {', '.join(map(repr, biases))}", bias)
        self._check(isinstance(norms, bool), "norms", "a bool", norms)

    def _check_sizes(self, *names: str, largest: int = LARGEST_SIZE) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(is_size(value, largest), name, f"an integer from 1 to {largest}", value)

    def _check_numbers(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(is_setting(value), name, f"a number from -{LARGEST_NUMBER} to {LARGEST_NUMBER}", value)

    @classmethod
    def _check(cls, ok: bool, name: str, expected: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{cls.__name__}.{name} must be {expected}, got {quote(got)}")


#: Kinds of trained parameters that can have their own learning rate.
RATE_KINDS = ("sides", "cores", "diagonals", "biases", "norms", "head", "scales")


def check_rates(rates: Any, where: str) -> None:
    """Check ``rates``, a mapping from kinds of parameters to multiples of the learning rate.

    Raises:
        ValueError: a kind is not in :data:`RATE_KINDS`, or a rate is not a positive number. The message starts with
            ``where``.
    """
    if not isinstance(rates, Mapping):
        raise ValueError(f"{where} must be a dict from kinds of parameters to rates, got {quote(rates)}")
    for kind, rate in rates.items():
        if kind not in RATE_KINDS:
            known = ", ".join(RATE_KINDS)
            raise ValueError(f"{where} must be rates of {known}; no kind of parameters is called {kind!r}")
        if not is_number(rate) or rate <= 0:
            raise ValueError(f"{where} must be positive multiples of lr, got {quote(rate)} for {kind!r}")


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_size(value: object, largest: int = LARGEST_SIZE) -> bool:
    """Return whether ``value`` is an integer from 1 to ``largest`` and not a bool."""
    return type(value) is int and 1 <= value <= largest


def is_setting(value: Any) -> bool:
    """Return whether ``value`` is a number that a setting can have."""
    return is_number(value) and abs(value) <= LARGEST_NUMBER


def quote(value: object) -> str:
    """Return the ``repr`` of a value for an error message, cut after 500 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python raises this for an integer of too many digits
        return "an integer of thousands of digits"
    return text if len(text) <= 500 else f"{text[:500]}..."


def _names(value: Any) -> Any:
    """Return one name, or a tuple of names, as a list; anything else stays as it is."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
