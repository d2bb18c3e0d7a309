"""EFFT as a method of ``peft``: importing this module registers it, also for ``peft.PeftModel.from_pretrained``.

from efft.integrations.peft import EfftPeftConfig
model = peft.get_peft_model(model, EfftPeftConfig(rank=16))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efft.config import EfftConfig
from efft.plan import make_plan
from efft_kernels import Site, TTFactors, tt_merge_
from efft_kernels.nn.weights import adapted_linear, is_plain

try:
    from peft import PeftConfig, PeftType
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import ModulesToSaveWrapper, register_peft_method
except ImportError as error:
    raise ImportError("efft.integrations.peft needs peft >= 0.21: pip install 'efft-kernels[hf]'") from error


@dataclass
class EfftPeftConfig(PeftConfig, EfftConfig):
    """:class:`efft.EfftConfig` as a configuration of peft, with the fields of both.

    ``modules_to_save`` is peft's name of ``head`` and means the same (None finds the classifier, [] trains none), but
    the ends of names do too; ``targets`` and ``exclude`` stand for what other methods of peft call
    ``target_modules`` and ``exclude_modules``.

    Raises:
        ValueError: a value out of range, or ``head`` and ``modules_to_save`` that differ.
    """

    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        EfftConfig.__post_init__(self)
        self.peft_type = PeftType.EFFT
        if self.head is not None and self.modules_to_save not in (None, self.head):
            raise ValueError(
                f"head and modules_to_save name the same modules: give one, got {self.head} and {self.modules_to_save}"
            )
        self.modules_to_save = self.head if self.modules_to_save is None else self.modules_to_save

    @property
    def target_modules(self) -> str | tuple[str, ...]:
        """``targets``, as peft reads it (from a list it would make another)."""
        return self.targets if isinstance(self.targets, str) else tuple(self.targets)


class EfftLayer(nn.Module, BaseTunerLayer):
    """A frozen ``nn.Linear`` with any number of adapters: ``y = x Wᵀ + b + (x D) G``, summed over the active ones.

    The factors belong to the :class:`EfftModel`; the layer refers to them by plain dicts, adapter name to its bank and
    to the binding in it.
    """

    adapter_layer_names = ("efft_factors",)
    other_param_names = ("efft_bindings",)

    active_adapters: list[str]
    base_layer: nn.Linear
    base_weight: Tensor | None

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.efft_factors: dict[str, TTFactors] = {}
        self.efft_bindings: dict[str, Any] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.register_buffer("base_weight", None, persistent=False)

    def update_layer(self, adapter_name: str, factors: TTFactors, site: Site) -> None:
        """Add an adapter: this layer is ``site`` of the bank ``factors``."""
        self.efft_factors[adapter_name], self.efft_bindings[adapter_name] = factors, factors.bind(site)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        linear = self.base_layer
        if self.disable_adapters and self.base_weight is not None:
            return F.linear(x, self.base_weight, linear.bias)
        names = [name for name in self.active_adapters if name in self.efft_factors]
        if self.disable_adapters or self.merged or not names:
            base: Tensor = linear(x)
            return base
        pairs = [self.efft_factors[name].down_up(self.efft_bindings[name]) for name in names]
        D, G = pairs[0]
        if len(pairs) > 1:
            D, G = torch.cat([D for D, _ in pairs], 1), torch.cat([G for _, G in pairs], 0)
        return adapted_linear(linear, x, D, G)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update ``[out_features, in_features]`` of an adapter in its factors' dtype, without dropout."""
        D, G = self.efft_factors[adapter].evaluated(self.efft_bindings[adapter].site)
        return (D @ G).t()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters (default: the active ones) to the weight, in fp32 with one rounding each.

        The base weight is kept, so that :meth:`unmerge` is exact.

        Raises:
            ValueError: ``safe_merge``, and the update has NaN or infinite entries; the layer is then unchanged.
            TypeError: the weight is quantised, so no update can be added to it.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.efft_factors]
        for name in names:
            if safe_merge and not torch.isfinite(self.get_delta_weight(name)).all():
                raise ValueError(f"the update of adapter {name!r} has NaN or infinite entries; it was not merged")
        weight = self.base_layer.weight
        if not is_plain(weight):
            raise TypeError(
                f"the weight is a {type(weight).__name__}, to which no update can be added: keep the adapter beside "
                "it, or load it onto the dense base and merge there"
            )
        if names and self.base_weight is None:
            self.base_weight = weight.detach().clone()
        for name in names:
            tt_merge_(weight, *self.efft_factors[name].evaluated(self.efft_bindings[name].site))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit. Does nothing on a layer that is not merged."""
        if self.base_weight is not None:
            self.base_layer.weight.copy_(self.base_weight)
            self.base_weight = None
            self.merged_adapters.clear()


class EfftModel(BaseTuner):
    """A model adapted by EFFT under peft. It owns the factors: ``efft_banks``, adapter name to group to bank."""

    prefix = "efft_"
    tuner_layer_cls = EfftLayer
    uses_shared_state = True

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, low_cpu_mem_usage: bool = False, **kwargs: Any
    ) -> None:
        """Plan the adapter as :func:`efft.apply` does, allocate its factors, and adapt the layers of the plan.

        Raises:
            ValueError: the configuration does not fit the model, which is then unchanged.
        """
        config, sites, banks = self.peft_config[adapter_name], {}, nn.ModuleDict()
        with _plain(model):
            if config.modules_to_save is not None:
                # peft matches the ends of names, and for some tasks adds the usual names of classifiers.
                ends = tuple(config.modules_to_save)
                config.head = [name for name, _ in model.named_modules() if name.endswith(ends)] if ends else []
            plan = make_plan(model, config)
            for group in plan.groups:
                weight = model.get_submodule(next(iter(group.sites))).weight
                assert isinstance(weight, Tensor)
                device = torch.device("meta") if low_cpu_mem_usage else weight.device
                factors = group.build(device, torch.promote_types(weight.dtype, torch.float32))
                sites.update({name: (factors, site) for name, site in group.sites.items()})
                banks[group.name] = factors
        self._check_names(adapter_name, banks)
        config.head = config.modules_to_save = plan.head
        config.settle(plan.groups, banks)
        if not hasattr(self, "efft_banks"):
            self.efft_banks = nn.ModuleDict()
            self._hooks = [  # on the model, which peft calls itself
                model.register_forward_pre_hook(self._prepare),
                model.register_forward_hook(self._release, always_call=True),
            ]
        earlier = {p: p.requires_grad for p in self.efft_banks.parameters()}
        self.efft_banks[adapter_name] = banks.train(model.training)
        self._sites: dict[str, tuple[TTFactors, Site]] = sites
        super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        self._sites = {}
        for parameter, requires_grad in earlier.items():  # peft does the same for what lies inside the model
            parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter and its factors."""
        super().delete_adapter(adapter_name)
        del self.efft_banks[adapter_name]

    def _check_names(self, adapter_name: str, banks: nn.ModuleDict) -> None:
        """peft finds an adapter's tensors by leaving out those with another adapter's name among their names."""
        adapters = {**getattr(self, "efft_banks", {}), adapter_name: banks}
        for groups in adapters.values():
            if clash := set(groups) & set(adapters):
                raise ValueError(f"an adapter may not be named like a group of factors, {clash.pop()!r}; rename it")

    def _check_target_module_exists(self, peft_config: EfftPeftConfig, key: str) -> bool:
        return key in self._sites

    def _create_and_replace(
        self,
        peft_config: EfftPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, EfftLayer):
            target.update_layer(adapter_name, *self._sites[current_key])
        else:
            if not isinstance(target, nn.Linear):
                raise ValueError(
                    f"EFFT under peft adapts linear layers, got {current_key}: {type(target).__name__}; adapt "
                    "convolutions by efft.apply"
                )
            layer = EfftLayer(target)
            layer.update_layer(adapter_name, *self._sites[current_key])
            self._replace_module(parent, target_name, layer, target)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        return model

    def _prepare(self, model: nn.Module, args: Any) -> None:
        """Contract all cores of the active adapters together, unless they are merged or switched off."""
        layer = next(module for module in model.modules() if isinstance(module, EfftLayer))
        if not (layer.disable_adapters or layer.merged):
            for name in self.active_adapters:
                for factors in self._banks(name):
                    factors.prepare()

    def _release(self, model: nn.Module, args: Any, output: Any) -> None:
        for name in self.efft_banks:
            for factors in self._banks(name):
                factors.release()

    def _banks(self, adapter_name: str) -> list[TTFactors]:
        banks: Any = self.efft_banks[adapter_name]
        return list(banks.values())

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"efft_banks.{adapter_name}.", "efft_banks.", 1)


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Within the ``with`` block the model has its own layers, whatever adapters it was given before."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, (EfftLayer, ModulesToSaveWrapper))
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child.base_layer if isinstance(child, EfftLayer) else child.original_module
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _register() -> None:
    """Make EFFT a member of peft's list of methods, which is an enum, and register it."""
    member = str.__new__(PeftType, "EFFT")
    member._name_ = member._value_ = "EFFT"
    type.__setattr__(PeftType, "EFFT", member)
    PeftType._member_map_["EFFT"] = PeftType._value2member_map_["EFFT"] = member
    PeftType._member_names_.append("EFFT")
    register_peft_method(name="efft", config_cls=EfftPeftConfig, model_cls=EfftModel)


_register()
