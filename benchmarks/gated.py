"""Check the accuracy of rows, and time the rows that pass the check, for the commands ``experts`` and ``kinds``.

A row is one implementation of an adapted layer. The row "floor" is the frozen baseline: the forward pass and dx of the
layer without an update. The results contain each time in seconds and as a ratio to the time of the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.budget import FACTOR
from benchmarks.memory import peak, saved_for_backward
from benchmarks.timing import Samples, ratios, time_rows
from efft_lab.record import quantiles


class GatedRow(Protocol):
    """Declare the members of a row that :func:`measure` uses. ``x`` is the input of the layer."""

    x: Tensor

    @property
    def trained(self) -> int:
        """Return the number of trained parameters."""

    def errors(self) -> dict[str, float]:
        """Return the error of each result against fp64, divided by the error of dense weights in the same dtype."""

    def forward(self) -> Tensor:
        """Return y with its autograd graph."""

    def forward_backward(self) -> object:
        """Run one forward and backward pass and return the gradients."""


def error_multiples(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> dict[str, float]:
    """Divide the error of each result in ``got`` by the error of the same result in ``plain``.

    An error is the norm of the difference from ``exact``, which holds fp64 results. If rounding the exact result to the
    dtype of ``got`` can cause a larger error than ``plain`` has, the divisor is this rounding error.
    """
    found = {}
    for name, value in exact.items():
        rounding = torch.finfo(got[name].dtype).eps / 2 * value.norm()
        yardstick = torch.maximum((plain[name].double() - value).norm(), rounding)
        found[name] = ((got[name].double() - value).norm() / yardstick).item()
    return found


def measure(
    rows: Mapping[str, Callable[[], GatedRow]], common: Mapping[str, Any], repeats: int, device: str
) -> list[dict[str, Any]]:
    """Measure every row and return one line of a result file per row.

    A row is timed only if its errors are at most ``budget.FACTOR`` times those of dense weights. Every line holds the
    fields of ``common``. The line of a timed row also holds its times, its memory in bytes and, if the baseline was
    timed, ratios to the baseline. The line of any other row holds the ``reason`` why it was not timed.
    """
    lines: dict[str, dict[str, Any]] = {}
    ready: dict[str, GatedRow] = {}
    for name, build in rows.items():
        lines[name] = {**common, "row": name, "reason": None}
        try:
            row = build()
            errors = row.errors()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:  # continue with the other rows
            lines[name]["reason"] = f"failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            continue
        lines[name] |= {"errors": errors, "trained": row.trained}
        over = [f"{result} {error:.3g}" for result, error in errors.items() if not error <= FACTOR]  # NaN is not <= 2
        if over:
            lines[name]["reason"] = f"error over {FACTOR:g} times that of dense weights: {', '.join(over)}"
            continue
        ready[name] = row
        lines[name]["saved_bytes"] = saved_for_backward(row.forward, [row.x])
        if torch.device(device).type == "cuda":  # the peak memory of a CPU process would include all earlier rows
            lines[name] |= peak(row.forward_backward, device)
    samples: dict[str, Samples] = {
        phase: time_rows({name: getattr(row, run) for name, row in ready.items()}, repeats, device=device)
        for phase, run in (("fwd", "forward"), ("fwd_bwd", "forward_backward"))
    }
    for name in ready:
        lines[name]["seconds"] = {phase: quantiles(of[name]) for phase, of in samples.items()}
        if "floor" in ready:
            lines[name]["ratio"] = {phase: quantiles(ratios(of)[name]) for phase, of in samples.items()}
    return list(lines.values())


def show(title: str, lines: list[dict[str, Any]]) -> None:
    """Print the table of one case."""
    print(f"\n{title}")
    print(f"{'row':<11} {'both ms':>9} {'/ floor':>8} {'fwd / floor':>12} {'saved MiB':>10} {'trained':>12}")
    for line in lines:
        if line["reason"] is not None or "ratio" not in line:
            print(f"{line['row']:<11} -- {line['reason'] or 'not timed: the frozen baseline failed its check'}")
            continue
        ratio, seconds = line["ratio"], line["seconds"]["fwd_bwd"]["p50"]
        print(
            f"{line['row']:<11} {1e3 * seconds:>9.2f} {ratio['fwd_bwd']['p50']:>8.3f} {ratio['fwd']['p50']:>12.3f} "
            f"{line['saved_bytes'] / 2**20:>10.1f} {line['trained']:>12,}"
        )
