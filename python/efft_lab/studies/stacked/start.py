"""Describe the start of a run: the initial parameters and the structure of an adapted timm ViT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from efft.adapting.adapter import adapted_layers


@dataclass(frozen=True)
class Start:
    """The start of one run.

    Attributes:
        parameters: all parameters by name. Layers that peft has wrapped keep the names that they have without peft.
        sites: for EFFT and FacT-TT, a mapping from the name of each adapted layer to (name of the bank, site). A bank
            is a set of shared factors, and the site is the place of the layer in the bank.
        scales: maps the name of each bank (``lora`` for LoRA) to the scale of its updates.
        dropout: dropout rate of EFFT's factors.
        heads: number of attention heads.
        patch: height and width of a patch in pixels.
        eps: epsilon of the layer norms.
    """

    parameters: dict[str, Tensor]
    sites: dict[str, tuple[str, Any]]
    scales: dict[str, float]
    dropout: float
    heads: int
    patch: int
    eps: float

    @classmethod
    def of(cls, model: nn.Module) -> Start:
        """Return the start of a timm ViT that was adapted by the library, by peft, or not at all."""
        vit: Any = model
        sites: dict[str, tuple[str, Any]] = {}
        scales: dict[str, float] = {}
        dropout = 0.0
        if hasattr(model, "efft"):
            banks = dict(vit.efft.items())
            names = {bank: name for name, bank in banks.items()}
            sites = {name: (names[layer.factors], layer.site) for name, layer in adapted_layers(model).items()}
            for name, bank in banks.items():
                scales[name] = float(bank.initial_scale if hasattr(bank, "initial_scale") else bank.scale)
                dropout = getattr(bank, "dropout", 0.0)
        for module in model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                scales["lora"] = float(module.scaling["default"])
        parameters = {
            name.replace(".base_layer", "").replace(".default.weight", ""): value.detach().clone()
            for name, value in model.named_parameters()
        }
        norm = vit.norm
        return cls(
            parameters,
            sites,
            scales,
            dropout,
            vit.blocks[0].attn.num_heads,
            vit.patch_embed.patch_size[0],
            float(norm.eps),
        )
