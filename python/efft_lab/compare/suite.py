"""Read and check suites.

A suite is the content of the JSON file that describes a comparison: tasks, methods, seeds and grids of settings.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_type_hints

from efft.saving.files import read_json
from efft_lab import data, typed
from efft_lab.train.config import TrainConfig
from efft_lab.train.methods import METHODS

#: Names of trivial predictors, which do not recognize objects. ``majority`` predicts the most frequent class,
#: ``pixels`` is a linear model on thumbnails, and ``knn`` finds the nearest neighbors among thumbnails.
TRIVIAL = ("majority", "pixels", "knn")
_RECIPE = {item.name for item in dataclasses.fields(TrainConfig)} - {"data", "seed", "data_seed", "protocol"}
_RECIPE -= {"task", "regression_loss"}  # suites support only classification, because the report compares accuracies
_METHOD = _RECIPE | {"grid", "vtab_settings", "seeds"}
#: Maximum number of points of a grid; a larger grid would take too long.
_MOST_POINTS = 1000


@dataclass(frozen=True)
class Suite:
    """The description of a comparison.

    Settings are fields of ``TrainConfig``. The settings of a task override those of a method, and the settings of a
    method override ``train``. This class and :class:`efft_lab.compare.agenda.Agenda` check all settings before the
    first run starts.

    A method may have a grid, which lists values to try for some settings. For each task, search runs try every
    combination of these values on the validation split. Final runs use the best combination and are tested.

    Attributes:
        name: name of the suite. The result file is called ``compare_NAME.jsonl``.
        about: description of the suite, which is the beginning of the report.
        tasks: maps the name of each data set to the settings of all runs on the data set.
        methods: maps the name of each method in the tables to its settings. ``method`` is required and may also be one
            of ``TRIVIAL``. Besides other fields of ``TrainConfig``, three entries are allowed: ``grid`` maps settings
            to lists of values, as in ``{"lr": [...], "efft.scale": [...]}``. ``vtab_settings`` ("efft1" or "efft2")
            selects the paper's settings of that variant for each VTAB-1K task. ``seeds`` lists some of the suite's
            seeds, for a method that needs fewer runs.
        seeds: seeds of the final runs. Each method has one final run per seed and task. If the data set does not define
            its training images, the seed also selects them.
        train: settings of all runs.
        search_seeds: seeds of the search runs; by default, the first of ``seeds``.
        reference: method, or list of methods, against which the other methods are tested; by default, the first method.
    """

    name: str
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    about: str = ""
    train: dict[str, Any] = field(default_factory=dict)
    search_seeds: list[int] = field(default_factory=list)
    reference: str | list[str] = ""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            typed.check(name, getattr(self, name), hint)
        if not re.fullmatch(r"\w[^/\\\0]*", self.name):
            raise ValueError(f"name must begin with a letter or digit and have no slash, got {self.name!r}")
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"suite {self.name!r} has no {name}")
        for name in ("seeds", "search_seeds"):
            seeds = getattr(self, name)
            if min(seeds, default=0) < 0 or len(set(seeds)) < len(seeds):
                raise ValueError(f"{name} must be distinct integers >= 0, got {seeds}")
        typed.check_names("train", self.train, _RECIPE)
        for task, settings in self.tasks.items():
            _check_task(task)
            typed.check(f"task {task!r}", settings, dict)
            typed.check_names(f"task {task!r}", settings, _RECIPE)
        for method, settings in self.methods.items():
            _check_method(f"method {method!r}", settings)
            own = settings.get("seeds", self.seeds)
            typed.check(f"method {method!r}, seeds", own, list[int])
            if not self.seeds_of(method):
                raise ValueError(f"method {method!r}: seeds must be some of the suite's {self.seeds}, got {own}")
        typed.check_names("reference", self.references, self.methods, "method")

    @property
    def references(self) -> list[str]:
        """The methods against which the other methods are tested."""
        return [self.reference or next(iter(self.methods))] if isinstance(self.reference, str) else self.reference

    def seeds_of(self, method: str) -> list[int]:
        """Return the seeds of a method's final runs, in the suite's order."""
        own = self.methods[method].get("seeds", self.seeds)
        return [seed for seed in self.seeds if seed in own]


def _check_task(name: str) -> None:
    """Raise an error for a name that is neither a known data set nor a folder."""
    if not os.path.isdir(name):
        try:
            data.describe(name)
        except ValueError as error:
            raise ValueError(f"tasks: {error}, nor is there a folder of that name") from None


def _check_method(where: str, settings: Any) -> None:
    typed.check(where, settings, dict)
    typed.check_names(where, settings, _METHOD)
    kind = settings.get("method")
    if kind is None:
        raise ValueError(f"{where} lacks the entry 'method', such as efft or full, or one of {', '.join(TRIVIAL)}")
    typed.check(f"{where}, vtab_settings", settings.get("vtab_settings"), Literal["efft1", "efft2"] | None)
    grid = settings.get("grid", {})
    typed.check(f"{where}, grid", grid, dict)
    if grid and kind in TRIVIAL:
        raise ValueError(f"{where} has a grid, but {kind!r} has no settings; remove the grid")
    for setting, values in grid.items():
        _check_setting(f"{where}, grid", setting, str(kind))
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: a grid maps a setting to a list of values, got {setting!r}: {values!r}")
        if any(value in values[:i] for i, value in enumerate(values)):
            raise ValueError(f"{where}, grid {setting!r} has a value twice: {values}")
    points = math.prod(map(len, grid.values()))
    if points > _MOST_POINTS:
        raise ValueError(f"{where}: the grid has {points} combinations, expected at most {_MOST_POINTS}")


def _check_setting(where: str, setting: str, method: str) -> None:
    """Raise an error if a name is not a setting of the method. Names are, for example, ``lr`` and ``efft.scale``."""
    head, dot, field_name = setting.partition(".")
    groups = {each.group for each in METHODS.values() if each.group}
    if not dot:
        typed.check_names(where, [setting], _RECIPE - groups - {"method"}, "setting")
        return
    typed.check_names(where, [head], groups, "group of settings")
    known = METHODS.get(method)
    own = known.group if known is not None and known.group else "adapter"
    if head != own:
        raise ValueError(
            f"{where}: {setting!r} is not read by method {method!r}; the names of its settings begin with '{own}.'"
        )
    types = known.setting_types() if known is not None else {}
    typed.check_names(f"{where} ({head}.)", [field_name], types, "setting")


def merge_settings(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings. Later settings override earlier settings.

    Values that are dicts (``efft``, ``adapter``) are merged key by key.
    """
    result: dict[str, Any] = {}
    for each in settings:
        for name, value in each.items():
            both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
            result[name] = {**result[name], **value} if both else value
    return result


