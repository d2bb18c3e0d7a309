"""Measure a forward and backward pass of one mixture-of-experts module in which all weight matrices have an update.

    python -m benchmarks experts --quick
    python -m benchmarks experts --model qwen3_30b --device cuda --dtype bfloat16

The module is the class ``MixtralExperts`` of transformers, with the sizes of several models. Its weights and the
selection of experts are random. A row is one implementation. Each of the following rows gives both parameters of the
module (``gate_up_proj`` and ``down_proj``) an update of the same rank:

- ``efft``: this library. An update is a product U C V. All matrices share U and V, and each has its own core C.
- ``lora:peft``: LoRA of ``peft``, with its option ``target_parameters``.
- ``dense``: the factors of this library, from which the dense weights W + dW are built in every pass.

The row ``floor`` is the frozen module without an update. Ratios divide the time of a row by the time of this baseline.

A row is timed only if its output and all its gradients are accurate: their errors against fp64 may be at most twice
those of dense weights in the same precision. If a row fails, its line contains the reason and no times. In the table,
"both" is the time of a forward and backward pass, and "fwd" is the time of a forward pass. The columns with "floor"
contain ratios. "saved" is the memory that a forward pass saves for the backward pass, and "trained" is the number of
trained parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gated
from benchmarks.options import parser_of_measurement
from efft.adapting.experts import adapt_experts
from efft_kernels import Site, TTFactors
from efft_lab.record import append, machine_facts

#: For each model, the width of a token, the inner width of an expert, the number of experts, and the number of experts
#: that process each token.
MODELS = {
    "tiny": (64, 32, 4, 2),
    "granite_1b": (1024, 512, 32, 8),
    "olmoe_1b_7b": (2048, 1024, 64, 8),
    "qwen3_30b": (2048, 768, 128, 8),
    "mixtral_8x7b": (4096, 14336, 8, 2),
}
_PARAMETERS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """Describe a module of experts and the number of input tokens."""

    model: str = "granite_1b"
    tokens: int = 512
    rank: int = 16
    dtype: str = "float32"
    device: str = "cpu"

    def inputs(self) -> Inputs:
        """Return random weights, random tokens and a random selection of experts for each token."""
        d, inner, n_experts, k = MODELS[self.model]
        like: dict[str, Any] = {"device": self.device, "dtype": getattr(torch, self.dtype)}
        torch.manual_seed(0)
        shapes = {"gate_up_proj": (n_experts, 2 * inner, d), "down_proj": (n_experts, d, inner)}
        stored = {name: torch.randn(shape, **like).mul_(shape[-1] ** -0.5) for name, shape in shapes.items()}
        scores, chosen = torch.rand(self.tokens, n_experts, device=self.device).topk(k)
        x, gy = (torch.randn(self.tokens, d, **like) for _ in range(2))
        return Inputs(self, stored, x, chosen, scores.softmax(-1).to(x.dtype), gy)


@dataclass(frozen=True)
class Inputs:
    """Hold the inputs that all rows of a case share. d is the width of a token, and k the number of experts per token.

    Attributes:
        case: the case.
        stored: the frozen weights, by the name of the parameter. Each has the shape [experts, d_out, d_in].
        x: the tokens. Shape [tokens, d].
        chosen: the indices of the selected experts. Shape [tokens, k].
        weights: the weights with which the outputs of the selected experts are added. Shape [tokens, k].
        gy: the gradient with respect to the output. Shape [tokens, d].
    """

    case: Case
    stored: dict[str, Tensor]
    x: Tensor
    chosen: Tensor
    weights: Tensor
    gy: Tensor

    def module(self, implementation: str = "grouped_mm") -> nn.Module:
        """Return a frozen module that shares the weights in ``stored``.

        ``implementation`` names the code in transformers that computes the experts, such as "eager".
        """
        import transformers
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        d, inner, n_experts, _ = MODELS[self.case.model]
        config = transformers.MixtralConfig(hidden_size=d, intermediate_size=inner, num_local_experts=n_experts)
        config._experts_implementation = implementation
        with torch.device("meta"):
            module: nn.Module = MixtralExperts(config)
        for name, weight in self.stored.items():
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
        return module


@dataclass
class Trained:
    """Bind an implementation to the inputs of one case.

    Attributes:
        inputs: the inputs of the case.
        run: function that computes y from x, the selected experts and their weights.
        factors: the trained tensors by name.
        deltas: differentiable function that computes the dense update of each parameter from the factors, in any dtype.
    """

    inputs: Inputs
    run: Callable[..., Tensor]
    factors: dict[str, Tensor]
    deltas: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    def __post_init__(self) -> None:
        self.x = self.inputs.x.detach().requires_grad_()
        self.leaves = [self.x, *self.factors.values()]

    def forward(self) -> Tensor:
        """Return y with its autograd graph."""
        return self.run(self.x, self.inputs.chosen, self.inputs.weights)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Run one forward and backward pass and return the gradients."""
        return torch.autograd.grad(self.forward(), self.leaves, self.inputs.gy)

    def results(self) -> dict[str, Tensor]:
        """Return ``y``, and the gradients with respect to x (``dx``) and every factor (``d`` and its name)."""
        y = self.forward()
        return self._named(y, torch.autograd.grad(y, self.leaves, self.inputs.gy))

    def densely(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Compute :meth:`results` in ``dtype`` with the forward pass of transformers and the dense weights W + dW."""
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves]
        deltas = self.deltas(dict(zip(self.factors, leaves[1:], strict=True)))
        sums = {name: weight.to(dtype) + deltas.get(name, 0) for name, weight in self.inputs.stored.items()}
        arguments = leaves[0], self.inputs.chosen, self.inputs.weights.to(dtype)
        y = torch.func.functional_call(self.inputs.module("eager"), sums, arguments)
        return self._named(y, torch.autograd.grad(y, leaves, self.inputs.gy.to(dtype)))

    def _named(self, y: Tensor, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        names = ["y", "dx", *(f"d{name}" for name in self.factors)]
        return dict(zip(names, [y.detach(), *gradients], strict=True))

    def errors(self) -> dict[str, float]:
        """Return the error of each result, divided by the error of dense weights in the same precision."""
        return gated.error_multiples(self.results(), self.densely(torch.float64), self.densely(self.x.dtype))

    @property
    def trained(self) -> int:
        """Return the number of trained parameters."""
        return sum(factor.numel() for factor in self.factors.values())


def floor(inputs: Inputs) -> Trained:
    """Return the frozen baseline: the forward pass and dx, which every method needs."""
    return Trained(inputs, inputs.module(), {}, lambda factors: {})


def efft(inputs: Inputs) -> Trained:
    """Return this library's row, which adds low-rank products to the products of the experts."""
    bank, sites = _bank(inputs)
    module = inputs.module()
    adapt_experts(module, {name: (bank, site) for name, site in sites.items()})
    return Trained(inputs, module, dict(bank.named_parameters()), _of_bank(bank, sites))


def dense(inputs: Inputs) -> Trained:
    """Return a row with the same factors that builds the dense weights W + dW under autograd."""
    bank, sites = _bank(inputs)
    module, factors, deltas = inputs.module(), dict(bank.named_parameters()), _of_bank(bank, sites)

    def run(*arguments: Tensor) -> Tensor:
        sums = {name: inputs.stored[name] + delta.to(inputs.x.dtype) for name, delta in deltas(factors).items()}
        y: Tensor = torch.func.functional_call(module, sums, arguments)
        return y

    return Trained(inputs, run, factors, deltas)


def lora(inputs: Inputs) -> Trained:
    """Return a row with LoRA of ``peft`` on the same parameters; each expert has separate factors."""
    import peft

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = inputs.module()

        def forward(self, *arguments: Tensor) -> Tensor:
            y: Tensor = self.experts(*arguments)
            return y

    names = [f"experts.{name}" for name in _PARAMETERS]
    config = peft.LoraConfig(
        r=inputs.case.rank, lora_alpha=inputs.case.rank, target_modules=[], target_parameters=names
    )
    model = peft.get_peft_model(Holder(), config)
    layers = {m.parameter_name: m for m in model.modules() if hasattr(m, "parameter_name")}
    factors = {}
    for name, layer in layers.items():
        for side in ("lora_A", "lora_B"):
            factors[f"{name}.{side}"] = factor = getattr(layer, side)["default"].weight
            n = inputs.case.rank if side == "lora_B" else factor.shape[1]
            nn.init.normal_(factor, std=n**-0.5)  # |dW| is then about |W|, which makes errors visible
    n_experts = MODELS[inputs.case.model][2]

    def deltas(factors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name in layers:
            A, B = factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]
            A, B = A.unflatten(0, (n_experts, -1)), B.unflatten(1, (-1, n_experts))
            found[name] = torch.einsum("ore,eri->eoi", B, A)
        return found

    return Trained(inputs, model, factors, deltas)


ROWS: dict[str, Callable[[Inputs], Trained]] = {"floor": floor, "efft": efft, "lora:peft": lora, "dense": dense}


def _bank(inputs: Inputs) -> tuple[TTFactors, dict[str, Site]]:
    """Return the module with the factors of both parameters, and a site for each parameter.

    The site states which cores in the module belong to the parameter. Each expert has one core per matrix: two for
    ``gate_up_proj``, which joins two matrices, and one for ``down_proj``. The norm of dW is about that of W. All calls
    return equal values.
    """
    d, inner, n, _ = MODELS[inputs.case.model]
    bank = TTFactors(d, inner, inputs.case.rank, n_cores=3 * n, device=inputs.case.device)
    torch.manual_seed(1)
    for factor, size in ((bank.U, d), (bank.C, 1), (bank.V, inputs.case.rank**2)):
        nn.init.normal_(factor, std=size**-0.5)
    first = Site(0, tuple(range(2 * n)), experts=n)
    second = Site(0, tuple(range(2 * n, 3 * n)), transpose=True, mask_scope=1, experts=n)
    return bank, dict(zip(_PARAMETERS, (first, second), strict=True))


def _of_bank(bank: TTFactors, sites: dict[str, Site]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def deltas(factors: dict[str, Tensor]) -> dict[str, Tensor]:
        first, second = (factors["C"][0, list(site.cores)] for site in sites.values())
        up = (factors["U"] @ first @ factors["V"]).unflatten(0, (-1, 2))  # [experts, 2, d, inner]
        down = factors["U"] @ second @ factors["V"]  # [experts, d, inner], as down_proj is stored
        return {"gate_up_proj": up.transpose(2, 3).flatten(1, 2), "down_proj": down}

    return deltas


def measure(case: Case, names: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measure the named rows and return one line of the result file per row."""
    inputs, common = case.inputs(), {**machine_facts(), "suite": "experts", **asdict(case)}
    return gated.measure({name: partial(ROWS[name], inputs) for name in names}, common, repeats, case.device)


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table of one case."""
    first = lines[0]
    title = f"{first['model']}, {first['tokens']} tokens, rank {first['rank']}, {first['dtype']}, {first['device']}"
    gated.show(title, lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    options = parser_of_measurement("experts", __doc__, ["float32"])
    options.add_argument("--model", nargs="+", choices=list(MODELS), default=[Case.model])
    options.add_argument("--tokens", nargs="+", type=int, default=[Case.tokens])
    options.add_argument("--rank", nargs="+", type=int, default=[Case.rank])
    options.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows to measure in addition to the baseline"
    )
    options.add_argument("--repeats", type=int, help="default: 10, with --quick 3")
    options.add_argument("--quick", action="store_true", help="few repeats")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and record every case."""
    args = parser().parse_args(words)
    names = [name for name in ROWS if name in {"floor", *args.rows}]
    path = None
    for model in args.model:
        for tokens in args.tokens:
            for rank in args.rank:
                for dtype in args.dtype:
                    case = Case(model, tokens, rank, dtype, args.device)
                    lines = measure(case, names, args.repeats or (3 if args.quick else 10))
                    path = append("experts", lines, args.results)
                    show(lines)
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
