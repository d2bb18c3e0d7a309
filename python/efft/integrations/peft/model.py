"""Define ``EfftModel``, the module that peft wraps around a model (a *tuner*). The tuner owns the factors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from efft.adapting import buffers
from efft.adapting.optimizing import watch_optimizers
from efft.integrations.peft import kinds
from efft.integrations.peft.config import EfftPeftConfig
from efft.integrations.peft.layer import EfftLayer, device_of, load, offload
from efft.integrations.peft.mixing import fill, mixed_config
from efft.integrations.peft.planning import exclusion, plan_adapter, trained_norms
from efft.planning.extras import is_norm
from efft_kernels import Site, TTFactors
from efft_kernels.nn.adapt import read_layers, replace_in_attributes


class _Banks(nn.ModuleDict):
    """Hold the modules that own the factors (banks), indexed by the names of the adapter and the group."""

    configs: dict[str, Any]

    @property
    def scaling(self) -> dict[str, float]:
        """The scale s of each adapter. ``peft.utils.hotswap`` compares scales through this attribute."""
        known = {name: config for name, config in self.configs.items() if config.lora_alpha is not None}
        return {name: config.lora_alpha / config.r for name, config in known.items()}


class EfftModel(BaseTuner):
    """Adapt a model by EFFT under peft.

    ``efft_banks`` owns the factors, indexed by the names of the adapter and the group.
    """

    prefix = "efft_"
    tuner_layer_cls = EfftLayer
    uses_shared_state = True
    _base_biases: Sequence[tuple[nn.Module, Tensor]] = ()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan the adapter as :func:`efft.apply` does, allocate its factors, and adapt the layers of the plan.

        Raises:
            ValueError: the configuration does not fit the model, or ``state_dict`` is given. A state dict contains only
                the names of groups and cannot identify the layers to adapt. In both cases the model is unchanged.
        """
        if state_dict is not None:
            raise ValueError("the tensors of EFFT do not name the layers they adapt: inject them by a configuration")
        if "efft_banks" not in self._modules:  # hasattr would also look in the wrapped model
            self.efft_banks = _Banks()
            self.efft_banks.__dict__["configs"] = self.peft_config
        config: EfftPeftConfig = self.peft_config[adapter_name]
        sites: dict[str, tuple[TTFactors, Site]] = {}
        banks: Any = nn.ModuleDict()
        with _plain(model):
            plan = plan_adapter(model, config)
            whole = [*plan.head, *trained_norms(model, plan.head)] if config.norms else plan.head
            _check_kinds(model, [name for group in plan.groups for name in group.sites])
            for group in plan.groups:
                layer = model.get_submodule(next(iter(group.sites)))
                device = torch.device("meta") if low_cpu_mem_usage else device_of(layer)
                factors = group.build(device, _dtype(layer, autocast_adapter_dtype))
                if not (config.init_weights or low_cpu_mem_usage):
                    nn.init.xavier_uniform_(factors.U)
                    nn.init.xavier_uniform_(factors.V)
                sites.update({name: (factors, site) for name, site in group.sites.items()})
                banks[group.name] = factors
            layers = [model.get_submodule(name) for name in sites]
        self._check_names(adapter_name, banks)
        if config.bias == "auto":
            config.bias = "none" if all(getattr(layer, "bias", None) is None for layer in layers) else "efft_only"
        self._check_biases(adapter_name)
        config.modules_to_save = whole
        config.settle(plan.groups, banks)
        config.choose(sites)
        earlier = {p: p.requires_grad for p in self.efft_banks.parameters()}
        self.efft_banks[adapter_name] = banks.train(model.training)
        self._sites: dict[str, tuple[TTFactors, Site]] = sites
        if config.bias != "none":
            self._base_biases = _biases(model if config.bias == "all" else nn.ModuleList(layers))
        by_targets = config.chosen_by_targets
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        if by_targets:  # peft replaces hundreds of names by their endings, but names would group the layers differently
            config.target_modules = None
        self._sites = {}
        self._freeze_statistics()
        _warn_of_statistics(model, config)
        for parameter, requires_grad in earlier.items():  # peft restores only the parameters inside the model
            parameter.requires_grad_(requires_grad)
        self._readers = {name: (layer, type(module).__name__) for name, layer, module in read_layers(model, EfftLayer)}
        if "_hooks" not in self.__dict__:
            self._mixed: list[str] = []
            self._hooks = [  # registered on the model, because peft does not call this tuner
                model.register_forward_pre_hook(self._prepare),
                model.register_forward_hook(self._release, always_call=True),
            ]
        if config.rates:
            watch_optimizers(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state of a copied or unpickled model."""
        super().__setstate__(state)
        watch_optimizers(self)

    def train(self, mode: bool = True) -> EfftModel:
        """Set the mode, but leave modules in eval mode if an active adapter has ``freeze_statistics``."""
        super().train(mode)
        self._freeze_statistics()
        return self

    def _freeze_statistics(self) -> None:
        names = self.active_adapters if "efft_banks" in self._modules else []
        frozen = [self.peft_config[name] for name in names if self.peft_config[name].freeze_statistics]
        if frozen:
            heads = [name for name in frozen[0].head or [] if not is_norm(_original(self.model.get_submodule(name)))]
            for module in buffers.statistics(self.model, heads):
                module.training = False

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add the exact weighted sum of adapters as another adapter, whose ranks are the sums of the adapters' ranks.

        Args:
            adapters: names of adapters of the same layers.
            weights: one factor per adapter.
            adapter_name: name of the sum. As in LoRA, nothing is done if an adapter with this name exists.
            combination_type: ``"cat"``.

        Raises:
            ValueError: a name or the combination is unknown, or the adapters cannot be added. The message gives the
                reason.
        """
        if combination_type != "cat":
            raise ValueError(f"combination_type must be 'cat', which is exact, got {combination_type!r}")
        if adapter_name in self.peft_config:
            return
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Adapter {unknown[0]} does not exist")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"expected one weight per adapter, got {len(adapters)} adapters, {len(weights)} weights")
        banks: Any = self.efft_banks
        self.peft_config[adapter_name] = mixed_config(adapters, self.peft_config, banks)
        self.inject_adapter(self.model, adapter_name)
        for group, bank in banks[adapter_name].items():
            fill(bank, [banks[name][group] for name in adapters], weights)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its factors. If it has trained biases, the biases of the base are restored."""
        trained = adapter_name in self.peft_config and self.peft_config[adapter_name].bias != "none"
        super().delete_adapter(adapter_name)
        if trained:
            self._restore_biases()
        for layer in self._layers():
            if adapter_name in layer.efft_bindings:  # peft skips names with the prefix of this method
                BaseTunerLayer.delete_adapter(layer, adapter_name)
        del self.efft_banks[adapter_name]

    def _check_names(self, adapter_name: str, banks: nn.ModuleDict) -> None:
        """Raise ValueError if an adapter has the name of a group, because peft finds tensors by the adapter's name."""
        adapters = {**getattr(self, "efft_banks", {}), adapter_name: banks}
        for groups in adapters.values():
            if clash := set(groups) & set(adapters):
                raise ValueError(f"an adapter may not be named like a group of factors, {clash.pop()!r}; rename it")

    def _check_biases(self, adapter_name: str) -> None:
        """Raise ValueError if an adapter would use or change the biases that another adapter has trained."""
        trained = [name for name, config in self.peft_config.items() if config.bias != "none"]
        others = [name for name in self.peft_config if name != adapter_name]
        if trained and others:
            raise ValueError(
                f"adapter {trained[0]!r} trains biases (bias={self.peft_config[trained[0]].bias!r}), of which a model "
                f"has one copy for all of its adapters ({', '.join(map(repr, [*others, adapter_name]))}): EfftModel "
                "supports only 1 adapter with bias. When using multiple adapters, set bias to 'none' for all adapters."
            )

    @torch.no_grad()
    def _restore_biases(self) -> None:
        """Give the biases that an adapter has trained the values of the base."""
        for module, value in self._base_biases:
            module._parameters["bias"].copy_(value)  # type: ignore[union-attr]
        self._base_biases = []

    def _prepare_adapter_config(self, peft_config: EfftPeftConfig, model_config: dict[str, Any]) -> EfftPeftConfig:
        return peft_config  # inject_adapter has planned the adapter already

    def _check_target_module_exists(self, peft_config: EfftPeftConfig, key: str) -> Any:
        return key in peft_config.planned or exclusion(peft_config, key)

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
            layer = EfftLayer(target)
            layer.update_layer(adapter_name, *self._sites[current_key])
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # peft would look for a weight in a head of several layers
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)
        replace_in_attributes(parent, {child: new_module})

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self._layers():
            if adapter_name in layer.efft_bindings:
                layer.efft_factors[adapter_name].to(_dtype(layer.base_layer, autocast_adapter_dtype))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if not merge:  # the base has its own biases and norms, and as in peft the trained head
            self._restore_biases()
            _restore_norms(self.model, self.peft_config.values())
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Select the adapter of each sample in layers and heads for a batch with ``adapter_names``.

        Raises:
            ValueError: the model is in training mode, no adapter has one of the names, or a sample uses the base model
                while an adapter has its own biases.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        self._mixed = sorted({*names} - {"__base__"})
        if unknown := [name for name in self._mixed if name not in self.efft_banks]:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        trained = next((name for name, config in self.peft_config.items() if config.bias != "none"), None)
        if trained is not None and "__base__" in names:
            raise ValueError(
                f"adapter {trained!r} trains biases, of which the model has one copy for all samples: samples of "
                "'__base__' would use them too, so call the model for these samples after unload()"
            )
        beams = kwargs.get("num_beams")
        in_decoder = [name for name in names for _ in range(beams)] if isinstance(beams, int) else names
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # The encoder runs before generation expands the batch for beam search.
        in_encoder = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_name_adapters, adapter_names=names if module in in_encoder else in_decoder), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (EfftLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            self._mixed = []
            for handle in handles:
                handle.remove()

    def _layers(self) -> Iterator[EfftLayer]:
        return (module for module in self.model.modules() if isinstance(module, EfftLayer))

    def _prepare(self, model: nn.Module, args: Any) -> None:
        """Compose all updates of the active adapters, unless the adapters are merged or disabled."""
        layer = next(self._layers())
        if not (layer.disable_adapters or layer.merged):
            for name in self._mixed or self.active_adapters:
                for factors in self._banks(name):
                    load(factors)
                    factors.prepare()

    def _release(self, model: nn.Module, args: Any, output: Any) -> None:
        unused: set[Any] = set()
        for name in self.efft_banks:
            for factors in self._banks(name):
                unused.update(factors.release())
                offload(factors)
        read = {name: own for name, own in self._readers.items() if own[0].was_read}
        for layer, _ in read.values():
            layer.was_read = False
        missed = {name: reader for name, (layer, reader) in read.items() if unused & set(layer.bindings)}
        if missed and output is not None:  # None if the forward pass has failed
            name, reader = next(iter(missed.items()))
            raise RuntimeError(
                f"the update of {name!r} had no effect: {reader} reads the layer's weight and does not call the layer "
                f"({len(missed)} layers in all); leave such layers out (exclude_modules=[...]), or adapt the model by "
                "efft.apply"
            )

    def _banks(self, adapter_name: str) -> list[TTFactors]:
        banks: Any = self.efft_banks[adapter_name]
        return list(banks.values())

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for bank in (f"base_model.efft_banks.{adapter_name}.", f"efft_banks.{adapter_name}."):
            if key.startswith(bank):
                return key.replace(f"efft_banks.{adapter_name}.", "efft_banks.", 1)
        return BaseTuner._remove_adapter_name_from_key(key, adapter_name)


def _check_kinds(model: nn.Module, names: list[str]) -> None:
    layers = dict(model.named_modules())
    for name in names:
        reason = kinds.why_not(layers[name]) if name in layers else "it is a parameter of a module that is not a layer"
        if reason is not None:
            raise ValueError(
                f"EFFT under peft adapts layers that are called, not {name!r}: {reason}; leave it out "
                f"(exclude_modules=[{name!r}]), or adapt the model by efft.apply"
            )


def _biases(model: nn.Module) -> list[tuple[nn.Module, Tensor]]:
    """Return every module with a bias, and a copy of the bias."""
    owners = (module for module in model.modules() if module._parameters.get("bias") is not None)
    return [(module, module._parameters["bias"].detach().clone()) for module in owners]  # type: ignore[union-attr]


def _original(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _warn_of_statistics(model: nn.Module, config: EfftPeftConfig) -> None:
    """Warn about batch norms whose statistics would change in training, because peft would not save them."""
    if config.inference_mode or config.freeze_statistics:
        return
    whole = {module for m in model.modules() if isinstance(m, ModulesToSaveWrapper) for module in m.modules()}
    changing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and module not in whole
    ]
    if changing:
        warnings.warn(
            f"{len(changing)} modules, {changing[0]!r} first, change their statistics in training mode, and peft does "
            "not save these: set freeze_statistics=True or norms=True, or name the modules in modules_to_save",
            stacklevel=4,
        )


def _restore_norms(model: nn.Module, configs: Iterable[EfftPeftConfig]) -> None:
    """Put normalization layers that were trained because of the setting ``norms`` back into the model."""
    if not any(config.norms for config in configs):
        return
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, ModulesToSaveWrapper) and is_norm(child.original_module):
                setattr(parent, name, child.original_module)


