"""Measure adapted layers that are not linear layers: attention with packed projections, and transformers' Conv1D.

    python -m benchmarks kinds --kind attention conv1d

The command times a forward and backward pass of one module. A row is one implementation. Each of the following rows
gives all weight matrices of the module an update of the same rank:

- ``efft``: this library.
- ``lora:peft``: LoRA of ``peft``.
- ``dense``: the factors of this library, from which the dense weights W + dW are built in every pass.

The row ``floor`` is the frozen module without an update. Ratios divide the time of a row by the time of this baseline.

A row is timed only if its errors against fp64 are at most twice those of dense weights in the same precision, or twice
the error of rounding the exact result if that is larger. The check covers the output y and all gradients. For
``lora:peft`` it covers only y and dx, the gradient with respect to the input. In the table, "both" is the time of a
forward and backward pass, and "fwd" is the time of a forward pass. The columns with "floor" contain ratios. "saved" is
the memory that a forward pass saves for the backward pass, and "trained" is the number of trained parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import efft
from benchmarks import gated
from benchmarks.options import parser_of_measurement
from efft_lab.record import append, machine_facts


class Attention(nn.Module):
    """Compute self-attention with torch's module, whose query, key and value weights are packed in one parameter."""

    targets = ("layer.in_proj_weight", "layer.out_proj")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(width, width // 64 or 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, width] -> [batch, tokens, width]
        y: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return y


class Conv1D(nn.Module):
    """Hold the first layer of GPT-2's MLP, which stores its weight transposed."""

    targets = ("layer",)

    def __init__(self, width: int) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.layer = Conv1D(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, tokens, width] -> [batch, tokens, 4 width]
        y: Tensor = self.layer(x)
        return y


KINDS: dict[str, Any] = {"attention": Attention, "conv1d": Conv1D}


@dataclass(frozen=True)
class Case:
    """Describe what is measured: a kind of module, the size of its input, the rank, the dtype and the device."""

    kind: str = "attention"
    width: int = 768
    batch: int = 8
    tokens: int = 197
    rank: int = 32
    dtype: str = "float32"
    device: str = "cpu"

    def module(self) -> nn.Module:
        """Return the frozen module; all calls return equal random weights."""
        torch.manual_seed(0)
        module: nn.Module = KINDS[self.kind](self.width)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=self.width**-0.5)
        return module.to(self.device, getattr(torch, self.dtype)).requires_grad_(False)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return random x [batch, tokens, width] and a random gradient with respect to y."""
        torch.manual_seed(1)
        like: dict[str, Any] = {"device": self.device, "dtype": getattr(torch, self.dtype)}
        x = torch.randn(self.batch, self.tokens, self.width, **like)
        with torch.no_grad():
            return x, torch.randn_like(self.module()(x))


@dataclass
class Trained:
    """Bind an implementation to the inputs of one case.

    Attributes:
        model: the module or function that computes y from x.
        factors: the trained tensors.
        x: the input. Shape [batch, tokens, width].
        gy: the gradient with respect to y.
        exact: the results of dense weights in fp64: y, dx and, except for ``floor`` and LoRA, the factors' gradients.
        plain: the results of dense weights in the precision of the row.
    """

    model: Callable[[Tensor], Tensor]
    factors: list[Tensor]
    x: Tensor
    gy: Tensor
    exact: dict[str, Tensor]
    plain: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.x = self.x.detach().requires_grad_()

    def forward(self) -> Tensor:
        """Return y with its autograd graph."""
        return self.model(self.x)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Run one forward and backward pass and return the gradients."""
        return torch.autograd.grad(self.forward(), [self.x, *self.factors], self.gy)

    def errors(self) -> dict[str, float]:
        """Return the errors as multiples of that of dense weights; see :func:`benchmarks.gated.error_multiples`."""
        y = self.forward()
        dx, *rest = torch.autograd.grad(y, [self.x, *self.factors], self.gy)
        got = {"y": y.detach(), "dx": dx, **{f"d{i}": g for i, g in enumerate(rest)}}
        return gated.error_multiples(got, self.exact, self.plain)

    @property
    def trained(self) -> int:
        """Return the number of trained parameters."""
        return sum(factor.numel() for factor in self.factors)


def floor(case: Case) -> Trained:
    """Return the frozen baseline, which computes the output and dx only."""
    model = case.module()
    return Trained(model, [], *case.inputs(), *_of_module(case, model))


