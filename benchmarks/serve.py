"""Measure inference with a merged adapter, an unmerged adapter, and many adapters, relative to the plain model.

    python -m benchmarks serve --quick

A row is one way to serve the model. Weights and images have the dtype of the option ``--dtype``. All rows get the same
images, and every repetition measures all rows in turn. The row ``base`` is the plain model. A row ``pool:n`` holds n
adapters in one model (:class:`efft.AdapterPool`), and successive images use these adapters in turn. The rows whose
names start with ``graph:`` replay a CUDA graph of the forward pass, and need a GPU. Each time is compared with the
times of ``base``, ``merged`` (the adapter is merged into the weights) and ``pool:1``.

Rows that compute the EFFT update are checked before they are timed. The errors of their logits against fp64 may be at
most twice those of a model with the dense weights W + dW in the same dtype. Otherwise their lines contain the reason
and no times.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import efft
from benchmarks.model.rows import NAIVE, adapted, lora
from benchmarks.model.step import Setting
from benchmarks.options import parser_of_measurement
from benchmarks.timing import ratios, time_rows
from efft.graphs.capture import can_capture, capture, graphs_on
from efft.pool.selecting import FixedBatch
from efft_kernels import Backend, can_run, use_backend
from efft_kernels.build import available_memory
from efft_kernels.testing import assert_close_budget, backends
from efft_lab.record import append, machine_facts, quantiles


class ManyAdapters(nn.Module):
    """Send the images through n adapters in turn, one adapter per image.

    The n adapters are copies of one adapter. They need as much time and memory as different adapters, and the correct
    output is known.
    """

    pool: efft.AdapterPool

    def __init__(self, model: nn.Module, n: int) -> None:
        super().__init__()
        self.model, self.n, self.next = model, n, 0
        self.default_cfg = model.default_cfg

    def fill(self) -> None:
        """Put n copies of the model's adapter into a pool.

        Raises:
            RuntimeError: the memory that is available on a CPU is too small for n adapters.
        """
        adapter = copy.deepcopy(self.model)
        self.pool = efft.AdapterPool(efft.remove(self.model), capacity=1)
        self.pool.add("0", adapter)
        needed = self.n * self.pool.bytes_per_adapter
        if next(adapter.parameters()).device.type == "cpu" and needed > available_memory():
            raise RuntimeError(f"{self.n} adapters need {needed / 2**30:.1f} GiB of memory, more than is available")
        self.pool.detach()
        self.pool = efft.AdapterPool(self.model, capacity=self.n)
        for i in range(self.n):
            self.pool.add(str(i), adapter)

    def forward(self, images: Tensor) -> Tensor:
        with self.pool.use(self.successive(len(images))) as model:
            logits: Tensor = model(images)
        return logits

    def successive(self, images: int) -> list[str]:
        """Return the adapters of the next images, one name per image."""
        names = [str((self.next + i) % self.n) for i in range(images)]
        self.next += images
        return names


class ManyAdaptersInGraph(ManyAdapters):
    """Send the images through n adapters in turn, by a CUDA graph for each number of images."""

    def __init__(self, model: nn.Module, n: int) -> None:
        super().__init__(model, n)
        self._graphs: dict[int, tuple[FixedBatch, Tensor, Tensor, Callable[[], None]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        if len(images) not in self._graphs:
            with torch.inference_mode(False), torch.no_grad():
                self._graphs[len(images)] = self._capture(images)
        batch, inputs, logits, replay = self._graphs[len(images)]
        batch.select(self.successive(len(images)))
        inputs.copy_(images)
        replay()
        return logits.clone()

    def _capture(self, images: Tensor) -> tuple[FixedBatch, Tensor, Tensor, Callable[[], None]]:
        """Return the adapters of a graph, the tensors with its images and logits, and a function that replays it."""
        batch, inputs, graphs = self.pool.fixed_batch(len(images)), images.clone(), graphs_on(images.device)
        found: list[Tensor] = []

        with self.pool.use(batch) as model:
            graphs.warm_up(lambda: found.append(model(inputs)))
            logits = torch.empty_like(found[0])

            def run() -> None:
                logits.copy_(model(inputs))

            graphs.warm_up(run)
            return batch, inputs, logits, capture(graphs, run, "the forward pass of the pool")


class InGraph(nn.Module):
    """Serve a model from CUDA graphs (:func:`efft.graph_serve`), one for each number of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.default_cfg = model.default_cfg
        self._servers: dict[int, Callable[[Tensor], Tensor]] = {}

    def forward(self, images: Tensor) -> Tensor:
        n = len(images)
        if n not in self._servers:
            self._servers[n] = efft.graph_serve(self.model, (images,), batches=(n,))
        return self._servers[n](images)


