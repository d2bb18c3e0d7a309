"""VPT-deep: learned tokens in front of the patches, different ones in every block.

Jia et al., "Visual Prompt Tuning", ECCV 2022 (arXiv 2203.12119). The prompts of a block replace what the previous
block computed from its own; they are removed behind the last block, so the classifier sees the tokens of the base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import efft
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import blocks


class Prompt(nn.Module):
    """Learned tokens of one block.

    Args:
        tokens: number of learned tokens.
        features: width of a token.
        start: position of the first one, behind the class token.
        bound: bound of the uniform distribution that they are initialized from.
        replace: replace the learned tokens of the previous block instead of adding to the sequence.
    """

    def __init__(self, tokens: int, features: int, start: int, bound: float, replace: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(tokens, features).uniform_(-bound, bound))
        self.start, self.replace = start, replace

    def forward(self, x: Tensor) -> Tensor:  # [batch, n, features] -> [batch, n (+ tokens), features]
        own = self.tokens.to(x.dtype).expand(len(x), -1, -1)
        rest = self.start + (len(self.tokens) if self.replace else 0)
        return torch.cat([x[:, : self.start], own, x[:, rest:]], dim=1)


@baseline("vpt_deep")
def apply(model: nn.Module, tokens: int = 10) -> nn.Module:
    """Gives every block of a ViT learned tokens, in place; they and the classifier train."""
    efft.freeze_backbone(model)
    each, whole = blocks(model), model
    features = each[0].attn.proj.out_features
    start = getattr(whole, "num_prefix_tokens", 1)
    kernel: Any = model.get_submodule("patch_embed.proj").weight  # [features, 3, patch, patch]
    bound = (6 / (kernel[0].numel() + features)) ** 0.5
    for index, block in enumerate(each):
        block.prompt = Prompt(tokens, features, start, bound, replace=index > 0)
        block.register_forward_pre_hook(_put_in)
    each[-1].register_forward_hook(_take_out)
    return model


def _put_in(block: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (block.prompt(inputs[0]), *inputs[1:])


def _take_out(block: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    prompt = block.prompt
    return torch.cat([output[:, : prompt.start], output[:, prompt.start + len(prompt.tokens) :]], dim=1)
