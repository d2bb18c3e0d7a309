"""Provide lists of settings for the study, in order of importance.

The name of a setting is, for example, ``efft2 r16 x3 c3``. ``r16`` means rank 16. ``x3`` means that all biases and
norms have three times the base learning rate (with ``x0``, they are not trained). ``c3`` means that EFFT's cores have
three times the base rate. ``lr`` is followed by the base rate, which is 1e-3 if the name does not state it.
"""

from __future__ import annotations

from typing import Any

from efft_lab.studies.extras.variants import Variant

#: The layers that LoRA adapts.
_LINEARS = ["qkv", "proj", "fc1", "fc2"]


def shared(
    rank: Any, extras: float = 0, cores: float = 1, label: str = "", variant: str = "efft2", **fields: Any
) -> Variant:
    """Return a setting of EFFT.

    Args:
        rank: rank of the tensor trains.
        extras: learning rate of all biases and norms as a multiple of the base rate; 0 does not train them.
        cores: learning rate of the cores as a multiple of the base rate.
        label: end of the name, which states all other differences.
        variant: "efft1" or "efft2".
        fields: other fields of :class:`Variant`. ``rates`` and ``settings`` are merged with the values that follow from
            the other arguments.
    """
    rates = {**({"biases": extras, "norms": extras} if extras else {}), "cores": cores, **fields.pop("rates", {})}
    settings = {"variant": variant, "rank": rank, **fields.pop("settings", {})}
    name = f"{variant} r{rank} x{extras:g} c{cores:g}" + (f" {label}" if label else "")
    return Variant(name, settings=settings, rates={k: v for k, v in rates.items() if v != 1 or k != "cores"}, **fields)


def lora(rank: int, lr: float, extras: float = 0) -> Variant:
    """Return a setting of peft's LoRA on all linear layers.

    ``lr`` is the base rate, and biases and norms have ``extras`` times this rate (0 does not train them).
    """
    rates = {"biases": extras, "norms": extras} if extras else {}
    name = f"lora r{rank}" + (f" x{extras:g}" if extras else "") + f" lr {lr:g}"
    return Variant(name, "peft_lora", {"rank": rank, "targets": _LINEARS}, lr, rates)


def alone(lr: float, **rates: float) -> Variant:
    """Return a setting that trains only the given kinds of parameters and the head, at multiples of the rate ``lr``."""
    return Variant(f"{'+'.join(rates)} alone lr {lr:g}", "linear", lr=lr, rates=rates)


def best(rank: Any, label: str = "", **fields: Any) -> Variant:
    """Return EFFT with all biases, norms and cores at three times the base rate, the best setting of earlier runs."""
    return shared(rank, 3, 3, label, **fields)


