"""Predict the time of one adapted layer on a GPU for several designs, from FLOPs and bytes only.

    python -m benchmarks.model_roofline --tokens 12608 --ranks 16 32 64

A design is a way to compute an adapted layer with a sequence of kernels. This module measures nothing. Its analytical
model compares designs before they are implemented, and its predictions appear next to measured ratios. The module
``roofline_gpu`` predicts the time of one kernel. The model assumes that no data is in a cache, and that an atomic
operation costs as much as moving its bytes. It ignores the time in which the host launches kernels. Expect
errors of a few percent per product.

An adapted layer computes y = x Wᵀ + h G with h = x D, where x is [tokens, d_in], W is [d_out, d_in], D is [d_in, r] and
G is [r, d_out]. Layers share the factors U and V, and each weight matrix has a core C: D = U and G = C V. gy is the
gradient with respect to y, and dh = gy Gᵀ. dx, dD, dG, dU, dC and dV are the gradients with respect to x, D, G, U, C
and V. dW is the update U C V as a dense matrix, and s is its scale. Activations and weights are in bf16.

The neighbors of a layer are the operations before and after it (LayerNorm, GELU or attention). "Our" kernels and
products belong to this library; "x is ours" means that our kernel computes x. "Vendor" products are those of cuBLAS.
The design "floor" is the frozen baseline, to which all ratios refer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.markdown import table
from benchmarks.roofline_gpu import Machine

#: The kernels of a forward pass or of a backward pass, as pairs of a name and a time in microseconds.
Kernels = list[tuple[str, float]]


@dataclass(frozen=True)
class Layer:
    """Describe a linear layer and its neighbors.

    Attributes:
        name: name of the layer.
        d_in, d_out: sizes of the input and the output.
        matrices: number of weight matrices that the layer joins, such as 3 for Q, K and V.
        front: the operation that computes x and receives dx: "norm", "gelu", or "" if it cannot be our kernel.
        owns_gy: whether our GELU kernel computes gy.
    """

    name: str
    d_in: int
    d_out: int
    matrices: int = 1
    front: str = "norm"
    owns_gy: bool = False

    @property
    def owns_x(self) -> bool:
        return self.front != ""


def vit_block(width: int) -> tuple[Layer, ...]:
    """Return the layers of a ViT block. Attention, which precedes the layer "o", is not our kernel."""
    return (
        Layer("qkv", width, 3 * width, matrices=3),
        Layer("o", width, width, front=""),
        Layer("fc1", width, 4 * width, owns_gy=True),
        Layer("fc2", 4 * width, width, front="gelu"),
    )


@dataclass(frozen=True)
class Case:
    """Predict the costs of one layer for a number of tokens and a rank.

    The methods return times in microseconds, except :meth:`reductions`, which returns kernels with their times. The
    properties ``x``, ``y``, ``h`` and ``w`` are sizes in bytes.
    """

    machine: Machine
    layer: Layer
    tokens: int
    rank: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.rank) < 1:
            raise ValueError(f"tokens and rank must be at least 1, got {self.tokens} and {self.rank}")

    @property
    def x(self) -> int:
        return 2 * self.tokens * self.layer.d_in

    @property
    def y(self) -> int:
        return 2 * self.tokens * self.layer.d_out

    @property
    def h(self) -> int:
        return 2 * self.tokens * self.rank

    @property
    def w(self) -> int:
        return 2 * self.layer.d_in * self.layer.d_out

    # The following methods describe kernels that several designs share.
    @property
    def tiny(self) -> float:
        """Return the time in microseconds of a kernel that reads and writes only small tensors, such as factors."""
        return self.machine.fixed + 0.5

    def forward(self, *, k_more: int = 0, relative: float = 1.0, tail: int = 0) -> float:
        """Return the time of x Wᵀ, with ``k_more`` columns appended to x."""
        layer = self.layer
        return self.machine.product(self.tokens, layer.d_out, layer.d_in + k_more, relative=relative, tail=tail)

    def dx(self, *, n_more: int = 0, relative: float = 1.0, tail: int = 0) -> float:
        """Return the time of gy W, with ``n_more`` columns appended to W."""
        layer = self.layer
        return self.machine.product(self.tokens, layer.d_in + n_more, layer.d_out, relative=relative, tail=tail)

    def h_alone(self) -> float:
        """Return the time of x D, which is also the time of dD = xᵀ dh and of dh Dᵀ."""
        return self.machine.skinny(self.tokens, self.rank, self.layer.d_in)

    def dh_alone(self) -> float:
        """Return the time of gy Gᵀ, which is also the time of dG = hᵀ gy and of h G."""
        return self.machine.skinny(self.tokens, self.rank, self.layer.d_out)

    def h_before(self) -> float:
        """Return the least additional time to compute h.

        If our kernel computes x, it can also compute h. Then only the arithmetic and the bytes of h count.
        """
        if not self.layer.owns_x:
            return self.h_alone()
        flops = 2 * self.tokens * self.layer.d_in * self.rank
        return 1e6 * (self.h / self.machine.bandwidth + 0.5 * flops / (0.3 * self.machine.flops))

    def add_up(self) -> float:
        """Return the time of the in-place sum y += h G."""
        return self.machine.memory(2 * self.y + self.h, 2 * self.tokens * self.layer.d_out * self.rank)

    def add_down(self) -> float:
        """Return the time of the in-place sum dx += dh Dᵀ."""
        return self.machine.memory(2 * self.x + self.h, 2 * self.tokens * self.layer.d_in * self.rank)

    def down_after(self) -> float:
        """Return the least additional time of dx += dh Dᵀ.

        If our kernel reads dx, it can also compute this sum. Then only the bytes of dh count.
        """
        return 1e6 * self.h / self.machine.bandwidth if self.layer.owns_x else self.add_down()

    def neighbor(self, *, slope_in_epilogue: bool = False) -> float:
        """Return the time of the LayerNorm or GELU before the layer, or 0 if another operation precedes the layer.

        The forward pass of this operation reads its input and writes x, which has the same size. The backward pass
        reads the input and dx and writes a gradient. With ``slope_in_epilogue``, the product that computes dx also
        multiplies dx by the derivative of a preceding GELU. The backward pass of the GELU then costs only one read.
        """
        inside = slope_in_epilogue and self.layer.front == "gelu"
        backward = 1e6 * self.x / self.machine.bandwidth if inside else self.machine.memory(3 * self.x)
        return self.layer.owns_x * (self.machine.memory(2 * self.x) + backward)

    def refresh(self) -> float:
        """Return this layer's share of the time of the kernel that computes G = C V for all layers."""
        return 0.25 * self.machine.fixed

    def reductions(self) -> Kernels:
        """Return a kernel that computes dG and dD without atomic operations, and a kernel that computes dC and dV."""
        sizes = self.layer.d_in + self.layer.d_out
        one_pass = self.machine.memory(self.y + self.x + 2 * self.h, 2 * self.tokens * self.rank * sizes)
        return [("dG, dD", one_pass), ("dC, dV", self.tiny)]


