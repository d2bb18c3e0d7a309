"""The file that says what is compared: tasks, methods, seeds and grids."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from efft.train.config import TrainConfig

#: Predictors that see no objects: they need no model and no trainer.
TRIVIAL = ("majority", "pixels", "knn")
_RECIPE = {item.name for item in dataclasses.fields(TrainConfig)} - {"data", "seed", "data_seed", "protocol"}
_METHOD = _RECIPE | {"grid", "vtab_settings"}


@dataclass(frozen=True)
class Suite:
    """What is compared. Settings are fields of `TrainConfig`; a task's go before a method's, a method's before `train`.

    Attributes:
        name: of the suite, and of its result file.
        about: what it is for; the first lines of the report.
        tasks: name of a data set to settings of every run on it.
        methods: name in the tables to its settings: ``method`` and any other field; ``grid``, the values that are
            searched (``{"lr": [...], "efft.scale": [...]}``, every combination); ``vtab_settings``, which of the
            paper's settings for each VTAB-1K task count (efft1 or efft2). ``method`` may also be one of `TRIVIAL`.
        seeds: one final run each, per task and method; of the training images too, where the data set has a choice.
        train: settings of every run.
        search_seeds: seeds whose validation accuracies choose among a grid; by default the first of `seeds`.
        reference: the method that the others are tested against; by default the first.
    """

    name: str
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    about: str = ""
    train: dict[str, Any] = field(default_factory=dict)
    search_seeds: list[int] = field(default_factory=list)
    reference: str = ""

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"suite {self.name!r} has no {name}")
        _known("train", self.train, _RECIPE)
        for task, settings in self.tasks.items():
            _known(f"task {task!r}", settings, _RECIPE)
        for method, settings in self.methods.items():
            _known(f"method {method!r}", settings, _METHOD)
            if "method" not in settings:
                raise ValueError(f"method {method!r} must say which: method = efft, full, ..., or {', '.join(TRIVIAL)}")
        if self.reference and self.reference not in self.methods:
            raise ValueError(f"reference must be one of {', '.join(self.methods)}, got {self.reference!r}")


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over one another: later ones win, and dicts (``efft``, ``adapter``) are merged by key."""
    result: dict[str, Any] = {}
    for each in settings:
        for name, value in each.items():
            both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
            result[name] = {**result[name], **value} if both else value
    return result


def names() -> list[str]:
    """Names of the suites that come with the library."""
    return sorted(path.name.removesuffix(".json") for path in (files("efft.compare") / "suites").iterdir())


def load(path_or_name: str | Path, quick: bool = False, train: Mapping[str, Any] | None = None) -> Suite:
    """Reads a suite.

    Args:
        path_or_name: a JSON file, or one of `names`.
        quick: the small variant: what the file's ``quick`` says goes over the rest, and its ``tasks`` and ``methods``
            are lists of the names that are left.
        train: settings that go over those of the file, such as ``{"epochs": 1}``.

    Raises:
        FileNotFoundError: no such file, and no such name.
        ValueError: not JSON, an unknown field (with the nearest known one), or no quick variant.
    """
    name = str(path_or_name)
    if name in names():
        text = (files("efft.compare") / "suites" / f"{name}.json").read_text("utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text("utf-8")
    else:
        raise FileNotFoundError(f"there is no suite file {name}; the suites by name are {', '.join(names())}")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the suite {name} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the suite {name} must hold a JSON object, got {type(values).__name__}")
    values = {"name": Path(name).stem, **values}
    small = values.pop("quick", None)
    if quick and small is None:
        raise ValueError(f"the suite {name} has no quick variant; leave out --quick")
    if quick:
        values = _quick(values, small)
    _known(f"suite {name!r}", values, {item.name for item in dataclasses.fields(Suite)})
    # What the caller gives goes over everything, what single tasks and methods set included.
    over = dict(train or {})
    keep = {"tasks": values.get("tasks", {}), "methods": values.get("methods", {})}
    for group, entries in keep.items():
        values[group] = {
            entry: {key: value for key, value in each.items() if key not in over} for entry, each in entries.items()
        }
    return Suite(**{**values, "train": merged(values.get("train", {}), over)})


def _quick(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    for group in ("tasks", "methods"):
        chosen = small.get(group, list(values[group]))
        _known(f"quick.{group}", dict.fromkeys(chosen), set(values[group]))
        values[group] = {name: values[group][name] for name in chosen}
    rest = {name: value for name, value in small.items() if name not in ("tasks", "methods")}
    return merged(values, rest) | {"name": f"{values['name']}-quick"}


def _known(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"unknown field {name!r} in {where}; {hint}")
