"""Train tiny models of the library transformers with its Trainer, after ``efft.apply`` or under ``peft``.

The adapters are saved. New processes load them and must compute the same logits. Adapters of ``efft.apply`` are
also exported as LoRA checkpoints, which peft loads without this library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import efft

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'efft-kernels[hf]'")
peft = pytest.importorskip("peft", reason="needs peft: pip install 'efft-kernels[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'efft-kernels[train]'")

from efft.integrations.peft import EfftPeftConfig  # noqa: E402  # it needs peft
from tests.efft.planning.test_transformers import inputs, make  # noqa: E402

pytestmark = pytest.mark.slow  # trains models of transformers and loads them in new processes

ROOT = Path(__file__).parents[3]
MODELS = ("vit", "swin", "clip", "bert")

#: A program that loads saved adapters with this library, with peft and this library, or with peft only.
LOAD = """
import copy, sys, torch, peft
from pathlib import Path
torch.set_num_threads(1)
if "adapter" in sys.argv:
    import efft, efft.integrations.peft
for folder in Path(sys.argv[1]).iterdir():
    base, inputs = torch.load(folder / "base.pt", weights_only=False)
    for way in sys.argv[2:]:
        load = efft.load_adapter if way == "adapter" else peft.PeftModel.from_pretrained
        model = load(copy.deepcopy(base), folder / way).eval()
        with torch.no_grad():
            torch.save(model(**inputs).logits, folder / f"{way}.pt")
assert "adapter" in sys.argv or not [name for name in sys.modules if name.startswith("efft")]
"""


def train(model: nn.Module, name: str, out: Path) -> list[float]:
    """Run eight steps of the Trainer and return their losses."""
    (key, x), *_ = inputs(name).items()
    examples = [{key: x[i % 2], "labels": i % 2} for i in range(4)]
    arguments = transformers.TrainingArguments(
        str(out),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.eval()(**inputs(name)).logits
    return y


Results = dict[str, tuple[list[float], Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Return the results for every model and every way to train and save it. The ways are the keys of ``WAYS``.

    The results are the losses, and the logits before training, after training, and in a new process.
    """
    folder, trained = tmp_path_factory.mktemp("models"), {}
    for name in MODELS:
        (folder / name).mkdir()
        torch.save((make(name), inputs(name)), folder / name / "base.pt")
        ours, theirs = efft.apply(make(name), efft.EfftConfig(rank=4)), under_peft(name)
        out = tmp_path_factory.mktemp("trainer")
        losses = {"adapter": train(ours, name, out), "peft": train(theirs, name, out)}
        efft.save_adapter(ours, folder / name / "adapter")
        efft.export_lora(ours, folder / name / "lora")
        theirs.save_pretrained(folder / name / "peft")
        trained[name] = {
            "adapter": (losses["adapter"], logits(ours, name)),
            "lora": (losses["adapter"], logits(ours, name)),
            "peft": (losses["peft"], logits(theirs, name)),
        }
    for ways in (["adapter", "peft"], ["lora"]):
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])} if "adapter" in ways else {}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | paths
        command = [sys.executable, "-c", LOAD, str(folder), *ways]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
    return {
        name: {
            way: (losses, logits(make(name), name), after, torch.load(folder / name / f"{way}.pt"))
            for way, (losses, after) in trained[name].items()
        }
        for name in MODELS
    }


def under_peft(name: str) -> nn.Module:
    model: nn.Module = peft.get_peft_model(make(name), EfftPeftConfig(rank=4))
    return model


WAYS = {"adapter": "efft.apply", "lora": "efft.export_lora", "peft": "peft.get_peft_model"}


@pytest.mark.parametrize("name", MODELS)
def test_trained_saved_and_loaded_in_a_new_process(
    name: str, results: dict[str, Results], show: Callable[..., None]
) -> None:
    for way, (losses, before, expected, found) in results[name].items():
        assert losses[-1] < 0.9 * losses[0]
        change, error = ((y - expected).abs().max().item() for y in (before, found))
        assert change > 0.1
        assert error <= 1e-5
        row = f"transformers, {name}, {WAYS[way]}"
        show("Largest change of a logit", row, "by the Trainer", change)
        show("Largest change of a logit", row, "by saving, and loading in a new process", error)