def explore() -> list[Variant]:
    """Return the settings for the stage ``explore``."""
    found = [
        # EFFT2 as in the suite, LoRA with three rates, and the best setting of earlier runs.
        shared(16),
        *(lora(8, lr) for lr in (3e-4, 1e-3, 3e-3)),
        best(8),
        *(lora(8, lr, 1) for lr in (5e-4, 1e-3)),
        lora(8, 1e-3, 3),
        # Other ranks. Ranks 15, 12, 8 and 4 have about 118 k, 104 k, 87 k and 73 k parameters.
        *(best(rank) for rank in (15, 12, 4)),
        # Other rates of the biases and norms, of the cores, and of all parameters.
        *(shared(8, extras, cores) for extras, cores in ((6, 3), (10, 3), (1, 3), (3, 1), (6, 6), (3, 6), (10, 6))),
        *(shared(15, extras, cores) for extras, cores in ((6, 3), (10, 3), (6, 6), (3, 1), (3, 6))),
        *(shared(15, 3, 3, f"lr{lr:g}", lr=lr) for lr in (5e-4, 2e-3, 3e-3)),
        *(shared(8, 3, 3, f"lr{lr:g}", lr=lr) for lr in (5e-4, 2e-3, 3e-3)),
        # Other automatic scales, with which the first step moves the weights by other amounts.
        *(best(15, label=f"movement{m:g}", movement=m) for m in (0.1, 0.2, 0.5)),
        *(best(8, label=f"movement{m:g}", movement=m) for m in (0.1, 0.2, 0.5)),
        # LoRA with about as many parameters as EFFT.
        *(lora(2, lr, 1) for lr in (1e-3, 2e-3)),
        lora(2, 1e-3, 3),
        *(lora(1, lr, 1) for lr in (1e-3, 2e-3)),
        lora(1, 1e-3, 3),
        *(lora(2, lr) for lr in (1e-3, 3e-3)),
        *(lora(1, lr) for lr in (1e-3, 3e-3)),
        # Settings of at most 59 k parameters, which compare the benefit of different kinds of extras.
        shared(15, 0, 3),
        shared(10, 0, 3, "norms3", rates={"norms": 3}),
        shared(10, 0, 3, "norms10", rates={"norms": 10}),
        shared(8, 0, 3, "norms3 out3", rates={"norms": 3, "biases.proj": 3, "biases.fc2": 3}),
        shared(8, 0, 3, "norms3 gammas3", rates={"norms": 3, "gammas": 3}),
        shared(8, 0, 3, "norms10 gammas10", rates={"norms": 10, "gammas": 10}),
        shared(4, 0, 3, "biases3", rates={"biases": 3}),
        shared(12, 0, 3, "normbias3 out3", rates={"norms.bias": 3, "biases.proj": 3}),
        shared(8, 0, 3, "in10", rates={"diagonal_in": 10}),
        # Diagonals, gains and layer scales in addition to biases and norms.
        best(8, label="in10", rates={"diagonal_in": 10}),
        best(8, label="in3", rates={"diagonal_in": 3}),
        best(8, label="out10", rates={"diagonal_out": 10}),
        best(8, label="gain3", rates={"gain": 3}),
        best(15, label="gammas3", rates={"gammas": 3}),
        best(12, label="gammas3", rates={"gammas": 3}),
        # Different rates of U and V.
        *(
            best(15, label=f"U{u:g} V{v:g}", rates={"sides.U": u, "sides.V": v})
            for u, v in ((0.3, 1), (3, 1), (1, 3), (1, 0.3), (0, 1))
        ),
        # EFFT1, which has one tensor train for all matrices.
        best(20, variant="efft1"),
        shared(15, 0, 3, "norms3", "efft1", rates={"norms": 3}),
        shared(21, 0, 3, "", "efft1"),
        # Preconditioned gradients, and other initial values.
        best(15, label="precondition", precondition=True),
        shared(15, 3, 1, "precondition", precondition=True),
        best(8, label="precondition", precondition=True),
        best(15, label="orthogonal", start="orthogonal"),
        best(15, label="matrix", settings={"core_init": "matrix"}),
        best(15, label="u", settings={"init": "u"}),
        best(15, label="uv", settings={"init": "uv"}),
        best(15, label="vu", settings={"init": "vu"}),
        # An additional update of rank 1 in each layer, which is not shared.
        shared(8, 0, 3, "own1", own=1),
        shared(4, 0, 3, "own1 norms3", own=1, rates={"norms": 3}),
        shared(4, 0, 3, "own1 norms3 B3", own=1, rates={"norms": 3, "own_B": 3}),
        # Dropout of the factors.
        *(best(15, label=f"dropout{p:g}", settings={"dropout": p}) for p in (0.02, 0.05, 0.1)),
        # Different ranks for attention and MLPs.
        best({"mhsa": 20, "ffn": 9}),
        best({"mhsa": 8, "ffn": 17}),
        # Settings without updates of matrices, and other methods.
        *(alone(lr, biases=1, norms=1) for lr in (1e-3, 3e-3, 1e-2)),
        *(alone(lr, norms=1) for lr in (3e-3, 1e-2)),
        Variant("fact_tt r16 x3 lr 1e-3", "fact_tt", {"rank": 16, "scale": 10.0}, rates={"biases": 3, "norms": 3}),
        *(Variant(f"full lr {lr:g}", "full", lr=lr) for lr in (3e-5, 1e-4)),
    ]
    return found


def rivals() -> list[Variant]:
    """Return the settings with which EFFT is compared, each with the learning rates to choose from.

    The first setting is EFFT2 as in the suite.
    """
    rates = (3e-4, 1e-3, 3e-3)
    return [
        shared(16),
        *(lora(8, lr) for lr in rates),
        *(lora(8, lr, 1) for lr in rates),
        *(lora(2, lr) for lr in rates),
        *(lora(2, lr, 1) for lr in rates),
        *(lora(1, lr) for lr in rates),
        *(alone(lr, biases=1, norms=1) for lr in (1e-3, 3e-3, 1e-2)),
        *(Variant(f"fact_tt r16 lr {lr:g}", "fact_tt", {"rank": 16, "scale": 10.0}, lr) for lr in rates),
        *(Variant(f"full lr {lr:g}", "full", lr=lr) for lr in (3e-5, 1e-4, 3e-4)),
    ]


def smoke() -> list[Variant]:
    """Return one setting of each structure in :func:`explore`, for a test that all structures can be trained."""
    seen: dict[str, Variant] = {}
    for variant in explore():
        seen.setdefault(variant.structure(), variant)
    return list(seen.values())