#: The time of a product per column of h, if the product also computes h, relative to its time per column of y.
#: benchmarks.steps fits this constant and some defaults of Machine to recorded medians.
_BESIDE = 0.8

#: A function that returns the kernels of the forward pass and those of the backward pass. Its docstring is the
#: description in the printed table.
Design = Callable[[Case], tuple[Kernels, Kernels]]


def floor(c: Case) -> tuple[Kernels, Kernels]:
    """Run only the forward pass and dx of the frozen layer."""
    return [("x Wᵀ", c.forward())], [("gy W", c.dx())]


def paper(c: Case) -> tuple[Kernels, Kernels]:
    """Compute x dW for each joined matrix, concatenate, scale and add under autograd, as the EFFT paper's code does."""
    m, d_in, each = c.machine, c.layer.d_in, c.layer.d_out // c.layer.matrices
    build = c.tiny + m.memory(2 * d_in * each)
    per_matrix: Kernels = [("build dW", build), ("x dW", m.product(c.tokens, each, d_in))]
    cat: Kernels = [("cat", m.memory(2 * c.y))] if c.layer.matrices > 1 else []
    back: Kernels = [
        ("gy dWᵀ", m.product(c.tokens, d_in, each)),
        ("dx +=", m.memory(3 * c.x)),
        ("xᵀ gy", m.product(d_in, each, c.tokens)),
        ("dU, dC, dV", m.memory(4 * d_in * each) + 2 * c.tiny),
    ]
    forward: Kernels = [("x Wᵀ", c.forward()), *per_matrix * c.layer.matrices, *cat]
    forward += [("s *", m.memory(2 * c.y)), ("y +=", m.memory(3 * c.y))]
    return forward, [("s *", m.memory(2 * c.y)), ("gy W", c.dx()), *back * c.layer.matrices]


def naive(c: Case) -> tuple[Kernels, Kernels]:
    """Compute x (W + dW)ᵀ under autograd, which needs a gradient as large as W."""
    m, layer = c.machine, c.layer
    forward = [("build dW", c.tiny + m.memory(c.w)), ("W + dW", m.memory(3 * c.w)), ("product", c.forward())]
    dense = m.product(layer.d_in, layer.d_out, c.tokens)
    return forward, [("dx", c.dx()), ("xᵀ gy", dense), ("dU, dC, dV", m.memory(2 * c.w) + 3 * c.tiny)]


