"""Compute confidence intervals and statistical tests.

Two methods are compared by their runs on the same task with the same seed, because a seed also selects the training
images. For differences, intervals and tests, the differences of these pairs of runs are first averaged over the seeds
of each task. Whether a method wins, ties or loses on a task is decided by :func:`outcome`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from efft_lab.compare.scores import Scores

RESAMPLES = 10_000  # number of bootstrap samples


def seed_interval(
    values: Mapping[str, Mapping[int, float]], weights: Mapping[str, float], level: float = 0.95
) -> tuple[float, float] | None:
    """Compute a bootstrap percentile interval over seeds for a weighted sum of task means. The tasks are fixed.

    Args:
        values: accuracies as ``values[task][seed]``. The seeds of each task are resampled independently.
        weights: maps each task to its weight, see :func:`efft_lab.compare.scores.weights`.
        level: coverage of the interval, from 0 to 1.

    Returns:
        The lower and the upper end of the interval; None if no task has two or more seeds.
    """
    if all(len(seeds) < 2 for seeds in values.values()):
        return None
    rng, total = np.random.default_rng(0), np.zeros(RESAMPLES)
    for task, seeds in values.items():
        sample = np.array(list(seeds.values()))
        total += weights[task] * sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    return _percentiles(total, level)


def task_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Compute a bootstrap percentile interval over tasks for the mean of paired differences, one per task."""
    rng, sample = np.random.default_rng(0), np.array(differences)
    means = sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    return _percentiles(means, level)


def _percentiles(values: np.ndarray[Any, Any], level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down correction, in the same order.

    The correction controls the family-wise error rate.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """The comparison of the reference method with another method, by their runs with equal tasks and seeds.

    Attributes:
        method: the other method.
        tasks: number of tasks on which both methods have a run with the same seed.
        pairs: number of pairs of such runs.
        difference: mean over tasks of the accuracy of the reference minus that of the other method, in percentage
            points.
        interval: 95 % bootstrap interval of ``difference`` over tasks.
        wins, ties, losses: number of tasks on which the reference method wins, ties or loses (:func:`outcome`).
        wilcoxon: p-value of the Wilcoxon signed-rank test over tasks.
        t_test: p-value of the paired t-test over tasks.
    """

    method: str
    tasks: int
    pairs: int
    difference: float
    interval: tuple[float, float]
    wins: int
    ties: int
    losses: int
    wilcoxon: float
    t_test: float


def compare(scores: Scores, reference: str, other: str) -> Comparison | None:
    """Compare two methods. Return None if they have runs with equal seeds on fewer than two tasks.

    Raises:
        ImportError: scipy is not installed.
    """
    stats = _scipy()
    own, others = scores.values.get(reference, {}), scores.values.get(other, {})
    paired = {task: _differences(own[task], others[task]) for task in scores.tasks if task in own and task in others}
    paired = {task: values for task, values in paired.items() if len(values)}
    if len(paired) < 2:
        return None
    differences = [float(values.mean()) for values in paired.values()]
    outcomes = [outcome(own[task], others[task]) for task in paired]
    same = not any(differences)  # neither test is defined then
    return Comparison(
        method=other,
        tasks=len(paired),
        pairs=sum(map(len, paired.values())),
        difference=float(np.mean(differences)),
        interval=task_interval(differences),
        wins=outcomes.count(1),
        ties=outcomes.count(0),
        losses=outcomes.count(-1),
        wilcoxon=1.0 if same else float(stats.wilcoxon(differences).pvalue),
        t_test=1.0 if same else float(stats.ttest_1samp(differences, 0).pvalue),
    )


def outcome(own: Mapping[int, float], other: Mapping[int, float]) -> int:
    """Return 1 if the first method wins on a task, -1 if it loses, and 0 for a tie.

    The result is a tie if the 95 % t-interval of the differences between runs with equal seeds contains zero, or if
    there are no such runs. With a single common seed, the sign of the difference decides.

    Args:
        own: accuracies of the first method on the task, by seed.
        other: accuracies of the second method on the task, by seed.
    """
    differences = _differences(own, other)
    if not len(differences):
        return 0
    mean, n = float(differences.mean()), len(differences)
    margin = 0.0
    if n > 1:
        margin = float(_scipy().t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)
    return 0 if abs(mean) <= margin else int(np.sign(mean))


def _differences(own: Mapping[int, float], other: Mapping[int, float]) -> np.ndarray[Any, Any]:
    """Return the differences between the runs of two methods with equal seeds."""
    return np.array([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("the report's tests need scipy: pip install 'efft-kernels[compare]'") from error
    return stats
