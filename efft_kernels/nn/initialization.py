"""Initial values of U, cores and V.

One side of the train starts at zero, so that the update starts at zero; the other is Xavier-uniform. The cores are
Xavier-uniform too. PyTorch derives the bound of a three-dimensional parameter from its layout, and the published scales
were tuned with that bound, so the layout of the paper's code is a setting of the initialization. Nothing else depends
on it: this project always stores cores as [n_layers, n_cores, r1, r2].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Where the paper's code has the index of the core, for n cores of r1 x r2 in one parameter, and the resulting bound:
#: ``last``   [r1, r2, n]  sqrt(6 / (n (r1 + r2)))    its ViT models
#: ``first``  [n, r1, r2]  sqrt(6 / (r1 r2 + n r2))   its Swin models
#: ``matrix`` n times [r1, r2]  sqrt(6 / (r1 + r2))   every core is its own matrix
CORE_LAYOUTS = ("last", "first", "matrix")


def core_bound(layout: str, n: int, r1: int, r2: int) -> float:
    """Return the bound of the uniform distribution of ``n`` cores ``[r1, r2]`` in a layout (:data:`CORE_LAYOUTS`)."""
    fans = {"last": n * (r1 + r2), "first": r1 * r2 + n * r2, "matrix": r1 + r2}
    if layout not in fans:
        raise ValueError(f"core_init must be one of {', '.join(map(repr, CORE_LAYOUTS))}, got {layout!r}")
    return math.sqrt(6 / fans[layout])


#: What :func:`automatic_scale` aims at. At lr 1e-3, Adam's first step then moves a weight by 3e-4, about as far as in
#: full fine-tuning. For ten of its nineteen tasks the paper chose scales that move weights so far (0.2 to 0.6).
MOVEMENT = 0.3


def automatic_scale(d_in: int, d_out: int, n: int, r1: int, r2: int, init: str, core_init: str) -> float:
    """Return the scale s with which a first step moves the update by :data:`MOVEMENT`.

    The step changes every entry of the side that starts at zero by 1, with random signs; the movement is the root mean
    square of the change of the update's entries. It then does not depend on the width, the ranks and the number of
    cores. The arguments are those of :func:`initialize`, with ``n`` cores ``[r1, r2]`` in one parameter.
    """
    d, r = (d_out, r2) if init == "u" else (d_in, r1)
    side = math.sqrt(2 / (d + r))  # of a Xavier-uniform matrix
    core = core_bound(core_init, n, r1, r2) / math.sqrt(3)
    return MOVEMENT / (side * core * math.sqrt(r1 * r2))


@torch.no_grad()
def initialize(U: Tensor, C: Tensor, V: Tensor, init: str, core_init: str) -> None:
    """Fill U [d_in, r1], C [n_layers, n_cores, r1, r2] and V [r2, d_out] in place.

    ``init="v"`` zeroes V and ``init="u"`` zeroes U; the other of the two is Xavier-uniform.
    """
    if init not in ("u", "v"):
        raise ValueError(f"init must be 'u' (U starts at zero) or 'v' (V starts at zero), got {init!r}")
    n_layers, n_cores, r1, r2 = C.shape
    bound = core_bound(core_init, n_layers * n_cores, r1, r2)
    for factor, zero in ((U, init == "u"), (V, init == "v")):
        if zero:
            factor.zero_()
        else:
            torch.nn.init.xavier_uniform_(factor)
    C.uniform_(-bound, bound)
