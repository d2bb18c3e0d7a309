"""Compare the generations of the CUDA kernels, on the layers of a ViT-B block and on a training step of ViT-B.

    python -m benchmarks generations
    python -m benchmarks generations --measure layers --device cpu --backend eager --images 1 --rank 4 --repeats 1

The environment variable EFFT_SM90_GENERATION selects a generation of kernels, and a process reads it only once.
Therefore each generation runs in its own process, and the processes take turns: in every repetition, each process
measures all its rows once while the other processes wait. A row is one implementation. The row ``floor`` is the frozen
baseline. A ratio divides the time of a row by the time of the baseline in the same repetition and the same process. If
a process crashes or does not answer, its result line contains the reason, and the other processes continue.

``--measure layers`` measures each of the four layers of a block. The row ``efft:BACKEND`` calls the op, which converts
its factors to the layout of the kernels in every call. In a model, the newer generations convert the factors of all
layers at once. Therefore the row ``packed:BACKEND`` calls the op with factors that were converted beforehand. As in the
command ``ops``, the times are those of CUDA graphs with a cold L2 cache.

``--measure step`` measures the training step of a model without an adapter (``floor``), with an adapter
(``efft:BACKEND``), and with an adapter after ``efft.fuse`` (``fused:BACKEND``). Each step is measured twice: launched
from Python, and captured as a CUDA graph by ``efft.graph_step``.

Before a row is timed, its results are checked as in the commands ``ops`` and ``model``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efft
from benchmarks.budget import Budget
from benchmarks.model import rows as model_rows
from benchmarks.model.gate import Gate
from benchmarks.model.step import Setting, training_step, unavailable
from benchmarks.ops import cases
from benchmarks.ops.cases import Case, Inputs
from benchmarks.ops.rows import ROWS, Efft, Layer, LayerRow
from benchmarks.ops.run import PHASES, first_line, judge
from benchmarks.options import parser_of_measurement
from benchmarks.timing import ratios, sampler
from efft.graphs.capture import can_capture
from efft_kernels import Backend
from efft_kernels._packed import attach
from efft_kernels.measured import requested_kernels
from efft_lab.record import append, machine_facts, quantiles

VARIABLE = "EFFT_SM90_GENERATION"
GENERATIONS = (1, 2, 3)
#: Seconds for one round of measurements. A process that needs more is stopped, because a kernel may never end.
TO_MEASURE = 20.0

#: A measured function is identified by its row and its variant. The variant is a phase of a layer ("fwd", "bwd" or
#: "fwd_bwd"), or the way in which a step is launched ("launched" or "graph").
Key = tuple[str, str]
Measure = Callable[[], dict[Key, float]]


class Packed(Efft):
    """Call the op with factors that were converted beforehand to the dtype and layout of the kernels."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.name = f"packed:{backend.value}"
        self.explains = f"tt_linear of this library with converted factors, backend {backend.value}"

    def build(self, inputs: Inputs) -> Layer:
        layer = super().build(inputs)
        D, G = layer.leaves["D"], layer.leaves["G"]
        attach(D, G[None], [G])
        return layer


def layer_rows(backend: Backend) -> list[LayerRow]:
    """Return the rows of a layer. Only newer generations have kernels that read converted factors."""
    return [ROWS["floor"], Efft(backend), *([Packed(backend)] if requested_kernels() > 1 else [])]


def step_rows(backend: Backend) -> list[model_rows.ModelRow]:
    """Return the rows of a training step."""
    return [model_rows.ROWS[name] for name in ("floor", f"efft:{backend.value}", f"fused:{backend.value}")]


class Task(Protocol):
    """Describe one measurement. The main process sends this object to the processes of the generations."""

    @property
    def to_prepare(self) -> float:
        """Seconds for :meth:`prepare`, including the start of the process. A process that needs more is stopped."""

    def prepare(self) -> tuple[dict[Key, str | None], Measure]:
        """Build and check the rows in the current process.

        Returns:
            For each measured function, None or the reason why it is not timed; and a function that measures all others
            once and returns the seconds.
        """

    def about(self, variant: str) -> dict[str, Any]:
        """Return the fields of the result lines that describe the measurement."""


