"""Define ``Adapter``, the submodule that holds the factors of an adapted model, and the hooks of the model's forward.

A *bank* is a module that owns trained factors. It composes from them the *operands* of the layers: the tensors by which
the layers multiply. The weights that share a bank form a *group*. A *pass* is one forward pass of the model. The *base*
is the model without the adapter.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from efft.adapting.placing import Update, find_update
from efft.adapting.wrappers import unwrap
from efft.config import AdapterConfig
from efft_kernels import FactorBank
from efft_kernels.nn.parameter import AdaptedParameter


class Adapter(nn.ModuleDict):
    """Hold the factors and the settings of an adapted model, as the submodule ``efft`` of the model.

    The adapter maps the name of each group to the :class:`FactorBank` of the group.

    Attributes:
        config: the configuration with which the model was adapted.
        layers: names of the adapted weights. A layer has the name of its module. Any other weight has the name of its
            parameter.
        plan: the groups, in the form in which adapter files contain them.
        head: names of the modules that are trained in addition to the factors.
        extras: names of the biases and norms that are trained in addition to the factors and the head.
        enabled: False while the update is switched off or merged.
    """

    def __init__(self, factors: dict[str, FactorBank], config: AdapterConfig, head: list[str]) -> None:
        super().__init__(factors)
        self.config, self.head, self.enabled = config, head, True
        self.layers: list[str] = []
        self.extras: list[str] = []
        self.plan: list[dict[str, Any]] = []
        self._copied = False  # whether this is a copy that has not run with gradients yet
        self._watch: Callable[[nn.Module], None] | None = None  # called with the model at the first such pass of a copy
        self._idle_checked = False
        self._reads_checked: set[bool] = set()  # modes (True: training) that were searched for dense weights
        self._originals: dict[str, Any] = {}
        self._base_buffers: dict[str, Tensor] = {}  # copies of the buffers of the base model
        self._base_extras: dict[str, Tensor] = {}  # copies of the trained biases and norms, from the base model
        self._unknown: set[str] = set()  # names of buffers, biases and norms whose copies are out of date
        self._aside = False  # whether efft.disabled has put in the buffers, biases and norms of the base
        self._loading: Any = None  # describes the state dict that is being loaded (efft.adapting.loading.Loading)
        # Modules that stay in eval mode. They are in a plain list, so they are not registered as submodules again.
        self._still: list[nn.Module] = []
        self._requires_grad: dict[str, bool] = {}
        self._hooks: list[Any] = []

    def forward(self, x: Any) -> Any:
        """Return ``x``, because an adapted ``nn.Sequential`` also calls the adapter as its last child."""
        return x

    def train(self, mode: bool = True) -> Adapter:
        """Set the mode, but leave modules with frozen statistics in eval mode.

        The adapter is the model's last child. ``model.train()`` therefore calls this method after it has set the mode
        of those modules.
        """
        super().train(mode)
        for module in self._still:
            module.training = False
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state of a copied or unpickled adapter."""
        super().__setstate__(state)
        self._copied = True

    def banks(self) -> list[FactorBank]:
        """Return the banks of all groups."""
        return [factors for factors in self.values() if isinstance(factors, FactorBank)]


#: Adapters of models whose frozen weights other models use too (:class:`efft.SharedBackbone`). A copy of such a model
#: has its own weights, so the adapter of the copy is not in the set.
SHARING: weakref.WeakSet[Adapter] = weakref.WeakSet()


def adapter_of(model: nn.Module) -> Adapter:
    """Return the adapter of a model.

    Raises:
        ValueError: the model is not adapted.
    """
    adapter = getattr(model, "efft", None)
    if not isinstance(adapter, Adapter):
        raise ValueError(
            f"this {type(model).__name__} is not adapted: call efft.apply(model, config) or efft.load_adapter(model, "
            f"path) first"
        )
    return adapter


def check_not_aside(adapter: Adapter, operation: str) -> None:
    """Check that the model has its trained buffers, biases and norms.

    Within its ``with`` block, ``efft.disabled`` replaces them by those of the base.

    Args:
        adapter: the adapter of the model.
        operation: the operation that needs the trained values, for the error message.

    Raises:
        RuntimeError: the model has the values of the base.
    """
    if adapter._aside:
        raise RuntimeError(
            f"{operation}: within the with block of efft.disabled, this model has the buffers, biases and norms of the "
            "base instead of the trained ones; leave the block first"
        )


