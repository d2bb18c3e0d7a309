"""Format results of studies of accuracy as tables for the documentation, like :mod:`benchmarks.tables`.

Each table combines several runs, and uses the newest line of each measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean, stdev

from benchmarks.tables import NOTHING, Line, cell, read, with_sources


def subspaces() -> str:
    """Return the table of the shares of full fine-tuning's updates and gradients that low-rank bases keep.

    The shares are means over tasks and seeds.
    """
    newest = {(x["of"], x["set"], x["task"], x["seed"]): x for x in read("subspaces")}
    if not newest:
        return NOTHING
    groups: dict[tuple[str, str], list[Line]] = {}
    for (of, name, *_), line in newest.items():
        groups.setdefault((of, name), []).append(line)
    measures = ("effective_rank", "own", "shared", "independent")
    rows = []
    for (of, name), lines in groups.items():
        means = [fmean(line[measure] for line in lines) for measure in measures]
        rows.append([of, name, f"{means[0]:.0f}", *(f"{mean:.1%}" for mean in means[1:])])
    rank = next(iter(newest.values()))["rank"]
    kept = ("separate bases per matrix", "one pair of bases", "one pair, random directions")
    header = ["quantity", "matrices", "effective rank", *(f"kept at rank {rank} by {bases}" for bases in kept)]
    return with_sources(header, rows, _by_command(newest.values()))


_STARTS = {"side": "one side, random cores", "cores": "both sides, zero cores"}


def starts() -> str:
    """Return the table of EFFT2's test accuracy for each way to initialize its factors, as means over seeds."""
    newest = {(x["kind"], x["source"], x["task"], x["seed"]): x for x in read("starts")}
    if not newest:
        return NOTHING
    lines = list(newest.values())
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    rows = []
    for kind, source in dict.fromkeys((line["kind"], line["source"]) for line in lines):
        of_start = [line for line in lines if (line["kind"], line["source"]) == (kind, source)]
        by_task = [[100 * line["test_accuracy"] for line in of_start if line["task"] == task] for task in tasks]
        means = [fmean(accuracies) if accuracies else None for accuracies in by_task]
        overall = None if None in means else fmean(mean for mean in means if mean is not None)
        rows.append([_STARTS[kind], source, *("-" if mean is None else f"{mean:.1f}" for mean in [*means, overall])])
    return with_sources(["directions in", "source", *tasks, "mean"], rows, _by_command(lines))


_DEFAULT_EXTRAS = "efft2 r16 x0 c3 fc1pf movement0.1"
#: For each variant (setting) in extras.jsonl, a title that names its differences from the default configuration. The
#: sides are the factors U and V. The movement determines the scale of the update (``EfftConfig``).
_EXTRAS = {
    _DEFAULT_EXTRAS: "**`EfftConfig.auto()`**",
    "efft2 r8 x0 c3 fc1pf movement0.1": "rank 8",
    "efft2 r16 x0 c3 fc1pf": "movement 0.3",
    "efft2 r16 x0 c1 fc1pf movement0.1": "cores at the learning rate of the sides",
    "efft2 r16 x0 c6 fc1pf movement0.1": "cores at 6 times the learning rate",
    "efft2 r16 x0 c3 fc1pf-1 movement0.1": "biases at the learning rate of the sides",
    "efft2 r16 x0 c3 movement0.1": "no biases",
    "efft2 r16 x0 c3 biases3 movement0.1": "biases of all linear layers",
    "efft2 r16 x0 c3 fc1pf norms3 movement0.1": "norms as well",
    "efft2 r16 x0 c3 fc1pf movement0.1 dropout0.1": "dropout 0.1",
    "efft2 r16 x0 c3 fc1pf movement0.1 precondition": "preconditioned gradients of U and V",
    "efft2 r16 x0 c3 fc1pf movement0.1 orthogonal": "orthogonal initial factors",
    "efft2 r14 x0 c3 fc1pf movement0.1 in10": "rank 14 and a diagonal on the input side of each layer",
    "efft2 r15 x3 c3 movement0.1": "rank 15, all biases and norms",
    "efft2 r15 x3 c3 movement0.05": "rank 15, all biases and norms, movement 0.05",
    "efft2 r15 x3 c3": "rank 15, all biases and norms, movement 0.3",
    "efft2 r15 x1 c3 movement0.1": "rank 15, all biases and norms at the learning rate of the sides",
    "efft2 r15 x6 c3 movement0.1": "rank 15, all biases and norms at 6 times the learning rate",
    "efft2 r15 x3 c3 lr0.002": "rank 15, all biases and norms, movement 0.3, learning rate 0.002",
    "efft2 r10 x0 c3 norms3 movement0.1": "rank 10, norms instead of biases",
    "efft2 r8 x3 c3 movement0.1": "rank 8, all biases and norms",
    "efft2 r4 x0 c3 biases3 movement0.1": "rank 4, biases of all linear layers",
    "efft2 r4 x0 c3 biases3": "rank 4, biases of all linear layers, movement 0.3",
    "efft2 r16 x0 c1": "no biases, one learning rate, movement 0.3 (the previous default)",
    "lora r8 lr 0.001": "LoRA, rank 8, learning rate 0.001",
}


