"""Set the initial values of the factors U, C (the cores) and V of ``ΔW = s · U C V``, and compute the scale s.

U or V starts at zero, so that the update starts at zero. The other one and the cores are Xavier-uniform. PyTorch
derives the Xavier bound of a three-dimensional parameter from its *layout*, the order of its dimensions. The scales s
that the EFFT paper (arXiv 2311.06749) publishes were tuned with the bound that results from the layout in the paper's
code. That layout is therefore a setting of the initialization. The layout has no other effect: this project always
stores cores as [n_layers, n_cores, r1, r2].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Layouts of n cores of r1 x r2 in the parameters of the paper's code, with the resulting bound:
#: ``last``    one parameter [r1, r2, n]    sqrt(6 / (n (r1 + r2)))   used by the paper's ViT models
#: ``first``   one parameter [n, r1, r2]    sqrt(6 / (r1 r2 + n r2))  used by the paper's Swin models
#: ``matrix``  n parameters [r1, r2]        sqrt(6 / (r1 + r2))       each core is a separate matrix
CORE_LAYOUTS = ("last", "first", "matrix")


def core_bound(layout: str, n: int, r1: int, r2: int) -> float:
    """Return the bound of the uniform distribution of ``n`` cores ``[r1, r2]`` in a layout (:data:`CORE_LAYOUTS`)."""
    fans = {"last": n * (r1 + r2), "first": r1 * r2 + n * r2, "matrix": r1 + r2}
    if layout not in fans:
        raise ValueError(f"core_init must be one of {', '.join(map(repr, CORE_LAYOUTS))}, got {layout!r}")
    return math.sqrt(6 / fans[layout])


#: The default movement of :func:`automatic_scale`. With this movement and lr 1e-3, Adam's first step moves a weight by
#: 3e-4, about as far as in full fine-tuning. For ten of the paper's nineteen tasks, the paper's scales give a similar
#: movement (0.2 to 0.6).
MOVEMENT = 0.3


def automatic_scale(
    d_in: int, d_out: int, n: int, r1: int, r2: int, init: str, core_init: str, movement: float = MOVEMENT
) -> float:
    """Return the scale for which the first optimizer step moves the update by ``movement`` per unit of learning rate.

    The first step with learning rate 1 is modeled as changing every entry of the factor that starts at zero by 1, with
    random signs. The movement is the root mean square of the resulting change of the update's entries. With this scale,
    the movement does not depend on the width, the ranks or the number of cores. The arguments ``init`` and
    ``core_init`` are those of :func:`initialize`; ``n`` is the total number of cores ``[r1, r2]``.
    """
    d, r = (d_out, r2) if init == "u" else (d_in, r1)
    side = math.sqrt(2 / (d + r))  # standard deviation of the entries of a Xavier-uniform matrix
    core = core_bound(core_init, n, r1, r2) / math.sqrt(3)
    return movement / (side * core * math.sqrt(r1 * r2))


@torch.no_grad()
def initialize(U: Tensor, C: Tensor, V: Tensor, init: str, core_init: str) -> None:
    """Fill U [d_in, r1], C [n_layers, n_cores, r1, r2] and V [r2, d_out] in place.

    ``init="v"`` zeroes V and ``init="u"`` zeroes U; the other one of U and V is Xavier-uniform.
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
