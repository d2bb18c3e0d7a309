"""Provide EFFT, LoRA and other methods.

Each method has a configuration for ``efft.apply`` and a *bank*: a module that owns trained factors. Example::

    efft.apply(model, efft.methods.LoRAConfig(rank=8, scale=2.0))

``docs/add-a-method.md`` explains how to add a method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efft.config import AdapterConfig
from efft.methods.efft import EfftConfig
from efft.methods.fact_tk import FacTTKConfig
from efft.methods.fact_tt import FacTTTConfig
from efft.methods.lora import LoRAConfig
from efft.methods.lora_xs import LoRAXSConfig
from efft.methods.loretta import LoRETTAAdpConfig, LoRETTARepConfig
from efft.methods.lorta import LoRTAConfig
from efft.methods.lotr import LoTRConfig
from efft.methods.metatt import MetaTT4DConfig, MetaTT5DConfig
from efft.methods.tenslora import TensLoRAConfig
from efft.methods.tt_lora import TTLoRAConfig
from efft.methods.vera import VeRAConfig

#: Maps the name of each method in adapter files to the class of its configuration.
METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in (
        EfftConfig,
        LoRAConfig,
        FacTTTConfig,
        FacTTKConfig,
        LoTRConfig,
        MetaTT4DConfig,
        MetaTT5DConfig,
        LoRTAConfig,
        TensLoRAConfig,
        TTLoRAConfig,
        LoRETTARepConfig,
        LoRETTAAdpConfig,
        VeRAConfig,
        LoRAXSConfig,
    )
}

__all__ = [
    "METHODS",
    "EfftConfig",
    "FacTTKConfig",
    "FacTTTConfig",
    "LoRAConfig",
    "LoRAXSConfig",
    "LoRETTAAdpConfig",
    "LoRETTARepConfig",
    "LoRTAConfig",
    "LoTRConfig",
    "MetaTT4DConfig",
    "MetaTT5DConfig",
    "TTLoRAConfig",
    "TensLoRAConfig",
    "VeRAConfig",
    "config_from_dict",
    "config_type",
]


def config_type(values: Mapping[str, Any]) -> type[AdapterConfig]:
    """Return the class of the configuration for the ``method`` in ``values`` (EFFT if ``values`` have no method).

    Raises:
        ValueError: the method is unknown.
    """
    method = values.get("method", EfftConfig.method)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}; this version knows {', '.join(METHODS)}")
    return METHODS[method]


def config_from_dict(values: Mapping[str, Any]) -> AdapterConfig:
    """Return the configuration, of any method, whose :meth:`AdapterConfig.to_dict` returned ``values``.

    Raises:
        ValueError: the method is unknown, or a value is out of range.
    """
    return config_type(values).from_dict(values)
