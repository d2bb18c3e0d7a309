"""Write a suite's results as a Markdown report, with plots if matplotlib is installed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from efft_lab.compare import plots
from efft_lab.compare.agenda import Agenda, Record
from efft_lab.compare.scores import Scores, collect, groups, weights
from efft_lab.compare.statistics import Comparison, compare, holm, seed_interval
from efft_lab.compare.store import read
from efft_lab.compare.suite import TRIVIAL
from efft_lab.data.vtab import INFOS as VTAB

Cells = Sequence[str]


def write(agenda: Agenda, results: Path) -> list[Path]:
    """Write NAME.md and the plots NAME-*.png next to the result file NAME.jsonl.

    Args:
        agenda: the runs to report. Other runs in the result file are ignored.
        results: the result file.

    Returns:
        Paths of the files that were written.

    Raises:
        FileNotFoundError: no final run has a result yet.
    """
    done = read(results) if results.is_file() else {}
    records = agenda.records(done)
    if not records:
        raise FileNotFoundError(f"no final run of {agenda.suite.name} is in {results}; run the suite first")
    pictures = draw(agenda, done, results.with_suffix(""))
    page = results.with_suffix(".md")
    page.write_text(text(agenda, done, pictures), encoding="utf-8")
    return [page, *pictures.values()]


def draw(agenda: Agenda, done: Mapping[str, Record], stem: Path) -> dict[str, Path]:
    """Write the plots STEM-*.png: accuracy against parameters, and one heat map per grid of two settings.

    Args:
        agenda: the runs to report.
        done: maps the key of each finished run to its result.
        stem: path and first part of the file names.

    Returns:
        A mapping from the title of each plot to its file; empty if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return {}
    records = agenda.records(done)
    target = stem.with_name(f"{stem.name}-parameters.png")
    plots.accuracy_against_parameters(collect(records, agenda.suite.tasks), _parameters(records), target)
    pictures = {"Accuracy against trained parameters": target}
    for name, entry in agenda.suite.methods.items():
        if len(entry.get("grid", {})) == 2:
            target = stem.with_name(f"{stem.name}-{_slug(name)}.png")
            plots.heat_map(agenda, name, done, target)
            pictures[f"{name}: validation accuracy by {' and '.join(entry['grid'])}"] = target
    return pictures


def text(agenda: Agenda, done: Mapping[str, Record], pictures: Mapping[str, Path]) -> str:
    """Return the report as Markdown text.

    Args:
        agenda: the runs to report.
        done: maps the key of each finished run to its result.
        pictures: maps the title of each plot to its file.
    """
    suite, records = agenda.suite, agenda.records(done)
    scores = collect(records, suite.tasks)
    methods = [method for method in suite.methods if method in scores.values]
    wanted = len(suite.tasks) * sum(len(suite.seeds_of(method)) for method in suite.methods)
    parts = [
        f"# {suite.name}",
        suite.about,
        f"{len(records)} of {wanted} final runs have a result. Accuracies are test accuracies in percent, as the mean "
        "± the standard deviation over seeds. Each run read the test split once, after its hyperparameters were chosen "
        "on the validation split.",
        *_leaks(scores, methods, suite.methods),
        "## Tasks",
        table(["method", *_headings(scores)], [_task_row(scores, method) for method in methods]),
        "## Means",
        "Brackets contain the 95 % bootstrap interval over seeds for fixed tasks. The categorical mean is the mean of "
        "the group means. The number of trained parameters does not include the classifier.",
        _means(scores, methods, records),
        *(part for reference in suite.references for part in _tests(reference, scores, methods)),
        "## Chosen on the validation split",
        _choices(agenda, done, methods),
    ]
    if set(suite.tasks) <= set(VTAB):
        parts += quote_literature(list(suite.tasks))
    parts += [f"![{title}]({path.name})" for title, path in pictures.items()]
    parts += ["## Machines and versions", _origin(records)]
    if scores.failed:
        lost = "\n".join(f"- {method} on {task}, seed {seed}" for method, task, seed in scores.failed)
        parts += ["## Diverged", lost]
    return "\n\n".join(part for part in parts if part) + "\n"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()


def means(agenda: Agenda, done: Mapping[str, Record]) -> str:
    """Return two parts of the report: the table of means over tasks, and the machines and versions.

    A dash in the table marks a mean over tasks of which at least one has no result.

    Args:
        agenda: the runs to report.
        done: maps the key of each finished run to its result.
    """
    records = agenda.records(done)
    scores = collect(records, agenda.suite.tasks)
    return f"{_means(scores, [m for m in agenda.suite.methods if m in scores.values], records)}\n\n{_origin(records)}"


