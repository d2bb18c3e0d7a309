"""Collect the accuracies of a suite in percent, by method, task and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

#: The groups of tasks that VTAB defines, in VTAB's order.
GROUPS = ("natural", "specialized", "structured")


@dataclass
class Scores:
    """The test accuracies of a suite in percent.

    Attributes:
        tasks: maps each task to its group, or to None if the task has no group.
        values: accuracies as ``values[method][task][seed]``. Runs that diverged or have no result are missing.
        failed: (method, task, seed) of each run that diverged.
    """

    tasks: dict[str, str | None]
    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    failed: list[tuple[str, str, int]] = field(default_factory=list)

    def complete(self, method: str) -> bool:
        """Return whether the method has at least one result on every task."""
        return all(self.values.get(method, {}).get(task) for task in self.tasks)

    def mean(self, method: str, task: str) -> float:
        """Return the mean accuracy over the seeds."""
        return fmean(self.values[method][task].values())

    def sd(self, method: str, task: str) -> float | None:
        """Return the sample standard deviation over the seeds, or None for a single seed."""
        values = list(self.values[method][task].values())
        return stdev(values) if len(values) > 1 else None

    def means(self, method: str) -> dict[str, float]:
        """Return a mapping from each task that has a result to the mean accuracy over the seeds."""
        return {task: self.mean(method, task) for task in self.tasks if self.values.get(method, {}).get(task)}


def collect(records: Iterable[Mapping[str, Any]], tasks: Iterable[str]) -> Scores:
    """Collect the accuracies of final runs.

    Args:
        records: results of final runs.
        tasks: all tasks of the suite, in the order of the report.
    """
    groups = {record["task"]: record["group"] for record in records if "group" in record}
    scores = Scores({task: groups.get(task) for task in tasks})
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        place = (record["method"], record["task"], record["seed"])
        if record.get("failed"):
            scores.failed.append(place)
        else:
            values[place[0]][place[1]][place[2]] = 100 * record["test_accuracy"]
    scores.values = {method: dict(by_task) for method, by_task in values.items()}
    return scores


def groups(tasks: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return a mapping from each group to its tasks, in VTAB's order. Tasks without a group form the group "other"."""
    members: dict[str, list[str]] = defaultdict(list)
    for task, group in tasks.items():
        members[group or "other"].append(task)
    return {group: members[group] for group in (*GROUPS, "other") if group in members}


def weights(tasks: Mapping[str, str | None], categorical: bool) -> dict[str, float]:
    """Return a mapping from each task to its weight in a mean over all tasks.

    If ``categorical`` is True, the mean is VTAB's categorical mean, which is the mean of the group means. Otherwise,
    all weights are equal.
    """
    members = groups(tasks)
    if not categorical:
        return {task: 1 / len(tasks) for task in tasks}
    return {task: 1 / (len(members) * len(own)) for own in members.values() for task in own}
