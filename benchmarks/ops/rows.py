"""Define the rows of the command ``ops``: implementations of an adapted linear layer, with one small class per row.

All rows have the same inputs. In half precision they run under autocast, as in training. They compute the same output
y = x Wᵀ + b + (x D) G and the gradients with respect to x, D and G. The LoRA rows train A = Dᵀ and B = Gᵀ instead of D
and G. There are two exceptions. The row ``merged`` computes the same y, but only the gradient dx. The row ``floor``,
the frozen baseline, computes y = x Wᵀ + b and dx. "The paper" is the paper that introduced EFFT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ops.cases import Inputs
from efft.hints import did_you_mean
from efft_kernels import Backend, can_run, tt_linear
from efft_kernels.testing import backends


class Layer:
    """Bind an implementation to the inputs of one case.

    Args:
        function: function without arguments that returns y.
        leaves: tensors that ``function`` uses and that require gradients, by the keys "x", "D" and "G".
        inputs: the inputs of the case.
        transposed: whether ``leaves`` holds Dᵀ and Gᵀ. The factors' gradients must then be transposed.
    """

    def __init__(
        self, function: Callable[[], Tensor], leaves: dict[str, Tensor], inputs: Inputs, transposed: bool = False
    ) -> None:
        self.leaves = leaves
        self._function, self._gy, self._transposed = function, inputs.gy, transposed
        self._device, self._dtype = inputs.x.device.type, inputs.x.dtype
        self._kept: Tensor | None = None

    def forward(self) -> Tensor:
        """Return y with its autograd graph."""
        with torch.autocast(self._device, self._dtype, enabled=self._dtype != torch.float32):
            return self._function()

    def backward(self) -> tuple[Tensor, ...]:
        """Return the gradients. The first call runs a forward pass and keeps its graph; later calls reuse the graph."""
        if self._kept is None:
            self._kept = self.forward()
        return torch.autograd.grad(self._kept, list(self.leaves.values()), self._gy, retain_graph=True)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Run one forward and backward pass and return the gradients."""
        return torch.autograd.grad(self.forward(), list(self.leaves.values()), self._gy)

    def results(self) -> dict[str, Tensor]:
        """Return ``y`` and the gradients: ``dx`` and, if the row trains factors, ``dD`` and ``dG``."""
        y = self.forward()
        grads = torch.autograd.grad(y, list(self.leaves.values()), self._gy)
        found = {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}}
        if self._transposed:
            found |= {name: found[name].t() for name in ("dD", "dG")}
        return found


class LayerRow:
    """Describe one way to compute the layer.

    Attributes:
        name: name of the row in tables and result files.
        explains: description in one line.
        adapts: whether y contains the update.
        trains: whether the row computes the gradients of the factors.
    """

    name: str
    explains: str
    adapts: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def unavailable(self, inputs: Inputs) -> str | None:
        """Return None if the row can run on ``inputs`` on this machine, or the reason why it cannot."""
        return None

    def build(self, inputs: Inputs) -> Layer:
        """Bind the row to ``inputs``."""
        raise NotImplementedError


