"""Run one command of the benchmarks: ``python -m benchmarks COMMAND``.

The option ``--help`` without a command lists the commands, and ``COMMAND --help`` explains one command.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from efft.hints import did_you_mean

#: For each command, the module whose ``main(arguments)`` runs the command, and a one-line description. EFFT2 is the
#: default variant of this library's method, in which the layers share the factors of their updates.
COMMANDS = {
    "ops": ("benchmarks.ops.run", "time one adapted linear layer: every backend, and other implementations"),
    "model": ("benchmarks.model.run", "time one training step of a model"),
    "memory": ("benchmarks.memory", "measure the memory saved for the backward pass, and the peak memory"),
    "serve": ("benchmarks.serve", "time inference with original, adapted and merged models, and with many adapters"),
    "together": ("benchmarks.together", "time the training of several adapters in one pass, compared with one adapter"),
    "experts": ("benchmarks.experts", "compare an adapted mixture of experts with LoRA of peft and with dense updates"),
    "quantized": ("benchmarks.quantized", "measure error, time and memory with int8, fp8 and nf4 backbones"),
    "scaling": ("benchmarks.scaling", "measure how time grows with tokens and rank"),
    "subspaces": (
        "efft_lab.studies.subspaces",
        "measure how much of a full fine-tuning update shared factors can express",
    ),
    "starts": ("efft_lab.studies.starts", "study EFFT2 that starts from the gradient or from the pretrained weights"),
    "extras": (
        "efft_lab.studies.extras.command",
        "study which parameters to train in addition to the shared factors, and at which rates",
    ),
    "fp8": ("efft_lab.studies.fp8", "study the accuracy of EFFT with frozen products in emulated 8-bit formats"),
    "text": ("efft_lab.studies.text", "compare EFFT2, LoRA and a linear probe on a text transformer"),
    "convolutions": (
        "efft_lab.studies.convolutions",
        "compare EFFT2, LoRA, a linear probe and full fine-tuning on a convolutional network",
    ),
    "kinds": ("benchmarks.kinds", "compare adapted attention and Conv1D layers with LoRA and with dense updates"),
    "host": ("benchmarks.host", "count dispatcher calls, Python calls and microseconds of one layer on the host"),
    "planning": ("benchmarks.planning", "time efft.inspect for models with thousands of layers"),
    "fp8-products": ("benchmarks.fp8_products", "compare the time of fp8 and bf16 products of a ViT-B block"),
    "models": ("benchmarks.models", "find the adapted layers of every architecture of timm and transformers"),
    "generations": (
        "benchmarks.generations",
        "compare the generations of the CUDA kernels, in processes that take turns",
    ),
    "timeline": ("benchmarks.timeline", "list the kernels of a block and of a training step, with their times"),
    "steps": ("benchmarks.steps_page", "predict the gain of each planned change to the cuda backend; measures nothing"),
    "compare": ("benchmarks.compare", "find slowdowns between two result files or two revisions"),
    "plot": ("benchmarks.plots", "draw pictures from result files"),
    "tables": ("benchmarks.readme", "write the documentation's tables from result files"),
    "gpu": ("benchmarks.gpu", "run tests and benchmarks on a GPU, the most important first, within a time budget"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    The code is 0 for success, 1 if ``compare`` finds a slowdown or a job of ``gpu`` fails, and 2 if the command line is
    invalid or the command raises ``ValueError``.
    """
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
