"""Find the structure of a model: weights that can be adapted, repeated blocks, and the parts of a block.

The structure is found only from the modules and not from the name of the architecture. Sibling modules of one class are
repeated if they are in a list or a sequence or have numbered names (``layer1``, ``layer2``). Each repeated module is a
block, and so are all its siblings in the same container. The place of a weight is the path from its innermost repeated
module to the weight.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from efft.adapting.experts import ExpertParameter, experts_of
from efft_kernels import EfftEmbedding
from efft_kernels.nn.adapt import layer_class
from efft_kernels.nn.adapted import matrix_sizes
from efft_kernels.nn.frozen import FrozenLayer, is_plain, not_only_a_weight
from efft_kernels.nn.parameter import cannot_adapt_parameter

#: The kinds of weights, see :attr:`Weight.kind`.
KINDS = frozenset({"linear", "convolution", "attention", "parameter", "embedding", "experts"})

#: torch's normalization layers.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


@dataclass(frozen=True)
class Weight:
    """A weight that multiplies activations: one matrix ``[d_out, d_in]``, or one such matrix per expert.

    Attributes:
        name: name of the module if an adapted layer can replace the module, otherwise the full name of the parameter.
        module, parameter: name of the module that owns the weight, and name of the parameter in the module.
        kind: "linear", "convolution" or "embedding" for layers that are called; "attention" for the output projection
            of an ``nn.MultiheadAttention``, which is called once it is adapted; "parameter" if the forward of its
            module reads it; "experts" for a batch of matrices, one per expert.
        numel: number of entries.
        view: "linear" if the matrix maps the features of each position to new features of the same position, "stacked"
            for matrices ``[..., d_in]`` that are stacked along the outputs, otherwise "convolution".
        experts: layout of the parameter of a mixture of experts. The sizes then describe the matrix of one expert.
        block: name of the innermost repeated module around the weight; None outside of blocks.
        tower: name of the module that holds the outermost repeated modules around the weight.
    """

    name: str
    module: str
    parameter: str
    kind: str
    d_in: int
    d_out: int
    numel: int
    view: str = "linear"
    n_experts: int = 0
    experts: ExpertParameter | None = None
    block: str | None = None
    tower: str | None = None

    @property
    def read_as(self) -> str:
        """Layout of the matrix in a parameter that a module reads."""
        return self.view if self.view in ("linear", "stacked") else "convolution"

    @property
    def outer(self) -> str:
        """Name of the outermost repeated module around the weight; empty outside of blocks."""
        depth = len(self.tower.split(".")) + 1 if self.tower else 1
        return "" if self.tower is None else ".".join(self.module.split(".")[:depth])

    @property
    def place(self) -> str:
        """The path from the block to the weight."""
        return self.name if self.block is None else self.name[len(self.block) + 1 :]


@dataclass
class Structure:
    """The weights of a model outside its head.

    Attributes:
        weights: the weights that can be adapted, by name, in the model's order.
        reasons: maps the name of each weight that cannot be adapted to the reason.
        tied: maps each layer that shares the weight of an earlier layer to the name of the earlier layer.
        sizes: maps the full name of every parameter of two or more dimensions in blocks to its number of entries. If
            the model has no blocks, all such parameters of the model are included.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def in_blocks(self) -> dict[str, Weight]:
        """The weights in repeated blocks (or all weights if no module is repeated), without embeddings."""
        matrices = {name: w for name, w in self.weights.items() if w.kind != "embedding"}
        inside = {name: w for name, w in matrices.items() if w.block is not None}
        return inside or matrices

    def with_tied(self, weights: Mapping[str, Weight]) -> tuple[dict[str, Weight], dict[str, str]]:
        """Return ``weights`` with the tied layers that share one of them, and the part of ``tied`` for these layers."""
        tied = {name: first for name, first in self.tied.items() if first in weights}
        return {**weights, **{n: replace(weights[first], name=n, module=n) for n, first in tied.items()}}, tied

    def untouched(self, names: Iterable[str]) -> dict[str, int]:
        """Return the full names and sizes of the parameters in blocks that do not belong to the weights ``names``."""
        names = set(names)
        taken = {f"{w.module}.{w.parameter}".lstrip(".") for n in names if (w := self.weights.get(n)) is not None}
        taken |= {f"{name}.weight" for name, first in self.tied.items() if first in names}
        return {name: size for name, size in self.sizes.items() if name not in taken}


