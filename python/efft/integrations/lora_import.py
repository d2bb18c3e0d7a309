"""Import LoRA checkpoints of ``peft``. The import is exact.

The update of a layer is ``s A B`` with ``A = lora_Aᵀ`` and ``B = lora_Bᵀ``, where ``lora_A`` and ``lora_B`` are the
tensors in the checkpoint, and s is a scale.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from efft.adapting import extras
from efft.adapting.inject import adapter_of, apply, check_plain
from efft.adapting.sharding import check_whole
from efft.config import is_setting, is_size, quote
from efft.integrations.file_patterns import file_matchers
from efft.integrations.lora_export import PREFIX
from efft.methods.lora import LoRABank, LoRAConfig
from efft.planning.names import MOST_CHARACTERS, are_short
from efft.planning.plan import Plan, make_plan
from efft.saving import files
from efft.saving.files import CONFIG, WEIGHTS
from efft.saving.io import head_tensors, misfits, read_tensors
from efft_kernels.nn.adapted import matrix_sizes

Value = TypeVar("Value")

_LAYER = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight")

#: Settings that do not affect the imported numbers, such as settings for training or for finding layers.
_ASIDE = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode"),
    *("lora_dropout", "eva_config", "megatron_core", "qalora_group_size"),
}
#: Settings that the import supports. No other setting may be set.
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
#: For each value of ``bias`` in peft, the value of ``bias`` in :class:`LoRAConfig`.
_BIASES: dict[str | None, Literal["none", "all", "adapted"]] = {
    None: "none",
    "none": "none",
    "all": "all",
    "lora_only": "adapted",
}
#: Accepted values of settings. These values change neither the base model nor the formula.
_SIMPLE: dict[str, tuple[Any, ...]] = {
    "bias": ("none", "all", "lora_only", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@torch.no_grad()
def import_lora(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Adapt ``model`` by LoRA (:class:`efft.methods.LoRAConfig`) with the factors and heads of peft's checkpoint.

    The import is exact. If layers have different ranks, the factors of lower rank are padded with zeros, which stay
    zero in training because their gradients are zero. The scale s is lora_alpha / r, or lora_alpha / √r with
    ``use_rslora``. If layers have different scales, s is 1 and B includes the scale of each layer. The modules in
    ``modules_to_save`` become the head. Biases that were trained (``bias="all"`` or ``"lora_only"``) are trained here
    too. Dropout of activations is not imported. The result is like any model that :func:`efft.apply` has adapted: you
    can train, save and merge it, or add it to an :class:`efft.AdapterPool`.

    Args:
        model: the base model on which the checkpoint was trained, with the same names of layers. It must not be
            adapted.
        folder: contains ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The same ``model``.

    Raises:
        FileNotFoundError: there is no checkpoint in ``folder``.
        ValueError: a file is damaged or is not a LoRA checkpoint; the settings are not those of a plain LoRA (DoRA,
            a changed base, ...); layers or heads of the checkpoint are missing in the model or have other sizes there;
            or the model is already adapted. The model is then unchanged.
    """
    folder = Path(folder)
    check_plain(model)
    check_whole(model, "import_lora")
    description = files.read_description(folder)
    settings = _settings(folder / CONFIG, description)
    content = files.read_weights(folder, description, settings.largest(model))
    if content is None:
        return import_lora(model, folder)
    tensors = _without_copies(read_tensors(folder / WEIGHTS, content))
    try:
        config, plan, shapes = _make_plan(model, settings, tensors)
    except (ValueError, RuntimeError) as error:  # RuntimeError: no tensor can have these sizes
        raise ValueError(_does_not_fit(folder, model, f" {error}")) from None
    problems = [problem for kind in misfits(tensors, shapes) for problem in kind]
    pairs = {} if problems else _pairs(settings, config, plan, tensors)
    problems += [f"the update of {n} is too large" for n, (_, B) in pairs.items() if not B.float().isfinite().all()]
    if problems:
        raise ValueError(_does_not_fit(folder, model, "".join(f"\n- {problem}" for problem in problems)))
    apply(model, config)
    for group in plan.groups:
        factors = adapter_of(model)[group.name]
        assert isinstance(factors, LoRABank)
        factors.A.zero_()
        for name, i in group.sites.items():
            A, B = pairs[name]
            factors.A[i, :, : len(B)], factors.B[i, : len(B)] = A, B
    for name, tensor in head_tensors(model, plan.head).items():
        tensor.copy_(tensors[f"{PREFIX}{name}"])
    for name, parameter in extras.parameters_of(model, plan.extras).items():
        parameter.copy_(tensors[f"{PREFIX}{_in_peft(name, plan)}"])
    return model


