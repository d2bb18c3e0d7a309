"""Define the base classes of all methods except EFFT: their configurations, groups and banks of factors.

A bank is a module that owns trained factors, and a group consists of the weights that share a bank. A site is the part
of a bank that one layer uses. The *role* of a layer is its purpose in its block, such as "qkv" or "fc2".
There are two kinds of banks. A :class:`StackedBank` serves layers of one shape. Each layer has its own factors, which
are stacked along the first dimension of the parameters. A :class:`BlockBank` serves layers of one width d. The layers
are split into d x d matrices that share one U and V.
"""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from efft.config import AdapterConfig
from efft.planning.extras import Extras
from efft.planning.structure import Weight
from efft.planning.targets import Target
from efft_kernels import FactorBank
from efft_kernels.nn.bank import Operands, compose_by_kind, per_site, take
from efft_kernels.nn.frozen import dequantized, is_conv1d
from efft_kernels.nn.operands import column_blocks, row_blocks


@dataclass
class MethodConfig(AdapterConfig):
    """Define the fields that all methods except EFFT have.

    Training uses no dropout, not even the dropout of activations in some of the papers.
    """

    bank: ClassVar[type[MethodBank]]
    """The class of the banks that hold the factors of the method."""

    paper: ClassVar[str]
    """The arXiv number of the paper."""

    rank: int = 8
    """The rank r."""

    scale: float = 1.0
    """The scale s, by which the update is multiplied. It is alpha / r in the notation of LoRA."""

    targets: str | list[str] = "all"
    """"all", "all-linear", "mhsa" or "ffn", or names of layers, as in :class:`efft.EfftConfig`."""

    exclude: list[str] = dataclasses.field(default_factory=list)
    """Layers that are not adapted, selected in the same ways as ``targets``."""

    head: list[str] | None = None
    """Modules that are trained and saved in addition to the factors. With None, they are the head of the task."""

    freeze_statistics: bool = False
    """Whether batch norms, and all other modules that update buffers in training, stay in eval mode. Otherwise their
    buffers change as usual. They are then saved with the adapter, and ``efft.remove`` restores them."""

    def __post_init__(self) -> None:
        self._check_sizes("rank")
        self._check_numbers("scale")
        self._check_layers()

    def groups(self, model: nn.Module, targets: list[Target]) -> list[MethodGroup]:
        """Return the groups of the given layers, one for each bank."""
        members: dict[str, list[Layer]] = {}
        for layer in (Layer.of(model, target) for target in targets):
            members.setdefault(self.bank.group_of(layer), []).append(layer)
        return [MethodGroup(name, self, layers, self.bank.sites(name, layers)) for name, layers in members.items()]

    def group_of_file(self, model: nn.Module, saved: dict[str, Any], weights: list[Weight]) -> MethodGroup:
        """Return the group that an adapter file describes, for these weights."""
        layers = [Layer.of(model, _target_of(weight, saved["weights"][weight.name])) for weight in weights]
        return MethodGroup(saved["name"], self, layers, self.bank.sites(saved["name"], layers))

    def summary(self) -> str:
        """Return the settings in one line, for a model card."""
        own = {f.name for f in dataclasses.fields(self)} - {"targets", "exclude", "head", "freeze_statistics"}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        untrained = Extras().as_fields().items()
        settings = ", ".join(f"{name} {value}" for name, value in values.items() if (name, value) not in untrained)
        source = f"([arXiv {self.paper}](https://arxiv.org/abs/{self.paper}))"
        return f"{self.method} {source}, {settings}, targets {self.targets}"