def pooled(n: int) -> Callable[[nn.Module, int], nn.Module]:
    """Return a function that adapts a model for a pool of n adapters; all have the factors of the other EFFT2 rows.

    EFFT2 is the default variant of this library's method, in which the layers share the factors of their updates.
    """
    return lambda model, rank: ManyAdapters(adapted(model, rank), n)


@dataclass(frozen=True)
class ServeRow:
    """Describe one way to serve an adapted model.

    Attributes:
        name: name of the row in tables and result files.
        explains: description in one line.
        adapt: function that creates the model from (plain model, rank).
        finish: function that is called on the model after its conversion to the dtype, or None.
        is_efft: whether the model computes the EFFT update.
        backend: the backend of this library's ops, or None for the default.
        graphs: whether the model captures CUDA graphs.
    """

    name: str
    explains: str
    adapt: Callable[[nn.Module, int], nn.Module]
    finish: Callable[[nn.Module], object] | None = None
    is_efft: bool = False
    backend: Backend | None = None
    graphs: bool = False

    def build(self, setting: Setting) -> nn.Module:
        """Return the model of the row in eval mode, in the dtype of the setting."""
        model = self.adapt(setting.plain(), setting.rank).eval()
        model = model.to(setting.device, getattr(torch, setting.dtype))
        if self.finish is not None:
            self.finish(model)
        return model

    def running(self) -> AbstractContextManager[None]:
        """Return the context in which the model of this row must run."""
        return nullcontext() if self.backend is None else use_backend(self.backend)


ROWS: dict[str, ServeRow] = {
    row.name: row
    for row in (
        ServeRow("base", "the plain model", lambda model, rank: model),
        *(
            ServeRow(f"efft:{b.value}", f"unmerged EFFT2, backend {b.value}", adapted, is_efft=True, backend=b)
            for b in backends()
        ),
        ServeRow("merged", "EFFT2 merged into the weights", adapted, efft.merge, is_efft=True),
        *(
            ServeRow(
                f"pool:{n}",
                f"a pool of {n} adapters, which successive images use in turn",
                pooled(n),
                ManyAdapters.fill,
                is_efft=True,
            )
            for n in (1, 10, 100, 1000)
        ),
        ServeRow("graph:base", "the plain model, CUDA graph", lambda model, rank: InGraph(model), graphs=True),
        ServeRow(
            "graph:efft",
            "unmerged EFFT2, CUDA graph",
            lambda model, rank: InGraph(adapted(model, rank)),
            is_efft=True,
            graphs=True,
        ),
        *(
            ServeRow(
                f"graph:pool:{n}",
                f"a pool of {n} adapters, which successive images use in turn, CUDA graph",
                lambda model, rank, n=n: ManyAdaptersInGraph(adapted(model, rank), n),  # type: ignore[misc]
                ManyAdapters.fill,
                is_efft=True,
                graphs=True,
            )
            for n in (10, 1000)
        ),
        ServeRow("peft", "unmerged LoRA of the peft library, same rank, same layers", lora),
    )
}


#: For each ratio ``ratio_to_NAME`` in the result lines, NAME and the row whose time is the divisor.
_COMPARED_WITH = {"base": "base", "merged": "merged", "one_adapter": "pool:1"}