def chain(c: Case, *, compiled: bool = False) -> tuple[Kernels, Kernels]:
    """Compute x Wᵀ + s (((x U) C) V) under eager autograd, as adapters of peft do."""
    m, h_alone, dh_alone = c.machine, c.h_alone(), c.dh_alone()
    scale: Kernels = [] if compiled else [("s *", m.memory(2 * c.y))]
    forward: Kernels = [("x Wᵀ", c.forward()), ("x U", h_alone), ("h C", m.memory(2 * c.h)), ("h V", dh_alone)]
    backward: Kernels = [("dV", dh_alone), ("gy Vᵀ", dh_alone), ("dC, dh", m.memory(4 * c.h) + m.fixed)]
    backward += [("dU", h_alone), ("dh Uᵀ", h_alone), ("gy W", c.dx()), ("dx +=", m.memory(3 * c.x))]
    return [*forward, *scale, ("y +=", m.memory(3 * c.y))], [*scale, *backward]


def compiled_chain(c: Case) -> tuple[Kernels, Kernels]:
    """Compute x Wᵀ + s (((x U) C) V) under torch.compile, which scales and adds in one kernel."""
    return chain(c, compiled=True)


def eager(c: Case) -> tuple[Kernels, Kernels]:
    """Run our eager backend: vendor products and in-place sums; h is saved for backward, and dh is computed once."""
    backward = [("gy Gᵀ", c.dh_alone()), ("gy W", c.dx()), ("dG", c.dh_alone()), ("dD", c.h_alone())]
    return [("x Wᵀ", c.forward()), ("x D", c.h_alone()), ("y += h G", c.add_up())], [
        *backward,
        ("dx += dh Dᵀ", c.add_down()),
    ]


def addmm(c: Case) -> tuple[Kernels, Kernels]:
    """Run like efft:eager, but compute h and dh twice, as Unsloth does, and dC and dV separately in every layer."""
    forward, backward = eager(c)
    again: Kernels = [("gy Gᵀ", c.dh_alone()), ("x D", c.h_alone()), ("dC, dV", 2 * c.tiny)]
    return forward, backward + again


def augmented_dx(c: Case) -> tuple[Kernels, Kernels]:
    """Run our eager backend with one vendor product for [dx, dh] = gy [W, Gᵀ]."""
    backward = [("gy [W, Gᵀ]", c.dx(n_more=c.rank)), ("dG", c.dh_alone()), ("dD", c.h_alone())]
    return eager(c)[0], [*backward, ("dx += dh Dᵀ", c.add_down())]


def lorafusion(c: Case) -> tuple[Kernels, Kernels]:
    """Run the kernels of LoRAFusion without dropout: fused products; fp32 atomic operations sum dh and dG."""
    m, atomics = c.machine, 4 * (c.rank / 128) * c.y
    fused_forward, fused_dx = c.forward(relative=m.own, tail=c.rank), c.dx(relative=m.own, tail=c.rank)
    backward: Kernels = [("dh, dG", m.memory(c.y + atomics + 2 * c.h)), ("zero, cast", 4 * m.fixed)]
    backward += [("dD", c.h_alone()), ("gy W + dh Dᵀ", fused_dx), ("dC, dV", c.tiny)]
    return [("x D", c.h_alone()), ("x Wᵀ + h G", fused_forward)], backward


def augmented(c: Case) -> tuple[Kernels, Kernels]:
    """Compute [x, h] [W, Gᵀ]ᵀ and gy [W, Gᵀ] as vendor products; our neighbor kernels compute h and add dh Dᵀ."""
    copy: Kernels = [] if c.layer.owns_x else [("copy x", c.machine.memory(2 * c.x))]
    forward = [("refresh G", c.refresh()), ("h", c.h_before()), *copy, ("[x, h] [W, Gᵀ]ᵀ", c.forward(k_more=c.rank))]
    return forward, [("gy [W, Gᵀ]", c.dx(n_more=c.rank)), *c.reductions(), ("dh Dᵀ", c.down_after())]


def augmented_alone(c: Case) -> tuple[Kernels, Kernels]:
    """Compute the products of augmented, but copy x into [x, h], and use separate kernels for h and dh Dᵀ."""
    copy = c.machine.memory(2 * c.x)
    forward = [("refresh G", c.refresh()), ("x D", c.h_alone()), ("copy x", copy)]
    backward = [("gy [W, Gᵀ]", c.dx(n_more=c.rank)), *c.reductions(), ("dx += dh Dᵀ", c.add_down())]
    return [*forward, ("[x, h] [W, Gᵀ]ᵀ", c.forward(k_more=c.rank))], backward


