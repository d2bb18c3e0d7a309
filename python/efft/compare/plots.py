"""Pictures of a report; only for where matplotlib is installed."""

from collections.abc import Mapping
from pathlib import Path

from efft.compare.scores import Scores, weights
from efft.compare.statistics import seed_interval


def accuracy_against_parameters(scores: Scores, parameters: Mapping[str, float], target: Path) -> None:
    """Overall mean of every method that has all tasks, with its interval over seeds, against trained parameters.

    Args:
        scores: accuracies.
        parameters: method to its trained parameters beside the classifier.
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
        axes.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", capsize=3)
        axes.annotate(method, (x, mean), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_xscale("symlog", linthresh=1000)  # the probe and the predictors without a model have none
    axes.set_xlabel("trained parameters beside the classifier")
    axes.set_ylabel("mean test accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=150)
    pyplot.close(figure)
