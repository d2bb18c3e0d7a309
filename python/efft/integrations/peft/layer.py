"""Define ``EfftLayer``, a layer under peft with any number of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from efft.integrations.peft import kinds
from efft_kernels import Site, TTFactors
from efft_kernels.nn.frozen import is_plain
from efft_kernels.nn.linear import adapted_linear


class EfftLayer(nn.Module, BaseTunerLayer):
    """Compute ``y = x Wᵀ + b + Σ (x D) G`` with a frozen layer. The sum is over the active adapters.

    The frozen layer may be an ``nn.Linear``, transformers' ``Conv1D``, a convolution or an embedding. The factors
    belong to the :class:`EfftModel`. Two dicts, which are not part of the layer's state, map the name of each adapter
    to its bank and to the binding of this layer to that bank.

    For an ``nn.Linear`` with a plain weight, one op computes ``y`` without calling the layer. If the weight is
    quantized, or if the class of the layer has its own ``forward``, this weight or class computes the frozen product
    (:func:`efft_kernels.nn.linear.frozen_linear`), and the update is added to the product.

    In some cases the layer must be called instead, and the update is added to its output. The layer is called if it is
    not an ``nn.Linear``, if it has hooks, if a ``forward`` was set on the layer itself (as accelerate's offloading
    does), if its weight or bias is trained, or if further arguments are passed.
    """

    adapter_layer_names = ("efft_factors",)
    other_param_names = ("efft_bindings",)

    active_adapters: list[str]
    efft_factors: nn.ModuleDict
    base_layer: Any
    base_weight: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = kinds.sizes(base_layer)
        self.__dict__["efft_factors"] = nn.ModuleDict()  # peft expects this type, but it must not be registered
        self.efft_bindings: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.was_read = False
        self.register_buffer("base_weight", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight of the adapted layer, which includes only the updates that are merged.

        Reading the weight while the model runs sets ``was_read``, because the module that reads it computes without the
        updates that are not merged.
        """
        if not torch.compiler.is_compiling() and any(binding.prepared is not None for binding in self.bindings):
            self.was_read = True
        weight: Tensor = BaseTunerLayer.get_base_layer(self).weight
        return weight

    def update_layer(self, adapter_name: str, factors: TTFactors, site: Site) -> None:
        """Add an adapter. This layer uses the part ``site`` of the adapter's bank ``factors``."""
        self.efft_factors[adapter_name], self.efft_bindings[adapter_name] = factors, factors.bind(site)

    @property
    def bindings(self) -> list[Any]:
        """The bindings of this layer to the banks of its adapters."""
        return list(self.efft_bindings.values())

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Map ``x [..., in_features]`` to ``[..., out_features]``. Further arguments are passed to the adapted layer.

        With ``adapter_names``, one name per sample (the first dimension), each sample uses the update of its own
        adapter, or none if the name is ``"__base__"``.
        """
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        layer = self.base_layer
        names = [name for name in self.active_adapters if name in self.efft_bindings]
        if self._disable_adapters and self.base_weight is not None:
            base: Tensor = torch.func.functional_call(layer, {"weight": self.base_weight}, (x, *args), kwargs)
            return base
        if self._disable_adapters or self.merged_adapters or not names:
            base = layer(x, *args, **kwargs)
            return base
        pairs = [self._bank(name).down_up(self.efft_bindings[name]) for name in names]
        D, G = pairs[0]
        if len(pairs) > 1:
            D, G = torch.cat([D for D, _ in pairs], 1), torch.cat([G for _, G in pairs], 0)
        if not (args or kwargs or _must_be_called(layer)):
            return adapted_linear(layer, x, D, G)
        y: Tensor = layer(x, *args, **kwargs)
        return y + kinds.beside(layer, x, D, G, y)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y: Tensor = self.base_layer(x, *args, **kwargs)
        for name in sorted({*adapter_names} & {*self.efft_bindings}):
            rows = torch.tensor([i for i, own in enumerate(adapter_names) if own == name], device=y.device)
            D, G = self._bank(name).down_up(self.efft_bindings[name])
            y = y.index_add(0, rows, kinds.beside(self.base_layer, x[rows.to(x.device)], D, G, y))
        return y

    def _bank(self, adapter: str) -> Any:
        return self.efft_factors[adapter]

    def _evaluate(self, adapter: str) -> tuple[Tensor, Tensor]:
        with load_during(self._bank(adapter)) as factors:
            pair: tuple[Tensor, Tensor] = factors.evaluated(self.efft_bindings[adapter].site)
        return pair

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the dense update of an adapter without dropout, in the shape of the weight and the factors' dtype.

        If the adapter does not adapt this layer, the result contains zeros in torch's default dtype.
        """
        if adapter not in self.efft_bindings:
            return torch.zeros(self.base_layer.weight.shape, device=device_of(self.base_layer))
        return kinds.dense(self.base_layer, *self._evaluate(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether ``peft.convert_to_lora`` can convert this layer, which is the case for all linear layers.

        The conversion is exact if the rank of the LoRA is at least the rank of the adapter.
        """
        return kinds.is_linear(self.base_layer)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of adapters (default: of the active adapters) to the weight.

        Each update is added in fp32, and the sum is rounded once. The layer keeps a copy of the base weight, so that
        :meth:`unmerge` is exact.

        Raises:
            ValueError: ``safe_merge`` is set, and an update has NaN or infinite entries. The layer is then unchanged.
            TypeError: no update can be added to the weight, because the weight is quantized or is computed from other
                tensors.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.efft_bindings]
        for name in names:
            if safe_merge and not torch.isfinite(self.get_delta_weight(name)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: "  # peft's words
                    f"the update of adapter {name!r} has NaN or infinite entries; it was not merged"
                )
        weight = self.base_layer.weight
        if not is_plain(weight):
            raise TypeError(
                f"the weight is a {type(weight).__name__}, to which no update can be added: keep the adapter "
                "unmerged, or load it onto the dense base model and merge it there"
            )
        if self.base_layer._parameters.get("weight") is not weight:
            raise TypeError(
                "the layer's weight is computed from other tensors (a pruning mask, a parametrization), so an "
                "update that is added to it would be lost: remove the mask or parametrization first, or keep the "
                "adapter unmerged"
            )
        if names and self.base_weight is None:
            self.base_weight = weight.detach().clone()
        for name in names:
            D, G = self._evaluate(name)
            kinds.merge_(self.base_layer, D.to(weight.device), G.to(weight.device))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the base weight exactly. Do nothing if no adapter is merged."""
        if self.base_weight is not None:
            self.base_layer.weight.copy_(self.base_weight)
            self.base_weight = None
            self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Many layers share the bank. It moves to the device of the first of these layers, and keeps its dtype.
        if adapter_name in self.efft_bindings:
            factors, binding = self._bank(adapter_name), self.efft_bindings[adapter_name]
            if factors.bindings[0] is binding and not factors.U.is_meta:
                factors.to(device or device_of(self.base_layer))


def device_of(layer: nn.Module) -> torch.device:
    """Return the device on which a layer computes, even while accelerate has offloaded its weight to another device."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    execution = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return torch.device(execution) if weight.is_meta and execution is not None else weight.device


@contextmanager
def load_during(factors: Any) -> Iterator[Any]:
    """Load the tensors of a bank that accelerate offloads, and offload them again after the ``with`` block."""
    load(factors)
    try:
        yield factors
    finally:
        offload(factors)


def load(factors: Any) -> None:
    """Load the tensors of a bank that accelerate offloads.

    Accelerate itself loads tensors only when a module is called, and banks are not called.
    """
    if hasattr(factors, "_hf_hook"):
        factors._hf_hook.pre_forward(factors)


def offload(factors: Any) -> None:
    """Offload the tensors of a bank that :func:`load` has loaded."""
    if hasattr(factors, "_hf_hook"):
        factors._hf_hook.post_forward(factors, None)


def _must_be_called(layer: Any) -> bool:
    """Return whether a call of the layer does more than the product of an ``nn.Linear`` with frozen parameters."""
    return bool(
        not isinstance(layer, nn.Linear)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or layer.weight.requires_grad
        or (layer.bias is not None and layer.bias.requires_grad)
    )
