"""Apply VPT-deep: insert learned tokens before the patch tokens, with different learned tokens in every block.

Reference: Jia et al., "Visual Prompt Tuning", ECCV 2022 (arXiv 2203.12119). The learned tokens are called the prompts
of a block. At the input of each block after the first, its prompts replace the tokens that the previous block computed
from its own prompts. The last block's outputs for its prompts are removed. The classifier therefore sees only the
tokens of the base model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import efft
from efft_lab.baselines.registry import baseline
from efft_lab.baselines.vit import blocks


class Prompt(nn.Module):
    """Insert the learned tokens of one block into a sequence of tokens.

    Args:
        tokens: number of learned tokens.
        features: width of a token.
        start: position of the first learned token, which is the number of class and register tokens.
        bound: the initial values are uniform between -bound and bound.
        replace: whether to replace the tokens at these positions (those of the previous block's prompts). Otherwise the
            learned tokens are added to the sequence.
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
    """Add learned tokens to every block of a ViT, in place.

    Only the learned tokens and the classifier are trainable.

    Args:
        model: a timm ViT.
        tokens: number of learned tokens per block.
    """
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
