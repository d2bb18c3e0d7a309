"""Time rows that train something, but only those that are right: what the benchmarks of single layers share."""

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
    """What a row must offer to be measured."""

    x: Tensor

    @property
    def trained(self) -> int:
        """Return how many numbers are trained."""

    def errors(self) -> dict[str, float]:
        """Return the error of each result against fp64, as a multiple of that of dense weights in the same dtype."""

    def forward(self) -> Tensor:
        """Return y, recorded for backward."""

    def forward_backward(self) -> object:
        """Run one forward pass and return its gradients."""


def error_multiples(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the error of each result in ``got``, divided by that of ``plain`` or by the rounding of the exact result.

    The larger of the two counts.
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
    """Return one line of a result file per row.

    A line holds times, ratios to the row "floor" and bytes, or the reason why it has none.
    """
    lines: dict[str, dict[str, Any]] = {}
    ready: dict[str, GatedRow] = {}
    for name, build in rows.items():
        lines[name] = {**common, "row": name, "reason": None}
        try:
            row = build()
            errors = row.errors()
        except (ImportError, RuntimeError, TypeError, ValueError) as error:  # the other rows go on
            lines[name]["reason"] = f"failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            continue
        lines[name] |= {"errors": errors, "trained": row.trained}
        over = [f"{result} {error:.3g}" for result, error in errors.items() if not error <= FACTOR]  # NaN is not <= 2
        if over:
            lines[name]["reason"] = f"error over {FACTOR:g} times that of dense weights: {', '.join(over)}"
            continue
        ready[name] = row
        lines[name]["saved_bytes"] = saved_for_backward(row.forward, [row.x])
        if torch.device(device).type == "cuda":  # on a CPU the peak of the process would be that of all rows so far
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
            print(f"{line['row']:<11} -- {line['reason'] or 'the floor that it is compared with was refused'}")
            continue
        ratio, seconds = line["ratio"], line["seconds"]["fwd_bwd"]["p50"]
        print(
            f"{line['row']:<11} {1e3 * seconds:>9.2f} {ratio['fwd_bwd']['p50']:>8.3f} {ratio['fwd']['p50']:>12.3f} "
            f"{line['saved_bytes'] / 2**20:>10.1f} {line['trained']:>12,}"
        )