def _without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without copies of biases.

    With ``bias="all"``, peft writes the biases of modules that it stores as a whole twice: once with the module, and
    once under the names that the biases have inside its wrapper.
    """
    copies = ("modules_to_save.bias", "original_module.bias")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.endswith(copies) and f"{name.rsplit('.', 2)[0]}.bias" in tensors)
    }


def _in_peft(name: str, plan: Plan) -> str:
    """Return the name of a bias in the checkpoint. It differs from ``name`` if peft has wrapped the layer."""
    owner, _, own = name.rpartition(".")
    return f"{owner}.base_layer.{own}" if owner in plan.weights else name


def _pairs(
    settings: _Settings, config: LoRAConfig, plan: Plan, tensors: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A ``[d_in, r]`` and B ``[r, d_out]`` of every layer. If the layer's scale is not s, B includes it."""
    pairs = {}
    for name in (name for group in plan.groups for name in group.sites):
        A, B = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].flatten(1).t() for side in "AB")
        scaling = settings.scaling(name)
        pairs[name] = A, B if scaling == config.scale else scaling * B.double()
    return pairs


@dataclass(frozen=True)
class _Settings:
    """Hold the settings that affect the imported numbers.

    Attributes:
        rank, alpha: functions from the name of a layer to its rank and its lora_alpha.
        rooted: whether lora_alpha is divided by the square root of the rank.
        bias: the trained biases, as in :class:`LoRAConfig`.
        ends: endings of the names of heads.
        largest_rank: the largest rank of all layers.
    """

    rank: Callable[[str], int]
    alpha: Callable[[str], float]
    rooted: bool
    bias: Literal["none", "all", "adapted"]
    ends: tuple[str, ...]
    largest_rank: int

    def scaling(self, name: str) -> float:
        """Return the factor by which peft multiplies the update of a layer."""
        rank = self.rank(name)
        return self.alpha(name) / (math.sqrt(rank) if self.rooted else rank)

    def largest(self, model: nn.Module) -> int:
        """Return the maximum number of bytes of the tensors in a checkpoint for ``model``."""
        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        sizes = sum(sum(matrix_sizes(layer)) for layer in layers)
        return 8 * (self.largest_rank * sizes + sum(t.numel() for t in model.state_dict().values()))


def _settings(path: Path, values: Any) -> _Settings:
    def check(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{path}: {name!r} must be {expected}, got {quote(values.get(name))}")

    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} is not the configuration of a LoRA checkpoint of peft: expected 'peft_type' to be 'LORA' "
            "(efft.load_adapter reads the files of efft.save_adapter)"
        )
    odd = {name: value for name, value in values.items() if value and name not in _ASIDE | _READ | set(_SIMPLE)}
    odd |= {n: values[n] for n, simple in _SIMPLE.items() if n in values and values[n] not in simple}
    if odd:
        settings = ", ".join(f"{quote(name)}: {quote(value)}" for name, value in odd.items())
        raise ValueError(
            f"{path} has settings beyond those of a plain LoRA, and only a plain LoRA can be imported: {settings}; let "
            "peft merge the checkpoint into the base (merge_and_unload), or convert it to a plain LoRA"
        )
    values = {"r": 8, "lora_alpha": 8, **values}  # the defaults of peft
    check(is_size(values["r"]), "r", "an integer from 1 to 65536")
    check(is_setting(values["lora_alpha"]), "lora_alpha", "a number")
    patterns: dict[str, dict[str, Any]] = {}
    for name, ok in (("rank_pattern", is_size), ("alpha_pattern", is_setting)):
        patterns[name] = values.get(name) or {}
        check(
            isinstance(patterns[name], dict) and all(map(ok, patterns[name].values())),
            name,
            "a dict from names to numbers",
        )
        check(are_short(patterns[name]), name, f"of at most {MOST_CHARACTERS} characters of regular expressions")
    ends = values.get("modules_to_save") or []
    check(isinstance(ends, list) and all(isinstance(end, str) for end in ends), "modules_to_save", "a list of names")
    return _Settings(
        _by_name(patterns["rank_pattern"], values["r"]),
        _by_name(patterns["alpha_pattern"], values["lora_alpha"]),
        bool(values.get("use_rslora")),
        _BIASES[values.get("bias")],
        tuple(filter(None, ends)),
        max(values["r"], *patterns["rank_pattern"].values(), 0),
    )


