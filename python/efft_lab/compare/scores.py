"""Accuracies of a suite in percent, as tables: by method, task and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

#: VTAB's order.
GROUPS = ("natural", "specialized", "structured")


@dataclass
class Scores:
    """Test accuracies in percent.

    Attributes:
        tasks: task to its group.
        values: method to task to seed to accuracy; runs that failed or have no result are missing.
        failed: (method, task, seed) of runs that diverged.
    """

    tasks: dict[str, str | None]
    values: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    failed: list[tuple[str, str, int]] = field(default_factory=list)

    def complete(self, method: str) -> bool:
        """Whether the method has a score on every task."""
        return all(self.values.get(method, {}).get(task) for task in self.tasks)

    def mean(self, method: str, task: str) -> float:
        """Mean over the seeds."""
        return fmean(self.values[method][task].values())

    def sd(self, method: str, task: str) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        values = list(self.values[method][task].values())
        return stdev(values) if len(values) > 1 else None

    def means(self, method: str) -> dict[str, float]:
        """Task to mean over the seeds."""
        return {task: self.mean(method, task) for task in self.tasks if self.values.get(method, {}).get(task)}


def collect(records: Iterable[Mapping[str, Any]], tasks: Iterable[str]) -> Scores:
    """Scores of final runs, in the order of the tasks."""
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
    """Group to its tasks, in VTAB's order; tasks without a group form the group "other"."""
    members: dict[str, list[str]] = defaultdict(list)
    for task, group in tasks.items():
        members[group or "other"].append(task)
    return {group: members[group] for group in (*GROUPS, "other") if group in members}


def weights(tasks: Mapping[str, str | None], categorical: bool) -> dict[str, float]:
    """Task to its weight in the overall mean, or in VTAB's categorical one, the mean of the group means."""
    members = groups(tasks)
    if not categorical:
        return {task: 1 / len(tasks) for task in tasks}
    return {task: 1 / (len(members) * len(own)) for own in members.values() for task in own}
