"""Provide the command `efft`. `efft COMMAND --help` explains each command.

Importing this module does not import torch, timm or accelerate. A command imports only the packages that it needs,
which keeps the start-up time of simple commands short.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

_SUMMARY = {
    "train": "fine-tune a model (--resume continues an interrupted run)",
    "eval": "print the scores of a trained model on a split of a data set",
    "compare": "compare methods on several tasks with several seeds, and write a report",
    "merge": "add an adapter to the weights of its base model",
    "export": "write an adapter as an equivalent LoRA checkpoint of peft",
    "inspect": "print the trainable parameters of an adapted model or of a saved adapter",
    "data": "list or download data sets",
    "bench": "measure speed and memory (only in a source checkout)",
    "env": "print versions and backends, and why a backend is missing; for bug reports",
}
# Errors that users can cause and fix: wrong values, missing files or packages, failed downloads, insufficient memory.
# Other exceptions are bugs and are shown with their traceback.
_EXPECTED = (ValueError, OSError, ImportError, RuntimeError, ArithmeticError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 2 for an error that was reported in one message, 130 for an interruption by the user, and
    141 if the reader of the output (such as ``head``) has exited. The command ``bench`` has its own exit codes. With
    the environment variable ``EFFT_DEBUG=1``, errors are raised with their traceback instead.

    Args:
        arguments: command-line arguments after ``efft``; by default, the arguments of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        from efft_kernels import __version__

        print(f"efft-kernels {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    name, *rest = words
    if name not in _SUMMARY:
        from efft.hints import did_you_mean

        print(f"efft: error: unknown command {name!r}; {did_you_mean(name, _SUMMARY)}", file=sys.stderr)
        return 2
    hints = {
        "train": "; the same command with --resume continues from the last checkpoint",
        "compare": "; the same command continues with the remaining runs",
    }
    return run_command(lambda: _dispatch(name, rest), hints.get(name, ""))


def run_command(command: Callable[[], int], after_interrupt: str = "") -> int:
    """Run a function that returns an exit code, and convert errors that users can cause to exit codes.

    Such an error is printed as one message, and the exit code is 2. See :func:`main` for the other codes.

    Args:
        command: the function.
        after_interrupt: text to add to the message if the user interrupts the function.
    """
    try:
        code = command()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"\nefft: interrupted{after_interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _EXPECTED as error:
        if os.environ.get("EFFT_DEBUG") == "1":
            raise
        print(f"efft: error: {error or type(error).__name__}", file=sys.stderr)
        return 2


def _dispatch(name: str, words: list[str]) -> int:
    if name == "bench":
        from efft_lab.cli import bench

        return bench.run(words)
    if name == "env":
        if words and set(words) <= {"-h", "--help"}:
            print(f"usage: efft env\n\n{_SUMMARY['env']}")
            return 0
        if words:
            raise ValueError(f"env takes no arguments, got {' '.join(words)!r}")
        from efft_kernels import env

        print(env.report())
        return 0
    try:
        import tyro  # noqa: F401  # check that tyro is installed, because the modules below import it
    except ImportError as error:
        raise ImportError(f"`efft {name}` needs tyro: pip install 'efft-kernels[train]'") from error
    from efft_lab.cli import commands
    from efft_lab.cli.compare import compare
    from efft_lab.cli.parsing import parse, parse_subcommand

    if name == "data":
        parse_subcommand({"list": commands.data_list, "fetch": commands.data_fetch}, words, "efft data")
    elif name == "train":
        commands.train(words)
    else:
        functions: dict[str, Callable[..., object]] = {
            "eval": commands.evaluate,
            "compare": compare,
            "merge": commands.merge,
            "export": commands.export,
            "inspect": commands.inspect,
        }
        parse(functions[name], words, f"efft {name}")
    return 0


def _usage() -> str:
    lines = [f"  {name:<9}{text}" for name, text in _SUMMARY.items()]
    return "\n".join(
        [
            "usage: efft COMMAND [options]",
            "",
            *lines,
            "",
            "`efft COMMAND --help` lists the options, and `efft --version` prints the version.",
        ]
    )
