"""Training in less memory: layer norms and GELUs computed inside the adapted layers behind them."""

from __future__ import annotations

from torch import nn

from efft.adapting.inject import adapted_layers, bank_of
from efft_kernels.nn.deferred import defer, undefer


def fuse(model: nn.Module) -> list[str]:
    """Let every LayerNorm and GELU beside the adapted layers of ``model`` be computed inside the layer behind it.

    Their outputs are then not kept for the backward pass but made again in it, which saves a quarter to a third of what
    a transformer block keeps, for the time of one more pass over each. Results are the same up to rounding. Parameters,
    names and saved files do not change; code compiled by ``torch.compile`` is left alone. :func:`unfuse` and
    ``efft.remove`` undo it.

    Returns:
        The names of the modules that hand their work on.

    Raises:
        ValueError: the model is not adapted.
    """
    bank_of(model)
    beside = {parent for name in adapted_layers(model) for parent in _parents(name)}
    return [name for name, module in model.named_modules() if name.rpartition(".")[0] in beside and defer(module)]


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`. Returns the same ``model``."""
    for module in model.modules():
        undefer(module)
    return model


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
