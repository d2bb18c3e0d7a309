"""One training step of a timm ViT under several ways to adapt it, as ratios to the frozen floor in the same run.

    python -m benchmarks.train_step --model vit_base_patch16_224 --batch 8 --rank 32 --repeats 5

Rows:
    floor   backbone frozen, gradient flowing through it from the head to the first block: what no method can avoid
    efft    EFFT2 by this library
    naive   the same factors, each update built and added to its weight: F.linear(x, W + dW)
    paper   the formulation of the paper's code: each update built and applied to x beside the frozen layer
    lora    LoRA of the peft library, same rank, same layers

Variants are interleaved and the best time of each is compared, so that a disturbance hits all alike. Measure alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft
from benchmarks.record import append, machine_facts
from efft.inject import adapted_layers
from efft_kernels import EfftLinear


class DenseDelta(nn.Module):
    """An adapted layer that builds its update, as ``W + dW`` ("naive") or beside the frozen product ("paper")."""

    def __init__(self, layer: EfftLinear, form: str) -> None:
        super().__init__()
        self.layer, self.form = layer, form

    def forward(self, x: Tensor) -> Tensor:
        layer, site = self.layer, self.layer.site
        U, V, C = layer.factors.U, layer.factors.V, layer.factors.C[site.layer]
        deltas = [U @ C[core] @ V for core in site.cores]  # [d_in, d_out] each
        if site.transpose:
            deltas = [delta.t() for delta in deltas]
        s = float(layer.factors.scale)
        if self.form == "naive":
            return F.linear(x, layer.weight + s * torch.cat(deltas, dim=1).t(), layer.bias)
        return F.linear(x, layer.weight, layer.bias) + s * torch.cat([x @ delta for delta in deltas], dim=-1)


def build(variant: str, name: str, rank: int) -> nn.Module:
    """A model of one row, in training mode, everything but its own parameters and the head frozen."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100)
    if variant == "floor":
        efft.freeze_backbone(model)
        first = model.get_submodule("blocks.0.attn.qkv")
        first.register_forward_hook(lambda module, args, y: y.requires_grad_())
    elif variant == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        model = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=["head"])
        )
    else:
        efft.apply(model, efft.EfftConfig(rank=rank, dropout=0.0))
        if variant != "efft":
            for path, layer in adapted_layers(model).items():
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, DenseDelta(layer, variant))
            model.efft.enabled = False  # the dense forms contract for themselves
    return model.train()


def training_step(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, backward and optimizer step, as one call."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, ``repeats`` times, interleaved, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=["floor", "efft", "naive", "paper", "lora"])
    args = parser.parse_args()

    models = {row: build(row, args.model, args.rank) for row in args.rows}
    size = models[args.rows[0]].patch_embed.img_size
    images, labels = torch.randn(args.batch, 3, *size), torch.randint(100, (args.batch,))
    steps = {row: training_step(m, images, labels, getattr(torch, args.dtype)) for row, m in models.items()}
    seconds = measure(steps, args.repeats)
    floor = min(seconds["floor"]) if "floor" in seconds else None
    rows: list[dict[str, Any]] = []
    for name, samples in seconds.items():
        best, median = min(samples), sorted(samples)[len(samples) // 2]
        trainable = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        ratio = None if floor is None else best / floor
        rows.append({"row": name, "best_s": best, "median_s": median, "ratio": ratio, "trainable": trainable})
        print(
            f"{name:<6} best {best:7.3f} s  median {median:7.3f} s  "
            f"ratio to floor {'-' if ratio is None else f'{ratio:.3f}'}  trainable {trainable:,}"
        )
    setting = {k: v for k, v in vars(args).items() if k != "rows"}
    append("train_step", [{**machine_facts(), **setting, **row} for row in rows])


if __name__ == "__main__":
    main()