def extras() -> str:
    """Return the table of the study ``extras``: accuracies of settings, compared with the default configuration.

    Each run of a setting is compared with the run of the default that has the same task and seed. A cell contains the
    mean difference of the accuracies over these pairs of runs, and its standard error. If a run trains the bias of the
    attention's output projection, it also trains the bias of the patch embedding, because both have the same name.
    """
    roles = {"dev": "validation", "test": "test"}
    newest = {(x["variant"], x["task"], x["seed"]): x for x in read("extras") if x["stage"] == "explore"}
    if not newest:
        return NOTHING
    groups: dict[str, dict[tuple[str, int], Line]] = {}
    for (variant, task, seed), line in newest.items():
        groups.setdefault(variant, {})[task, seed] = line
    default = groups[_DEFAULT_EXTRAS]
    rows = []
    for variant in sorted(groups, key=lambda name: list(_EXTRAS).index(name) if name in _EXTRAS else len(_EXTRAS)):
        runs = groups[variant]
        pairs = [(line, default[run]) for run, line in runs.items() if run in default]
        cells = [_difference(pairs, f"{role}_accuracy") if variant != _DEFAULT_EXTRAS else "" for role in roles]
        of = len(runs) if variant == _DEFAULT_EXTRAS else len(pairs)
        rows.append([_EXTRAS.get(variant, variant), f"{next(iter(runs.values()))['trained']:,}", str(of), *cells])
    header = ["setting", "trained parameters", "runs", *(f"{name}, points" for name in roles.values())]
    return with_sources(header, rows, _as_one(list(newest.values()), "python -m benchmarks extras run --stage explore"))


def dropout() -> str:
    """Return the table of the default configuration with dropout, compared with no dropout, by length of training.

    Each run with dropout is compared with the run without it that has the same task, seed and length.
    """
    plain, dropped = variants = (_DEFAULT_EXTRAS, f"{_DEFAULT_EXTRAS} dropout0.1")
    found: dict[tuple[int, int], dict[str, dict[tuple[str, int], Line]]] = {}
    for line in (*read("extras"), *read("extras_long")):
        variant, _, length = line["variant"].partition(" e")
        if line["stage"] == "explore" and variant in variants:
            epochs = int(length.split()[0]) if length else 10
            of_length = found.setdefault((epochs, line["updates"]), {plain: {}, dropped: {}})
            of_length[variant][line["task"], line["seed"]] = line
    rows, lines = [], []
    for (epochs, updates), runs in sorted(found.items()):
        pairs = [(line, runs[plain][run]) for run, line in runs[dropped].items() if run in runs[plain]]
        if pairs:
            lines += [line for pair in pairs for line in pair]
            points = (_difference(pairs, f"{role}_accuracy") for role in ("dev", "test"))
            tasks = ", ".join(dict.fromkeys(line["task"] for line, _ in pairs))
            rows.append([str(epochs), f"{updates:,}", tasks, str(len(pairs)), *points])
    if not rows:
        return NOTHING
    header = ["epochs", "updates", "tasks", "pairs of runs", "validation, points", "test, points"]
    return with_sources(header, rows, _as_one(lines, "python -m benchmarks extras run --stage explore"))


_FP8_SUITE, _FP8_METHOD = "twelve", "EFFT, auto"
_FP8 = {
    "bf16": "none (bf16)",
    "e4m3": "`x`, `W` and `gy` to e4m3, one scale per row",
    "e5m2": "`x` and `W` to e4m3, `gy` to e5m2, one scale per row",
    "tensor": "`x` and `W` to e4m3, `gy` to e5m2, one scale per tensor",
    "forward": "only `x` and `W` to e4m3, one scale per row",
}


