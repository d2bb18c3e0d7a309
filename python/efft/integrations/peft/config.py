"""Define ``EfftPeftConfig``, which accepts the settings of EFFT under the names of peft and under the names of EFFT."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, cast

from peft import PeftConfig, PeftType
from torch import nn

from efft.integrations.peft.planning import plan_adapter, trained_beside
from efft.methods.efft import EfftConfig


class _Alias:
    """Give a field of :class:`EfftConfig` a second name. The alias does not store a value of its own.

    ``read`` computes the value of the alias from the configuration. ``write`` computes the value of the other field
    from the value of the alias. A configuration can be created with both values only if they agree. Afterwards, either
    of the two can be set.
    """

    def __init__(self, of: str, read: Callable[[Any], Any], write: Callable[[Any, Any], Any]) -> None:
        self.of, self.read, self.write = of, read, write

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, config: Any, owner: type) -> Any:
        return None if config is None else self.read(config)  # the default value of the dataclass field

    def __set__(self, config: Any, value: Any) -> None:
        complete = "_complete" in config.__dict__
        if not complete and (value is None or _same(self.read(config), value)):
            return
        if not complete and getattr(config, self.of) != getattr(EfftConfig, self.of):
            raise ValueError(
                f"{self.of} and {self.name} name the same {_MEANINGS[self.name]}: pass only one of them, got "
                f"{getattr(config, self.of)!r} and {value!r}"
            )
        setattr(config, self.of, self.write(config, value))


_MEANINGS = {"r": "rank", "lora_alpha": "scale", "lora_dropout": "probability", "modules_to_save": "modules"}


class _TargetModules:
    """Provide the field ``target_modules``, which selects the layers by peft's rules.

    If ``targets`` selects the layers instead, the value is the list of layers that were selected in a model. Before the
    configuration is used on a model, the value is then ``targets`` if that is a list of names, and None otherwise.
    """

    def __get__(self, config: Any, owner: type) -> Any:
        if config is None:
            return None
        modules = config.__dict__.get("_modules")
        if modules is not None:
            return modules
        own = None if isinstance(config.targets, str) else list(config.targets)
        return list(config.planned) or own

    def __set__(self, config: Any, value: Any) -> None:
        config.__dict__["_modules"] = _to_list(value)


_r: Any = _Alias("rank", lambda config: _largest(config.rank), lambda config, r: r)
_lora_alpha: Any = _Alias("scale", lambda config: _alpha(config), lambda config, alpha: _quotient(alpha, config.rank))
_lora_dropout: Any = _Alias("dropout", lambda config: config.dropout, lambda config, p: p)
_modules_to_save: Any = _Alias("head", lambda config: config.head, lambda config, names: _to_list(names))
_target_modules: Any = _TargetModules()


@dataclass
class EfftPeftConfig(PeftConfig, EfftConfig):
    """Configure EFFT under peft, with peft's names of the settings or the names of :class:`efft.EfftConfig`.

    | peft | here | remarks |
    |---|---|---|
    | `r` | `rank` | the same setting; if there are several ranks, `r` is the largest |
    | `lora_alpha` | `scale` | the update is (`lora_alpha` / `r`) U C V, so `scale` is their quotient, also for \
layers with another rank in `rank_pattern`; setting `r` later keeps `scale` |
    | `lora_dropout` | `dropout` | elements of the *factors* are dropped, never activations |
    | `target_modules` | `targets` | peft's rules: names, endings of names, one regular expression, or `"all-linear"`; \
if it is not set, `targets` selects the layers |
    | `exclude_modules` | `exclude` | names, endings of names or one regular expression, in addition to `exclude` |
    | `layers_to_transform`, `layers_pattern` | - | as in LoRA; they restrict `targets` too |
    | `rank_pattern` | `rank` of a group | only layers of the same rank share a tensor train |
    | `modules_to_save` | `head` | endings of names; None selects the classifier, and [] selects no module |
    | `bias` | `bias` | `"none"`, `"all"`, `"efft_only"` (also `"adapted"`), or `"auto"`: `"efft_only"` if \