def structure_of(model: nn.Module, head: Iterable[str] = (), share_tied: bool = False) -> Structure:
    """Find the structure of ``model`` outside of the modules ``head``, in time linear in the number of modules.

    ``model`` may be on the meta device. A weight that several modules own cannot be adapted and is listed in
    ``reasons``, because merging an update into one module would change the others. With ``share_tied``, the weight can
    be adapted if all owners are linear layers outside the head, because linear layers can share one update.
    """
    modules = dict(model.named_modules())
    inside_head = {name for h in head for name in modules if name == h or name.startswith(f"{h}.")} if head else set()
    repeated = _find_repeated(modules)
    owners = _owners(modules)
    widths: dict[str, set[int]] = defaultdict(set)  # widths of the activations in each block
    found = Structure()
    sizes: dict[bool, dict[str, int]] = {True: {}, False: {}}  # in blocks or not
    doubtful: list[Weight] = []
    sharing: dict[Any, list[tuple[Weight, Tensor]]] = defaultdict(list)
    for name, module in modules.items():
        if name in inside_head or isinstance(module, (FrozenLayer, *NORMS, nn.ParameterList)):
            continue
        block, tower = repeated.get(name, (None, None))
        for weight, reason in _weights_of(name, module):
            parameter = module._parameters.get(weight.parameter)
            if parameter is not None and parameter.numel() == 0 and is_plain(parameter):
                continue
            others = [] if parameter is None else owners[_key(parameter)]
            tied = reason is None and len(others) > 1
            if tied:
                reason = (
                    f"its weight is tied: {' and '.join(others)} have the same one; leave the layer out "
                    "(exclude=[...]), or give it its own: layer.weight = nn.Parameter(layer.weight.detach().clone())"
                )
            weight = Weight(**{**vars(weight), "block": block, "tower": tower})
            if weight.kind != "embedding":
                sizes[block is not None][f"{name}.{weight.parameter}".lstrip(".")] = weight.numel
            if reason == _DOUBTFUL:
                doubtful.append(weight)
                continue
            if reason is not None:
                found.reasons[weight.name] = reason
                if share_tied and tied and parameter is not None and weight.kind == "linear":
                    sharing[_key(parameter)].append((weight, parameter))
                continue
            found.weights[weight.name] = weight
            if block is not None:  # a convolution maps channels; its kernel size is not a width
                widths[block] |= {weight.d_in, weight.d_out} if weight.view == "linear" else {weight.d_out}
    for weight in doubtful:  # assume a bare parameter multiplies activations if both its sizes are widths
        if weight.block is not None and {weight.d_in, weight.d_out} <= widths[weight.block]:
            found.weights[weight.name] = weight
        else:
            found.reasons[weight.name] = "a parameter whose shape does not tell which product it takes part in"
    for key, layers in sharing.items():
        names = [weight.name for weight, _ in layers]
        if names == owners[key] and all(parameter is layers[0][1] for _, parameter in layers):
            found.weights[names[0]] = layers[0][0]
            found.tied |= dict.fromkeys(names[1:], names[0])
            for name in names:
                del found.reasons[name]
    found.sizes = sizes[True] or sizes[False]
    order = {name: i for i, name in enumerate(modules)}
    found.weights = dict(sorted(found.weights.items(), key=lambda item: order[item[1].module]))
    return found


_DOUBTFUL = "doubtful"


def _weights_of(name: str, module: nn.Module) -> list[tuple[Weight, str | None]]:
    """Return a module's own parameters of two or more dimensions.

    Each parameter comes with the reason why it cannot be adapted, or with None if it can be adapted.
    """
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return []
    computed = _find_computed(name, module)
    if computed is not None:
        return [computed]
    own = {p: t for p, t in module._parameters.items() if t is not None and (t.dim() > 1 or not is_plain(t))}
    if not own:
        return []
    experts = experts_of(module)
    of_experts = {} if experts is None else {e.name: e for e in experts.parameters}
    found: list[tuple[Weight, str | None]] = []
    for p, t in own.items():
        if experts is not None and p in of_experts:
            one = of_experts[p]
            sizes = one.d_in, one.d_out, t.numel()
            full = f"{name}.{p}".lstrip(".")
            weight = Weight(full, name, p, "experts", *sizes, n_experts=experts.n_experts, experts=one)
            found.append((weight, None))
        elif experts is not None:  # the biases of all experts also form one parameter
            continue
        elif p == "weight" and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            weight = Weight(name, name, p, "embedding", t.shape[0], t.shape[1], t.numel())
            found.append((weight, EfftEmbedding.refusal(module)))
        elif p == "weight" and _stands_for(module):
            kind = "convolution" if isinstance(module, nn.modules.conv._ConvNd) else "linear"
            if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
                kind = "attention"
            d_in, d_out = matrix_sizes(module)
            view = "linear" if kind != "convolution" or _is_one_by_one(module) else "convolution"
            found.append((Weight(name, name, p, kind, d_in, d_out, d_in * d_out, view), None))
        elif sum(size > 1 for size in t.shape) > 1:  # other parameters are effectively vectors
            weight = _read(name, p, t)
            likely = None if p.endswith("weight") else _DOUBTFUL
            unlikely = _TABLE if min(weight.d_in, weight.d_out) == 1 else likely
            # Such a parameter contains one matrix per head.
            if t.dim() > 2 and likely is None and not isinstance(module, nn.modules.conv._ConvNd):
                weight = replace(weight, d_in=t.shape[-1], d_out=math.prod(t.shape[:-1]), view="stacked")
            found.append((weight, cannot_adapt_parameter(module, p, weight.read_as) or unlikely))
    return found


_TABLE = "a parameter that is added or multiplied entry by entry"