@dataclass(frozen=True)
class LayerTask:
    """Measure one layer, in the phases "fwd", "bwd" and "fwd_bwd"."""

    case: Case
    backend: Backend
    device: str
    to_prepare: float = 45.0

    def prepare(self) -> tuple[dict[Key, str | None], Measure]:
        inputs = self.case.inputs(self.device)
        budget = Budget(inputs)
        reasons: dict[Key, str | None] = {}
        calls: dict[Key, Callable[[], object]] = {}
        for row in layer_rows(self.backend):
            layer, found = judge(row, inputs, budget)
            for phase, method in PHASES.items():
                reasons[row.name, phase] = found["reason"]
                if layer is not None:
                    calls[row.name, phase] = getattr(layer, method)
        return reasons, sampler(calls, device=self.device, flush_l2=True, cuda_graphs=True)

    def about(self, variant: str) -> dict[str, Any]:
        sizes = self.case.sizes
        cuda = torch.device(self.device).type == "cuda"
        of_device = {"device": self.device, "l2": "cold" if cuda else None, "cuda_graphs": cuda}
        shape = {"tokens": sizes.tokens, "d_in": sizes.d_in, "d_out": sizes.d_out}
        return {**asdict(self.case), **shape, **of_device}

    def __str__(self) -> str:
        return str(self.case)


@dataclass(frozen=True)
class StepTask:
    """Measure the training step of a model, launched from Python and as a CUDA graph."""

    setting: Setting
    backend: Backend
    to_prepare: float = 80.0

    def prepare(self) -> tuple[dict[Key, str | None], Measure]:
        setting, gate = self.setting, Gate(self.setting)
        reasons: dict[Key, str | None] = {}
        calls: dict[Key, Callable[[], object]] = {}
        for row in step_rows(self.backend):
            for variant, build in (("launched", training_step), ("graph", graph_step)):
                reason = unavailable(row, setting)
                if reason is None and variant == "graph" and not can_capture(torch.device(setting.device)):
                    reason = f"CUDA graphs need a GPU, and the device is {setting.device}"
                if reason is not None:
                    reasons[row.name, variant] = f"not available: {reason}"
                    continue
                model = setting.build(row)
                wrong = gate.verdict(row, model)
                reasons[row.name, variant] = None if wrong is None else f"wrong: {wrong}"
                if wrong is None:
                    try:
                        calls[row.name, variant] = build(row, model, setting)
                    except (RuntimeError, ValueError) as error:  # such as a step that cannot be captured
                        reasons[row.name, variant] = f"failed: {first_line(error)}"
        return reasons, sampler(calls, device=setting.device)

    def about(self, variant: str) -> dict[str, Any]:
        return asdict(dataclasses.replace(self.setting, cuda_graphs=variant == "graph"))

    def __str__(self) -> str:
        s = self.setting
        return f"training step of {s.model}, batch {s.batch}, rank {s.rank}, {s.dtype}"


def graph_step(row: model_rows.ModelRow, model: nn.Module, setting: Setting) -> Callable[[], object]:
    """Return a training step like that of :func:`training_step`, which ``efft.graph_step`` has captured."""
    trained = [p for p in model.parameters() if p.requires_grad]
    cuda = torch.device(setting.device).type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True, capturable=cuda)  # as in docs/cuda-graphs.md
    batch = setting.examples(model)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    dtype = getattr(torch, setting.dtype)
    with row.running():
        step = efft.graph_step(model, optimizer, loss, batch, autocast=dtype if dtype.itemsize < 4 else None)
        step(*batch)  # the first update runs without a graph; then the step is captured
    return functools.partial(step, *batch)


# --- processes --------------------------------------------------------------------------------------------------------

_MEASURE = "measure"


def answer(connection: Connection) -> None:
    """Answer the requests of the main process until it closes the connection; this runs in a new process.

    The request is a :class:`Task` or ``_MEASURE``. The answer to a task contains the reasons of :meth:`Task.prepare`.
    The answer to ``_MEASURE`` contains the seconds of all functions of the last task. If a request fails, the answer is
    the text of the error.
    """
    measure: Measure | None = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        found: object
        try:
            if request == _MEASURE:
                assert measure is not None
                found = measure()
            else:
                measure = None  # frees the memory of the last task
                found, measure = request.prepare()
        except Exception as error:  # the main process reports it, and goes on with the other generations
            found = f"{type(error).__name__}: {first_line(error)}"
        connection.send(found)


class Failed(RuntimeError):
    """Report that the process of a generation failed or crashed."""


class Hangs(Failed):
    """Report that the process of a generation did not answer."""


