"""Count the work of the host for one adapted layer: dispatcher calls, Python calls and microseconds.

    python -m benchmarks host

The host is the CPU that launches the operations. If a GPU finishes a layer faster than the host can launch the next
one, the GPU waits for the host. This command measures the work of the host, not the arithmetic. The model is a chain of
small linear layers, whose products take almost no time. A row is one way to adapt the chain. The row ``linear`` is the
frozen chain. In the rows whose names begin with ``mlp``, each layer of the chain is an MLP. It consists of a layer
norm, a linear layer, a GELU and another linear layer. The row ``mlp`` is frozen. The rows whose names begin with
``mlp-fused`` run after ``efft.fuse``. Each row runs in these modes, but after ``efft.fuse`` not in inference mode, in
which it has no effect:

- ``forward``: a forward pass in training mode, which records an autograd graph.
- ``forward_backward``: the same pass, followed by its backward pass.
- ``evaluation``: a forward pass in eval mode under ``torch.no_grad()``.
- ``inference``: a forward pass in eval mode under ``torch.inference_mode()``.

Each count is taken with two depths of the chain. The difference, divided by the number of additional layers, is the
count per layer. The rest, which does not depend on the depth, is the count per pass. Counts of calls do not vary
between machines that have the same versions of Python and its packages.

- A dispatcher call is a call of an operator of torch or of this library, from Python or from another operator.
  ``resolve_conj`` is not counted, because only torch's products on the CPU call it.
- A Python call is a call, from Python, of a Python function or of a C function.
- Microseconds are the best of many repetitions. Every repetition runs all rows.

The row ``efft:triton`` runs on the CPU with kernels that do nothing, and its counts do not include Triton's launcher.
The rows of the backend ``cuda`` run on the meta device. Only their dispatcher calls are counted, and calls that this
library's operators make are left out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import efft
from benchmarks.options import DTYPES, parser_of
from efft_kernels import Backend, backends, can_run, use_backend
from efft_lab.record import append, machine_facts

#: Sizes of the chain: width of the layers, rank of the update, and shape of the activations.
WIDTH, RANK, LEADING = 64, 16, (2, 8)
#: The two depths of the chain, in layers.
DEPTHS = (4, 12)
MODES = ("forward", "forward_backward", "evaluation", "inference")
#: The modes in which efft.fuse has an effect.
FUSED_MODES = ("forward", "forward_backward", "evaluation")


class Chain(nn.Module):
    """Apply linear layers in turn."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(WIDTH, WIDTH)}) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["fc"](x)  # type: ignore[index]
        return x


class MlpChain(nn.Module):
    """Apply MLPs in turn, each after a layer norm."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _adapted(model: nn.Module) -> nn.Module:
    efft.apply(model, efft.EfftConfig(rank=RANK, dropout=0.0, targets=["fc"], head=[]))
    return model


def _adapted_mlp(model: nn.Module) -> nn.Module:
    efft.apply(model, efft.EfftConfig(rank=RANK, dropout=0.0, targets=["1", "3"], head=[]))
    return model


def _fused_mlp(model: nn.Module) -> nn.Module:
    efft.fuse(_adapted_mlp(model))
    return model


def _lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["fc"]))


@dataclass(frozen=True)
class HostRow:
    """Describe one way to adapt the chain.

    Attributes:
        adapt: function that adapts the chain in place and returns the model to run.
        backend: the backend of this library's ops, or None if the row does not use them.
        device: the device of all tensors.
        around: function that returns the context in which the row must run.
        chain: function that returns a chain of the given depth.
        modes: the modes in which the row runs.
    """

    adapt: Callable[[nn.Module], nn.Module]
    backend: Backend | None = None
    device: str = "cpu"
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    chain: Callable[[int], nn.Module] = Chain
    modes: Sequence[str] = MODES

    def reason(self) -> str | None:
        """Return None if the row can run on this machine, else the reason why it cannot."""
        if self.backend is None:
            return None
        try:
            with self.around():
                return can_run(self.backend, torch.empty(1, device=self.device))
        except ImportError as error:
            return str(error)

    @contextmanager
    def running(self, dtype: str) -> Iterator[None]:
        """Run the ``with`` block in the contexts of the row; autocast is on for half precision."""
        autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()
        with autocast, self.around(), nullcontext() if self.backend is None else use_backend(self.backend):
            yield


class _Unlaunched:
    """Stand in for a Triton kernel, and do nothing when it is launched."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def without_launches() -> Iterator[None]:
    """Make the backend ``triton`` accept CPU tensors and launch no kernels. Its results are then undefined."""
    from efft_kernels.triton import lowrank_gemm, reduce_tokens, tt_contract

    with mock.patch.object(backends, "_INTERPRETED", True):
        patched = [
            mock.patch.object(module, name, _Unlaunched())
            for module in (lowrank_gemm, reduce_tokens, tt_contract)
            for name in vars(module)
            if name.endswith("_kernel")
        ]
        for patch in patched:
            patch.start()
        try:
            yield
        finally:
            for patch in patched:
                patch.stop()


def _with_schemas_of_cuda() -> AbstractContextManager[object]:
    """Return a context in which the backend ``cuda`` runs on meta tensors without its compiled library.

    On the meta device only the schemas of its operators are needed.
    """
    return mock.patch.dict(backends.MISSING, cuda=None)


