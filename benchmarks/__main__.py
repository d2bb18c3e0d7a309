"""Run one command of the benchmarks: ``python -m benchmarks COMMAND``; ``COMMAND --help`` explains the command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from efft.hints import did_you_mean

#: For each command, the module whose ``main(arguments)`` runs the command, and a one-line description.
COMMANDS = {
    "ops": ("benchmarks.ops.run", "time one adapted layer: every backend, the naive form, the paper's form, LoRA ..."),
    "model": ("benchmarks.model.run", "time one training step of a model"),
    "memory": ("benchmarks.memory", "memory saved for the backward pass, and peak memory of the process"),
    "serve": ("benchmarks.serve", "inference with the base, adapted and merged models, and with 1 to 1000 adapters"),
    "together": ("benchmarks.together", "a training step of several adapters at once, compared with one alone"),
    "experts": ("benchmarks.experts", "a mixture of experts: low-rank products, LoRA of peft, dense updates"),
    "quantized": ("benchmarks.quantized", "int8, fp8 and nf4 backbones: error, time, memory"),
    "scaling": ("benchmarks.scaling", "how time grows with tokens and rank"),
    "subspaces": ("efft_lab.studies.subspaces", "how much of a full fine-tuning update shared factors can express"),
    "starts": ("efft_lab.studies.starts", "EFFT2 initialized from the gradient or from the pretrained weights"),
    "extras": (
        "efft_lab.studies.extras.command",
        "what to train in addition to the shared factors, and at which rates",
    ),
    "text": ("efft_lab.studies.text", "EFFT2, LoRA and a linear probe on a text transformer"),
    "convolutions": (
        "efft_lab.studies.convolutions",
        "EFFT2, LoRA, a linear probe and full fine-tuning on a convolutional network",
    ),
    "kinds": ("benchmarks.kinds", "adapted attention and Conv1D layers, compared with LoRA and dense updates"),
    "host": ("benchmarks.host", "dispatcher calls, Python calls and microseconds of one adapted layer on the host"),
    "planning": ("benchmarks.planning", "how long planning takes on models of thousands of layers"),
    "models": ("benchmarks.models", "which layers are adapted in every architecture of timm and transformers"),
    "steps": ("benchmarks.steps", "predict the gain of each planned change to the cuda backend; measures nothing"),
    "compare": ("benchmarks.compare", "find slowdowns between two result files or two revisions"),
    "plot": ("benchmarks.plots", "draw pictures from result files"),
    "tables": ("benchmarks.readme", "write the documentation's tables from result files"),
    "gpu": ("benchmarks.gpu", "run all benchmarks, the most important first, within a time budget"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 for success, 1 for a slowdown, 2 for an invalid command line."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:<13}{text}" for command, (_, text) in COMMANDS.items()]
        print("\n".join(["usage: python -m benchmarks COMMAND [options]", "", *lines]))
        return 0
    if name not in COMMANDS:
        print(f"benchmarks: error: unknown command {name!r}; {did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except ValueError as error:
        print(f"benchmarks {name}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
