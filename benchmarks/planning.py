"""Measure the time of ``efft.inspect`` for mixtures of experts of increasing size, on the meta device.

    python -m benchmarks planning

``efft.inspect`` plans which layers to adapt. Each block of the models has attention, with four linear layers, and 64
experts of three linear layers each. For each number of blocks, the command appends one line to the result file: the
number of linear layers in the model, and the seconds that planning takes. The time should grow in proportion to the
number of linear layers. The command therefore also prints the time per linear layer. Run it on an idle machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import efft
from benchmarks.options import parser_of
from efft_lab.record import append, machine_facts, quantiles


class _Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, n_experts: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{part}_proj": nn.Linear(width, width) for part in "qkvo"})
        self.experts = nn.ModuleList(_Expert(width, hidden) for _ in range(n_experts))


def mixture(blocks: int) -> nn.Module:
    """Return a mixture of experts on the meta device, with 196 linear layers per block."""
    with torch.device("meta"):
        return nn.ModuleDict({"layers": nn.ModuleList(_Block(64, 128, 64) for _ in range(blocks))})


def measure(blocks: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Time planning for each number of blocks and return one line of the result file per number."""
    lines = []
    for n in blocks:
        model = mixture(n)
        layers = sum(isinstance(module, nn.Linear) for module in model.modules())
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            plan = efft.inspect(model, efft.EfftConfig(rank=16))
            seconds.append(time.perf_counter() - start)
        assert len(plan.weights) == layers
        facts = {**machine_facts(), "suite": "planning", "row": f"{layers} linear layers", "device": "meta"}
        lines.append({**facts, "layers": layers, "seconds": quantiles(seconds)})
        best = min(seconds)
        print(f"{layers:>6} linear layers: {best:.2f} s, {1e6 * best / layers:.0f} microseconds per layer", flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record the planning times."""
    parser = parser_of("planning", __doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 13, 26, 52])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    path = append("planning", measure(args.blocks, args.repeats), args.results)
    print(f"results written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
