"""Compare intervals and tests with scipy, closed forms and published examples."""

from __future__ import annotations

import itertools
import math
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from efft_lab.compare import statistics
from efft_lab.compare.scores import Scores, collect, groups, weights

TASKS = {"a": "natural", "b": "natural", "c": "structured"}


def scores(**methods: dict[str, list[float]]) -> Scores:
    values = {m: {t: dict(enumerate(v)) for t, v in tasks.items()} for m, tasks in methods.items()}
    return Scores(dict.fromkeys(next(iter(methods.values())), "natural"), values)


def test_means_are_those_of_vtab() -> None:
    assert groups(TASKS) == {"natural": ["a", "b"], "structured": ["c"]}
    assert weights(TASKS, categorical=True) == {"a": 0.25, "b": 0.25, "c": 0.5}
    assert weights(TASKS, categorical=False) == pytest.approx(dict.fromkeys(TASKS, 1 / 3))
    assert groups({"x": None, "y": "natural"}) == {"natural": ["y"], "other": ["x"]}


def test_collect_keeps_failures_apart() -> None:
    final: dict[str, Any] = {"method": "m", "task": "a", "group": "natural"}
    records = [
        {**final, "seed": 0, "test_accuracy": 0.5},
        {**final, "seed": 1, "test_accuracy": 0.7},
        {**final, "seed": 2, "failed": "the loss is nan"},
    ]
    found = collect(records, ["a", "b"])
    assert found.values == {"m": {"a": {0: 50.0, 1: 70.0}}}
    assert found.mean("m", "a") == 60
    assert found.sd("m", "a") == pytest.approx(math.sqrt(200))
    assert found.failed == [("m", "a", 2)]
    assert not found.complete("m")


def test_seed_interval_covers_as_a_normal_interval_would() -> None:
    """For two tasks with many seeds, the bootstrap agrees with mean ± 1.96 standard errors of the weighted sum."""
    rng = np.random.default_rng(1)
    values = {task: dict(enumerate(rng.normal(mean, sd, 400))) for task, mean, sd in (("a", 50, 2), ("b", 80, 6))}
    weight = {"a": 0.25, "b": 0.75}
    low, high = statistics.seed_interval(values, weight) or (0.0, 0.0)
    center = sum(weight[t] * fmean(v.values()) for t, v in values.items())
    variance = sum(weight[t] ** 2 * np.var(list(v.values())) / 400 for t, v in values.items())
    assert (low, high) == pytest.approx((center - 1.96 * variance**0.5, center + 1.96 * variance**0.5), abs=0.02)


def test_seed_interval_of_two_seeds_is_their_exact_distribution() -> None:
    assert statistics.seed_interval({"a": {0: 10.0, 1: 20.0}}, {"a": 1.0}) == (10.0, 20.0)  # 1/4, 1/2, 1/4
    assert statistics.seed_interval({"a": {0: 10.0}}, {"a": 1.0}) is None


def test_task_interval_against_scipy() -> None:
    sample = [1.0, 4.0, -2.0, 7.0, 3.0, 0.5, 2.5]
    ours = statistics.task_interval(sample)
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.1)


def test_holm_on_a_worked_example_and_by_its_definition() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]
    rng = np.random.default_rng(2)
    for p in rng.uniform(0, 0.2, (20, 6)).tolist():
        for level in (0.01, 0.05, 0.2):
            # Holm's procedure: reject the p-values from the smallest on, until one exceeds level / (number left).
            ordered, rejected = sorted(p), 0
            while rejected < 6 and ordered[rejected] <= level / (6 - rejected):
                rejected += 1
            assert sum(adjusted <= level for adjusted in statistics.holm(p)) == rejected


def test_tests_over_tasks_against_exact_enumeration() -> None:
    own = {"a": 71.0, "b": 64.0, "c": 80.5, "d": 55.0, "e": 91.0, "f": 43.0}
    other = {"a": 70.0, "b": 66.5, "c": 77.0, "d": 48.0, "e": 86.0, "f": 37.0}
    found = statistics.compare(
        scores(own={t: [v] for t, v in own.items()}, other={t: [v] for t, v in other.items()}), "own", "other"
    )
    assert found is not None
    d = np.array([own[t] - other[t] for t in own])
    assert found.difference == pytest.approx(d.mean())
    assert (found.tasks, found.wins, found.ties, found.losses) == (6, 5, 0, 1)
    ranks = np.argsort(np.argsort(np.abs(d))) + 1
    observed = min(ranks[d > 0].sum(), ranks[d < 0].sum())
    signs = np.array(list(itertools.product((0, 1), repeat=6)))
    below = (signs @ ranks <= observed).mean()
    assert found.wilcoxon == pytest.approx(2 * below)
    t = d.mean() / (d.std(ddof=1) / math.sqrt(6))
    assert found.t_test == pytest.approx(2 * stats.t.sf(abs(t), 5))


def test_equal_methods_do_not_differ() -> None:
    same = {"a": [50.0, 60.0], "b": [70.0, 70.0]}
    found = statistics.compare(scores(own=same, other=same), "own", "other")
    assert found is not None
    assert (found.wilcoxon, found.t_test, found.ties, found.difference) == (1.0, 1.0, 2, 0.0)
    assert statistics.compare(scores(own={"a": [1.0]}, other={"a": [2.0]}), "own", "other") is None


def test_only_runs_with_equal_seeds_are_compared() -> None:
    """A seed that only one method has would change the difference, because it also selects the training images."""
    own = {"a": [50.0, 90.0, 94.0], "b": [60.0, 80.0], "c": [1.0]}
    other = {"a": [49.0], "b": [57.0, 78.0], "d": [2.0]}
    found = statistics.compare(scores(own=own, other=other), "own", "other")
    assert found is not None
    assert (found.tasks, found.pairs) == (2, 3)
    assert found.difference == pytest.approx((1.0 + (3.0 + 2.0) / 2) / 2)
    back = statistics.compare(scores(own=own, other=other), "other", "own")
    assert back is not None
    assert back.difference == -found.difference


def test_a_tie_is_a_t_interval_with_zero_in_it() -> None:
    own, other = [70.0, 72.0, 71.0, 73.0], [69.0, 70.5, 71.5, 70.0]
    interval = stats.ttest_rel(own, other).confidence_interval(0.95)
    assert interval.low < 0 < interval.high
    assert statistics.outcome(dict(enumerate(own)), dict(enumerate(other))) == 0
    worse = [value - 4 for value in other]
    assert statistics.outcome(dict(enumerate(own)), dict(enumerate(worse))) == 1
    assert statistics.outcome(dict(enumerate(worse)), dict(enumerate(own))) == -1
    assert statistics.outcome({0: 2.0}, {0: 1.0}) == 1  # with one seed, the sign decides
    assert statistics.outcome({0: 2.0}, {1: 1.0}) == 0  # no seed in common