class Generation:
    """Run the rows of one generation of kernels in a new process.

    Args:
        number: the generation, 1, 2 or 3.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=answer, args=(there,), daemon=True)
        with _environment(VARIABLE, str(number)):
            self._process.start()
        there.close()

    def send(self, request: object) -> None:
        try:
            self._connection.send(request)
        except OSError:
            raise Failed(f"the process ended with exit code {self._exit_code()}") from None

    def receive(self, deadline: float) -> dict[Key, Any]:
        """Return the answer to the last request.

        Raises:
            Hangs: there is no answer before ``deadline``, a time of ``time.monotonic``.
            Failed: the answer is an error, or the process ended.
        """
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise Hangs("the process did not answer in time, so a kernel may never have ended")
            found = self._connection.recv()
        except (EOFError, OSError):
            raise Failed(f"the process ended with exit code {self._exit_code()}") from None
        if isinstance(found, str):
            raise Failed(found)
        return found

    def stop(self) -> None:
        """End the process, even if it is waiting for a kernel."""
        self._process.kill()
        self._process.join(5)
        self._connection.close()

    def _exit_code(self) -> int | None:
        self._process.join(5)
        return self._process.exitcode


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable of the environment within the block. Processes that start there inherit it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass
class Outcome:
    """Hold the results of one generation: reasons of the functions that are not timed, and samples of all others."""

    reasons: dict[Key, str | None]
    samples: dict[Key, list[float]]
    failure: str | None = None


class Generations:
    """Hold the processes of several generations.

    A process that failed is replaced before the next task. A generation that did not answer is not measured again,
    because waiting for it would take the time of the others.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._running: dict[int, Generation] = {}
        self._hanging: set[int] = set()

    def __enter__(self) -> Generations:
        return self

    def __exit__(self, *error: object) -> None:
        for generation in self._running.values():
            generation.stop()

    def measure(self, task: Task, repeats: int) -> dict[int, Outcome]:
        """Let all generations prepare a task at the same time, and then measure it in turns, ``repeats`` times."""
        outcomes = {number: Outcome({}, {}) for number in self._numbers}
        deadline = time.monotonic() + task.to_prepare
        for number in self._numbers:
            if number in self._hanging:
                outcomes[number].failure = "not measured: the process did not answer in an earlier measurement"
                continue
            if number not in self._running:
                self._running[number] = Generation(number)
            self._ask(number, task, outcomes)
        for number in list(self._running):
            reasons = self._answer(number, deadline, outcomes)
            outcomes[number].reasons = reasons
            outcomes[number].samples = {key: [] for key, reason in reasons.items() if reason is None}
        for _ in range(repeats):
            for number in list(self._running):
                deadline = time.monotonic() + TO_MEASURE
                self._ask(number, _MEASURE, outcomes)
                for key, seconds in self._answer(number, deadline, outcomes).items():
                    outcomes[number].samples[key].append(seconds)
        return outcomes

    def _ask(self, number: int, request: object, outcomes: dict[int, Outcome]) -> None:
        try:
            self._running[number].send(request)
        except Failed as error:
            self._give_up(number, error, outcomes)

    def _answer(self, number: int, deadline: float, outcomes: dict[int, Outcome]) -> dict[Key, Any]:
        """Return the answer of a process, or an empty dictionary if the process failed now or before."""
        if number not in self._running:
            return {}
        try:
            return self._running[number].receive(deadline)
        except Failed as error:
            self._give_up(number, error, outcomes)
            return {}

    def _give_up(self, number: int, error: Failed, outcomes: dict[int, Outcome]) -> None:
        outcomes[number].failure = f"failed: {error}"
        self._running.pop(number).stop()
        if isinstance(error, Hangs):
            self._hanging.add(number)


# --- results ----------------------------------------------------------------------------------------------------------


def lines_of(task: Task, outcomes: dict[int, Outcome]) -> list[dict[str, Any]]:
    """Return the lines of the result file for one task.

    A line of a layer holds all phases of a row, as in ``ops.jsonl``. A line of a step holds one row, either launched or
    as a graph, as in ``model.jsonl``.
    """
    lines = []
    for number, outcome in outcomes.items():
        common = {**machine_facts(), "suite": "generations", "generation": number}
        if outcome.failure is not None:
            lines.append({**common, **task.about(""), "row": None, "reason": outcome.failure})
            continue
        relative = _ratios(outcome.samples)
        by_row: dict[tuple[str, str], dict[str, Any]] = {}
        for (row, variant), reason in outcome.reasons.items():
            phase = variant in PHASES
            line = by_row.setdefault((row, "" if phase else variant), {**task.about(variant), "row": row})
            line["reason"] = reason
            if reason is not None:
                continue
            for field, values in (("seconds", outcome.samples), ("ratio", relative)):
                if (row, variant) not in values:
                    continue
                summary = quantiles(values[row, variant])
                if phase:
                    line.setdefault(field, {})[variant] = summary
                else:
                    line[field] = summary
        lines += [{**common, **line} for line in by_row.values()]
    return lines