def _by_name(patterns: dict[str, Value], default: Value) -> Callable[[str], Value]:
    """Return a function from a name to the value of the first pattern that matches it (as in peft), or the default."""
    matchers = list(zip(file_matchers(patterns), patterns.values(), strict=True))
    return functools.cache(lambda name: next((value for matches, value in matchers if matches(name)), default))


def _make_plan(
    model: nn.Module, settings: _Settings, tensors: dict[str, Tensor]
) -> tuple[LoRAConfig, Plan, dict[str, tuple[int, ...]]]:
    """Return the configuration and plan for ``model``, and the names and shapes of the required tensors."""
    layers = list(dict.fromkeys(match[1] for name in tensors if (match := _LAYER.fullmatch(name))))
    if not layers:
        raise ValueError(f"none of its tensors is named {PREFIX}<layer>.lora_A.weight")
    scalings = {settings.scaling(name) for name in layers}
    config = LoRAConfig(
        rank=max(map(settings.rank, layers)),
        scale=scalings.pop() if len(scalings) == 1 else 1.0,
        targets=layers,
        head=_heads(model, settings.ends, tensors),
        bias=settings.bias,
    )
    plan = make_plan(model, config)
    more = {name for group in plan.groups for name in group.sites} - set(layers)
    if more:  # a target also selects layers whose names end with it
        config = dataclasses.replace(config, exclude=[f"^{re.escape(name)}$" for name in sorted(more)])
        plan = make_plan(model, config)
    shapes: dict[str, tuple[int, ...]] = {}
    for group in plan.groups:
        for layer in group.layers:
            rank, name, linear = settings.rank(layer.target.name), f"{PREFIX}{layer.target.name}", layer.linear
            kernel = linear.weight.shape[1:] if isinstance(linear, nn.Conv2d) else (layer.d_in,)
            shapes[f"{name}.lora_A.weight"] = (rank, *kernel)
            shapes[f"{name}.lora_B.weight"] = (layer.d_out, rank, *[1] * (len(kernel) - 1))
    shapes.update({f"{PREFIX}{name}": tuple(t.shape) for name, t in head_tensors(model, plan.head).items()})
    extra = extras.parameters_of(model, plan.extras)
    shapes.update({f"{PREFIX}{_in_peft(name, plan)}": tuple(t.shape) for name, t in extra.items()})
    return config, plan, shapes


def _heads(model: nn.Module, ends: tuple[str, ...], tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the heads: the modules in the checkpoint whose names end with one of ``ends``."""
    heads: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{head}.") for head in heads)
        if name.endswith(ends) and not inside and any(tensor.startswith(f"{PREFIX}{name}.") for tensor in tensors):
            heads.append(name)
    of_heads = {p for head in heads for p in model.get_submodule(head).parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in of_heads and not any(name.startswith(f"{head}.") for head in heads):
            raise ValueError(
                f"{name!r} is the same parameter as one of {', '.join(heads)}, of which peft trains a copy"
            )
    return heads


def _does_not_fit(folder: Path, model: nn.Module, problems: str) -> str:
    return f"the LoRA checkpoint in {folder} does not fit this {type(model).__name__}:{problems}"
