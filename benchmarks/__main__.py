"""Run ``python -m benchmarks COMMAND`` to measure, compare and show; ``COMMAND --help`` explains each command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from efft.hints import did_you_mean

#: The module of each command, whose ``main(arguments)`` runs it, and what it does.
COMMANDS = {
    "ops": ("benchmarks.ops.run", "one adapted layer: every backend, the naive form, the paper's form, LoRA ..."),
    "model": ("benchmarks.model.run", "a training step of a whole model"),
    "memory": ("benchmarks.memory", "what is kept for the backward pass, and the peak of the process"),
    "serve": ("benchmarks.serve", "inference: base, adapted, merged, with 1 to 1000 adapters at hand"),
    "experts": ("benchmarks.experts", "a mixture of experts: low-rank products, LoRA of peft, dense updates"),
    "quantized": ("benchmarks.quantized", "int8, fp8 and nf4 backbones: error, time, memory"),
    "scaling": ("benchmarks.scaling", "how time grows with tokens and rank"),
    "subspaces": ("efft_lab.studies.subspaces", "what shared factors can express of a full fine-tuning update"),
    "starts": ("efft_lab.studies.starts", "EFFT2 from directions of the gradient or of the pretrained weights"),
    "extras": ("efft_lab.studies.extras.command", "what to train beside the shared factors, and at which rates"),
    "text": ("efft_lab.studies.text", "EFFT2, LoRA and a linear probe on a text transformer"),
    "convolutions": (
        "efft_lab.studies.convolutions",
        "EFFT2, LoRA, a linear probe and full fine-tuning on a convolutional network",
    ),
    "kinds": ("benchmarks.kinds", "adapted attention and Conv1D against LoRA and dense updates"),
    "planning": ("benchmarks.planning", "how long planning takes on models of thousands of layers"),
    "models": ("benchmarks.models", "what is adapted in every architecture of timm and transformers"),
    "compare": ("benchmarks.compare", "what became slower between two result files or revisions"),
    "plot": ("benchmarks.plots", "draw pictures from result files"),
    "tables": ("benchmarks.readme", "write the documentation's tables from result files"),
    "gpu": ("benchmarks.gpu", "run everything, in order of importance, within a time budget"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 for success, 1 if something became slower, 2 for a wrong call."""
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