def fp8() -> str:
    """Return the table of the study ``fp8``: errors before training, and accuracies compared with those in bf16.

    Each run is compared with the run in bf16 of the suite ``twelve`` that has the same task and seed. The errors are
    means over the tasks and seeds for which all settings have errors.
    """
    lines = read("fp8")
    if not lines:
        return NOTHING
    of_suite = [x for x in read(f"compare_{_FP8_SUITE}") if (x["method"], x["stage"]) == (_FP8_METHOD, "final")]
    bf16 = {(x["task"], x["seed"]): x for x in of_suite}
    measured: dict[str, dict[tuple[str, int], Line]] = {}
    for line in lines:
        measured.setdefault(line["setting"], {})[line["task"], line["seed"]] = line
    common = set.intersection(*(set(runs) for runs in measured.values()))
    rows = []
    for name in sorted(measured, key=list(_FP8).index):
        trained = {(x["task"], x["seed"]): x for x in lines if x["setting"] == name and "test_accuracy" in x}
        found = [
            f"{fmean(measured[name][run][f'{what}_error'] for run in common):.1%}" if common else "-"
            for what in ("logits", "gradients")
        ]
        pairs = [(line, bf16[run]) for run, line in trained.items() if run in bf16]
        means = [f"{fmean(100 * x['test_accuracy'] for x in runs):.1f}" for runs in zip(*pairs, strict=True)] or ["-"]
        rows.append([_FP8[name], *found, str(len(pairs)), means[-1], means[0], _difference(pairs, "test_accuracy")])
    header = ["rounding", "error of the logits", "error of the gradients", "runs"]
    header += ["accuracy in bf16, %", "accuracy, %", "difference, points"]
    return with_sources(header, rows, _as_one(lines, "python -m benchmarks fp8"))


def _difference(pairs: Sequence[tuple[Line, Line]], field: str) -> str:
    """Return the mean difference of ``field`` within the pairs and its standard error, in percentage points."""
    points = [100 * (line[field] - other[field]) for line, other in pairs]
    if not points:
        return "-"
    error = f" ± {stdev(points) / len(points) ** 0.5:.1f}" if len(points) > 1 else ""
    return f"{fmean(points):+.1f}{error}"


def study(name: str) -> str:
    """Return the table of a study in :mod:`efft_lab.studies.side_by_side`: mean accuracy and its standard deviation."""
    newest = {(x["row"], x["seed"]): x for x in read(name)}
    groups: dict[str, list[Line]] = {}
    for (row, _), line in newest.items():
        groups.setdefault(row, []).append(line)
    rows = []
    for row, lines in groups.items():
        accuracies = [100 * line["test_accuracy"] for line in lines]
        spread = f" ± {stdev(accuracies):.1f}" if len(lines) > 1 else ""
        parameters = cell(lines[0], "parameters", lambda x: f"{x['parameters']:,}")
        rows.append([row, parameters, f"{fmean(accuracies):.1f}{spread}", str(len(lines))])
    header = ["method", "trained parameters", "test accuracy, %", "seeds"]
    return with_sources(header, rows, _by_command(newest.values())) if rows else NOTHING


def _by_command(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    """Group lines by date and command. Return the title and the lines of each run; the title lists the run's tasks."""
    runs: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        runs.setdefault((line["date"], line["command"]), []).append(line)
    return [(", ".join(dict.fromkeys(str(line["task"]) for line in run)), run) for run in runs.values()]


def _as_one(lines: Sequence[Line], command: str) -> dict[str, list[Line]]:
    """Return one source for all lines of a study, whose commands differ only in their settings, tasks and seeds."""
    commits, tasks, seeds = (
        ", ".join(dict.fromkeys(str(line[field]) for line in lines)) for field in ("commit", "task", "seed")
    )
    machines = " and ".join(dict.fromkeys(str(line["machine"]) for line in lines))
    common = {"commit": commits, "machine": machines, "command": command}
    return {f"tasks {tasks}; seeds {seeds}": [{**lines[-1], **common}]}


#: The functions that create the tables, by table name.
TABLES: dict[str, Callable[[], str]] = {
    "subspaces": subspaces,
    "starts": starts,
    "extras": extras,
    "dropout": dropout,
    "fp8": fp8,
    "text": partial(study, "text"),
    "convolutions": partial(study, "convolutions"),
}
