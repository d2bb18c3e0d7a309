"""Intervals and tests. Two methods are compared task by task: the seeds of one task are averaged first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from efft_lab.compare.scores import Scores

RESAMPLES = 10_000


def seed_interval(
    values: Mapping[str, Mapping[int, float]], weights: Mapping[str, float], level: float = 0.95
) -> tuple[float, float] | None:
    """Bootstrap percentile interval of a weighted sum of task means, over seeds: the tasks are fixed.

    Args:
        values: task to seed to accuracy; the seeds of each task are resampled independently.
        weights: task to its weight, see :func:`efft_lab.compare.scores.weights`.
        level: probability that the interval covers.

    Returns:
        The interval; None if every task has a single seed.
    """
    if all(len(seeds) < 2 for seeds in values.values()):
        return None
    rng, total = np.random.default_rng(0), np.zeros(RESAMPLES)
    for task, seeds in values.items():
        sample = np.array(list(seeds.values()))
        total += weights[task] * sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    return _percentiles(total, level)


def task_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of a mean of paired differences, over tasks."""
    rng, sample = np.random.default_rng(0), np.array(differences)
    means = sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))].mean(axis=1)
    return _percentiles(means, level)


def _percentiles(values: np.ndarray[Any, Any], level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values that keep the family-wise error below any level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """The reference method against another, over the tasks that both have.

    Attributes:
        method: the other method.
        tasks: number of tasks.
        difference: mean of (reference - other), in points.
        interval: its 95 % bootstrap interval over tasks.
        wins, ties, losses: number of tasks on which the reference is better, undecided, or worse.
        wilcoxon: p-value of the signed-rank test over tasks.
        t_test: p-value of the paired t-test over tasks.
    """

    method: str
    tasks: int
    difference: float
    interval: tuple[float, float]
    wins: int
    ties: int
    losses: int
    wilcoxon: float
    t_test: float


def compare(scores: Scores, reference: str, other: str) -> Comparison | None:
    """Compares two methods; None if they have fewer than two tasks in common.

    Raises:
        ImportError: scipy is not installed.
    """
    stats = _scipy()
    own, others = scores.means(reference), scores.means(other)
    common = [task for task in own if task in others]
    if len(common) < 2:
        return None
    differences = [own[task] - others[task] for task in common]
    outcomes = [outcome(scores.values[reference][task], scores.values[other][task]) for task in common]
    same = not any(differences)  # neither test is defined then
    return Comparison(
        method=other,
        tasks=len(common),
        difference=float(np.mean(differences)),
        interval=task_interval(differences),
        wins=outcomes.count(1),
        ties=outcomes.count(0),
        losses=outcomes.count(-1),
        wilcoxon=1.0 if same else float(stats.wilcoxon(differences).pvalue),
        t_test=1.0 if same else float(stats.ttest_1samp(differences, 0).pvalue),
    )


def outcome(own: Mapping[int, float], other: Mapping[int, float]) -> int:
    """1 for a win on one task, -1 for a loss, 0 for a tie: the 95 % t-interval of the differences of equal seeds
    contains zero. With a single common seed, the sign decides."""
    differences = np.array([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])
    if not len(differences):
        return 0
    mean, n = float(differences.mean()), len(differences)
    margin = 0.0
    if n > 1:
        margin = float(_scipy().t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)
    return 0 if abs(mean) <= margin else int(np.sign(mean))


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("the report's tests need scipy: pip install 'efft-kernels[compare]'") from error
    return stats