def adapted_layers(model: nn.Module) -> dict[str, Update]:
    """Return the updates of an adapted model by the names of their weights (:attr:`Adapter.layers`).

    The attributes of an update are ``delta_weight()`` (returns the dense update), ``evaluated()`` (returns D and G),
    ``merge()``, ``unmerge()``, ``merged`` and ``enabled``. The update of a layer is the adapted layer itself. ``model``
    may be wrapped by DDP or a similar wrapper.

    Raises:
        ValueError: the model is not adapted.
        RuntimeError: the model has lost an adapted layer: it was removed, replaced by another module, or wrapped by an
            unknown one.
    """
    model = unwrap(model)
    present = present_layers(model)
    lost = [name for name in adapter_of(model).layers if name not in present]
    if lost:
        raise RuntimeError(
            f"{len(lost)} of {len(adapter_of(model).layers)} adapted layers, {lost[0]!r} first, are not at their "
            "places: they were removed, replaced or wrapped after the model was adapted. Put them back; change a model "
            "(for example with resize_token_embeddings) before it is adapted"
        )
    return present


def present_layers(model: nn.Module) -> dict[str, Update]:
    """Return what :func:`adapted_layers` returns, without the layers that the model has lost."""
    updates = {name: find_update(model, name) for name in adapter_of(model).layers}
    return {name: update for name, update in updates.items() if update is not None}


def named_factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name in the state dict, parameter) of every trainable factor.

    ``model`` may be wrapped by DDP or a similar wrapper. The names do not include the wrapper.
    """
    return adapter_of(unwrap(model)).named_parameters("efft")


def prepare(model: nn.Module, args: Any) -> None:
    """Compose the operands of all layers before a pass of the model. Warn if a merged model is trained."""
    # The hook finds the adapter through its argument, so that a copied or unpickled model uses its own adapter.
    adapter = adapter_of(model)
    if adapter._copied and adapter._watch and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        adapter._copied = False
        adapter._watch(model)
    if adapter.enabled:
        for factors in adapter.banks():
            factors.prepare()
    elif (
        model.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(layer.merged for layer in present_layers(model).values())
    ):
        warnings.warn(
            "training a merged model: its factors get no gradient; call efft.unmerge(model) first", stacklevel=2
        )


def release(model: nn.Module, args: Any, output: Any) -> None:
    """Release the composed operands after a pass. Warn once about layers that did not run and about dense weights."""
    adapter = adapter_of(model)
    idle = [binding for factors in adapter.banks() for binding in factors.release()]
    if torch.compiler.is_compiling():
        return
    if adapter.enabled and output is not None and adapter.training not in adapter._reads_checked:
        adapter._reads_checked.add(adapter.training)
        _tell_of_dense(adapter, present_layers(model))
    if not idle or not adapter.enabled or output is None or adapter._idle_checked:
        return
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        adapter._idle_checked = True  # it is not known whether compiled blocks have run
        return
    layers = present_layers(model)
    placed = {id(update.binding) for update in layers.values()}
    if any(id(binding) not in placed for binding in idle):
        layers = adapted_layers(model)  # raises RuntimeError, because the model has lost the layer of this binding
    names = _never_run(layers, idle)
    if names:
        adapter._idle_checked = True
        warnings.warn(
            f"{len(names)} of {len(adapter.layers)} adapted layers did not run in this pass, {names[0]!r} first, and "
            "neither did the corresponding layers of other blocks. This is expected if this input does not use them "
            "(for example, text without images). If no input uses them, exclude them (exclude=[...])",
            stacklevel=2,
        )


#: Fraction of the adapted weights that may become dense before a warning is issued.
SILENT_DENSE = 0.01


def _tell_of_dense(adapter: Adapter, layers: Mapping[str, Update]) -> None:
    """Warn about adapted weights that modules read directly. Every pass builds dense weights for them.

    Warn only once, and only if these weights are more than the fraction :data:`SILENT_DENSE` of all adapted weights.
    """
    dense = {name: update for name, update in layers.items() if update.binding.dense}
    entries = sum(update.stored.numel() for update in dense.values())
    if entries <= SILENT_DENSE * sum(update.stored.numel() for update in layers.values()):
        return
    adapter._reads_checked |= {False, True}
    size = sum(update.stored.numel() * update.stored.element_size() for update in dense.values())
    readers = {type(u.module).__name__ if isinstance(u, AdaptedParameter) else u.reader for u in dense.values()}
    known = ", ".join(sorted(reader for reader in readers if reader)) or "the modules around them"
    warnings.warn(
        f"{len(dense)} of {len(layers)} adapted weights, {next(iter(dense))!r} first, are read directly by {known}, "
        "and such reads cannot be intercepted: every pass builds dense weights that include the update, "
        f"{size / 2**20:.3g} MiB in all. The result is correct; to save the time and memory, exclude these weights, or "
        "merge the update for inference",
        stacklevel=2,
    )


def _never_run(layers: Mapping[str, Update], idle: list[Any]) -> list[str]:
    """Return the idle layers whose counterparts in all other blocks were idle too.

    A layer that the model never calls is idle in every block. If blocks are skipped at random (LayerDrop), the
    counterpart of an idle layer usually runs in another block.
    """
    ran: dict[str, bool] = {}
    for name, layer in layers.items():
        place = re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}.")
        ran[place] = ran.get(place, False) or layer.binding not in idle or not layer.enabled or layer.merged
    return [name for name in layers if not ran[re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}.")]]