def recompute(c: Case) -> tuple[Kernels, Kernels]:
    """Run our own products, which recompute h or dh in the main loop of every tile."""
    m = c.machine
    more = 1 + c.rank / (256 if c.rank <= 32 else 192)  # registers limit the columns of a tile
    products = (f(relative=m.own, tail=c.rank) for f in (c.forward, c.dx))
    forward, backward = (m.fixed + (product - m.fixed) * more for product in products)
    return [("refresh G", c.refresh()), ("x Wᵀ + x D G", forward)], [("gy W + gy Gᵀ Dᵀ", backward), *c.reductions()]


def one_pass(c: Case) -> tuple[Kernels, Kernels]:
    """Compute dh, dG and dD in one kernel that reads gy and x once, and then dx in our own product."""
    m, layer = c.machine, c.layer
    partial_sums = 4 * m.multiprocessors * c.rank * (layer.d_in + layer.d_out)
    flops = 2 * c.tokens * c.rank * (2 * layer.d_out + layer.d_in)
    backward = [("dh, dG, dD", m.memory(c.y + c.x + 2 * c.h + partial_sums, flops)), ("dC, dV", c.tiny)]
    return own_forward(c)[0], [*backward, ("gy W + dh Dᵀ", c.dx(relative=m.own, tail=c.rank))]


def triton(c: Case) -> tuple[Kernels, Kernels]:
    """Run our triton backend on a single layer; separate kernels compute h and dh."""
    forward, dx = (f(relative=c.machine.own, tail=c.rank) for f in (c.forward, c.dx))
    return (
        [("refresh G", c.refresh()), ("x D", c.h_alone()), ("x Wᵀ + h G", forward)],
        [("gy Gᵀ", c.dh_alone()), ("gy W + dh Dᵀ", dx), *c.reductions()],
    )


def fused_triton(c: Case) -> tuple[Kernels, Kernels]:
    """Run our triton backend after efft.fuse; the kernel of a preceding LayerNorm or GELU also computes h."""
    if not c.layer.owns_x:
        return triton(c)
    product = c.forward(relative=c.machine.own, tail=c.rank)
    return [("refresh G", c.refresh()), ("h", c.h_before()), ("x Wᵀ + h G", product)], triton(c)[1]


def cuda(c: Case) -> tuple[Kernels, Kernels]:
    """Run our cuda backend on a single layer; a product also computes h or dh if rank and output are small enough."""

    def direction(d_in: int, d_out: int) -> Kernels:
        m = c.machine
        made = c.rank <= 32 and d_out <= 2048
        product = m.product(c.tokens, d_out, d_in, relative=m.own, tail=64)
        more = 1 + _BESIDE * 32 / 192 if made else 1.0
        h: Kernels = [] if made else [("h", m.skinny(c.tokens, c.rank, d_in))]
        return [("pack", c.tiny), *h, ("product", m.fixed + (product - m.fixed) * more)]

    d_in, d_out = c.layer.d_in, c.layer.d_out
    (sums, one_pass), _ = c.reductions()
    return direction(d_in, d_out), [*direction(d_out, d_in), (sums, one_pass), ("finish", c.tiny)]


def merged(c: Case) -> tuple[Kernels, Kernels]:
    """Build W + dW once per step, and compute dx and dh in one product with [W, Gᵀ]; bf16 rounds small updates away."""
    merge = c.machine.memory(2 * c.w, 2 * c.rank * c.layer.d_in * c.layer.d_out)
    forward = [("merge", merge), ("h", c.h_before()), ("product", c.forward())]
    return forward, [("gy [W, Gᵀ]", c.dx(n_more=c.rank)), *c.reductions()]


def own_forward(c: Case) -> tuple[Kernels, Kernels]:
    """Run our own forward product, which also adds h G; the backward pass is that of the design augmented."""
    product = c.forward(relative=c.machine.own, tail=c.rank)
    return [("refresh G", c.refresh()), ("h", c.h_before()), ("x Wᵀ + h G", product)], augmented(c)[1]


def best(c: Case) -> tuple[Kernels, Kernels]:
    """Use the fastest of the designs augmented, recompute, one-pass and own-forward for each layer."""
    return min((design(c) for design in (augmented, recompute, one_pass, own_forward)), key=microseconds)


