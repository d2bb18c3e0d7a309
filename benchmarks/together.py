"""Measure the time per image of a step that trains several adapters at once, compared with training a single adapter.

    python -m benchmarks together
    python -m benchmarks together --model vit_tiny_patch16_224 --image-size 56 --batch 16

A row is one way to train. The row ``alone`` trains a single adapted model. The row ``fused`` also trains a single
model, after ``efft.fuse``: its adapted layers also compute the norms and GELUs before them. The row ``K=n`` trains n
models in one pass through an ``efft.SharedBackbone``. Each of the n models gets as many images as the single model. A
step is the forward pass, the backward pass and the optimizer's step. Every repetition measures every row. In a
repetition, the time per image of a row is divided by that of the row ``alone``. The ratio of the row is the median of
these quotients. Run the command on an idle machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import efft
from benchmarks.options import parser_of_measurement
from benchmarks.timing import Samples, time_rows
from efft_lab.record import append, machine_facts, quantiles

CLASSES = 10


def adapted(model: str, size: int, rank: int, seed: int, device: str, fuse: bool = False) -> nn.Module:
    """Return an adapted model in training mode; ``seed`` determines the factors, but not the frozen weights."""
    import timm

    torch.manual_seed(0)
    plain: nn.Module = timm.create_model(model, img_size=size, num_classes=CLASSES)
    torch.manual_seed(seed)
    made = efft.apply(plain, efft.EfftConfig(rank=rank, dropout=0.0)).to(device).train()
    if fuse:
        efft.fuse(made)
    return made


def step_alone(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: Any) -> Callable[[], object]:
    """Return a function that runs one training step of one model."""
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, 1e-3))

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_together(shared: Any, images: torch.Tensor, labels: torch.Tensor, autocast: Any) -> Callable[[], object]:
    """Return a function that runs one training step of all models of an ``efft.SharedBackbone``."""
    optimizer = torch.optim.AdamW(shared.parameter_groups(1e-3))
    batches = dict.fromkeys(shared.models, images)

    def step() -> None:
        with autocast():
            outputs = shared(batches)
            loss = torch.stack([F.cross_entropy(y.float(), labels) for y in outputs.values()]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(args: Any, dtype: str) -> list[dict[str, Any]]:
    """Measure every row with the given options and return one line of the result file per row."""

    def autocast() -> Any:
        return torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16")

    def make(seed: int, fuse: bool = False) -> nn.Module:
        return adapted(args.model, args.image_size, args.rank, seed, args.device, fuse)

    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.arange(args.batch, device=args.device) % CLASSES
    rows = {"alone": (1, step_alone(make(0), images, labels, autocast))}
    rows["fused"] = (1, step_alone(make(0, fuse=True), images, labels, autocast))
    for n in args.adapters:
        shared = efft.SharedBackbone((str(seed), make(seed)) for seed in range(n))
        rows[f"K={n}"] = (n, step_together(shared, images, labels, autocast))
    samples = time_rows({name: step for name, (_, step) in rows.items()}, args.repeats, device=args.device)
    per_image: Samples = {name: [t / (rows[name][0] * args.batch) for t in times] for name, times in samples.items()}
    about = {name: getattr(args, name) for name in ("model", "image_size", "batch", "rank", "device")}
    lines = []
    for name, times in per_image.items():
        ratio = statistics.median(t / base for t, base in zip(times, per_image["alone"], strict=True))
        facts = {**machine_facts(), "suite": "together", "row": name, "dtype": dtype, **about}
        lines.append({**facts, "seconds_per_image": quantiles(times), "of_alone": ratio})
        median = statistics.median(times)
        print(f"{dtype:<9} {name:<6} {1e3 * median:8.3f} ms per image, {ratio:.3f} of one model alone", flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record the times per image."""
    parser = parser_of_measurement("together", __doc__)
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a ViT of timm (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=56, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="images per model (default: %(default)s)")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8], help="numbers of models (default: 1 8)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args(arguments)
    lines = [line for dtype in args.dtype for line in measure(args, dtype)]
    path = append("together", lines, args.results)
    print(f"results written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
