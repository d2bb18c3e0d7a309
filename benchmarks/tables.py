"""Format results as tables for the documentation. A list of the sources of the numbers follows each table.

Each table shows the newest run in a result file. Only :func:`host` shows the first and the newest run. The tables of
studies of accuracy are in :mod:`benchmarks.study_tables`.

In most tables a row is one implementation in a comparison. The row "floor" of the result files is the frozen baseline:
the layer or model without an update. It computes only the gradients that every method needs. The head of a model is
its classifier. A pool is one model that holds many adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.model_roofline import block_times, vit_block
from benchmarks.roofline_gpu import Machine
from efft_lab import record

Line = dict[str, Any]

NOTHING = "*No run recorded yet.*"

#: The rows of result files in the order of the tables, with their titles.
TITLES = {
    "floor": "frozen baseline",
    "base": "plain model",
    "efft:auto": "**EFFT2, this library**",
    "fused:auto": "**EFFT2, this library, after `efft.fuse`**",
    "efft:cpu": "EFFT2, backend cpu",
    "fused:cpu": "EFFT2, backend cpu, after `efft.fuse`",
    "efft:cuda": "EFFT2, backend cuda",
    "fused:cuda": "EFFT2, backend cuda, after `efft.fuse`",
    "efft:triton": "EFFT2, backend triton",
    "fused:triton": "EFFT2, backend triton, after `efft.fuse`",
    "efft:eager": "EFFT2, backend eager",
    "fused:eager": "EFFT2, backend eager, after `efft.fuse`",
    "efft:reference": "EFFT2, backend reference",
    "merged": "EFFT2 merged into the weights",
    **{f"pool:{n}": f"EFFT2, one of {n} adapters per image" for n in (10, 100, 1000)},
    "pool:1": "EFFT2, one adapter from a pool",
    "graph:base": "plain model, CUDA graph",
    "graph:efft": "EFFT2, CUDA graph",
    **{f"graph:pool:{n}": f"EFFT2, one of {n} adapters per image, CUDA graph" for n in (10, 1000)},
    "peft": "LoRA of `peft`",
    "addmm": "LoRA by hand, `addmm_`",
    "lorafusion": "LoRA split as in LoRAFusion",
    "chain-compiled": "EFFT2 under `torch.compile`",
    "chain": "EFFT2 under plain autograd",
    "naive": "EFFT2 as `W + dW`",
    "paper": "EFFT2 as the paper's code does it",
    "mlp": "frozen MLP with its layer norm",
    "mlp:cpu": "MLP, EFFT2, backend cpu",
    **{f"mlp-fused:{backend}": f"MLP, EFFT2, backend {backend}, after `efft.fuse`" for backend in ("cpu", "cuda")},
    "bitfit": "BitFit",
    "full": "full fine-tuning",
}
_QUANTIZED = {
    "dense": "not quantized",
    "int8": "int8",
    "int8-dynamic": "int8, weights and activations",
    "fp8": "fp8",
    "fp8-dynamic": "fp8, weights and activations",
    "nf4": "nf4",
}
_LAYERS = ("qkv", "o", "fc1", "fc2")
VIT_B = "vit_base_patch16_224"
_RANK = 32


def newest_runs(lines: Iterable[Line], fields: Sequence[str]) -> dict[tuple[Any, ...], list[Line]]:
    """Return the lines of the newest run for each combination of values of ``fields``.

    Lines with the same date belong to the same run. A field that is missing in a line counts as False.
    """
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line.get(field, False) for field in fields), []).append(line)
    return {key: [line for line in group if line["date"] == group[-1]["date"]] for key, group in groups.items()}


def newest(name: str, **wanted: object) -> dict[str, list[Line]]:
    """Return the newest run in ``<name>.jsonl`` for each dtype, among the lines whose fields match ``wanted``.

    ``wanted`` may contain the additional field ``amx`` (default: False), which is True for a run on a CPU with AMX. AMX
    accelerates only bfloat16 products. Ratios from such a CPU therefore differ from those of other CPUs.
    """
    lines = ({**x, "amx": x.get("device") == "cpu" and "AMX" in x["machine"]} for x in read(name))
    wanted = {"amx": False, **wanted}
    lines = (x for x in lines if all(x.get(field, False) == value for field, value in wanted.items()))
    return {dtype: run for (dtype,), run in newest_runs(lines, ["dtype"]).items()}


def read(name: str, folder: Path | None = None) -> list[Line]:
    """Return the lines of ``<name>.jsonl``, or an empty list if the file does not exist.

    ``folder`` is the folder of the file, by default that of this checkout's results.
    """
    path = (folder or record.RESULTS) / f"{name}.jsonl"
    return record.read(path) if path.exists() else []


def train_step(device: str, cuda_graphs: bool = False, amx: bool = False) -> str:
    """Return the table of training steps of ViT-B/16: ratios to the frozen baseline, and images/s."""
    runs = newest("model", model=VIT_B, device=device, cuda_graphs=cuda_graphs, amx=amx)
    if not runs:
        return NOTHING
    header = ["step of", *(f"{dtype}, {what}" for dtype in runs for what in ("time / frozen baseline", "images/s"))]
    rows = []
    for name, title in _present(runs):
        cells = [title]
        for lines in runs.values():
            line = _row(lines, name)
            cells.append(cell(line, "ratio", lambda x: f"{x['ratio']['p50']:.2f}"))
            cells.append(cell(line, "images_per_s", lambda x: f"{x['images_per_s']:.1f}"))
        rows.append(cells)
    return with_sources(header, rows, runs)


def memory(device: str) -> str:
    """Return the table of a ViT-B/16 training step: saved and peak memory, trained parameters and adapter file size."""
    runs = newest("memory", level="model", model=VIT_B, device=device)
    if not runs:
        return NOTHING
    steps = [line for lines in newest("model", model=VIT_B, device=device).values() for line in lines]
    header = ["step of", *(f"{dtype}, {what}" for dtype in runs for what in ("saved for backward", "peak"))]
    header += ["trained, including the head", "adapter"]
    rows = []
    for name, title in _present(runs):
        cells = [title]
        for lines in runs.values():
            line = _row(lines, name)
            cells.append(cell(line, "saved_bytes", lambda x: f"{x['saved_bytes'] / 2**20:.0f} MiB"))
            cells.append(cell(line, "peak_bytes", lambda x: f"{x['peak_bytes'] / 2**20:.0f} MiB"))
        step = _row(steps, name)
        cells.append(cell(step, "trainable", lambda x: f"{x['trainable']:,}"))
        cells.append(cell(step, "adapter_bytes", lambda x: f"{x['adapter_bytes'] / 1e6:.2f} MB"))
        rows.append(cells)
    return with_sources(header, rows, runs)


def ops(device: str, amx: bool = False) -> str:
    """Return the table of the layers of a ViT-B block: times of forward and backward pass as ratios to the baseline.

    The table for a GPU also contains the ratios of the complete block, both measured and as predicted by the analytical
    model.
    """
    runs = newest("ops", model="vit_b", images=8 if device == "cpu" else 64, rank=_RANK, device=device, amx=amx)
    if not runs:
        return NOTHING
    header = ["forward and backward", *(f"{layer}, {' / '.join(runs)}" for layer in _LAYERS)]
    rows = [[title, *(_ratio_cell(runs, layer, name) for layer in _LAYERS)] for name, title in _present(runs)]
    rows.append(["arithmetic limit", *(_limit_cell(runs, layer) for layer in _LAYERS)])
    if device == "cpu":
        return with_sources(header, rows, runs)
    tokens = next(iter(runs.values()))[0]["tokens"]
    times = block_times(Machine(), tokens, _RANK, vit_block(768))
    header += ["block, bfloat16", "block, modeled for an H200, not measured"]
    for (name, _), cells in zip([*_present(runs), ("ideal", "")], rows, strict=True):
        modeled = f"{times[name]['block'] / times['floor']['block']:.2f}" if name in times else "-"
        cells += [_block_cell(runs.get("bfloat16", []), name), modeled]
    return with_sources(header, rows, runs)


def serve(device: str) -> str:
    """Return the table of ViT-B/16 inference times as ratios to the plain model."""
    runs = newest("serve", model=VIT_B, device=device)
    if not runs:
        return NOTHING
    columns = [(dtype, batch) for dtype, lines in runs.items() for batch in sorted({line["batch"] for line in lines})]
    rows = []
    for name, title in _present(runs):
        of_batch = (_row((x for x in runs[dtype] if x["batch"] == batch), name) for dtype, batch in columns)
        rows.append(
            [title, *(cell(x, "ratio_to_base", lambda x: f"{x['ratio_to_base']['p50']:.2f}") for x in of_batch)]
        )
    return with_sources(["time / plain model", *(f"{dtype}, batch {batch}" for dtype, batch in columns)], rows, runs)


def many_adapters(device: str) -> str:
    """Return the table of ViT-B/16 inference with many adapters in one model: time ratios and memory per adapter.

    Successive images use the adapters in turn.
    """
    runs = newest("serve", model=VIT_B, device=device)
    names = [(name, title) for name, title in _present(runs) if name.startswith("pool:")]
    if not names:
        return NOTHING
    columns = [(dtype, batch) for dtype, lines in runs.items() for batch in sorted({line["batch"] for line in lines})]
    header = ["time", *(f"{dtype}, batch {batch}, / {of}" for dtype, batch in columns for of in ("one", "merged"))]
    rows = []
    for name, title in sorted(names, key=lambda row: int(row[0].removeprefix("pool:"))):
        cells = [title]
        for dtype, batch in columns:
            line = _row((x for x in runs[dtype] if x["batch"] == batch), name)
            cells.append(cell(line, "ratio_to_one_adapter", lambda x: f"{x['ratio_to_one_adapter']['p50']:.2f}"))
            cells.append(cell(line, "ratio_to_merged", lambda x: f"{x['ratio_to_merged']['p50']:.2f}"))
        for lines in runs.values():
            size = cell(_row(lines, name), "bytes_per_adapter", lambda x: f"{x['bytes_per_adapter'] / 2**20:.2f} MiB")
            cells.append(size)
        rows.append(cells)
    return with_sources([*header, *(f"{dtype}, size of an adapter" for dtype in runs)], rows, runs)


def quantized(device: str) -> str:
    """Return the table of EFFT2 on a quantized ViT-B/16: error of the logits, memory, and time.

    Times are ratios to those of the model without quantization.
    """
    runs = newest("quantized", model=VIT_B, device=device)
    if not runs:
        return NOTHING
    header = ["frozen weights", *(f"{dtype}, {x}" for dtype in runs for x in ("error", "MiB", "inference", "step"))]
    rows = []
    for name, title in _QUANTIZED.items():
        cells = [title]
        for lines in runs.values():
            line = _row(lines, name)
            cells.append(cell(line, "error", lambda x: f"{x['error']:.1e}"))
            cells.append(cell(line, "weight_bytes", lambda x: f"{x['weight_bytes'] / 2**20:.0f}"))
            cells.append(cell(line, "ratio", lambda x: f"{x['ratio']['fwd']['p50']:.2f}"))
            cells.append(cell(line, "ratio", lambda x: f"{x['ratio']['fwd_bwd']['p50']:.2f}"))
        rows.append(cells)
    return with_sources(header, rows, runs)


def together(device: str) -> str:
    """Return the table of training several adapters in one pass: the time per image, relative to one adapter."""
    runs = newest("together", device=device)
    if not runs:
        return NOTHING
    header = ["trained", *(f"{dtype}, {x}" for dtype in runs for x in ("time / one model", "ms per image"))]
    names = dict.fromkeys(line["row"] for lines in runs.values() for line in lines)
    rows = []
    for name in names:
        cells = [_TOGETHER.get(name, f"{name.partition('=')[2]} models in one `efft.SharedBackbone`")]
        for lines in runs.values():
            line = _row(lines, name)
            cells.append(cell(line, "of_alone", lambda x: f"{x['of_alone']:.2f}"))
            cells.append(cell(line, "seconds_per_image", lambda x: f"{1e3 * x['seconds_per_image']['p50']:.2f}"))
        rows.append(cells)
    return with_sources(header, rows, runs)


_TOGETHER = {
    "alone": "one model",
    "fused": "one model, after `efft.fuse`",
    "K=1": "one model in an `efft.SharedBackbone`",
}
_KINDS = {"floor": "frozen", "efft": "EFFT2", "lora:peft": "LoRA of `peft`", "dense": "EFFT2 as `W + dW`"}


def kinds(device: str) -> str:
    """Return the table of layers that are not linear layers: attention, ``Conv1D`` and mixtures of experts.

    A cell contains the time relative to the frozen layer, the saved memory and the number of trained parameters.
    """
    runs: dict[str, list[Line]] = {}
    for name, case in (("kinds", "kind"), ("experts", "model")):
        lines = [line for line in read(name) if line["device"] == device]
        for (kind, dtype), run in newest_runs(lines, [case, "dtype"]).items():
            runs[f"{kind}, {dtype}"] = run
    if not runs:
        return NOTHING
    header = ["time / frozen layer; MiB saved; trained", *_KINDS.values()]
    rows = [[title, *(_kind_cell(_row(run, row)) for row in _KINDS)] for title, run in runs.items()]
    return with_sources(header, rows, runs)


def _kind_cell(line: Line | None) -> str:
    if line is None or "ratio" not in line:
        return "-" if line is None else str(line["reason"])
    return f"{line['ratio']['fwd_bwd']['p50']:.2f}; {line['saved_bytes'] / 2**20:.1f}; {line['trained']:,}"


def planning() -> str:
    """Return the table of the seconds in which ``efft.inspect`` plans the layers to adapt, by number of layers."""
    runs = newest_runs(read("planning"), [])
    lines = runs.get((), [])
    rows = [[f"{line['layers']:,}", f"{line['seconds']['p50']:.2f}"] for line in lines]
    return with_sources(["linear layers", "seconds to plan"], rows, {"": lines}) if lines else NOTHING


def host() -> str:
    """Return the table of the calls that the host makes for one layer.

    If the first and the newest run differ, a cell shows both, joined by an arrow.
    """
    lines = [line for line in read("host") if line["dtype"] == "float32"]
    if not lines:
        return NOTHING
    first, last = ([line for line in lines if line["date"] == at["date"]] for at in (lines[0], lines[-1]))

    def cell(name: str, mode: str, field: str) -> str:
        values = [
            f"{line[field]['per_layer']:.0f}"
            for run in (first, last)
            for line in run
            if line["row"] == name and line.get("mode") == mode and field in line
        ]
        return " → ".join(dict.fromkeys(values)) or "-"

    names = list(dict.fromkeys(line["row"] for line in last if "reason" not in line))
    rows = [
        [TITLES.get(name, "frozen `nn.Linear`"), *(cell(name, mode, field) for mode, field in _HOST)] for name in names
    ]
    header = ["row"]
    for mode, field in _HOST:
        header.append(f"{mode.replace('_', ' + ')}, {field.replace('_', ' ').replace('python', 'Python')}")
    return with_sources(
        header, rows, {"before": first, "now": last} if first[0]["date"] != last[0]["date"] else {"": last}
    )


#: The columns of the table of :func:`host`: pairs of a mode and the field of the result lines that is counted.
_HOST = (
    ("forward_backward", "dispatcher_calls"),
    ("inference", "dispatcher_calls"),
    ("forward_backward", "python_calls"),
    ("inference", "python_calls"),
)


def demo() -> str:
    """Return the table of the newest run of the demo."""
    runs = newest_runs(read("demo"), [])
    if not runs:
        return NOTHING
    cells = [
        [
            row["task"],
            row["method"],
            f"{row['trainable_parameters']:,}",
            f"{row['test_accuracy']:.1%}",
            f"{row['seconds']:.0f} s",
        ]
        for row in runs[()]
    ]
    header = ["task", "method", "trained parameters, including the head", "test accuracy", "training time"]
    return with_sources(header, cells, {"": runs[()]})


_FP8_ROWS = {
    "fp8": "one scale per row",
    "fp8-slow": "one scale per row, without fast accumulation",
    "fp8-tensor": "one scale per tensor",
}


def fp8_products() -> str:
    """Return the table of fp8 products on the GPU: times relative to bf16 for each product, and for all of them."""
    (run,) = newest("fp8_products", device="cuda").values() or [[]]
    if not run:
        return NOTHING
    base = {(x["case"], way): x["seconds"][way]["p50"] for x in run if x["row"] == "bf16" for way in ("fwd", "bwd")}
    rows = []
    for name, title in _FP8_ROWS.items():
        timed = {x["case"]: x for x in run if x["row"] == name and "seconds" in x}
        cells = [f"{timed[case]['ratio'][way]['p50']:.2f}" if case in timed else "-" for case, way in base]
        total = sum(timed[case]["seconds"][way]["p50"] for case, way in base if case in timed)
        complete = all(case in timed for case, _ in base)
        rows.append([title, *cells, f"{total / sum(base.values()):.2f}" if complete else "-"])
    header = ["time in fp8 / in bf16", *(f"{case}, {way}" for case, way in base), "all"]
    return with_sources(header, rows, {"": run})


_BY_DEVICE = (train_step, ops, memory, serve, many_adapters, quantized, together)
#: The functions that create the tables, by table name.
TABLES: dict[str, Callable[[], str]] = {
    **{make.__name__: partial(make, "cpu") for make in _BY_DEVICE},
    **{f"{make.__name__}_gpu": partial(make, "cuda") for make in _BY_DEVICE},
    "train_step_gpu_graphs": partial(train_step, "cuda", cuda_graphs=True),
    "train_step_amx": partial(train_step, "cpu", amx=True),
    "ops_amx": partial(ops, "cpu", amx=True),
    "demo": demo,
    "fp8_products": fp8_products,
    "kinds": partial(kinds, "cpu"),
    "planning": planning,
    "host": host,
}


def with_sources(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    runs: Mapping[str, list[Line]] | Sequence[tuple[str, list[Line]]],
) -> str:
    """Return a table, followed by a list with the source of the numbers of each run.

    ``runs`` contains for each run a title, which may be empty, and the lines of the run.
    """
    titled = runs.items() if isinstance(runs, Mapping) else runs
    notes = [f"- {f'{title}: ' if title else ''}{provenance(lines[0])}" for title, lines in titled]
    return table(header, rows) + "\n\n" + "\n".join(notes)


def provenance(line: Line) -> str:
    """Return the source of a result line: command, commit, machine, versions and date."""
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    machine = line["gpu"]["name"] if line.get("device") == "cuda" else line["machine"]
    command = re.sub(r" --results[ =]\S+", "", line["command"])  # the folder of the results does not affect the numbers
    return f"`{command}`, commit {line['commit']}, {machine}; {versions}; {line['date'][:10]}"


def _present(runs: dict[str, list[Line]]) -> list[tuple[str, str]]:
    """Return the name and the title of every row that has results in at least one run."""
    measured = {line["row"] for lines in runs.values() for line in lines if line.get("reason") is None}
    order = [*TITLES, *sorted(measured - set(TITLES))]
    return [(name, TITLES.get(name, f"`{name}`")) for name in order if name in measured]


def _row(lines: Iterable[Line], name: str) -> Line | None:
    return next((line for line in lines if line["row"] == name), None)


def cell(line: Line | None, needs: str, text: Callable[[Line], str]) -> str:
    return "-" if line is None or needs not in line else text(line)


def _ratio_cell(runs: dict[str, list[Line]], layer: str, name: str) -> str:
    """Return the time ratios of row ``name`` for one layer, one per dtype."""
    lines = (_row((x for x in of_dtype if x["case"] == layer), name) for of_dtype in runs.values())
    return " / ".join(cell(line, "ratio", lambda x: f"{x['ratio']['fwd_bwd']['p50']:.2f}") for line in lines)


def _limit_cell(runs: dict[str, list[Line]], layer: str) -> str:
    """Return the arithmetic limits of the time ratio for one layer, one per dtype.

    Rows that do not train factors have the limit 1. Therefore the largest limit is used.
    """
    limits = (
        max((x["limit"]["fwd_bwd"] for x in of_dtype if x["case"] == layer and "limit" in x), default=None)
        for of_dtype in runs.values()
    )
    return " / ".join("-" if limit is None else f"{limit:.2f}" for limit in limits)


def _block_cell(lines: Sequence[Line], name: str) -> str:
    """Return the time ratio of a block for row ``name``, or "-" if a layer has no times.

    The ratio divides the sum of the row's median times over the layers of the block by the same sum for the frozen
    baseline.
    """
    seconds: dict[str, float] = {}
    for row in (name, "floor"):
        measured = [x["seconds"]["fwd_bwd"]["p50"] for x in lines if x["row"] == row and "seconds" in x]
        if len(measured) != len(_LAYERS):
            return "-"
        seconds[row] = sum(measured)
    return f"{seconds[name] / seconds['floor']:.2f}"
