"""Draw the plots of a report with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from efft_lab.compare.agenda import Agenda, Record
from efft_lab.compare.scores import Scores, weights
from efft_lab.compare.statistics import seed_interval


def accuracy_against_parameters(scores: Scores, parameters: Mapping[str, float], target: Path) -> None:
    """Plot the mean accuracy of each method over all tasks against its number of trained parameters.

    Error bars show the 95 % bootstrap interval over seeds. Methods that lack results on a task are omitted.

    Args:
        scores: accuracies of the final runs.
        parameters: maps each method to its number of trained parameters, excluding the classifier.
        target: the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    share = weights(scores.tasks, categorical=False)
    for method in filter(scores.complete, scores.values):
        mean = sum(share[task] * value for task, value in scores.means(method).items())
        low, high = seed_interval(scores.values[method], share) or (mean, mean)
        x = parameters[method]
        axes.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", capsize=3, label=method)
    figure.legend(loc="outside right center", fontsize=8)
    axes.set_xscale("symlog", linthresh=10_000)  # a logarithmic axis that can show zero parameters
    axes.set_xlabel("trained parameters, excluding the classifier")
    axes.set_ylabel("mean test accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def heat_map(agenda: Agenda, method: str, done: Mapping[str, Record], target: Path) -> None:
    """Plot the validation accuracy of a method, averaged over all tasks, for a grid of two settings.

    A cell has no color and shows ``nan`` if one of its runs has no result yet.

    Args:
        agenda: the runs.
        method: a method whose grid has two settings.
        done: maps the key of each finished run to its result.
        target: the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (rows, across), (columns, along) = agenda.suite.methods[method]["grid"].items()
    values = [[_validation(agenda, method, done, {rows: y, columns: x}) for x in along] for y in across]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    image = axes.imshow(values, aspect="auto", origin="lower")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.6})
    axes.set_xticks(range(len(along)), [f"{x:g}" for x in along])
    axes.set_yticks(range(len(across)), [f"{y:g}" for y in across])
    axes.set(xlabel=columns, ylabel=rows, title=f"{method}, mean over {', '.join(agenda.suite.tasks)}")
    figure.colorbar(image, label="validation accuracy, %")
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def _validation(agenda: Agenda, method: str, done: Mapping[str, Record], point: Mapping[str, float]) -> float:
    """Return the mean validation accuracy of the search runs of a point, in percent.

    A diverged run counts as 0. If a run has no result yet, the mean is NaN.
    """
    runs = [run for task in agenda.suite.tasks for run in agenda.search(task, method) if run.settings == point]
    if any(run.key not in done for run in runs):
        return float("nan")
    return 100 * fmean(0.0 if done[run.key].get("failed") else done[run.key]["val_accuracy"] for run in runs)