def logits_of(row: ServeRow, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return a function that runs ``model`` on ``images`` in inference mode and returns the logits."""

    @torch.inference_mode()
    def run() -> Tensor:
        with row.running():
            return model(images)

    return run


def images_for(setting: Setting, model: nn.Module, n: int) -> Tensor:
    """Return ``n`` random images in the dtype of the weights. Shape [n, channels, height, width]."""
    return setting.examples(model, n)[0].to(getattr(torch, setting.dtype))


def build_checked(setting: Setting, rows: Sequence[ServeRow]) -> dict[str, nn.Module | str]:
    """Return the model of each row, or the reason why the row cannot be measured."""
    dense = ServeRow(NAIVE.name, NAIVE.explains, NAIVE.adapt)

    def logits(row: ServeRow, model: nn.Module, at: Setting) -> Tensor:
        return logits_of(row, model, images_for(at, model, 2))()

    double = replace(setting, dtype="float64")
    exact = logits(dense, dense.build(double), double)
    rounded = logits(dense, dense.build(setting), setting)
    found: dict[str, nn.Module | str] = {}
    for row in rows:
        probe = torch.empty(1, dtype=getattr(torch, setting.dtype), device=setting.device)
        reason = None if row.backend is None else can_run(row.backend, probe)
        if row.graphs and not can_capture(torch.device(setting.device)):
            reason = f"CUDA graphs need a GPU, and the device is {setting.device}"
        if reason is not None:
            found[row.name] = f"not available: {reason}"
            continue
        try:
            model = row.build(setting)
            if row.is_efft:
                assert_close_budget(logits(row, model, setting), exact, rounded, name="logits")
            found[row.name] = model
        except AssertionError as error:
            found[row.name] = f"wrong: {error}"
        except (RuntimeError, ImportError) as error:  # such as out of memory; continue with the other rows
            found[row.name] = f"failed: {error}"
    return found


def measure(setting: Setting, rows: Sequence[ServeRow], batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Measure every row and return one line of the result file per row and batch size."""
    built = build_checked(setting, rows)
    models = {name: model for name, model in built.items() if isinstance(model, nn.Module)}
    lines = []
    for batch in batches:
        common = {**machine_facts(), "suite": "serve", **asdict(replace(setting, batch=batch))}
        runs = {name: logits_of(ROWS[name], m, images_for(setting, m, batch)) for name, m in models.items()}
        samples = time_rows(runs, repeats, warmup=2, device=setting.device)
        relative = {f"ratio_to_{b}": ratios(samples, name) for b, name in _COMPARED_WITH.items() if name in samples}
        for name, model in built.items():
            line = {**common, "row": name}
            if isinstance(model, str):
                lines.append({**line, "reason": model})
                continue
            seconds = quantiles(samples[name])
            line |= {"seconds": seconds, "images_per_s": batch / seconds["p50"]}
            if isinstance(model, ManyAdapters):
                line["bytes_per_adapter"] = model.pool.bytes_per_adapter
            lines.append(line | {ratio: quantiles(of_rows[name]) for ratio, of_rows in relative.items()})
    return lines


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print the table of one setting."""
    first = lines[0]
    print(f"\n{first['model']}, rank {first['rank']}, {first['dtype']}, {first['device']}")
    print(
        f"{'batch':>5} {'row':<16} {'ms':>9} {'images/s':>9} {'ratio to base':>21} {'to merged':>9} {'to pool:1':>9} "
        "KiB per adapter"
    )
    for line in lines:
        figures = line.get("reason")
        if figures is None:
            ratio = line.get("ratio_to_base")
            relative = "-" if ratio is None else f"{ratio['p50']:.3f} [{ratio['p20']:.3f}, {ratio['p80']:.3f}]"
            others = (line.get(f"ratio_to_{of}", {}).get("p50") for of in ("merged", "one_adapter"))
            figures = f"{1e3 * line['seconds']['p50']:>9.2f} {line['images_per_s']:>9.1f} {relative:>21}"
            figures += "".join(f" {'-' if x is None else f'{x:.3f}':>9}" for x in others)
            figures += f" {line['bytes_per_adapter'] / 1024:.1f}" if "bytes_per_adapter" in line else ""
        print(f"{line['batch']:>5} {line['row']:<16} {figures}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    options = parser_of_measurement("serve", __doc__)
    options.add_argument("--model", default=Setting.model, help="timm name; ViT or Swin")
    options.add_argument("--batch", type=int, nargs="+", help="numbers of images; default: 1 8, on a GPU 1 8 64 256")
    options.add_argument("--rank", type=int, default=Setting.rank)
    options.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options.add_argument("--repeats", type=int, help="default: 20, with --quick 5")
    options.add_argument("--quick", action="store_true", help="few repeats")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and record every setting."""
    args = parser().parse_args(words)
    batches = args.batch or ([1, 8] if args.device == "cpu" else [1, 8, 64, 256])
    repeats = args.repeats or (5 if args.quick else 20)
    rows = [row for row in ROWS.values() if row.name in {"base", *args.rows}]
    for dtype in args.dtype:
        lines = measure(Setting(args.model, max(batches), args.rank, dtype, args.device), rows, batches, repeats)
        path = append("serve", lines, args.results)
        show(lines)
    print(f"\nresults written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