def neighbors(c: Case) -> tuple[Kernels, Kernels]:
    """Run augmented, but our neighbor kernels also compute dD (for fc1 also dG); if x is not ours, run best."""
    if not c.layer.owns_x:
        return best(c)
    left = 0 if c.layer.owns_gy else c.y  # bytes that a separate reduction must still read
    moved = c.layer.d_in + (c.layer.d_out if c.layer.owns_gy else 0)
    inside = 1e6 * c.tokens * c.rank * moved / (0.3 * c.machine.flops)
    alone: Kernels = [("dG", c.machine.memory(left + c.h, left * c.rank))] if left else []
    backward = [("gy [W, Gᵀ]", c.dx(n_more=c.rank)), *alone, ("dC, dV", c.tiny), ("dG, dD in neighbors", inside)]
    return augmented(c)[0], [*backward, ("dh Dᵀ", c.down_after())]


def ideal(c: Case) -> tuple[Kernels, Kernels]:
    """Run one perfect kernel per direction, which is limited only by arithmetic and memory traffic."""
    fixed, gb_per_us = c.machine.fixed, c.machine.bandwidth / 1e6
    more = c.rank * (1 / c.layer.d_in + 1 / c.layer.d_out)
    forward = max((c.forward() - fixed) * (1 + more), (c.x + c.y + c.w) / gb_per_us)
    backward = max((c.dx() - fixed) * (1 + 2 * more), (c.y + 2 * c.x + c.w) / gb_per_us)
    return [("forward", fixed + forward)], [("backward", fixed + backward)]


#: The designs by name. A design that is also measured has the name of the measured row.
DESIGNS: dict[str, Design] = {
    "floor": floor,
    "paper": paper,
    "naive": naive,
    "peft": chain,
    "chain-compiled": compiled_chain,
    "addmm": addmm,
    "efft:eager": eager,
    "augmented-dx": augmented_dx,
    "lorafusion": lorafusion,
    "augmented": augmented,
    "augmented-alone": augmented_alone,
    "recompute": recompute,
    "one-pass": one_pass,
    "efft:triton": triton,
    "fused:triton": fused_triton,
    "efft:cuda": cuda,
    "merged": merged,
    "own-forward": own_forward,
    "best": best,
    "neighbors": neighbors,
    "ideal": ideal,
}


def microseconds(kernels: tuple[Kernels, Kernels]) -> float:
    """Return the total time of the forward and the backward pass."""
    return sum(time for direction in kernels for _, time in direction)


def block_times(machine: Machine, tokens: int, rank: int, layers: Sequence[Layer]) -> dict[str, dict[str, float]]:
    """Return the microseconds of forward and backward pass together, by design and layer.

    For each design, the entry "block" is the sum over the layers. The entry "with norms and GELU" also includes the
    LayerNorms and the GELU that precede layers.
    """
    times: dict[str, dict[str, float]] = {}
    for name, design in DESIGNS.items():
        cases = [Case(machine, layer, tokens, rank) for layer in layers]
        times[name] = {case.layer.name: microseconds(design(case)) for case in cases}
        times[name]["block"] = sum(times[name].values())
        fronts = sum(case.neighbor(slope_in_epilogue=name == "fused:triton") for case in cases)
        times[name]["with norms and GELU"] = times[name]["block"] + fronts
    return times


def render(machine: Machine, tokens: int, ranks: Sequence[int], width: int) -> str:
    """Return the predictions as a Markdown table: microseconds, and in parentheses the ratio to the frozen baseline."""
    parts = []
    for rank in ranks:
        times = block_times(machine, tokens, rank, vit_block(width))
        rows = [
            [
                f"`{name}`",
                (DESIGNS[name].__doc__ or ""),
                *(f"{t:.1f} ({t / times['floor'][k]:.2f})" for k, t in of.items()),
            ]
            for name, of in times.items()
        ]
        parts.append(f"Modeled, not measured: {tokens} tokens, width {width}, rank {rank}, bf16; {machine}\n")
        parts.append(table(["design", "description", *times["floor"]], rows) + "\n")
    return "\n".join(parts)


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables of predictions."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Machine()
    parser.add_argument("--tokens", type=int, default=64 * 197)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--width", type=int, default=768, help="width of the ViT")
    parser.add_argument("--fixed", type=float, default=default.fixed, help="fixed microseconds per kernel")
    parser.add_argument("--own", type=float, default=default.own, help="speed of own products relative to the vendor's")
    parser.add_argument("--flat", action="store_true", help="assume that products of every shape run at peak")
    args = parser.parse_args(words)
    machine = Machine(fixed=args.fixed, own=args.own, tiled=not args.flat)
    print(render(machine, args.tokens, args.ranks, args.width))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
