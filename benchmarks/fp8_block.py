"""Predict the time of a ViT-B block whose frozen products are computed in fp8. No GPU has measured these times.

    python -m benchmarks tables fp8_block

The model is that of :mod:`benchmarks.steps`, with its fitted constants and its medians of the frozen baseline (the
products x Wᵀ and gy W in bf16 with cuBLAS). A frozen product in fp8 takes a *fraction* of the time of this product in
bf16. ``python -m benchmarks fp8-products`` measures the fraction for the products of the vendor's library. All other
terms of a layer, y = x Wᵀ + h G with h = x D, are computed in bf16 from x and gy that are not rounded to fp8.

An fp8 product cannot compute h = x D or dh = gy Gᵀ, because it reads only the rounded operand. Therefore the kernel
that rounds an operand also computes h or dh. An operand in fp8 has one byte per entry, and one fp32 scale per token.
The kernels contain the changes A to E of :data:`benchmarks.steps.STEPS` (the third generation), and the model assumes
that a product of our own in fp8 is as close to the vendor's as one in bf16. :data:`DESIGNS` lists the designs.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import NamedTuple

from benchmarks.markdown import table
from benchmarks.steps import LAYERS, PASSES, RANK, TOKENS, Constants, Key, Launch, by_gpu, fit, time_of

#: For each design, its description.
DESIGNS = {
    "separate": "a kernel rounds `x` or `gy` before each product, and a reduction reads `x` and `gy` again",
    "fused": "the norm or GELU before a layer also writes `x` in fp8 (not for `o`), and the kernel that sums dG also "
    "writes `gy` in fp8",
    "merged": "as above, with the changes F, G and H: the kernels that compute `gy` of `fc1` and `x` of `fc2` also sum "
    "dG and dD and round, and the other sums dD are one launch, half of which overlaps with products",
}
FRACTIONS = (0.55, 0.65, 0.75)
GOAL = 0.99
_TAIL = 16 * ceil(RANK / 16)  # depth of the product with the factors; one matrix instruction has the depth 16
_H = 2 * TOKENS * RANK  # bytes of h or dh


class Kernel(NamedTuple):
    """Describe one kernel of the block.

    Attributes:
        key: layer and direction of the call that launches the kernel.
        launch: the kernel. The ``depth`` of a product is that of its tail in bf16, divided by that of its main loop.
        hidden: the part of the time, apart from that of the launch, that overlaps with other kernels.
    """

    key: Key
    launch: Launch
    hidden: float = 0.0


def kernels(design: str) -> list[Kernel]:
    """Return the kernels of the block that belong to the adapted layers, including the rounding of operands.

    The name of a launch begins with "in " if the work is part of a kernel that the frozen model needs as well.
    """
    found = []
    summed_later = 0
    for layer, (d_in, d_out) in LAYERS.items():
        for way in PASSES:
            k, n = (d_in, d_out) if way == "fwd" else (d_out, d_in)
            read, written = 2 * TOKENS * k + 2 * RANK * k, TOKENS * (k + 4) + _H
            if way == "fwd" and design != "separate" and layer != "o":
                rounding = Launch("in the norm or GELU", written)
            elif way == "bwd" and design == "merged" and layer == "fc1":
                rounding = Launch("in the backward pass of the GELU", written + _sum_bytes(k) - 2 * TOKENS * k)
            elif way == "bwd" and design != "separate":
                rounding = Launch("dG and rounding", written + _sum_bytes(k))
            else:
                rounding = Launch("rounding", written + read)
            operands = TOKENS * (k + 4) + n * (k + 4) + _H + 2 * RANK * n + 2 * n * (way == "fwd")
            product = Launch("product", operands + 2 * TOKENS * n, _TAIL / k)
            found += [Kernel((layer, way), rounding), Kernel((layer, way), product)]
        if design == "separate":
            found.append(Kernel((layer, "bwd"), Launch("dD and dG", _sum_bytes(d_in) + _sum_bytes(d_out))))
        elif design == "fused":
            found.append(Kernel((layer, "bwd"), Launch("dD", _sum_bytes(d_in))))
        elif layer == "fc2":
            later = _sum_bytes(d_in) - 2 * TOKENS * d_in
            found.append(Kernel((layer, "bwd"), Launch("in the backward pass of the GELU", later)))
        else:
            summed_later += _sum_bytes(d_in)
    if summed_later:
        found.append(Kernel(("qkv", "bwd"), Launch("dD of three layers", summed_later), hidden=0.5))
    return found


def _sum_bytes(width: int) -> int:
    """Return the bytes of a sum over tokens, dG or dD: gy or x ``[tokens, width]``, h or dh, and the result in fp32."""
    return 2 * TOKENS * width + _H + 4 * RANK * width


def launched(kernel: Kernel) -> bool:
    """Return whether the kernel is a separate launch, and not part of a kernel that the frozen model needs as well."""
    return not kernel.launch.kernel.startswith("in ")


def microseconds(kernel: Kernel, fraction: float, floor: dict[Key, float], by: Constants) -> float:
    """Return the modeled time of a kernel.

    ``fraction`` is the time of the vendor's product in fp8, divided by that in bf16. ``floor`` contains the recorded
    microseconds of the products in bf16.
    """
    by = by._replace(own=(1 + by.own) / 2)  # change D
    launch = kernel.launch
    if launch.depth:
        launch = replace(launch, depth=fraction + launch.depth)
    work = time_of(launch, floor[kernel.key], by) - by.launch
    return work * (1 - kernel.hidden) + launched(kernel) * by.launch / 2  # change C hides half of the launch


def block(design: str, fraction: float, floor: dict[Key, float], by: Constants) -> float:
    """Return the modeled time of the block, divided by that of the frozen baseline in bf16."""
    return sum(microseconds(kernel, fraction, floor, by) for kernel in kernels(design)) / sum(floor.values())


def largest_fraction(design: str, floor: dict[Key, float], by: Constants) -> float:
    """Return the fraction for which :func:`block` is equal to :data:`GOAL`. The block is linear in the fraction."""
    start, slope = block(design, 0, floor, by), block(design, 1, floor, by) - block(design, 0, floor, by)
    return (GOAL - start) / slope


def predictions() -> str:
    """Return the table of modeled times, with one row per design."""
    groups = by_gpu()
    last = {gpu: (runs[-1].floor, fit(runs)) for gpu, runs in groups.items()}
    rows = []
    for design, text in DESIGNS.items():
        of = kernels(design)
        cells = [text, str(sum(map(launched, of))), f"{sum(kernel.launch.bytes for kernel in of) / 1e6:.0f}"]
        for run in last.values():
            cells += [f"{block(design, fraction, *run):.2f}" for fraction in FRACTIONS]
            cells.append(f"{largest_fraction(design, *run):.2f}")
        rows.append(cells)
    header = ["rounding and sums", "launches", "MB"]
    for gpu in last:
        header += [f"{gpu}, fraction {fraction:g}" for fraction in FRACTIONS] + [f"{gpu}, fraction for {GOAL:g}"]
    return table(header, rows)