def _of_module(case: Case, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return y and dx of ``model``, first in fp64 and then in the precision of the case."""
    found = []
    for dtype in (torch.float64, getattr(torch, case.dtype)):
        x, gy = (t.to(dtype) for t in case.inputs())
        x.requires_grad_()
        y = copy.deepcopy(model).to(dtype)(x)
        found.append({"y": y.detach(), "dx": torch.autograd.grad(y, x, gy)[0]})
    return found[0], found[1]


def _adapted(case: Case) -> nn.Module:
    model = case.module()
    config = efft.EfftConfig(rank=case.rank, targets=list(KINDS[case.kind].targets), head=[], dropout=0.0)
    efft.apply(model, config)
    torch.manual_seed(2)
    for _, factor in efft.named_factors(model):
        nn.init.normal_(factor, std=factor.shape[-2] ** -0.5)  # |dW| is then about |W|: errors are visible
    return model


def _densely(case: Case, adapted: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the plain module with the weights W + dW.

    Each call builds these weights from the factors of ``adapted``, in the dtype of x.
    """
    plain = case.module()
    updates = efft.adapted_layers(adapted)

    def run(x: Tensor) -> Tensor:
        sums = {}
        for name, update in updates.items():
            full = f"{name}.weight" if isinstance(update, nn.Module) else name
            D, G = update.factors.down_up(update.binding)
            sums[full] = plain.get_parameter(full).to(x.dtype) + update.update(D, G).to(x.dtype)
        rest = {name: p.to(x.dtype) for name, p in plain.named_parameters() if name not in sums}
        y: Tensor = torch.func.functional_call(plain, sums | rest, (x,))
        return y

    return run


def _dense_results(case: Case, adapted: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    model = copy.deepcopy(adapted)
    model.efft.to(torch.promote_types(dtype, torch.float32))
    x, gy = (t.to(dtype) for t in case.inputs())
    x.requires_grad_()
    y = _densely(case, model)(x)
    dx, *rest = torch.autograd.grad(y, [x, *(p for _, p in efft.named_factors(model))], gy)
    return {"y": y.detach(), "dx": dx, **{f"d{i}": g for i, g in enumerate(rest)}}


def _of_factors(case: Case, adapted: nn.Module, model: Callable[[Tensor], Tensor]) -> Trained:
    exact, plain = (_dense_results(case, adapted, t) for t in (torch.float64, getattr(torch, case.dtype)))
    return Trained(model, [p for _, p in efft.named_factors(adapted)], *case.inputs(), exact, plain)


def adapted(case: Case) -> Trained:
    """Return the row of this library."""
    model = _adapted(case)
    return _of_factors(case, model, model)


def dense(case: Case) -> Trained:
    """Return a row that builds the dense weights W + dW from the same factors, under autograd."""
    model = _adapted(case)
    return _of_factors(case, model, _densely(case, model))


def lora(case: Case) -> Trained:
    """Return a row with LoRA of ``peft`` on the same module, at the same rank."""
    import peft

    model: Any = peft.get_peft_model(
        case.module(), peft.LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules=["layer"])
    )
    factors = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(2)
    for factor in factors:
        nn.init.normal_(factor, std=factor.shape[-1] ** -0.5)
    merged = copy.deepcopy(model).double().merge_and_unload()
    return Trained(model, factors, *case.inputs(), *_of_module(case, merged))


ROWS: dict[str, Callable[[Case], Trained]] = {"floor": floor, "efft": adapted, "lora:peft": lora, "dense": dense}


def measure(case: Case, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measure the named rows and return one line of the result file per row."""
    common = {**machine_facts(), "suite": "kinds", "case": case.kind, **asdict(case)}
    return gated.measure({name: partial(ROWS[name], case) for name in names}, common, repeats, case.device)


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table of one case."""
    first = lines[0]
    title = f"{first['kind']}, width {first['width']}, {first['batch']} x {first['tokens']} tokens, {first['dtype']}"
    gated.show(title, lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and record every case."""
    options = parser_of_measurement("kinds", __doc__, ["float32"])
    options.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    options.add_argument("--width", type=int, default=Case.width)
    options.add_argument("--batch", type=int, default=Case.batch)
    options.add_argument("--rank", type=int, default=Case.rank)
    options.add_argument("--repeats", type=int, default=10)
    args = options.parse_args(words)
    path = None
    for kind in args.kind:
        for dtype in args.dtype:
            case = Case(kind, args.width, args.batch, rank=args.rank, dtype=dtype, device=args.device)
            lines = measure(case, list(ROWS), args.repeats)
            path = append("kinds", lines, args.results)
            show(lines)
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