def _name_adapters(module: nn.Module, args: Any, kwargs: Any, *, adapter_names: list[str]) -> tuple[Any, Any]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _dtype(layer: nn.Module, autocast_adapter_dtype: bool) -> torch.dtype:
    """Return the dtype for the factors of a layer.

    It is the dtype of the weight, promoted to at least fp32 if ``autocast_adapter_dtype`` is True or if the weight does
    not hold floating-point numbers.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    narrow = weight.is_floating_point() and not autocast_adapter_dtype
    return weight.dtype if narrow else torch.promote_types(weight.dtype, torch.float32)


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Undo earlier changes to the layers of a model within the ``with`` block.

    The model has its original layers even if they were adapted before. A ``forward`` that was set on a layer itself, as
    accelerate's offloading does, is removed within the block. It is not a reason to refuse the layer, because
    :class:`EfftLayer` calls it.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, (EfftLayer, ModulesToSaveWrapper))
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child.base_layer if isinstance(child, EfftLayer) else child.original_module
    forwards = [(module, module.__dict__.pop("forward")) for module in model.modules() if "forward" in module.__dict__]
    try:
        yield
    finally:
        for module, forward in forwards:
            module.__dict__["forward"] = forward
        for parent, name, child in wrapped:
            parent._modules[name] = child