def comparisons(agenda: Agenda, done: Mapping[str, Record]) -> str:
    """Return the part of the report with the paired tests of each reference method against the other methods.

    The text is empty if no two methods can be compared.

    Args:
        agenda: the runs to report.
        done: maps the key of each finished run to its result.
    """
    scores = collect(agenda.records(done), agenda.suite.tasks)
    methods = [m for m in agenda.suite.methods if m in scores.values]
    return "\n\n".join(part for name in agenda.suite.references for part in _tests(name, scores, methods)[1:])


def table(heading: Cells, rows: Sequence[Cells]) -> str:
    """Format a heading and rows of cells as a Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headings(scores: Scores) -> list[str]:
    return [f"{task} ({group or '-'})" for task, group in scores.tasks.items()]


def _task_row(scores: Scores, method: str) -> Cells:
    cells = []
    for task in scores.tasks:
        if not scores.values[method].get(task):
            cells.append("-")
            continue
        sd = scores.sd(method, task)
        cells.append(f"{scores.mean(method, task):.1f}" + ("" if sd is None else f" ± {sd:.1f}"))
    return [method, *cells]


def _parameters(records: Sequence[Record]) -> dict[str, float]:
    """Return a mapping from each method to its number of trained parameters, averaged over runs.

    The classifier is excluded, because its size depends on the task.
    """
    counts: dict[str, list[int]] = {}
    for record in records:
        if not record.get("failed"):
            own = record["trainable_parameters"] - record["head_parameters"]
            counts.setdefault(record["method"], []).append(own)
    return {method: fmean(values) for method, values in counts.items()}


def _means(scores: Scores, methods: Sequence[str], records: Sequence[Record]) -> str:
    parameters, members = _parameters(records), groups(scores.tasks)
    rows = []
    for method in methods:
        row = [method, f"{parameters.get(method, 0):,.0f}"]
        by_task = scores.means(method)
        for own in members.values():
            complete = all(task in by_task for task in own)
            row.append(f"{fmean(by_task[task] for task in own):.1f}" if complete else "-")
        for categorical in (True, False):
            row.append(_with_interval(scores, method, categorical) if scores.complete(method) else "-")
        rows.append(row)
    heading = ["method", "trained parameters", *members, "categorical mean", "overall mean"]
    return table(heading, rows)


def _with_interval(scores: Scores, method: str, categorical: bool) -> str:
    by_task, share = scores.means(method), weights(scores.tasks, categorical)
    mean = sum(share[task] * value for task, value in by_task.items())
    interval = seed_interval(scores.values[method], share)
    return f"{mean:.1f}" + ("" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]")


def _tests(reference: str, scores: Scores, methods: Sequence[str]) -> list[str]:
    if reference not in scores.values:
        return []
    others = [method for method in methods if method != reference]
    found: list[Comparison] = [c for other in others if (c := compare(scores, reference, other)) is not None]
    if not found:
        return []
    signed, paired = holm([c.wilcoxon for c in found]), holm([c.t_test for c in found])
    rows = [
        [
            c.method,
            str(c.tasks),
            str(c.pairs),
            f"{c.difference:+.1f} [{c.interval[0]:+.1f}, {c.interval[1]:+.1f}]",
            f"{c.wins} / {c.ties} / {c.losses}",
            f"{c.wilcoxon:.3f} ({corrected:.3f})",
            f"{c.t_test:.3f} ({t_corrected:.3f})",
        ]
        for c, corrected, t_corrected in zip(found, signed, paired, strict=True)
    ]
    heading = ["against", "tasks", "pairs of runs", "mean difference", "win / tie / loss"]
    heading += ["Wilcoxon p (Holm)", "paired t p (Holm)"]
    tasks = max(c.tasks for c in found)
    return [
        f"## {reference} against the others",
        f"Differences are in percentage points, and positive differences favor {reference}. Only runs with equal tasks "
        "and seeds are compared, so a difference may not be that of the means above. For the intervals and tests, each "
        "task is one observation, averaged over these seeds. Holm's method corrects for the number of rows. "
        f"With {tasks} tasks, the smallest possible Wilcoxon p is {2 / 2**tasks:.2g}. A task is a tie if the 95 % "
        "t-interval of the differences between runs with equal seeds contains zero.",
        table(heading, rows),
    ]


def _leaks(scores: Scores, methods: Sequence[str], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the tasks on which a trivial predictor, which does not recognize objects, is as good as a trained method.

    On such tasks, it is doubtful whether the accuracy measures the recognition of objects. Methods that train from
    scratch are not considered, because the few images of a task do not suffice for them.
    """
    methods = [method for method in methods if entries[method].get("pretrained", True)]
    trivial = [method for method in methods if entries[method]["method"] in TRIVIAL]
    lines = []
    for task in scores.tasks:
        known = {method: scores.mean(method, task) for method in methods if scores.values[method].get(task)}
        easy = {method: known.pop(method) for method in trivial if method in known}
        if easy and known:
            best = max(easy, key=lambda method: easy[method])
            beaten = [method for method, value in known.items() if value <= easy[best]]
            if beaten:
                lines.append(f"- {task}: {best} reaches {easy[best]:.1f}, at least as much as {', '.join(beaten)}.")
    note = (
        "On some tasks, a predictor that does not recognize objects is as good as a method. "
        "Interpret these results with care:"
    )
    return ["\n".join([note, "", *lines])] if lines else []