ROWS: dict[str, HostRow] = {
    "linear": HostRow(_frozen),
    "efft:eager": HostRow(_adapted, Backend.EAGER),
    "efft:cpu": HostRow(_adapted, Backend.CPU),
    "efft:triton": HostRow(_adapted, Backend.TRITON, around=without_launches),
    "efft:cuda": HostRow(_adapted, Backend.CUDA, device="meta", around=_with_schemas_of_cuda),
    "peft": HostRow(_lora),
    "mlp": HostRow(_frozen, chain=MlpChain),
    "mlp:cpu": HostRow(_adapted_mlp, Backend.CPU, chain=MlpChain),
    "mlp-fused:cpu": HostRow(_fused_mlp, Backend.CPU, chain=MlpChain, modes=FUSED_MODES),
    "mlp-fused:cuda": HostRow(
        _fused_mlp, Backend.CUDA, "meta", _with_schemas_of_cuda, chain=MlpChain, modes=FUSED_MODES
    ),
}


def pass_of(row: HostRow, mode: str, dtype: str, depth: int) -> Callable[[], None]:
    """Return a function that runs one pass of a chain of ``depth`` layers, adapted by ``row``."""
    torch.manual_seed(0)
    # The backbone is converted to the measured dtype before it is adapted. The factors then stay in fp32.
    model = row.adapt(row.chain(depth).to(getattr(torch, dtype))).to(row.device)
    model.train(mode.startswith("forward"))
    training = model.training
    x = torch.randn(*LEADING, WIDTH, dtype=getattr(torch, dtype)).to(row.device).requires_grad_(training)
    gy = torch.ones_like(x, requires_grad=False)
    context = {"evaluation": torch.no_grad, "inference": torch.inference_mode}.get(mode, nullcontext)

    def run() -> None:
        with context(), row.running(dtype):
            y = model(x)
        if mode == "forward_backward":
            with row.running(dtype):
                y.backward(gy)

    return run


def dispatcher_calls(run: Callable[[], None], outside_of_ops: bool = False) -> int:
    """Return the number of operator calls in one run of ``run``, after one run that is not counted.

    With ``outside_of_ops``, the calls that operators of this library make are not counted.
    """
    run()
    with torch.autograd.profiler.profile() as profile:
        run()
    calls = [event for event in profile.function_events if _is_operator(event.name)]
    if outside_of_ops:
        calls = [event for event in calls if not _is_inside_of_op(event)]
    return len(calls)


def _is_operator(name: str) -> bool:
    namespace, _, rest = name.partition("::")
    return bool(rest) and namespace not in ("autograd", "torch") and rest != "resolve_conj"


def _is_inside_of_op(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("efft::"):
            return True
        parent = parent.cpu_parent
    return False


def python_calls(run: Callable[[], None]) -> int:
    """Return the number of calls that Python makes in one run of ``run``, after one run that is not counted."""
    run()
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def best_seconds(runs: dict[Any, Callable[[], None]], repeats: int) -> dict[Any, float]:
    """Return the least time of each function, measured in ``repeats`` rounds over all functions."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            best[key] = min(best[key], time.perf_counter() - start)
    return best


def split(of_depth: dict[int, float]) -> tuple[float, float]:
    """Return the count per layer and the count per pass, computed from the counts at two depths."""
    few, many = sorted(of_depth)
    layer = (of_depth[many] - of_depth[few]) / (many - few)
    return layer, of_depth[few] - few * layer


def measure(rows: Sequence[str], dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Measure every row in every mode, and return one line of the result file for each."""
    runs = {
        (name, mode, depth): pass_of(ROWS[name], mode, dtype, depth)
        for name in rows
        if ROWS[name].reason() is None
        for mode in ROWS[name].modes
        for depth in DEPTHS
    }
    real = {key: run for key, run in runs.items() if ROWS[key[0]].device != "meta"}
    calls = {key: dispatcher_calls(run, ROWS[key[0]].device == "meta") for key, run in runs.items()}
    python = {key: python_calls(run) for key, run in real.items()}
    seconds = best_seconds(real, repeats) if repeats else {}
    lines = []
    for name in rows:
        row = ROWS[name]
        common = {**machine_facts(), "suite": "host", "dtype": dtype, "device": row.device, "row": name}
        if row.reason() is not None:
            lines.append({**common, "reason": row.reason()})
            continue
        for mode in row.modes:
            line: dict[str, Any] = {**common, "mode": mode}
            for field, found, unit in (
                ("dispatcher_calls", calls, 1),
                ("python_calls", python, 1),
                ("microseconds", seconds, 1e6),
            ):
                if (name, mode, DEPTHS[0]) not in found:
                    continue
                layer, rest = split({depth: unit * found[name, mode, depth] for depth in DEPTHS})
                line[field] = {"per_layer": round(layer, 2), "per_pass": round(rest, 2)}
            lines.append({**line, "repeats": repeats})
    return lines


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print one table: the counts per layer and, in parentheses, the additional counts per pass."""
    fields = ("dispatcher_calls", "python_calls", "microseconds")
    print(f"\n{'dtype':<10}{'row':<16}{'mode':<18}" + "".join(f"{field.replace('_', ' '):>22}" for field in fields))
    for line in lines:
        start = f"{line['dtype']:<10}{line['row']:<16}"
        if "reason" in line:
            print(f"{start}not available: {line['reason']}")
            continue
        cells = (line.get(field) for field in fields)
        texts = ("-" if cell is None else f"{cell['per_layer']:.1f} ({cell['per_pass']:.0f})" for cell in cells)
        print(f"{start}{line['mode']:<18}" + "".join(f"{text:>22}" for text in texts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record the work of the host."""
    parser = parser_of("host", __doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--repeats",
        type=int,
        default=400,
        help="default: %(default)s; with 0, calls are counted and no time is measured",
    )
    args = parser.parse_args(arguments)
    for dtype in args.dtype:
        lines = measure(args.rows, dtype, args.repeats)
        path = append("host", lines, args.results)
        show(lines)
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
