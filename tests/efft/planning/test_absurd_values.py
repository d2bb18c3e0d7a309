"""Test that meaningless settings, in Python and in adapter files, immediately raise an error that names the setting."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import efft
from efft.methods import METHODS
from tests.adapter_files import CONFIG, edit_config
from tests.hostile import at_most

pytestmark = pytest.mark.slow  # tries every field of every method

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]

INTEGERS = [0, -1, 10**5, 10**30, 10**5000, True, 3.0, float("nan"), float("inf"), "3", [], {}]
NUMBERS = [10**7, -1e30, 10**30, 10**400, float("nan"), float("-inf"), True, "1.0", [1.0], None]
TEXTS = [3, None, True, "nonsense", ["v"], {}]
#: For each name of a field, values that no method accepts.
ABSURD: dict[str, list[Any]] = {
    **dict.fromkeys(("rank", "bottleneck", "n_factors", "heads"), INTEGERS),
    **dict.fromkeys(("scale", "d_initial", "dropout"), NUMBERS),
    **dict.fromkeys(("variant", "init", "core_init", "core_sharing", "tensor"), TEXTS),
    "ranks": [3, "4444", [4, 4, 4], [4, 4, 4, 0], [4, 4, 4, True], [4, 4, 4, 10**9], {}],
    "trainable_scale": [1, "yes", None],
    "targets": [3, None, ["qkv", 3], {}],
    "exclude": [None, [3], {}],
    "head": [3, [3], {}],
    "freeze_statistics": [0, "no", None, [], {}],
    "bias": [0, "yes", None],
    "norms": [0, "no", None, [], {}],
    "movement": [0, -1.0, float("nan"), float("inf"), True, "1.0", [1.0], None],
    "rates": [3, None, [3.0], {"core": 3.0}, {"cores": 0}, {"cores": float("nan")}, {"cores": "3"}],
    "layer_scale": [1, "yes", True, [], {}],
    "heads_on": ["both", 1, None],
}
CASES = [
    (method, field.name, value)
    for method, config in METHODS.items()
    for field in dataclasses.fields(config)  # type: ignore[arg-type]
    for value in ABSURD[field.name]
    if not (
        field.name in ("scale", "rank") and method == "efft" and value == {}
    )  # the constructor accepts {}, but a plan rejects it, because it names no group
]


def written(value: Any) -> str:
    text = str(type(value).__name__ if isinstance(value, int) and abs(value) > 10**100 else value)
    return text[:20]


@contextmanager
def cheap() -> Iterator[None]:
    """Check that the block needs little memory and at most one second."""
    start = time.process_time()
    with at_most(20):
        yield
    assert time.process_time() - start < 1


def test_every_field_is_tried() -> None:
    for method, config in METHODS.items():
        assert {field.name for field in dataclasses.fields(config)} <= ABSURD.keys(), method  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_constructors_refuse(method: str) -> None:
    for _, name, value in (case for case in CASES if case[0] == method):
        with cheap(), pytest.raises(ValueError, match=rf"^{METHODS[method].__name__}\.{name} must be ") as caught:
            METHODS[method](**{name: value})
        assert len(str(caught.value)) < 900, written(value)


@pytest.mark.parametrize("method", METHODS)
def test_files_are_refused(method: str, tiny_vit: Make, tmp_path: Path, unchanged: Unchanged) -> None:
    settings: dict[str, Any] = {} if method in ("efft", "loretta_adp") else {"rank": 4}
    efft.save_adapter(efft.apply(tiny_vit(), METHODS[method](**settings)), tmp_path)
    whole, model = (tmp_path / CONFIG).read_text(), tiny_vit()
    with unchanged(model):
        for _, name, value in (case for case in CASES if case[0] == method):
            if isinstance(value, int) and abs(value) > 10**4000:
                continue  # json cannot write an integer of this size
            edit_config(tmp_path, lambda d, name=name, value=value: d["config"].update({name: value}))
            with cheap(), pytest.raises(ValueError, match=rf"{METHODS[method].__name__}\.{name} must be "):
                efft.load_adapter(model, tmp_path)
            (tmp_path / CONFIG).write_text(whole)


@pytest.mark.parametrize("digits", [400, 5000])
def test_integers_of_many_digits_in_a_file(digits: int, tiny_vit: Make, tmp_path: Path, unchanged: Unchanged) -> None:
    efft.save_adapter(efft.apply(tiny_vit(), efft.EfftConfig(rank=4)), tmp_path)
    text = json.dumps(json.loads((tmp_path / CONFIG).read_text()))
    (tmp_path / CONFIG).write_text(text.replace('"rank": 4', '"rank": 1' + "0" * digits))
    model = tiny_vit()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"EfftConfig\.rank must be|adapter_config\.json is not JSON"),
    ):
        efft.load_adapter(model, tmp_path)
