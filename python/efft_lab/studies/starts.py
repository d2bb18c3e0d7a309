"""Study whether EFFT2 learns better if its factors start with directions of the gradient or of the pretrained weights.

    python -m benchmarks starts --tasks cifar10 orientation count

EFFT2 updates a matrix by ``s U C V``. All matrices of one tensor train share U and V, and each has its own core C. The
study trains EFFT2 with the recipe of the suite ``local`` and an automatic scale s. It compares three sources of initial
directions for U and V:

- ``gradient``: the mean gradient of the matrices before the first step;
- ``weights``: the pretrained weights of the matrices;
- ``random``: random directions, which serve as the reference.

For the first two sources, the directions are the pair of bases that preserves the largest share of the squared norm of
all matrices of a train (:func:`efft_lab.studies.subspaces.shared_bases`). Each source is used in two kinds of start.
Both leave the outputs of the model unchanged:

- ``side``: as in the paper of EFFT, the cores are random, and one of U and V is zero. The other one contains the
  directions.
- ``cores``: the cores are zero, and U and V contain the directions. The scale s is chosen so that Adam's first step
  moves a weight as far as with the automatic scale.

A factor that contains directions is scaled to the norm that it has in a random start.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efft.config import AdapterConfig
from efft_kernels import TTFactors
from efft_kernels.nn.initialization import MOVEMENT
from efft_lab.record import append, machine_facts
from efft_lab.studies.side_by_side import method
from efft_lab.studies.subspaces import SETS, matrices, mean_gradient, recipe, shared_bases
from efft_lab.train import TrainConfig, build, run
from efft_lab.train.methods import Efft

KINDS = ("side", "cores")
SOURCES = ("random", "gradient", "weights")
RANK = 16

#: Maps each group of EFFT2 ("mhsa" and "ffn") to the two bases [d_in, r] and [d_out, r] of its train.
Bases = Mapping[str, tuple[Tensor, Tensor]]


def bases_of(found: Mapping[str, Tensor], rank: int) -> Bases:
    """Return the bases for each train. ``found`` has the form of :func:`efft_lab.studies.subspaces.matrices`."""
    trains = {name: torch.cat([found[kind] for kind in SETS[name]]) for name in ("mhsa", "ffn")}
    return {name: shared_bases(each, rank) for name, each in trains.items()}


@torch.no_grad()
def start(factors: TTFactors, kind: str, bases: tuple[Tensor, Tensor] | None) -> None:
    """Set the start of newly initialized factors in place.

    Args:
        factors: the factors of one train.
        kind: "side" or "cores".
        bases: the directions for U and V; None for random directions.
    """
    if kind == "cores":
        for side in (factors.U, factors.V):
            nn.init.xavier_uniform_(side)
        factors.C.zero_()
        rms = [float(side.square().mean().sqrt()) for side in (factors.U, factors.V)]
        factors.initial_scale = MOVEMENT / (math.prod(rms) * math.sqrt(factors.r1 * factors.r2))
    if bases is not None:
        for side, basis in ((factors.U, bases[0]), (factors.V, bases[1].T)):
            side.copy_(basis * (side.norm() / basis.norm()))


def study(task: str, seed: int, kind: str, bases: Bases | None) -> dict[str, object]:
    """Train one model and return its test accuracy and time for the result file."""
    fields = recipe(task, seed)
    efft = {**fields["efft"], "rank": RANK, "scale": "auto"}
    config = TrainConfig.from_dict({**fields, "method": "efft", "efft": efft})

    class Started(Efft):
        def apply(self, model: nn.Module, settings: AdapterConfig) -> None:
            super().apply(model, settings)
            groups: Any = model.efft
            for name, factors in groups.items():
                start(factors, kind, None if bases is None else bases[name])

    with tempfile.TemporaryDirectory() as folder, method("efft", Started()):
        summary = run(config, folder, progress=False).summary
    return {"test_accuracy": summary["test_accuracy"], "seconds": summary["seconds"]}


def bases_from(source: str, task: str, seed: int) -> Bases | None:
    """Return the bases for one of `SOURCES`, or None for random directions."""
    if source == "random":
        return None
    if source == "gradient":
        return bases_of(mean_gradient(task, seed), RANK)
    model = build.create_model(TrainConfig.from_dict({**recipe(task, seed), "method": "efft"}), 0)
    return bases_of(matrices(model.state_dict()), RANK)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and append to ``starts.jsonl``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks starts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["cifar10", "orientation", "count"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for starts.jsonl")
    args = parser.parse_args(arguments)
    for task, seed, source in product(args.tasks, args.seeds, SOURCES):
        bases = bases_from(source, task, seed)
        for kind in KINDS:
            what = {"task": task, "seed": seed, "kind": kind, "source": source, "rank": RANK}
            row = {**what, **study(task, seed, kind, bases)}
            append("starts", [{**row, **machine_facts()}], args.results)
            print(f"{task:<20} seed {seed} {kind:<6} {source:<9} {row['test_accuracy']:.1%}", flush=True)
    return 0