def _find_computed(name: str, module: nn.Module) -> tuple[Weight, str] | None:
    """Return a weight that a parametrization or a hook computes, and the reason why it cannot be adapted."""
    parametrized = nn.utils.parametrize.is_parametrized(module)
    hooked = layer_class(module) is not None and "weight" not in module._parameters
    if not parametrized and not hooked:
        return None
    reason = not_only_a_weight(module, type(module)) if hooked else None
    reason = reason or "the weight is parametrized; remove the parametrization first"
    originals = [p for p in module.parameters() if p.dim() > 1]
    sizes = max((p.numel() for p in originals), default=0)
    return Weight(name, name, "weight", "parameter", 0, 0, sizes), reason


def _stands_for(layer: nn.Module) -> bool:
    """Return whether an adapted layer can replace ``layer``."""
    kind = layer_class(layer)
    return kind is not None and kind.refusal(layer) is None


def _is_one_by_one(module: Any) -> bool:
    return module.groups == 1 and all(size == 1 for size in module.kernel_size)


def _read(name: str, parameter: str, tensor: Tensor) -> Weight:
    d_out, d_in = _matrix(tensor)
    view = "linear" if tensor.dim() == 2 else "convolution"
    return Weight(f"{name}.{parameter}".lstrip("."), name, parameter, "parameter", d_in, d_out, tensor.numel(), view)


def _matrix(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shape[0], math.prod(tensor.shape[1:])) if tensor.dim() > 1 else (1, tensor.numel())


def _key(parameter: Tensor) -> Any:
    """Return a key that is equal for all names of the same weight."""
    pointer = 0 if parameter.is_meta or not is_plain(parameter) else parameter.data_ptr()
    return pointer or id(parameter)


def _owners(modules: Mapping[str, nn.Module]) -> dict[Any, list[str]]:
    owners: dict[Any, list[str]] = defaultdict(list)
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[_key(parameter)].append(name)
    return owners


def _find_repeated(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Return (block, tower) of every module inside a repeated module.

    The block is the innermost repeated module around the module. The tower is the module that contains the outermost
    repeated module.
    """
    found: dict[str, tuple[str, str]] = {}
    repeats: set[str] = set()
    for name, module in modules.items():
        if module._modules:
            repeats |= {f"{name}.{child}".lstrip(".") for child in _alike(module)}
        parent = name.rpartition(".")[0]
        if name in repeats:
            found[name] = (name, found[parent][1] if parent in found else parent)
        elif parent in found and name:
            found[name] = found[parent]
    return found


def _alike(module: nn.Module) -> list[str]:
    """Return the repeated children of a module. Only children that have children themselves can be repeated.

    All children of a ``ModuleList`` are repeated. Children of a sequence or a ``ModuleDict``, and children with
    numbered names, are repeated if two of them have the same class.
    """
    listed = isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    names = [
        name
        for name, child in module._modules.items()
        if child is not None and child._modules and (listed or re.search(r"\d$", name))
    ]
    classes = {type(module._modules[name]) for name in names}
    return names if isinstance(module, nn.ModuleList) or len(classes) < len(names) else []


_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|expert|moe|glu", re.IGNORECASE)


def parts_of(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Find the weights that belong to the attention ("mhsa") and those that belong to the MLP ("ffn") of a block.

    The part is inferred from the names and classes of the modules around the weight inside its block, or else from
    those of the modules around the block (for experts in a list). If neither tells the part and the block has an
    attention, the shapes are used: two weights with transposed shapes form the MLP. Weights without a known part are
    omitted.

    A router in a mixture of experts counts as part of the MLP that contains it.
    """
    found: dict[str, str] = {}
    rest: dict[str, list[Weight]] = defaultdict(list)  # by outermost block
    for name, weight in weights.items():
        part = next((part for words in _words(model, weight) if (part := _part_from(words)) is not None), None)
        if part is not None:
            found[name] = part
        elif weight.block is not None:
            rest[weight.outer].append(weight)
    attending = {weights[name].outer for name, part in found.items() if part == "mhsa"}
    for block, others in rest.items():
        shapes = {(w.d_in, w.d_out) for w in others}
        if block in attending:
            found |= {w.name: "ffn" for w in others if (w.d_out, w.d_in) in shapes}
    return found


def _part_from(words: str) -> str | None:
    return "mhsa" if _ATTENTION.search(words) else "ffn" if _MLP.search(words) else None


def _words(model: nn.Module, weight: Weight) -> list[str]:
    """Return texts that indicate the part of a weight, with the most informative text first.

    The first text contains the names and classes of the modules between the block and the weight, and the name of the
    weight. Each of the other texts contains the name and class of one module, from the block outwards to the outermost
    repeated module.
    """
    parts = weight.module.split(".")
    depth = len(weight.block.split(".")) if weight.block is not None else 0
    outermost = len(weight.tower.split(".")) + 1 if weight.tower else 1

    def class_of(n: int) -> str:
        return type(model.get_submodule(".".join(parts[:n]))).__name__

    inside = " ".join([*parts[depth:-1], *map(class_of, range(depth + 1, len(parts))), weight.place])
    return [inside, *(f"{parts[n - 1]} {class_of(n)}" for n in range(depth, outermost, -1))]
