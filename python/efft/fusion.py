"""Save memory in training by computing layer norms and GELUs in the same op as the adapted layers that follow them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from efft.adapting.inject import adapted_layers, adapter_of
from efft_kernels.nn.mlp import fuse_mlp, unfuse_mlp
from efft_kernels.nn.producers import ProducerOutput, fuse_producer, unfuse_producer


def fuse(model: nn.Module) -> list[str]:
    """Make adapted layers compute the LayerNorm or GELU whose output they read.

    The backward pass computes the outputs of these modules again, so they are not stored. This saves about a quarter to
    a third of the memory that a transformer block needs for the backward pass, and each output is computed once more.
    If a module does nothing but call two adapted layers with a GELU between them, one op computes all of them. Results
    are equal up to rounding. Parameters, names and saved files do not change. :func:`unfuse` and ``efft.remove`` undo
    the fusion. A change of a norm's parameters through ``.data`` is not noticed, and affects outputs of the norm that
    have not been read yet.

    Code that ``torch.compile`` compiles is not affected. Under ``torch.inference_mode()``, LayerNorms and GELUs run
    separately, as before, because torch does not count the changes of the tensors that they would read later. Use
    ``torch.no_grad()`` to evaluate a fused model.

    Returns:
        The names of all LayerNorms and GELUs in the modules around adapted layers. Only a forward pass shows which of
        them an adapted layer reads. If another operation reads the output of one of them, the output is computed as
        usual.

    Raises:
        ValueError: the model is not adapted.
    """
    adapter = adapter_of(model)
    beside = {parent for name in adapted_layers(model) for parent in _parents(name)}
    near = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[0] in beside]
    fused = [name for name, module in near if fuse_producer(module)]
    for name in beside:
        fuse_mlp(model.get_submodule(name))
    if _compute_outputs not in model._forward_hooks.values():
        adapter._hooks.append(model.register_forward_hook(_compute_outputs))  # efft.remove removes these hooks
    return fused


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, and return the same ``model``."""
    for module in model.modules():
        unfuse_mlp(module)
        unfuse_producer(module)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _compute_outputs:
                del module._forward_hooks[key]
    return model


def _compute_outputs(model: nn.Module, args: Any, output: Any) -> Any:
    """Replace postponed tensors in the output of the model by their values. The model runs this as a forward hook.

    The values must not depend on later changes of the model, such as those by an optimizer.
    """
    if torch.compiler.is_compiling():
        return None
    if not any(isinstance(leaf, ProducerOutput) for leaf in torch.utils._pytree.tree_leaves(output)):
        return None
    return torch.utils._pytree.tree_map_only(ProducerOutput, ProducerOutput.value, output)


def _parents(name: str) -> list[str]:
    """Return the names of all modules around the module ``name``, including the model itself ('')."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
