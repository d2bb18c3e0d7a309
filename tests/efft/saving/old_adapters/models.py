"""Define the models and configurations of the adapters that were saved in the first file format.

    PYTHONPATH=.:python:<this checkout> python -m tests.efft.saving.old_adapters.models FOLDER

This command, run in a checkout of commit fd60874 (the last commit that wrote this format), created the folders next to
this file. Each folder holds an adapter and the logits of the adapted model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import efft
from efft.methods import METHODS


def fill(tensors: Any, size: float) -> None:
    """Fill tensors with numbers that do not depend on a random generator."""
    for i, tensor in enumerate(tensors):
        values = torch.arange(tensor.numel(), dtype=torch.float64).mul(1.7 + 0.01 * i).add(i).sin()
        tensor.data.copy_(
            (size * values / math.sqrt(max(tensor.shape[-1], 1) if tensor.dim() > 1 else 1)).view_as(tensor)
        )


def vit() -> nn.Module:
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3)


def swin() -> nn.Module:
    from timm.models import SwinTransformer

    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=4, depths=(1, 1), num_heads=(1, 1), window_size=2, num_classes=3
    )


def llama() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=16, num_labels=3, pad_token_id=0)
    return transformers.LlamaForSequenceClassification(config)


def bert() -> nn.Module:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=16, num_labels=3))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 12 * 12, 3))


PICTURES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
WORDS = torch.arange(1, 11).view(2, 5)

#: The model, the input and the configuration of each adapter.
ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[], Any]]] = {
    "vit": (vit, PICTURES, lambda: efft.EfftConfig(rank=2)),
    "vit_efft1": (vit, PICTURES, lambda: efft.EfftConfig(rank=(2, 3), variant="efft1", init="u")),
    "vit_shared": (vit, PICTURES, lambda: efft.EfftConfig(rank=2, core_sharing="shared", exclude=["fc2"])),
    "vit_scales": (
        vit,
        PICTURES,
        lambda: efft.EfftConfig(rank=2, scale="auto", trainable_scale="matrix", targets="mhsa"),
    ),
    "vit_by_name": (vit, PICTURES, lambda: efft.EfftConfig(rank=2, targets=["attn.qkv", "fc1"], head=["head", "norm"])),
    "swin": (swin, PICTURES, lambda: efft.EfftConfig(rank=2)),
    "llama": (llama, WORDS, lambda: efft.EfftConfig(rank=2)),
    "bert": (bert, WORDS, lambda: efft.EfftConfig(rank=2)),
    "convolutions": (convolutions, PICTURES, lambda: efft.EfftConfig(rank=2, targets=["0", "2"], head=["4"])),
    **{
        f"vit_{method}": (vit, PICTURES, lambda method=method: METHODS[method](rank=2))
        for method in ("lora", "fact_tt", "lotr", "lorta", "lora_xs", "vera")
    },
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits in fp64."""
    with torch.no_grad():
        found: Any = model.double().eval()(x.double() if x.is_floating_point() else x)
    return found if isinstance(found, Tensor) else found.logits


def base(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the model, with weights that are equal on every machine."""
    model = build()
    fill(model.parameters(), 1.0)
    return model


def main(folder: Path) -> None:
    for name, (build, x, configure) in ADAPTERS.items():
        model = efft.apply(base(build), configure())
        fill((p for _, p in efft.named_factors(model)), 0.7)
        for head in model.efft.head:
            fill(model.get_submodule(head).parameters(), 0.5)
        efft.save_adapter(model, folder / name)
        logits = output(model, x).tolist()
        (folder / name / "logits.json").write_text(json.dumps(logits) + "\n")
        (folder / name / "README.md").unlink()
        print(name, logits[0][:2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