@dataclass
class HeadedConfig(MethodConfig):
    """Define the fields of a method whose tensors have a mode (a dimension) for the heads of the attention."""

    heads: int | None = None
    """Number of heads of the attention. With None, it is taken from the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            self._check_sizes("heads")


#: Names of the number of heads in attention modules and in configurations of models.
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class Layer:
    """Describe a layer to adapt: its :class:`Target`, its sizes, and the frozen module ``linear`` that owns the weight.

    ``heads`` is the number of heads in the nearest module around the layer that has such an attribute or such an entry
    in its ``config``. It is None if no module has one.
    """

    target: Target
    d_in: int
    d_out: int
    heads: int | None
    linear: nn.Module

    @classmethod
    def of(cls, model: nn.Module, target: Target) -> Layer:
        """Return the layer of ``model`` that ``target`` names."""
        linear = model.get_submodule(target.weight.module)
        parts = target.name.split(".")
        around = [model.get_submodule(".".join(parts[:n])) for n in reversed(range(len(parts)))]
        holders = [holder for module in around for holder in (module, getattr(module, "config", None))]
        named = [getattr(holder, name, None) for holder in holders for name in _HEADS]
        heads = next((number for number in named if type(number) is int), None)
        return cls(target, target.weight.d_in, target.weight.d_out, heads, linear)

    def matrix(self) -> Tensor:
        """Return the frozen weight as a dense matrix ``[d_out, d_in]``."""
        weight = self.linear._parameters[self.target.weight.parameter]
        assert weight is not None
        dense = dequantized(weight.detach()).flatten(1)
        return dense if dense.shape == (self.d_out, self.d_in) and not is_conv1d(self.linear) else dense.t()

    def group(self, of_known_roles: str) -> str:
        """Return the name of the layer's group.

        If the role of the layer is known, the name is ``of_known_roles``, preceded by the stage if there are stages.
        Otherwise the name contains the shape of the layer.
        """
        target = self.target
        if target.role == "linear":
            # Such groups also contain convolutions. The name must not change, because adapter files contain it.
            return f"linear_{self.d_in}x{self.d_out}"
        return of_known_roles if target.stage is None else f"stage{target.stage + 1}_{of_known_roles}"


@dataclass
class MethodGroup:
    """Describe a bank of a method before it is allocated."""

    name: str
    config: MethodConfig
    layers: list[Layer]
    sites: dict[str, Any]

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters of the bank."""
        return sum(p.numel() for p in self.build(torch.device("meta"), torch.float32).parameters())

    def describe(self) -> str:
        """Describe the group in one line."""
        return f"{self.name}: {len(self.sites)} weights, {self.n_parameters:,} parameters"

    def to_dict(self) -> dict[str, Any]:
        """Return the description of the group for an adapter file."""
        return {"name": self.name, "weights": {layer.target.name: _text_of(layer.target) for layer in self.layers}}

    def build(self, device: torch.device, dtype: torch.dtype) -> FactorBank:
        """Allocate and initialize the bank."""
        return self.config.bank(self.config, self.layers, device=device, dtype=dtype)


def _text_of(target: Target) -> str:
    """Write a target as ``role=qkv block=blocks.0 ...``."""
    words = [f"role={target.role}", f"block={target.block}"]
    return " ".join(words if target.stage is None else [*words, f"stage={target.stage}"])


def _target_of(weight: Weight, text: str) -> Target:
    match = re.fullmatch(r"role=(\w+) block=(\S*)(?: stage=(\d{1,4}))?", text)
    if match is None:
        raise ValueError(f"'plan' has no valid role for a weight: {text[:80]!r}")
    return Target(weight, match[1], match[2], None if match[3] is None else int(match[3]))


class MethodBank(FactorBank):
    """Serve as the base class of the banks of these methods.

    A bank is created from a configuration and the layers that share the bank. ``kw`` contains ``device`` and ``dtype``
    of its tensors.
    """

    def __init__(self, config: Any, layers: list[Layer], **kw: Any) -> None:
        super().__init__()
        self.scale = float(config.scale)

    @staticmethod
    @abstractmethod
    def group_of(layer: Layer) -> str:
        """Return the name of the bank that a layer belongs to."""

    @staticmethod
    @abstractmethod
    def sites(name: str, layers: list[Layer]) -> dict[str, Any]:
        """Return the sites of the layers of bank ``name``. Raise ValueError if the layers do not fit together."""


