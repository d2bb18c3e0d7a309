"""Define the cases of the command ``ops``: linear layers of several models, their sizes, and their random inputs.

The layers compute y = x Wᵀ + b + (x D) G, where W is frozen, and D and G are the factors of a low-rank update.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.counts import Sizes
from efft.hints import did_you_mean

#: For each model, the width of a token (the model's width) and the number of tokens per image of 224 x 224 pixels. The
#: names ``swin_b.1`` to ``swin_b.4`` are the four stages of Swin-B.
MODELS = {
    "vit_b": (768, 197),
    "vit_l": (1024, 197),
    "vit_h": (1280, 257),
    "swin_b.1": (128, 3136),
    "swin_b.2": (256, 784),
    "swin_b.3": (512, 196),
    "swin_b.4": (1024, 49),
}
#: For each layer, d_in and d_out as multiples of the model's width, and the number of matrices that the layer joins.
LAYERS = {"qkv": (1, 3, 3), "o": (1, 1, 1), "fc1": (1, 4, 1), "fc2": (4, 1, 1)}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Named sets of cases. Each dictionary stands for all combinations of its values, for every layer in ``LAYERS``. A set
#: contains the cases of all its dictionaries. 8, 64 and 256 images of ViT-B have 1576, 12608 and 50432 tokens.
SETS: dict[str, list[dict[str, Sequence[Any]]]] = {
    "quick": [{"model": ["vit_b"], "images": [8], "rank": [32], "dtype": ["float32", "bfloat16"]}],
    "full": [
        {"model": ["vit_b"], "images": [64], "rank": [8, 16, 32, 64], "dtype": list(DTYPES)},
        {"model": ["vit_b"], "images": [1, 8, 256], "rank": [32], "dtype": list(DTYPES)},
        {"model": list(MODELS), "images": [64], "rank": [32], "dtype": list(DTYPES)},
    ],
}


@dataclass(frozen=True)
class Inputs:
    """Hold the inputs that all rows (implementations) of a case share.

    As in mixed-precision training, x, W, b and gy have the dtype of the case, and the trained factors D and G are fp32.
    For the layer fc2, D is the transpose of a contiguous tensor, as in a layer that uses the transpose of the shared
    factors.
    """

    x: Tensor  # [tokens, d_in]
    W: Tensor  # [d_out, d_in]
    b: Tensor | None  # [d_out]
    D: Tensor  # [d_in, rank]
    G: Tensor  # [rank, d_out]
    gy: Tensor  # [tokens, d_out], the gradient with respect to y
    n_cores: int  # number of matrices that the layer joins; each of them has one block of the columns of G


@dataclass(frozen=True)
class Case:
    """Describe one linear layer of one model: the number of images, the rank of the update, and the dtype.

    ``case`` is a key of ``LAYERS``, ``model`` a key of ``MODELS``, and ``dtype`` a key of ``DTYPES``.
    """

    case: str
    model: str
    images: int
    rank: int
    dtype: str

    @property
    def sizes(self) -> Sizes:
        width, tokens_per_image = MODELS[self.model]
        d_in, d_out, _ = LAYERS[self.case]
        tokens = self.images * tokens_per_image
        return Sizes(tokens, d_in * width, d_out * width, self.rank, DTYPES[self.dtype].itemsize)

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Return random inputs with |D G| ≈ |W|; an error in the update is then visible in y."""
        return make_inputs(self.sizes, DTYPES[self.dtype], LAYERS[self.case][2], self.case == "fc2", device, seed)

    def __str__(self) -> str:
        s = self.sizes
        return f"{self.model} {self.case} [{s.tokens} x {s.d_in} -> {s.d_out}] rank {self.rank} {self.dtype}"


def make_inputs(
    sizes: Sizes,
    dtype: torch.dtype,
    n_cores: int = 1,
    transposed: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Return random inputs with |D G| ≈ |W|.

    ``dtype`` is the dtype of all tensors except D and G, which are fp32. With ``transposed``, D is the transpose of a
    contiguous tensor [rank, d_in].
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens, d_in, d_out, rank = sizes.tokens, sizes.d_in, sizes.d_out, sizes.rank

    def normal(*shape: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(of)

    D = normal(d_in, rank, std=d_in**-0.5, of=torch.float32)
    return Inputs(
        x=normal(tokens, d_in),
        W=normal(d_out, d_in, std=d_in**-0.5),
        b=normal(d_out),
        D=D.t().contiguous().t() if transposed else D,
        G=normal(rank, d_out, std=rank**-0.5, of=torch.float32),
        gy=normal(tokens, d_out),
        n_cores=n_cores,
    )


def select(name: str, **overrides: Sequence[Any] | None) -> list[Case]:
    """Return the cases of the set ``name``, without duplicates.

    ``model``, ``case``, ``images``, ``rank`` and ``dtype`` replace the values of the set if they are given.

    Raises:
        ValueError: a name is unknown.
    """
    given = {key: values for key, values in overrides.items() if values}
    for value in given.get("model", ()):
        _check("model", value, MODELS)
    for value in given.get("case", ()):
        _check("case", value, LAYERS)
    for value in given.get("dtype", ()):
        _check("dtype", value, DTYPES)
    _check("set", name, SETS)
    return list(dict.fromkeys(itertools.chain.from_iterable(_product({**p, **given}) for p in SETS[name])))


def _product(values: Mapping[str, Sequence[Any]]) -> Iterator[Case]:
    axes = {"case": list(LAYERS), **values}
    order = ("dtype", "model", "images", "rank", "case")
    for combination in itertools.product(*(axes[key] for key in order)):
        yield Case(**dict(zip(order, combination, strict=True)))


def _check(what: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: {did_you_mean(name, known)}")
