"""Check that a saved adapter reproduces the trained model.

A new process loads the adapter from its files and computes logits with the loaded model, the merged model and a plain
timm model with the merged weights. These logits are compared with those of the trained model.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import efft
from efft_lab import backbones
from efft_lab.train import build
from efft_lab.train.build import load_trained
from efft_lab.train.inference import device

_IMAGES = 64
_TOLERANCE = 1e-3  # relative to the largest logit; rounding in fp32 causes far smaller differences


@dataclass(frozen=True)
class Agreement:
    """The agreement between the logits of the trained model and those of another model.

    Attributes:
        name: name of the other model.
        difference: largest absolute difference between the logits.
        scale: largest absolute logit of the trained model.
        same: number of images with the same predicted class.
        images: number of compared images.
    """

    name: str
    difference: float
    scale: float
    same: int
    images: int

    def __str__(self) -> str:
        return (
            f"{self.name}: max difference {self.difference:.1e} (logits up to {self.scale:.1f}), "
            f"same class for {self.same} of {self.images} images"
        )


def verify(model: nn.Module, run_folder: Path, data: Dataset[Any]) -> list[Agreement]:
    """Compare the trained model with the three models of a new process, in fp32, on up to 64 images.

    Args:
        model: the trained model, in evaluation mode.
        run_folder: folder of the run.
        data: data set with the images for the comparison.

    Returns:
        The agreement with the models "reloaded" (adapter loaded), "merged" (adapter merged) and "merged file" (plain
        timm model with the merged weights).

    Raises:
        RuntimeError: the logits or the classes differ, the adapter has no effect, or the new process failed.
    """
    count = min(_IMAGES, len(data))  # type: ignore[arg-type]
    images = torch.stack([data[i][0] for i in range(count)])
    live = _logits(model, images)
    with efft.disabled(model):
        base = _logits(model, images)
    given, answer = run_folder / "verify-images.safetensors", run_folder / "verify-logits.safetensors"
    save_file({"images": images}, given)
    command = [sys.executable, "-m", "efft_lab.demo.verify", str(run_folder), str(given), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr}")
    answers = load_file(answer)
    found = [_compare(name, live, answers[name]) for name in ("reloaded", "merged", "merged file")]
    given.unlink()
    answer.unlink()
    for agreement in found:
        if agreement.same < agreement.images or agreement.difference > _TOLERANCE * agreement.scale:
            raise RuntimeError(f"the {agreement.name} model differs from the trained model: {agreement}")
    without = _compare("base", live, base)
    if without.difference <= _TOLERANCE * without.scale:
        raise RuntimeError(f"the adapter has no effect on the logits, so the comparison proves nothing: {without}")
    return found


def _compare(name: str, live: Tensor, logits: Tensor) -> Agreement:
    same = int((live.argmax(-1) == logits.argmax(-1)).sum())
    return Agreement(name, float((live - logits).abs().max()), float(live.abs().max()), same, len(live))


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:  # [n, 3, size, size] -> [n, classes]
    result: Tensor = model.to(device())(images.to(device()))
    return result.cpu()


def _answer(run_folder: Path, given: Path, answer: Path) -> None:
    """Write the logits of the reloaded model, the merged model, and the plain timm model with the merged weights.

    This function runs in the new process.
    """
    images = load_file(given)["images"]
    model, config = load_trained(run_folder / "adapter")
    logits = {"reloaded": _logits(model, images)}
    state = efft.merged_state_dict(model)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, run_folder / "merged.safetensors")
    print(efft.merge(model))
    logits["merged"] = _logits(model, images)
    plain = build.create_model(config, model.get_classifier().out_features, weights=False).eval()  # type: ignore[operator]
    backbones.load_strict(plain, load_file(run_folder / "merged.safetensors"), "merged.safetensors")
    logits["merged file"] = _logits(plain, images)
    save_file(logits, answer)


if __name__ == "__main__":
    _answer(*map(Path, sys.argv[1:]))
