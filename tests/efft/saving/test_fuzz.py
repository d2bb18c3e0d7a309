"""Test randomly changed files: adapters, configurations, LoRA checkpoints and backbones.

A changed file must either load, or raise ValueError or FileNotFoundError without changing the model.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import efft
from efft.methods import METHODS, config_from_dict
from efft_lab.backbones import load_backbone
from tests.adapter_files import CONFIG, WEIGHTS, record, write_weights
from tests.hostile import altered, at_most, damaged, fuzz

pytestmark = pytest.mark.slow  # runs hundreds of generated examples

Make = Callable[..., nn.Module]
Unchanged = Callable[[nn.Module], AbstractContextManager[None]]


@pytest.fixture
def offered(tiny_vit: Make, unchanged: Unchanged) -> Callable[..., None]:
    """Return a function that tries to load an adapter into a plain model, and removes it after a success."""
    model = tiny_vit().eval()

    def offer(folder: Path, load: Callable[..., Any] = efft.load_adapter, **options: Any) -> None:
        with unchanged(model), at_most(150), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load(model, folder, **options)
            except (ValueError, FileNotFoundError) as error:
                assert str(error)  # noqa: PT017
            else:
                assert all(p.isfinite().all() for p in model.parameters())
                fresh = tiny_vit()
                model.head.load_state_dict(fresh.head.state_dict())
                efft.remove(model)

    return offer


@pytest.fixture
def folder(saved: tuple[nn.Module, Path]) -> Path:
    return saved[1]


@fuzz
@given(data=st.data(), recorded=st.booleans(), strict=st.booleans())
def test_weights(data: st.DataObject, recorded: bool, strict: bool, folder: Path, offered: Callable[..., None]) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    try:
        (folder / WEIGHTS).write_bytes(data.draw(damaged(whole)))
        if recorded:
            record(folder)
        offered(folder, strict=strict)
    finally:
        write_weights(folder, whole)


@fuzz
@given(data=st.data(), strict=st.booleans())
def test_headers_of_weights(data: st.DataObject, strict: bool, folder: Path, offered: Callable[..., None]) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.dumps(data.draw(altered(json.loads(whole[8 : 8 + size])))).encode()
    try:
        write_weights(folder, len(header).to_bytes(8, "little") + header + whole[8 + size :])
        offered(folder, strict=strict)
    finally:
        write_weights(folder, whole)


@fuzz
@given(data=st.data())
def test_bytes_of_the_configuration(data: st.DataObject, folder: Path, offered: Callable[..., None]) -> None:
    whole = (folder / CONFIG).read_bytes()
    try:
        (folder / CONFIG).write_bytes(data.draw(damaged(whole)))
        offered(folder)
    finally:
        (folder / CONFIG).write_bytes(whole)


@fuzz
@given(data=st.data(), strict=st.booleans())
def test_values_in_the_configuration(
    data: st.DataObject, strict: bool, folder: Path, offered: Callable[..., None]
) -> None:
    whole = (folder / CONFIG).read_text()
    try:
        (folder / CONFIG).write_text(json.dumps(data.draw(altered(json.loads(whole)))))
        offered(folder, strict=strict)
    finally:
        (folder / CONFIG).write_text(whole)


@fuzz
@given(data=st.data(), method=st.sampled_from(list(METHODS)))
def test_configurations_of_methods(data: st.DataObject, method: str, tiny_vit: Make, unchanged: Unchanged) -> None:
    """Huge values must not exhaust the memory, even if they are valid."""
    values: Any = data.draw(altered(METHODS[method]().to_dict()))
    model = tiny_vit()
    with unchanged(model), at_most(150), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = config_from_dict(values) if isinstance(values, dict) else None
        except ValueError as error:
            assert str(error)  # noqa: PT017
        else:
            assert config is None or config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@fuzz
@given(data=st.data())
def test_descriptions_of_every_method(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, tiny_vit: Make, offered: Callable[..., None]
) -> None:
    method = data.draw(st.sampled_from(list(METHODS)))
    settings = {} if method == "loretta_adp" else {"rank": 4}
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    efft.save_adapter(efft.apply(tiny_vit(), METHODS[method](**settings)), folder)
    description = json.loads((folder / CONFIG).read_text())
    description["config"] = data.draw(altered(description["config"]))
    (folder / CONFIG).write_text(json.dumps(description))
    offered(folder)


@fuzz
@given(data=st.data(), part=st.sampled_from(["weights", "header", "configuration", "settings"]))
def test_lora_checkpoints(
    data: st.DataObject, part: str, saved: tuple[nn.Module, Path], tmp_path: Path, offered: Callable[..., None]
) -> None:
    folder = efft.export_lora(saved[0], tmp_path / "lora")
    weights, config = (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_bytes()
    if part == "weights":
        (folder / WEIGHTS).write_bytes(data.draw(damaged(weights)))
    elif part == "header":
        size = int.from_bytes(weights[:8], "little")
        header = json.dumps(data.draw(altered(json.loads(weights[8 : 8 + size])))).encode()
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + weights[8 + size :])
    elif part == "configuration":
        (folder / CONFIG).write_bytes(data.draw(damaged(config)))
    else:
        (folder / CONFIG).write_text(json.dumps(data.draw(altered(json.loads(config)))))
    offered(folder, load=efft.import_lora)
    shutil.rmtree(folder)


@fuzz
@given(data=st.data(), suffix=st.sampled_from([".pth", ".npz", ".safetensors"]))
def test_backbones(data: st.DataObject, suffix: str, tiny_vit: Make, tmp_path: Path) -> None:
    model, path = tiny_vit(num_classes=0), tmp_path / f"backbone{suffix}"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if suffix == ".pth":
        torch.save({"model": state}, path)
    elif suffix == ".npz":
        numpy.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        save_file(state, path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with at_most(150):
        try:
            load_backbone(model, path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
