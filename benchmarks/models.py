"""Find out which layers ``efft.apply`` adapts in every architecture of timm and transformers, and write docs/models.md.

    python -m benchmarks models --out docs/models.md

The models are created on the meta device, without weights, and adapted there with ``EfftConfig(rank=16)``. A model is
adapted "wholly" if at least 99 % of the weights in its repeated blocks are adapted, and otherwise "in part". For a
model that is adapted in part, the page lists the weights that are not adapted. Nothing is downloaded. Without ``--out``
no page is written.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import io
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import efft

#: Time limit in seconds for creating and adapting one model.
PATIENCE = 60


@dataclass(frozen=True)
class Outcome:
    """Describe the result for one architecture.

    Attributes:
        library: ``timm`` or ``transformers``.
        name: name of the architecture in the library.
        verdict: "wholly" or "in part" if the model was adapted, "refused" if ``efft.apply`` raised an error, or "not
            made" if the library cannot create the model with its default configuration.
        parameters: number of trained factor parameters.
        backbone: number of parameters of the backbone.
        share: share of the weights in the repeated blocks that are adapted, from 0 to 1.
        said: the weights that are not adapted and the reasons, or the error.
    """

    library: str
    name: str
    verdict: str
    parameters: int = 0
    backbone: int = 0
    share: float = 0.0
    said: str = ""


def architectures(library: str) -> list[str]:
    """Return the names of all architectures of the installed library.

    For timm these are the registered models, and for transformers the classes that its auto classes can create.
    """
    if library == "timm":
        import timm

        names: list[str] = timm.list_models()
        return names
    from transformers.models.auto import modeling_auto

    found = set()
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES"):
            for classes in mapping.values():
                found.update(classes if isinstance(classes, (tuple, list)) else [classes])
    return sorted(found)


def create(library: str, name: str) -> nn.Module:
    """Create the architecture with its default configuration, on the meta device."""
    with torch.device("meta"):
        if library == "timm":
            import timm

            return timm.create_model(name, num_classes=10)
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class())


def examine(library: str, name: str) -> Outcome:
    """Create and adapt one architecture within :data:`PATIENCE` seconds. The result also describes errors."""
    with _quietly(), _patience():
        try:
            model = create(library, name)
        except BaseException as error:  # a library may raise any error if its defaults do not make a model
            return Outcome(library, name, "not made", said=_line(error))
        try:
            config = efft.EfftConfig(rank=16)
            plan = efft.inspect(model, config)
            efft.apply(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            return Outcome(library, name, "refused", said=_line(error))
        except BaseException as error:
            return Outcome(library, name, "refused", said=f"{type(error).__name__}: {_line(error)}")
    counted = efft.count_parameters(model)
    share = 1 - plan.untouched_share
    verdict = "wholly" if share >= 0.99 else "in part"
    return Outcome(library, name, verdict, counted.factors, counted.backbone, share, plan.missing())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {PATIENCE} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def examine_all(library: str, names: Sequence[str], jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Examine the named architectures in ``jobs`` processes and return the outcomes in the order of ``names``.

    ``report`` is called with each outcome.
    """
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = []
        for outcome in pool.map(examine, [library] * len(names), names, chunksize=8):
            report(outcome)
            found.append(outcome)
        return found


def page(outcomes: Sequence[Outcome], command: str) -> str:
    """Return the text of docs/models.md."""
    lines = [
        "# Architectures",
        "",
        "This page shows which weights `efft.apply(model, efft.EfftConfig(rank=16))` adapts in every architecture of",
        "timm and transformers. The models were created on the meta device with their default configurations.",
        "*Wholly* means that at least 99 % of the weights in the repeated blocks are adapted. For the other",
        "architectures, the tables list the weights that are not adapted and the reasons.",
        "`print(efft.inspect(model))` lists them for your model.",
        "",
        f"This page was written by `{command}` with "
        + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("timm", "transformers", "torch"))
        + ".",
        "",
        "| library | architectures | wholly | in part | refused | cannot be created with default settings |",
        "|---|---|---|---|---|---|",
    ]
    for library in dict.fromkeys(o.library for o in outcomes):
        own = [o for o in outcomes if o.library == library]
        counts = collections.Counter(o.verdict for o in own)
        made = len(own) - counts["not made"]
        cells = [f"{counts[v]} ({counts[v] / made:.1%})" for v in ("wholly", "in part", "refused")]
        lines.append(f"| {library} | {len(own)} | {' | '.join(cells)} | {counts['not made']} |")
    for library in dict.fromkeys(o.library for o in outcomes):
        own = [o for o in outcomes if o.library == library]
        rest = [o for o in own if o.verdict in ("in part", "refused")]
        if rest:
            lines += [
                "",
                f"## {library}: in part or refused",
                "",
                "| architecture | adapted | weights that are not adapted, or the error |",
            ]
            lines += ["|---|---|---|"]
            lines += [
                f"| {o.name} | {f'{o.share:.1%}' if o.verdict == 'in part' else 'refused'} | {_cell(o.said)} |"
                for o in rest
            ]
        lines += [
            "",
            f"## {library}: wholly",
            "",
            "| architecture | trained parameters at rank 16 | relative to the backbone |",
            "|---|---|---|",
        ]
        lines += [
            f"| {o.name} | {o.parameters:,} | {o.parameters / max(o.backbone, 1):.2%} |"
            for o in own
            if o.verdict == "wholly"
        ]
        unmade = [o for o in own if o.verdict == "not made"]
        if unmade:
            lines += ["", f"## {library}: not made", "", "| architecture | error of the library |", "|---|---|"]
            lines += [f"| {o.name} | {_cell(o.said)} |" for o in unmade]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine the architectures, print a summary and, with ``--out``, write the page."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", nargs="+", choices=("timm", "transformers"), default=["timm", "transformers"])
    parser.add_argument("--every", type=int, default=1, help="examine only every n-th architecture (default: all)")
    parser.add_argument("--names", nargs="+", help="examine only these architectures")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--out", type=Path, help="page to write; the command always prints the models that are not wholly adapted"
    )
    args = parser.parse_args(arguments)
    outcomes = []
    for library in args.library:
        names = args.names or architectures(library)[:: args.every]

        def report(outcome: Outcome) -> None:
            if outcome.verdict != "wholly":
                print(f"{outcome.name}: {outcome.verdict} {outcome.share:.1%} {outcome.said[:150]}", flush=True)

        outcomes += examine_all(library, names, args.jobs, report)
        print(library, dict(collections.Counter(o.verdict for o in outcomes if o.library == library)))
    if args.out is not None:
        args.out.write_text(page(outcomes, f"python -m benchmarks models --out {args.out}"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
