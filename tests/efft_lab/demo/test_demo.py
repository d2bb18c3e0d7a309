"""Test the demo from end to end, on scikit-learn's digits and a small random ViT."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import efft
from efft_lab.demo import settings, verify
from efft_lab.train import TrainConfig, build, run
from efft_lab.train.probe import FeatureTask, linear_probe

pytestmark = pytest.mark.slow  # runs the demo

ROOT = Path(efft.__file__).parents[1]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, which contains the digits")
    monkeypatch.setenv("EFFT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT.parent}")  # for the process that verifies the results


def small(method: Any) -> TrainConfig:
    return TrainConfig(
        data="digits",
        model="test_vit",
        pretrained=False,
        image_size=32,
        method=method,
        efft=efft.EfftConfig(rank=4, scale=10.0),
        epochs=2,
        lr=5e-3,
        schedule_per="update",
    )


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    demo: Any = importlib.import_module("efft_lab.demo.__main__")
    monkeypatch.setattr(demo, "TASKS", ("digits",))
    monkeypatch.setattr(demo, "efft_config", lambda name, quick: small("efft"))
    monkeypatch.setattr(demo, "probe_config", lambda name, quick: small("linear"))
    monkeypatch.setattr(sys, "argv", ["efft_lab.demo", "--quick", "--out", str(tmp_path / "out")])
    assert demo.main() == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert report in capsys.readouterr().out
    rows = [line.split("|")[2].strip() for line in report.splitlines() if line.startswith("| digits")]
    assert rows == ["best trivial predictor", "linear probe", "EFFT"]
    for name in ("reloaded", "merged", "merged file"):
        assert f"- digits: {name}: max difference" in report
    assert report.count("same class for 64 of 64 images") == 3
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000


def test_verification_fails_loudly(tmp_path: Path) -> None:
    config = small("efft")
    result = run(config, tmp_path / "run", task=build.load_task(config))
    assert result.model is not None
    data = build.load_task(config).val
    verify.verify(result.model, tmp_path / "run", data)
    with torch.no_grad():
        for _, factor in efft.named_factors(result.model):
            factor.mul_(1.5)  # makes the factors differ from the saved ones
    with pytest.raises(RuntimeError, match="the reloaded model differs from the trained model: reloaded: max diff"):
        verify.verify(result.model, tmp_path / "run", data)
    with torch.no_grad():
        for _, factor in efft.named_factors(result.model):
            factor.zero_()
    efft.save_adapter(result.model, tmp_path / "run" / "adapter", {**_info(tmp_path / "run" / "adapter")})
    with pytest.raises(RuntimeError, match="the adapter has no effect on the logits, so the comparison proves nothing"):
        verify.verify(result.model, tmp_path / "run", data)


def _info(folder: Path) -> dict[str, Any]:
    from efft.saving.io import read_description

    info: dict[str, Any] = read_description(folder)["info"]
    return info


def test_probe_features_are_what_the_head_sees(tmp_path: Path) -> None:
    config = small("linear")
    task = build.load_task(config)
    model: Any = build.create_model(config, task.classes)
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = FeatureTask(model, task, "no")
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        model.eval()(torch.stack([task.val[i][0] for i in range(8)]))
    torch.testing.assert_close(features.val.tensors[0][:8], seen[0], rtol=1e-4, atol=1e-5)
    assert features.val.tensors[1].tolist() == task.val.labels.tolist()


def test_probe_chooses_its_rate_without_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("linear")
    task = build.load_task(config)
    reads: list[str] = []
    of = FeatureTask._of

    def spy(self: FeatureTask, role: str) -> Any:
        reads.append(f"{role} after {len(list((tmp_path / 'search').glob('*/result.json')))} trials")
        return of(self, role)

    monkeypatch.setattr(FeatureTask, "_of", spy)
    result = linear_probe(config, tmp_path, build.create_model(config, task.classes), task, (1e-6, 1e-1))
    assert reads == ["train after 0 trials", "val after 0 trials", "test after 2 trials"]
    assert result.summary["config"]["lr"] == 0.1
    assert result.summary["trainable_parameters"] == 64 * 10 + 10


def test_precision_is_decided_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, expected in (("fpu avx512_bf16 sse", True), ("fpu amx_bf16", True), ("fpu avx512f avx2", False)):
        monkeypatch.setattr(Path, "read_text", lambda self, flags=flags: f"flags\t\t: {flags}\n")
        monkeypatch.setattr(Path, "exists", lambda self: True)
        assert settings.fast_bf16() is expected