the adapted layers have biases; as in peft, only parameters with the name `bias` are trained and saved, and at most \
one adapter can train biases |
    | - | `norms` | normalization layers are trained and saved as a whole, with one copy per adapter |
    | `init_weights` | `init` | False initializes all factors at random, so that the update is not zero (for tests) |

    Raises:
        ValueError: a value is out of range, a setting has different values under its two names, or settings contradict
            each other.
    """

    use_rslora: ClassVar[bool] = False
    alpha_pattern: ClassVar[dict[str, float]] = {}

    r: int | None = _r
    lora_alpha: float | None = _lora_alpha
    lora_dropout: float | None = _lora_dropout
    target_modules: str | list[str] | None = _target_modules
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = _modules_to_save
    bias: Literal["none", "all", "adapted", "efft_only", "auto"] = "none"  # type: ignore[assignment]
    init_weights: bool = True

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        EfftConfig.__post_init__(self)
        self.peft_type = PeftType.EFFT
        self.bias = "efft_only" if self.bias == "adapted" else self.bias
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            setattr(self, name, _to_list(getattr(self, name)))
        self.rank_pattern = dict(self.rank_pattern or {})
        self.__dict__["_complete"] = True
        modules = self.__dict__["_modules"]
        known = modules is None or isinstance(modules, str) or _are(str, modules)
        self._check(known, "target_modules", "None, a list of names, 'all-linear' or a regular expression", modules)
        if modules is not None and self.targets not in ("all", modules):
            raise ValueError(
                f"targets and target_modules both choose the layers: pass only one of them, got {self.targets!r} and "
                f"{modules!r}"
            )
        biases = ("none", "all", "efft_only", "auto")
        self._check(self.bias in biases, "bias", "'none', 'all', 'efft_only' or 'auto'", self.bias)
        if self.rank_pattern:
            self._check(isinstance(self.rank, int), "rank", "one integer if rank_pattern is set", self.rank)
            for rank in self.rank_pattern.values():
                self._check(type(rank) is int and rank > 0, "rank_pattern", "a dict of names to ranks", rank)
        layers = self.layers_to_transform
        known = layers is None or isinstance(layers, int) or _are(int, layers)
        self._check(known, "layers_to_transform", "None, an index or a list of them", layers)
        if layers is not None and isinstance(modules, str):
            raise ValueError(
                f"layers_to_transform narrows a list of target_modules, got the string {modules!r}: put the indices "
                "into the expression, or list the names"
            )
        if self.layers_pattern and layers is None:
            raise ValueError(
                "layers_pattern names the list to which the indices in layers_to_transform belong: set both or neither"
            )

    @classmethod
    def auto(
        cls, *, budget: int | None = None, model: Any = None, epochs: float | None = None, **fields: Any
    ) -> EfftPeftConfig:
        """Return a configuration that needs no search, as :meth:`EfftConfig.auto` does.

        The rank and the dropout may also have peft's names. With ``budget``, all biases and norms that peft would train
        are counted.
        """
        for alias, name in (("r", "rank"), ("lora_dropout", "dropout")):
            if alias in fields and name not in fields:
                fields[name] = fields.pop(alias)
        config: Any = super().auto(budget=budget, model=model, epochs=epochs, **fields)
        return cast(EfftPeftConfig, config)

    def planner(self, model: nn.Module) -> Callable[[Any], tuple[Sequence[Any], int]]:
        def plan(config: EfftPeftConfig) -> tuple[Sequence[Any], int]:
            with warnings.catch_warnings():  # get_peft_model issues the warnings
                warnings.simplefilter("ignore")
                found = plan_adapter(model, config)
            return found.groups, trained_beside(model, config, found)

        return plan

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that can be stored as JSON, without the names that ``targets`` selected in a model."""
        values: dict[str, Any] = PeftConfig.to_dict(self)
        return {**values, "target_modules": self.__dict__["_modules"]}

    def choose(self, names: Iterable[str]) -> None:
        """Record the names of the layers that the settings selected in a model."""
        self.__dict__["_planned"] = dict.fromkeys(names)

    @property
    def planned(self) -> dict[str, None]:
        """The names of the layers that the settings selected in the last model, as the keys of a dict."""
        names: dict[str, None] = self.__dict__.get("_planned", {})
        return names

    @property
    def chosen_by_targets(self) -> bool:
        """Whether ``targets`` selects the layers instead of ``target_modules``."""
        return self.__dict__["_modules"] is None

    def own(self, **changes: Any) -> EfftConfig:
        """Return the settings, with ``changes``, as an :class:`efft.EfftConfig` that adapts only layers."""
        values = {f.name: getattr(self, f.name) for f in fields(EfftConfig)}
        return _OfLayers(**{**values, "bias": "none", "norms": False, **changes})  # peft itself trains biases and norms

    def _check_extras(self, bias: Any, norms: Any) -> None:
        super()._check_extras("none", norms)  # __post_init__ checks bias, because its values are those of peft


class _OfLayers(EfftConfig):
    """Restrict EFFT to layers that the model calls. peft's tuners cannot adapt parameters that a module reads."""

    kinds = frozenset({"linear", "convolution", "embedding"})
    why_not = "peft's tuners cannot adapt weights of this kind; efft.apply can"


_OfLayers.__name__ = EfftPeftConfig.__name__  # for error messages


def _to_list(value: Any) -> Any:
    """Convert a set or a tuple to a list, because a list stays the same when it is written to JSON and read again."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _flat(value: Any) -> list[Any]:
    """Return the numbers in a number, a pair, or a dict of numbers or pairs."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in _flat(part)]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _largest(value: Any) -> Any:
    return max(_flat(value), key=abs, default=None)


def _alpha(config: Any) -> float | None:
    """Return lora_alpha for the scale, or for the largest of several scales; None if a scale is "auto"."""
    if "auto" in _flat(config.scale):
        return None
    alpha: float = _largest(config.scale) * _largest(config.rank)
    return alpha


def _quotient(alpha: Any, rank: Any) -> float:
    """Return the scale alpha / rank, as in LoRA."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"EfftPeftConfig.lora_alpha must be a number, got {alpha!r}")
    if not isinstance(rank, int):
        raise ValueError(f"lora_alpha is divided by a single rank, got {rank!r}: pass the scale itself (scale=...)")
    return alpha / rank


def _same(a: Any, b: Any) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (a, b))
    return math.isclose(a, b, rel_tol=1e-12) if numbers else bool(a == b)