class StackedBank(MethodBank):
    """Hold the factors of n layers of one shape. Site i belongs to layer i."""

    def __init__(self, config: Any, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        self.n, self.d_in, self.d_out = len(layers), layers[0].d_in, layers[0].d_out

    @staticmethod
    def group_of(layer: Layer) -> str:
        """Return the role (qkv, o, fc1, ...) as the name of the group, or a name with the shape if it has no role."""
        return layer.group(layer.target.role)

    @staticmethod
    def sites(name: str, layers: list[Layer]) -> dict[str, int]:
        """Return the position of each layer in the stack."""
        first = layers[0]
        for layer in layers:
            if (layer.d_in, layer.d_out) != (first.d_in, first.d_out):
                raise ValueError(
                    f"group {name!r}: layers of one role must have one shape, but {first.target.name!r} is "
                    f"{first.d_in}x{first.d_out} and {layer.target.name!r} is {layer.d_in}x{layer.d_out}; exclude one "
                    "of them"
                )
        return {layer.target.name: i for i, layer in enumerate(layers)}

    @abstractmethod
    def operands(self) -> tuple[Tensor, Tensor]:
        """Return D ``[n, d_in, r]`` and G ``[n, r, d_out]`` of all layers, where G includes the scale.

        An operand that all layers share has no first dimension.
        """

    def sizes(self, site: int) -> tuple[int, int]:
        """Return (in_features, out_features), which are equal for all sites."""
        return self.d_in, self.d_out

    def compose(self, sites: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return (D, G) of each site."""
        D, G = (per_site(operand, self.n) for operand in self.operands())
        return [(D[i], G[i]) for i in sites]


@dataclass(frozen=True)
class Blocks:
    """Select the d x d matrices ``first`` to ``last`` (exclusive) of a block.

    The matrices are stacked vertically if ``rows`` is set. Otherwise they are side by side.
    """

    block: int
    first: int
    last: int
    rows: bool = False


class BlockBank(MethodBank):
    """Compute ``ΔW = s · U C[l, m] V`` for matrix m of block l. All matrices are d x d.

    A layer d -> n d consists of n matrices side by side (3 for a fused qkv, 4 for fc1). A layer n d -> d consists of n
    matrices stacked vertically (fc2). Therefore ``[U C_1 V | U C_2 V | ...] = U [C_1 V | C_2 V | ...]`` and
    ``[U C_1 V; U C_2 V; ...] = [U C_1; U C_2; ...] V``.
    """

    def __init__(self, config: Any, layers: list[Layer], **kw: Any) -> None:
        super().__init__(config, layers, **kw)
        sites = self.sites("", layers).values()
        self.d = min(min(layer.d_in, layer.d_out) for layer in layers)
        self.n_blocks = 1 + max(site.block for site in sites)
        self.n_matrices = max(site.last for site in sites)

    @staticmethod
    def group_of(layer: Layer) -> str:
        """Return one name for all layers with a role (of one stage, if there are stages).

        For any other layer, the name contains its shape.
        """
        return layer.group("joint")

    @staticmethod
    def sites(name: str, layers: list[Layer]) -> dict[str, Blocks]:
        """Number the matrices of each block in the order of the roles: q, k, v, o, fc1, gate, fc2."""
        d = min(min(layer.d_in, layer.d_out) for layer in layers)
        counts: dict[str, int] = {}
        for layer in layers:
            if min(layer.d_in, layer.d_out) != d or max(layer.d_in, layer.d_out) % d:
                raise ValueError(
                    f"group {name!r}: layers that share U and V must have the sizes d -> d, d -> n d or n d -> d for "
                    f"one width d (here {d}), but {layer.target.name!r} is {layer.d_in}x{layer.d_out}; exclude it, or "
                    "name the layers of each width (targets=[...])"
                )
            counts[layer.target.role] = max(counts.get(layer.target.role, 0), max(layer.d_in, layer.d_out) // d)
        first = 0
        start: dict[str, int] = {}
        for role in (r for r in _ROLES if r in counts):
            start[role], first = first, first + counts[role]
        block = {b: i for i, b in enumerate(dict.fromkeys(layer.target.block for layer in layers))}
        sites = {}
        for layer in layers:
            role, n = layer.target.role, max(layer.d_in, layer.d_out) // d
            sites[layer.target.name] = Blocks(
                block[layer.target.block], start[role], start[role] + n, rows=layer.d_in > d
            )
        return sites

    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """Return U ``[d, r1]``, C ``[n_blocks, n_matrices, r1, r2]`` and V ``[r2, d]``."""

    def operands(self, factors: tuple[Tensor, ...], like: Blocks, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """Return the stacked D and G of sites in the given ``blocks`` that otherwise equal the site ``like``.

        An operand that all sites share has no first dimension.
        """
        U, C, V = factors
        C = take(C[:, like.first : like.last], 0, blocks)
        return (row_blocks(U, C), self.scale * V) if like.rows else (U, column_blocks(C, self.scale * V))

    def sizes(self, site: Blocks) -> tuple[int, int]:
        """Return (in_features, out_features) of a layer that consists of these matrices."""
        n = (site.last - site.first) * self.d
        return (n, self.d) if site.rows else (self.d, n)

    def compose(self, sites: Sequence[Blocks]) -> list[Operands]:
        """Return (D, G) of each site. Sites with the same matrices are composed together."""
        factors = self.factors()

        def compose_alike(alike: list[Blocks]) -> list[Sequence[Tensor]]:
            stacked = self.operands(factors, alike[0], [site.block for site in alike])
            return [per_site(operand, len(alike)) for operand in stacked]

        return compose_by_kind(sites, lambda site: dataclasses.replace(site, block=0), compose_alike)


_ROLES = ("qkv", "q", "k", "v", "o", "fc1", "gate", "fc2", "linear")


def uniform(*shape: int, bound: float, **kw: Any) -> nn.Parameter:
    """Return a parameter drawn from U(-bound, bound)."""
    return nn.Parameter(torch.empty(shape, **kw).uniform_(-bound, bound))


def zeros(*shape: int, **kw: Any) -> nn.Parameter:
    """Return a parameter of zeros, so that the update starts at zero."""
    return nn.Parameter(torch.zeros(shape, **kw))


def heads_of(given: int | None, layers: list[Layer], d: int) -> int:
    """Return the number of heads from the configuration (``given``) or, without it, from the attention of the layers.

    Raises:
        ValueError: the number of heads is unknown, or the width d is not a multiple of it.
    """
    found = {layer.heads for layer in layers if layer.heads is not None}
    if given is None and len(found) != 1:
        names = ", ".join(layer.target.name for layer in layers[:2])
        raise ValueError(
            f"expected one number of heads ({', '.join(_HEADS)}) in the modules around {names}, ... or in the model's "
            f"config, found {sorted(found) or 'none'}; set heads=... in the method's configuration, or name the layers "
            "of one kind of attention (targets=[...])"
        )
    heads = next(iter(found)) if given is None else given
    if heads < 1 or d % heads:
        raise ValueError(
            f"the number of heads must divide the layers' width {d}, got {heads}; set heads=... in the method's "
            "configuration"
        )
    return heads
