"""Training in less memory: compute layer norms and GELUs inside the adapted layers after them."""

from __future__ import annotations

from torch import nn

from efft.adapting.inject import adapted_layers, adapter_of
from efft_kernels.nn.producers import fuse_producer, unfuse_producer


def fuse(model: nn.Module) -> list[str]:
    """Compute every LayerNorm and GELU beside the adapted layers of ``model`` inside the layer after it.

    The backward pass computes their outputs again instead of keeping them. This saves a quarter to a third of what a
    transformer block keeps, for the time of one more pass over each output. Results are the same up to rounding.
    Parameters, names and saved files do not change; code compiled by ``torch.compile`` is left alone. :func:`unfuse`
    and ``efft.remove`` undo it.

    Returns:
        The names of the modules that leave their work to the layer after them.

    Raises:
        ValueError: the model is not adapted.
    """
    adapter_of(model)
    beside = {parent for name in adapted_layers(model) for parent in _parents(name)}
    near = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[0] in beside]
    return [name for name, module in near if fuse_producer(module)]


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`. Returns the same ``model``."""
    for module in model.modules():
        unfuse_producer(module)
    return model


def _parents(name: str) -> list[str]:
    """Return the names of all modules around the module ``name``, the model itself ('') included."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
