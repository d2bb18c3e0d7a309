"""Measure how much of a full fine-tuning update can be expressed with factors that many matrices share.

    python -m benchmarks subspaces --tasks cifar10 orientation count

The study fine-tunes all weights of the backbone that the suite ``local`` of ``efft compare`` uses. It analyzes the
update of every attention and MLP matrix. It also analyzes the mean gradient of these matrices, which is computed with
the pretrained weights and a trained linear classifier. The matrices of all blocks are analyzed in sets. A set contains
one type of matrix (Q, K, V, O, W1 or W2) or one group of types that EFFT2 puts into one tensor train: ``mhsa`` (Q, K, V
and O) or ``ffn`` (W1 and the transpose of W2). For each set, the study measures:

- ``effective_rank``: the exponential of the entropy of the normalized squared singular values, averaged over matrices;
- ``own``: the share of the squared norm that the best rank-r approximation of each single matrix keeps. This is the
  share that LoRA can express.
- ``shared``: the share that remains if all matrices are projected onto the same r input and r output directions. The
  study optimizes these directions for the set. One tensor train with a core for each matrix can express at least this
  share. (A tensor train updates every matrix of the set by U C V, with common U and V and one core C per matrix.)
- ``independent``: ``shared`` for other matrices, which have the same singular values but random directions. If
  ``shared`` is larger than ``independent``, the matrices have directions in common.
- ``norm``: the mean Frobenius norm of the matrices.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from efft_lab.compare import suite as suites
from efft_lab.record import append, machine_facts
from efft_lab.train import build, run
from efft_lab.train.config import TrainConfig

#: Maps the name of each set to its types of matrices.
SETS = {name: (name,) for name in ("q", "k", "v", "o", "fc1", "fc2")} | {
    "mhsa": ("q", "k", "v", "o"),
    "ffn": ("fc1", "fc2"),
}
#: The measured fields of a row, which is a line of the result file for one set, and for its update or its gradient.
MEASURES = ("effective_rank", "own", "shared", "independent", "norm")
SWEEPS = 8
"""Number of alternations in :func:`shared_bases`. After five of them, the share changes by less than 1e-3."""


def matrices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices in the state dict of a timm ViT by type, fp64 [blocks, d_in, d_out].

    Matrices of fc2 are [blocks, d_out, d_in], because they are transposed in the tensor train.
    """
    blocks = sorted({int(name.split(".")[1]) for name in state if name.startswith("blocks.")})

    def stacked(name: str) -> Tensor:
        return torch.stack([state[f"blocks.{block}.{name}.weight"].double() for block in blocks])

    q, k, v = stacked("attn.qkv").chunk(3, dim=1)  # [blocks, d, d] each, rows are outputs
    found = {"q": q, "k": k, "v": v, "o": stacked("attn.proj"), "fc1": stacked("mlp.fc1")}
    return {name: each.mT for name, each in found.items()} | {"fc2": stacked("mlp.fc2")}


def effective_rank(values: Tensor) -> float:
    """Return the effective rank of n matrices, averaged over the matrices. ``values`` are singular values, [n, m]."""
    share = values.square() / values.square().sum(-1, keepdim=True)
    return float((-(share * share.clamp_min(1e-300).log()).sum(-1)).exp().mean())


def own_energy(values: Tensor, rank: int) -> float:
    """Return the share of the squared norm that the best approximation of each matrix with a given rank keeps.

    ``values`` are the singular values of n matrices in descending order, [n, m].
    """
    return float(values[:, :rank].square().sum() / values.square().sum())