def _ratios(samples: dict[Key, list[float]]) -> dict[Key, list[float]]:
    """Divide every sample by that of the frozen baseline in the same repetition and variant, if it was measured."""
    found: dict[Key, list[float]] = {}
    for variant in {variant for _, variant in samples}:
        of_variant = {row: seconds for (row, v), seconds in samples.items() if v == variant}
        if "floor" in of_variant:
            found |= {(row, variant): values for row, values in ratios(of_variant).items()}
    return found


def show(task: Task, lines: Sequence[dict[str, Any]]) -> None:
    """Print the table of one task."""
    print(f"\n{task}")
    print(f"{'generation':<11}{'row':<16}{'variant':<10}{'ms':>9}{'ratio to floor':>15}")
    for line in lines:
        start = f"{line['generation']:<11}{line['row'] or 'all rows':<16}"
        if line["reason"] is not None:
            variant = "graph" if line.get("cuda_graphs") and "case" not in line else ""
            print(f"{start}{variant:<10} {line['reason']}")
            continue
        of_step = {"graph" if line["cuda_graphs"] else "launched": line["seconds"]}
        for variant, seconds in (line["seconds"] if "case" in line else of_step).items():
            ratio = line.get("ratio", {})
            ratio = ratio.get(variant, {}) if "case" in line else ratio
            relative = f"{ratio['p50']:.3f}" if ratio else "-"
            print(f"{start}{variant:<10}{1e3 * seconds['p50']:>9.3f}{relative:>15}", flush=True)


def show_block(lines: Sequence[dict[str, Any]]) -> None:
    """Print the ratio of a block: the summed medians of its layers, forward and backward, divided by the baseline's."""
    layers = {line["case"] for line in lines}
    sums: dict[tuple[int, str], float] = {}
    for generation, row in dict.fromkeys((line["generation"], line["row"]) for line in lines):
        own = [x for x in lines if (x["generation"], x["row"], x["reason"]) == (generation, row, None)]
        if {line["case"] for line in own} == layers:
            sums[generation, row] = sum(line["seconds"]["fwd_bwd"]["p50"] for line in own)
    print("\nall layers, forward and backward")
    for (generation, row), seconds in sums.items():
        ratio = f"{seconds / sums[generation, 'floor']:.3f}" if (generation, "floor") in sums else "-"
        print(f"{generation:<11}{row:<16}{'fwd_bwd':<10}{1e3 * seconds:>9.3f}{ratio:>15}")


def parser_of_block(command: str, description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options of a command that measures the layers of a block and a training step.

    Args:
        command, description: see :func:`benchmarks.options.parser_of`.
        repeats: default of the option ``--repeats``.
    """
    options = parser_of_measurement(command, description, dtypes=["bfloat16"])
    options.add_argument("--measure", nargs="+", choices=("layers", "step"), default=["layers", "step"])
    options.add_argument("--backend", choices=[b.value for b in Backend], default="cuda", help="default: %(default)s")
    options.add_argument("--layers-of", choices=list(cases.MODELS), default="vit_b", help="default: %(default)s")
    options.add_argument("--images", type=int, default=64, help="images per batch of a layer (default: %(default)s)")
    options.add_argument("--model", default=Setting.model, help="timm name of the trained model (default: %(default)s)")
    options.add_argument("--batch", type=int, default=64, help="images per batch of the step (default: %(default)s)")
    options.add_argument("--rank", type=int, default=Setting.rank, help="default: %(default)s")
    options.add_argument("--repeats", type=int, default=repeats, help="samples per row (default: %(default)s)")
    return options


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    options = parser_of_block("generations", __doc__, repeats=20)
    options.add_argument("--generation", nargs="+", type=int, choices=GENERATIONS, default=list(GENERATIONS))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record the layers and the step, with every generation."""
    args = parser().parse_args(arguments)
    backend = Backend(args.backend)
    path = None
    with Generations(args.generation) as generations:
        for dtype in args.dtype:
            tasks: list[Task] = []
            if "layers" in args.measure:
                tasks += [
                    LayerTask(Case(name, args.layers_of, args.images, args.rank, dtype), backend, args.device)
                    for name in cases.LAYERS
                ]
            if "step" in args.measure:
                tasks.append(StepTask(Setting(args.model, args.batch, args.rank, dtype, args.device), backend))
            of_layers: list[dict[str, Any]] = []
            for task in tasks:
                lines = lines_of(task, generations.measure(task, args.repeats))
                path = append("generations", lines, args.results)
                show(task, lines)
                if isinstance(task, LayerTask):
                    of_layers += lines
            if of_layers:
                show_block(of_layers)
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