def under_autograd(compute: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Layer:
    """Bind ``compute(x, D, G)`` to ``inputs``; autograd differentiates it with respect to all three arguments."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("x", "D", "G")}
    return Layer(lambda: compute(*leaves.values()), leaves, inputs)


def frozen(W: Tensor, inputs: Inputs) -> Layer:
    """Bind the plain linear layer with weight ``W`` to ``inputs``; only x requires a gradient."""
    x = inputs.x.detach().requires_grad_()
    return Layer(lambda: F.linear(x, W, inputs.b), {"x": x}, inputs)


def lora(compute: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Layer:
    """Bind ``compute(x, A, B)`` to ``inputs``, with contiguous A = Dᵀ [rank, d_in] and B = Gᵀ [d_out, rank]."""
    x = inputs.x.detach().requires_grad_()
    A, B = (factor.detach().t().contiguous().requires_grad_() for factor in (inputs.D, inputs.G))
    return Layer(lambda: compute(x, A, B), {"x": x, "D": A, "G": B}, inputs, transposed=True)


class Floor(LayerRow):
    name = "floor"
    explains = "the frozen layer: forward pass and dx, which every method needs"
    adapts = trains = False

    def build(self, inputs: Inputs) -> Layer:
        return frozen(inputs.W, inputs)


class Efft(LayerRow):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name = f"efft:{backend.value}"
        self.explains = f"tt_linear of this library, backend {backend.value}"

    def unavailable(self, inputs: Inputs) -> str | None:
        return can_run(self.backend, inputs.x, inputs.W, inputs.b, inputs.D, inputs.G)

    def build(self, inputs: Inputs) -> Layer:
        W, b = inputs.W, inputs.b
        return under_autograd(lambda x, D, G: tt_linear(x, W, b, D, G, backend=self.backend), inputs)


class Naive(LayerRow):
    name = "naive"
    explains = "builds the update and adds it to the weight, W + (D G)ᵀ, under autograd"

    def build(self, inputs: Inputs) -> Layer:
        return under_autograd(lambda x, D, G: F.linear(x, inputs.W + (D @ G).t(), inputs.b), inputs)


class Paper(LayerRow):
    name = "paper"
    explains = "as in the paper's code: one dense update per matrix, y += s [x dW_1 | x dW_2 | ...], under autograd"
    scale = 1.0

    def build(self, inputs: Inputs) -> Layer:
        def compute(x: Tensor, D: Tensor, G: Tensor) -> Tensor:
            y = F.linear(x, inputs.W, inputs.b)
            deltas = [D @ block for block in G.chunk(inputs.n_cores, dim=1)]
            y += torch.cat([x @ delta for delta in deltas], dim=-1) * self.scale
            return y

        return under_autograd(compute, inputs)


def chain(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor, G: Tensor) -> Tensor:
    """Compute y = x Wᵀ + b + (x D) G in this order."""
    return F.linear(x, W, b) + (x @ D) @ G


class Chain(LayerRow):
    name = "chain"
    explains = "x Wᵀ + b + (x D) G under autograd"

    def build(self, inputs: Inputs) -> Layer:
        return under_autograd(lambda x, D, G: chain(x, inputs.W, inputs.b, D, G), inputs)


class ChainCompiled(LayerRow):
    name = "chain-compiled"
    explains = "the row chain under torch.compile, compiled for the shape of the case"

    def build(self, inputs: Inputs) -> Layer:
        from torch._functorch import config

        config.donated_buffer = False  # with donated buffers, a backward pass can run only once per forward pass
        compiled = torch.compile(chain, dynamic=False, fullgraph=True)
        return under_autograd(lambda x, D, G: compiled(x, inputs.W, inputs.b, D, G), inputs)


class Peft(LayerRow):
    name = "peft"
    explains = "LoRA layer of the peft library, same rank; peft's cast of the input to the factors' dtype is disabled"

    def build(self, inputs: Inputs) -> Layer:
        from peft import LoraConfig, inject_adapter_in_model

        d_out, d_in = inputs.W.shape
        base = nn.Linear(d_in, d_out, bias=inputs.b is not None, device="meta")
        base.weight = nn.Parameter(inputs.W, requires_grad=False)
        if inputs.b is not None:
            base.bias = nn.Parameter(inputs.b, requires_grad=False)
        rank = inputs.D.shape[1]
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=["linear"])
        layer: Any = inject_adapter_in_model(config, nn.ModuleDict({"linear": base}))["linear"]
        layer.cast_input_dtype_enabled = False  # under autocast the cast has no effect except for a copy of x
        A, B = (nn.Parameter(factor.t().contiguous()) for factor in (inputs.D, inputs.G))
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = A, B
        x = inputs.x.detach().requires_grad_()
        return Layer(lambda: layer(x), {"x": x, "D": A, "G": B}, inputs, transposed=True)


class Addmm(LayerRow):
    name = "addmm"
    explains = "LoRA by hand: y.addmm_(x Aᵀ, Bᵀ); recomputes the rank-r intermediates in the backward pass"

    def build(self, inputs: Inputs) -> Layer:
        return lora(lambda x, A, B: _AddmmLora.apply(x, inputs.W, inputs.b, A, B), inputs)


class _AddmmLora(torch.autograd.Function):
    """Compute LoRA as Unsloth's fast_lora does: products of torch add the update to y and dx in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, W, b).addmm_(x @ A.to(x.dtype).t(), B.to(x.dtype).t())

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        down, up = A.to(x.dtype), B.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            dA = ((gy @ up).t() @ x).to(A.dtype)
            dB = (gy.t() @ (x @ down.t())).to(B.dtype)
            dx = (gy @ W).addmm_(gy @ up, down)
        return dx, None, None, dA, dB


class LoraFusion(LayerRow):
    name = "lorafusion"
    explains = "LoRA with fused Triton kernels that share a rank-r intermediate, as in LoRAFusion, without dropout"

    def unavailable(self, inputs: Inputs) -> str | None:
        rank = inputs.D.shape[1]
        if rank < 16 or rank & (rank - 1):
            return f"its kernels need a rank that is a power of two and at least 16, got {rank}"
        if os.environ.get("TRITON_INTERPRET") != "1" and not inputs.x.is_cuda:
            return f"Triton needs a GPU, but the inputs are on {inputs.x.device.type}"
        try:
            import triton  # noqa: F401
        except ImportError:
            return "the triton package is not installed"
        return None

    def build(self, inputs: Inputs) -> Layer:
        from benchmarks.ops.lorafusion import split_lora

        return lora(lambda x, A, B: split_lora(x, inputs.W, inputs.b, A, B), inputs)


class Merged(LayerRow):
    name = "merged"
    explains = "the update is added to the weight beforehand (in fp32, rounded once); trains no factors"
    trains = False

    def build(self, inputs: Inputs) -> Layer:
        return frozen((inputs.W.float() + (inputs.D @ inputs.G).t()).to(inputs.W.dtype), inputs)


#: All rows by name, in the order of the tables.
ROWS: dict[str, LayerRow] = {
    row.name: row
    for row in (
        Floor(),
        *(Efft(backend) for backend in backends()),
        Naive(),
        Paper(),
        Chain(),
        ChainCompiled(),
        Peft(),
        Addmm(),
        LoraFusion(),
        Merged(),
    )
}


def select(names: Iterable[str] | None) -> list[LayerRow]:
    """Return the rows with these ``names`` (default: all), starting with the frozen baseline.

    Raises:
        ValueError: a name is unknown.
    """
    wanted = list(ROWS if names is None else names)
    for name in wanted:
        if name not in ROWS:
            raise ValueError(f"unknown row {name!r}: {did_you_mean(name, ROWS)}")
    return [row for row in ROWS.values() if row.name in {"floor", *wanted}]