def shared_bases(each: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return two orthonormal bases, [a, rank] and [b, rank], that keep most of the squared norm of matrices [n, a, b].

    The basis of the columns [b, rank] starts as the best one if only the columns are projected. Then each basis in turn
    is replaced by the best one for the current basis of the other side. The result is a local optimum.
    """

    def best(of: Tensor) -> Tensor:  # [n, a, m] -> [a, rank]
        return torch.linalg.eigh(torch.einsum("nam,nbm->ab", of, of))[1][:, -rank:]

    right = best(each.mT)
    for _ in range(SWEEPS):
        left = best(each @ right)
        right = best(each.mT @ left)
    return left, right


def shared_energy(each: Tensor, rank: int) -> float:
    """Return the share of the squared norm of matrices [n, a, b] that the bases of :func:`shared_bases` keep."""
    left, right = shared_bases(each, rank)
    return float((left.T @ each @ right).square().sum() / each.square().sum())


def independent(each: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
    """Return matrices with the shape of ``each``, the singular values ``values`` [n, m] and random directions."""

    def directions(size: int) -> Tensor:
        normal = torch.randn(len(each), size, values.shape[1], dtype=each.dtype, generator=generator)
        return torch.linalg.qr(normal)[0]

    return directions(each.shape[1]) * values[:, None] @ directions(each.shape[2]).mT


def measure(found: Mapping[str, Tensor], rank: int, seed: int) -> list[dict[str, object]]:
    """Return one row per set in `SETS`, with the fields in `MEASURES`."""
    generator = torch.Generator().manual_seed(seed)
    singular = {kind: torch.linalg.svdvals(each) for kind, each in found.items()}
    rows: list[dict[str, object]] = []
    for name, types in SETS.items():
        each, values = (torch.cat([of[kind] for kind in types]) for of in (found, singular))
        row = {
            "effective_rank": effective_rank(values),
            "own": own_energy(values, rank),
            "shared": shared_energy(each, rank),
            "independent": shared_energy(independent(each, values, generator), rank),
            "norm": float(values.square().sum(1).sqrt().mean()),
        }
        rows.append({"set": name, **row})
    return rows


def recipe(task: str, seed: int) -> dict[str, Any]:
    """Return the fields of ``TrainConfig`` that the suite ``local`` has for all methods, for training on all images."""
    return {**suites.load("local").train, "data": task, "seed": seed, "data_seed": seed, "protocol": "final"}


def mean_gradient(task: str, seed: int) -> dict[str, Tensor]:
    """Return the mean gradient of the loss over the training images of a task, in the form of :func:`matrices`.

    The backbone has its pretrained weights, but the classifier is trained first. With a random classifier, the
    directions of the gradient would be meaningless.
    """
    fields = recipe(task, seed)
    fields.pop("efft")
    config = TrainConfig.from_dict({**fields, "method": "linear", "lr": 1e-2})
    with tempfile.TemporaryDirectory() as folder:
        model = run(config, folder, progress=False).model
    assert model is not None
    data = build.load_task(config).trainval
    loader = torch.utils.data.DataLoader(data, batch_size=config.eval_batch_size)
    model.requires_grad_(True).eval()
    for images, labels in loader:
        (functional.cross_entropy(model(images), labels, reduction="sum") / len(data)).backward()
    return matrices({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})


def study(task: str, seed: int, lr: float, rank: int) -> list[dict[str, object]]:
    """Fine-tune one model, and return the rows for its update and for :func:`mean_gradient`."""
    gradient = measure(mean_gradient(task, seed), rank, seed)
    fields = recipe(task, seed)
    fields.pop("efft")
    config = TrainConfig.from_dict({**fields, "method": "full", "lr": lr})
    before = build.create_model(config, build.load_task(config).classes).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        result = run(config, folder, progress=False)
    assert result.model is not None
    after = result.model.state_dict()
    update = measure(matrices({name: after[name] - before[name] for name in before}), rank, seed)
    common = {"task": task, "seed": seed, "rank": rank, "lr": lr, "test_accuracy": result.summary["test_accuracy"]}
    return [
        {**common, "of": of, **row, **machine_facts()}
        for of, rows in (("gradient", gradient), ("update", update))
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study and append to ``subspaces.jsonl``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks subspaces", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["cifar10", "orientation", "count"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--lr",
        type=float,
        default=3e-5,
        help="learning rate of full fine-tuning (default: the rate that the suite chose)",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder for subspaces.jsonl")
    args = parser.parse_args(arguments)
    for task in args.tasks:
        for seed in args.seeds:
            rows = study(task, seed, args.lr, args.rank)
            append("subspaces", rows, args.results)
            for row in rows:
                numbers = " ".join(f"{name} {row[name]:8.3f}" for name in MEASURES)
                print(f"{task:<20} seed {seed} {row['of']:<9}{row['set']:<5}{numbers}", flush=True)
    return 0