def names() -> list[str]:
    """Return the names of the suites in the folder ``suites`` of this package."""
    return sorted(path.name.removesuffix(".json") for path in (files("efft_lab.compare") / "suites").iterdir())


def load(path_or_name: str | Path, quick: bool = False, train: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite.

    Args:
        path_or_name: path of a JSON file, or one of :func:`names`.
        quick: whether to read the small variant, which the entry ``quick`` of the file describes. The fields in
            ``quick`` override those of the suite, and its lists ``tasks`` and ``methods`` contain the names to keep.
        train: settings that override all settings in the file, such as ``{"epochs": 1}``.

    Raises:
        FileNotFoundError: neither a file nor a suite has this name.
        ValueError: the file is not JSON, a field is unknown (the message names the most similar field), a value is
            invalid, or ``quick`` is True and the file has no entry ``quick``.
    """
    name = str(path_or_name)
    if name in names():
        values = json.loads((files("efft_lab.compare") / "suites" / f"{name}.json").read_text("utf-8"))
    elif Path(name).is_file():
        values = read_json(Path(name))
    else:
        raise FileNotFoundError(f"there is no suite file {name!r}; the suites by name are {', '.join(names())}")
    typed.check(f"the suite {name}", values, dict)
    known = {item.name for item in dataclasses.fields(Suite)}
    small = values.pop("quick", None)
    typed.check_names(f"suite {name!r}", values, known)
    empty: dict[str, Any] = {"name": Path(name).stem, "tasks": {}, "methods": {}, "seeds": []}
    suite = Suite(**{**empty, **values})
    if small is None and quick:
        raise ValueError(f"the suite {name!r} has no quick variant; leave out --quick")
    if small is not None:
        variant = _quick(suite, small)
        suite = variant if quick else suite
    if not train:
        return suite
    # The caller's settings override everything, including the settings of single tasks and methods.
    groups: dict[str, Any] = {
        group: {
            entry: {key: value for key, value in each.items() if key not in train} for entry, each in entries.items()
        }
        for group, entries in (("tasks", suite.tasks), ("methods", suite.methods))
    }
    return dataclasses.replace(suite, **groups, train=merge_settings(suite.train, train))


def _quick(suite: Suite, small: Any) -> Suite:
    values = {item.name: getattr(suite, item.name) for item in dataclasses.fields(Suite)}
    typed.check("quick", small, dict)
    typed.check_names("quick", small, values.keys() - {"name"})
    chosen: dict[str, Any] = {}
    for group in ("tasks", "methods"):
        names = small.get(group, list(values[group]))
        typed.check(f"quick.{group}", names, list[str])
        typed.check_names(f"quick.{group}", names, values[group], group.removesuffix("s"))
        chosen[group] = {name: values[group][name] for name in names}
    try:
        return Suite(**{**merge_settings(values, small), **chosen, "name": f"{suite.name}-quick"})
    except ValueError as error:
        raise ValueError(f"quick: {error}") from None