def _choices(agenda: Agenda, done: Mapping[str, Record], methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        cells = []
        for task in agenda.suite.tasks:
            point = agenda.choose(task, method, done)
            cells.append("-" if not point else ", ".join(f"{name} {value:g}" for name, value in point.items()))
        if set(cells) != {"-"}:
            rows.append([method, *cells])
    return table(["method", *agenda.suite.tasks], rows) if rows else "No method has a grid of settings."


def quote_literature(tasks: list[str]) -> list[str]:
    """Return tables with results from the literature. They are kept apart from the results of this repository."""
    published = json.loads((files("efft_lab.compare") / "published_vtab1k.json").read_text("utf-8"))
    shares = [weights({task: VTAB[task].group for task in VTAB}, categorical) for categorical in (True, False)]
    parts = ["## Published results from other papers", published["about"]]
    heading = ["method", "parameters", *tasks, "categorical mean", "overall mean", "source"]
    for name, about in published["tables"].items():
        rows = []
        for entry in published["methods"]:
            if entry["table"] != name:
                continue
            cells = [f"{entry['accuracy'][task]:.1f}" for task in tasks]
            cells += [f"{sum(share[task] * entry['accuracy'][task] for task in VTAB):.1f}" for share in shares]
            rows.append([entry["method"], entry["parameters"], *cells, "; ".join(entry["sources"])])
        parts += [f"### {name}", about, table(heading, rows)]
    names = ("natural", "specialized", "structured")
    group_rows = [
        [entry["method"], entry["parameters"], *(str(entry[name]) for name in names), "; ".join(entry["sources"])]
        for entry in published["groups"]
    ]
    return [
        *parts,
        "### EFFT",
        "For EFFT itself, only these group means are published in a readable form:",
        table(["method", "parameters", *names, "source"], group_rows),
        "### Sources",
        "\n".join(f"- {name}: {reference}" for name, reference in published["papers"].items()),
    ]


def _origin(records: Sequence[Record]) -> str:
    def each(name: str) -> str:
        return "; ".join(sorted({str(record[name]) for record in records if name in record}))

    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    configs = [record["config"] for record in records if "config" in record]
    models = "; ".join(
        sorted({f"{c['model']} at {c['image_size'] or 'its own'} pixels, autocast {c['amp']}" for c in configs})
    )
    lines = [
        f"- backbone: {models}" if models else "",
        *(f"- machine: {machine}" for machine in _machines(records)),
        f"- versions: {'; '.join(versions)}",
        f"- commit: {each('commit')}",
        *(f"- command: `{command}`" for command in sorted({_without_folders(r["command"]) for r in records})),
        f"- dates: {min(record['date'] for record in records)} to {max(record['date'] for record in records)}",
    ]
    return "\n".join(line for line in lines if line)


def _without_folders(command: str) -> str:
    """Return the command with only the names of the files that it gives by absolute paths."""
    return re.sub(r"(?<=[ =])/\S*/", "", command)


def _machines(records: Sequence[Record]) -> list[str]:
    """Return one line per machine with its number of final runs and their processor time in hours.

    If several machines were used, each line also gives the number of runs per method.
    """
    owns: dict[str, list[Record]] = {}
    for record in records:
        gpu: Any = record.get("gpu")  # older results contain only the name of the GPU
        gpu = f" with {gpu['name'] if isinstance(gpu, Mapping) else gpu}" if gpu else ""
        owns.setdefault(f"{record['machine']}{gpu}", []).append(record)
    lines = []
    for machine, own in owns.items():
        hours = sum(record.get("cpu_seconds", 0) for record in own) / 3600
        by_method = Counter(record["method"] for record in own)
        parts = "; ".join(f"{method} {count}" for method, count in by_method.items()) if len(owns) > 1 else ""
        lines.append(f"{machine}: {len(own)} final runs, {hours:.1f} processor hours" + (parts and f" ({parts})"))
    return lines
