"""Provide EFFT as a method of ``peft``.

Importing this module registers EFFT. After that, ``peft`` can also load saved adapters of EFFT. Example::

    from efft.integrations.peft import EfftPeftConfig
    model = peft.get_peft_model(model, EfftPeftConfig(r=16, target_modules="all-linear"))
"""

from __future__ import annotations

try:
    from peft import PeftType
    from peft.utils import register_peft_method
    from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
except ImportError as error:
    raise ImportError("efft.integrations.peft needs peft >= 0.21: pip install 'efft-kernels[hf]'") from error

from efft.integrations.peft.config import EfftPeftConfig
from efft.integrations.peft.layer import EfftLayer
from efft.integrations.peft.model import EfftModel

__all__ = ["EfftLayer", "EfftModel", "EfftPeftConfig"]

#: Settings that two adapters must share for ``peft.utils.hotswap``, which replaces the tensors of one adapter by the
#: tensors of another adapter.
_SWAPPED_ALIKE = [
    *("variant", "rank", "rank_pattern", "scale", "trainable_scale", "core_sharing", "bias", "norms"),
    "layer_scale",
    *("targets", "exclude", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
]


def _register() -> None:
    """Add EFFT to peft's enum of methods and register it."""
    member = str.__new__(PeftType, "EFFT")
    member._name_ = member._value_ = "EFFT"
    type.__setattr__(PeftType, "EFFT", member)
    PeftType._member_map_["EFFT"] = PeftType._value2member_map_["EFFT"] = member
    PeftType._member_names_.append("EFFT")
    register_peft_method(name="efft", config_cls=EfftPeftConfig, model_cls=EfftModel)
    CONFIG_KEYS_TO_CHECK[member] = _SWAPPED_ALIKE


_register()
