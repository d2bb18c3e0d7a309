"""Format results as tables for the documentation. A list of the sources of the numbers follows each table.

Most tables show the newest run in a result file. :func:`host` shows the first and the newest run. :func:`subspaces`,
:func:`starts`, :func:`extras`, :func:`fp8` and :func:`study` combine several runs, and use the newest line of each
measurement.

In most tables a row is one implementation in a comparison. The row "floor" of the result files is the frozen baseline:
the layer or model without an update. It computes only the gradients that every method needs. The head of a model is
its classifier. A pool is one model that holds many adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
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
    **{f"mlp:{backend}": f"MLP, EFFT2, backend {backend}" for backend in ("cpu", "cuda")},
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
            cells.append(_cell(line, "ratio", lambda x: f"{x['ratio']['p50']:.2f}"))
            cells.append(_cell(line, "images_per_s", lambda x: f"{x['images_per_s']:.1f}"))
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
            cells.append(_cell(line, "saved_bytes", lambda x: f"{x['saved_bytes'] / 2**20:.0f} MiB"))
            cells.append(_cell(line, "peak_bytes", lambda x: f"{x['peak_bytes'] / 2**20:.0f} MiB"))
        step = _row(steps, name)
        cells.append(_cell(step, "trainable", lambda x: f"{x['trainable']:,}"))
        cells.append(_cell(step, "adapter_bytes", lambda x: f"{x['adapter_bytes'] / 1e6:.2f} MB"))
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
            [title, *(_cell(x, "ratio_to_base", lambda x: f"{x['ratio_to_base']['p50']:.2f}") for x in of_batch)]
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
            cells.append(_cell(line, "ratio_to_one_adapter", lambda x: f"{x['ratio_to_one_adapter']['p50']:.2f}"))
            cells.append(_cell(line, "ratio_to_merged", lambda x: f"{x['ratio_to_merged']['p50']:.2f}"))
        for lines in runs.values():
            size = _cell(_row(lines, name), "bytes_per_adapter", lambda x: f"{x['bytes_per_adapter'] / 2**20:.2f} MiB")
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
            cells.append(_cell(line, "error", lambda x: f"{x['error']:.1e}"))
            cells.append(_cell(line, "weight_bytes", lambda x: f"{x['weight_bytes'] / 2**20:.0f}"))
            cells.append(_cell(line, "ratio", lambda x: f"{x['ratio']['fwd']['p50']:.2f}"))
            cells.append(_cell(line, "ratio", lambda x: f"{x['ratio']['fwd_bwd']['p50']:.2f}"))
        rows.append(cells)
    return with_sources(header, rows, runs)


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


def subspaces() -> str:
    """Return the table of the shares of full fine-tuning's updates and gradients that low-rank bases keep.

    The shares are means over tasks and seeds.
    """
    newest = {(x["of"], x["set"], x["task"], x["seed"]): x for x in read("subspaces")}
    if not newest:
        return NOTHING
    groups: dict[tuple[str, str], list[Line]] = {}
    for (of, name, *_), line in newest.items():
        groups.setdefault((of, name), []).append(line)
    measures = ("effective_rank", "own", "shared", "independent")
    rows = []
    for (of, name), lines in groups.items():
        means = [fmean(line[measure] for line in lines) for measure in measures]
        rows.append([of, name, f"{means[0]:.0f}", *(f"{mean:.1%}" for mean in means[1:])])
    rank = next(iter(newest.values()))["rank"]
    kept = ("separate bases per matrix", "one pair of bases", "one pair, random directions")
    header = ["quantity", "matrices", "effective rank", *(f"kept at rank {rank} by {bases}" for bases in kept)]
    return with_sources(header, rows, _by_command(newest.values()))


_STARTS = {"side": "one side, random cores", "cores": "both sides, zero cores"}


def starts() -> str:
    """Return the table of EFFT2's test accuracy for each way to initialize its factors, as means over seeds."""
    newest = {(x["kind"], x["source"], x["task"], x["seed"]): x for x in read("starts")}
    if not newest:
        return NOTHING
    lines = list(newest.values())
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    rows = []
    for kind, source in dict.fromkeys((line["kind"], line["source"]) for line in lines):
        of_start = [line for line in lines if (line["kind"], line["source"]) == (kind, source)]
        by_task = [[100 * line["test_accuracy"] for line in of_start if line["task"] == task] for task in tasks]
        means = [fmean(accuracies) if accuracies else None for accuracies in by_task]
        overall = None if None in means else fmean(mean for mean in means if mean is not None)
        rows.append([_STARTS[kind], source, *("-" if mean is None else f"{mean:.1f}" for mean in [*means, overall])])
    return with_sources(["directions in", "source", *tasks, "mean"], rows, _by_command(lines))


_DEFAULT_EXTRAS = "efft2 r16 x0 c3 fc1pf movement0.1"
#: For each variant (setting) in extras.jsonl, a title that names its differences from the default configuration. The
#: sides are the factors U and V. The movement determines the scale of the update (``EfftConfig``).
_EXTRAS = {
    _DEFAULT_EXTRAS: "**`EfftConfig.auto()`**",
    "efft2 r8 x0 c3 fc1pf movement0.1": "rank 8",
    "efft2 r16 x0 c3 fc1pf": "movement 0.3",
    "efft2 r16 x0 c1 fc1pf movement0.1": "cores at the learning rate of the sides",
    "efft2 r16 x0 c6 fc1pf movement0.1": "cores at 6 times the learning rate",
    "efft2 r16 x0 c3 fc1pf-1 movement0.1": "biases at the learning rate of the sides",
    "efft2 r16 x0 c3 movement0.1": "no biases",
    "efft2 r16 x0 c3 biases3 movement0.1": "biases of all linear layers",
    "efft2 r16 x0 c3 fc1pf norms3 movement0.1": "norms as well",
    "efft2 r16 x0 c3 fc1pf movement0.1 dropout0.1": "dropout 0.1",
    "efft2 r16 x0 c3 fc1pf movement0.1 precondition": "preconditioned gradients of U and V",
    "efft2 r16 x0 c3 fc1pf movement0.1 orthogonal": "orthogonal initial factors",
    "efft2 r14 x0 c3 fc1pf movement0.1 in10": "rank 14 and a diagonal on the input side of each layer",
    "efft2 r15 x3 c3 movement0.1": "rank 15, all biases and norms",
    "efft2 r15 x3 c3 movement0.05": "rank 15, all biases and norms, movement 0.05",
    "efft2 r15 x3 c3": "rank 15, all biases and norms, movement 0.3",
    "efft2 r15 x1 c3 movement0.1": "rank 15, all biases and norms at the learning rate of the sides",
    "efft2 r15 x6 c3 movement0.1": "rank 15, all biases and norms at 6 times the learning rate",
    "efft2 r15 x3 c3 lr0.002": "rank 15, all biases and norms, movement 0.3, learning rate 0.002",
    "efft2 r10 x0 c3 norms3 movement0.1": "rank 10, norms instead of biases",
    "efft2 r8 x3 c3 movement0.1": "rank 8, all biases and norms",
    "efft2 r4 x0 c3 biases3 movement0.1": "rank 4, biases of all linear layers",
    "efft2 r4 x0 c3 biases3": "rank 4, biases of all linear layers, movement 0.3",
    "efft2 r16 x0 c1": "no biases, one learning rate, movement 0.3 (the previous default)",
    "lora r8 lr 0.001": "LoRA, rank 8, learning rate 0.001",
}


def extras() -> str:
    """Return the table of the study ``extras``: accuracies of settings, compared with the default configuration.

    Each run of a setting is compared with the run of the default that has the same task and seed. A cell contains the
    mean difference of the accuracies over these pairs of runs, and its standard error. If a run trains the bias of the
    attention's output projection, it also trains the bias of the patch embedding, because both have the same name.
    """
    roles = {"dev": "validation", "test": "test"}
    newest = {(x["variant"], x["task"], x["seed"]): x for x in read("extras") if x["stage"] == "explore"}
    if not newest:
        return NOTHING
    groups: dict[str, dict[tuple[str, int], Line]] = {}
    for (variant, task, seed), line in newest.items():
        groups.setdefault(variant, {})[task, seed] = line
    default = groups[_DEFAULT_EXTRAS]
    rows = []
    for variant in sorted(groups, key=lambda name: list(_EXTRAS).index(name) if name in _EXTRAS else len(_EXTRAS)):
        runs = groups[variant]
        pairs = [(line, default[run]) for run, line in runs.items() if run in default]
        cells = [_difference(pairs, f"{role}_accuracy") if variant != _DEFAULT_EXTRAS else "" for role in roles]
        of = len(runs) if variant == _DEFAULT_EXTRAS else len(pairs)
        rows.append([_EXTRAS.get(variant, variant), f"{next(iter(runs.values()))['trained']:,}", str(of), *cells])
    header = ["setting", "trained parameters", "runs", *(f"{name}, points" for name in roles.values())]
    lines = list(newest.values())
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    tasks = ", ".join(dict.fromkeys(line["task"] for line in lines))
    seeds = ", ".join(dict.fromkeys(str(line["seed"]) for line in lines))
    # The commands differ only in settings, tasks and seeds, which the table and the title of the source already name.
    source = {**lines[-1], "commit": commits, "command": "python -m benchmarks extras run --stage explore"}
    return with_sources(header, rows, {f"tasks {tasks}; seeds {seeds}": [source]})


def dropout() -> str:
    """Return the table of the default configuration with dropout, compared with no dropout, by length of training.

    Each run with dropout is compared with the run without it that has the same task, seed and length.
    """
    plain, dropped = variants = (_DEFAULT_EXTRAS, f"{_DEFAULT_EXTRAS} dropout0.1")
    found: dict[tuple[int, int], dict[str, dict[tuple[str, int], Line]]] = {}
    for line in (*read("extras"), *read("extras_long")):
        variant, _, length = line["variant"].partition(" e")
        if line["stage"] == "explore" and variant in variants:
            epochs = int(length.split()[0]) if length else 10
            of_length = found.setdefault((epochs, line["updates"]), {plain: {}, dropped: {}})
            of_length[variant][line["task"], line["seed"]] = line
    rows, lines = [], []
    for (epochs, updates), runs in sorted(found.items()):
        pairs = [(line, runs[plain][run]) for run, line in runs[dropped].items() if run in runs[plain]]
        if pairs:
            lines += [line for pair in pairs for line in pair]
            points = (_difference(pairs, f"{role}_accuracy") for role in ("dev", "test"))
            tasks = ", ".join(dict.fromkeys(line["task"] for line, _ in pairs))
            rows.append([str(epochs), f"{updates:,}", tasks, str(len(pairs)), *points])
    if not rows:
        return NOTHING
    header = ["epochs", "updates", "tasks", "pairs of runs", "validation, points", "test, points"]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    source = {**lines[-1], "commit": commits, "command": "python -m benchmarks extras run --stage explore"}
    return with_sources(header, rows, {"": [source]})


_FP8_SUITE, _FP8_METHOD = "twelve", "EFFT, auto"
_FP8 = {
    "bf16": "none (bf16)",
    "e4m3": "`x`, `W` and `gy` to e4m3, one scale per row",
    "e5m2": "`x` and `W` to e4m3, `gy` to e5m2, one scale per row",
    "tensor": "`x` and `W` to e4m3, `gy` to e5m2, one scale per tensor",
    "forward": "only `x` and `W` to e4m3, one scale per row",
}


def fp8() -> str:
    """Return the table of the study ``fp8``: errors before training, and accuracies compared with those in bf16.

    Each run is compared with the run in bf16 of the suite ``twelve`` that has the same task and seed. The errors are
    means over the tasks and seeds for which all settings have errors.
    """
    lines = read("fp8")
    if not lines:
        return NOTHING
    of_suite = [x for x in read(f"compare_{_FP8_SUITE}") if (x["method"], x["stage"]) == (_FP8_METHOD, "final")]
    bf16 = {(x["task"], x["seed"]): x for x in of_suite}
    measured: dict[str, dict[tuple[str, int], Line]] = {}
    for line in lines:
        measured.setdefault(line["setting"], {})[line["task"], line["seed"]] = line
    common = set.intersection(*(set(runs) for runs in measured.values()))
    rows = []
    for name in sorted(measured, key=list(_FP8).index):
        trained = {(x["task"], x["seed"]): x for x in lines if x["setting"] == name and "test_accuracy" in x}
        found = [
            f"{fmean(measured[name][run][f'{what}_error'] for run in common):.1%}" if common else "-"
            for what in ("logits", "gradients")
        ]
        pairs = [(line, bf16[run]) for run, line in trained.items() if run in bf16]
        means = [f"{fmean(100 * x['test_accuracy'] for x in runs):.1f}" for runs in zip(*pairs, strict=True)] or ["-"]
        rows.append([_FP8[name], *found, str(len(pairs)), means[-1], means[0], _difference(pairs, "test_accuracy")])
    header = ["rounding", "error of the logits", "error of the gradients", "runs"]
    header += ["accuracy in bf16, %", "accuracy, %", "difference, points"]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    tasks = ", ".join(dict.fromkeys(line["task"] for line in lines))
    seeds = ", ".join(dict.fromkeys(str(line["seed"]) for line in lines))
    # The commands differ only in settings, tasks and seeds.
    source = {**lines[-1], "commit": commits, "command": "python -m benchmarks fp8"}
    return with_sources(header, rows, {f"tasks {tasks}; seeds {seeds}": [source]})


def _difference(pairs: Sequence[tuple[Line, Line]], field: str) -> str:
    """Return the mean difference of ``field`` within the pairs and its standard error, in percentage points."""
    points = [100 * (line[field] - other[field]) for line, other in pairs]
    if not points:
        return "-"
    error = f" ± {stdev(points) / len(points) ** 0.5:.1f}" if len(points) > 1 else ""
    return f"{fmean(points):+.1f}{error}"


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


def study(name: str) -> str:
    """Return the table of a study in :mod:`efft_lab.studies.side_by_side`: mean accuracy and its standard deviation."""
    newest = {(x["row"], x["seed"]): x for x in read(name)}
    groups: dict[str, list[Line]] = {}
    for (row, _), line in newest.items():
        groups.setdefault(row, []).append(line)
    rows = []
    for row, lines in groups.items():
        accuracies = [100 * line["test_accuracy"] for line in lines]
        spread = f" ± {stdev(accuracies):.1f}" if len(lines) > 1 else ""
        parameters = _cell(lines[0], "parameters", lambda x: f"{x['parameters']:,}")
        rows.append([row, parameters, f"{fmean(accuracies):.1f}{spread}", str(len(lines))])
    header = ["method", "trained parameters", "test accuracy, %", "seeds"]
    return with_sources(header, rows, _by_command(newest.values())) if rows else NOTHING


_BY_DEVICE = (train_step, ops, memory, serve, many_adapters, quantized)
#: The functions that create the tables, by table name.
TABLES: dict[str, Callable[[], str]] = {
    **{make.__name__: partial(make, "cpu") for make in _BY_DEVICE},
    **{f"{make.__name__}_gpu": partial(make, "cuda") for make in _BY_DEVICE},
    "train_step_gpu_graphs": partial(train_step, "cuda", cuda_graphs=True),
    "train_step_amx": partial(train_step, "cpu", amx=True),
    "ops_amx": partial(ops, "cpu", amx=True),
    "demo": demo,
    "subspaces": subspaces,
    "extras": extras,
    "dropout": dropout,
    "starts": starts,
    "fp8": fp8,
    "fp8_products": fp8_products,
    "kinds": partial(kinds, "cpu"),
    "planning": planning,
    "host": host,
    "text": partial(study, "text"),
    "convolutions": partial(study, "convolutions"),
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


def _by_command(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    """Group lines by date and command. Return the title and the lines of each run; the title lists the run's tasks."""
    runs: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        runs.setdefault((line["date"], line["command"]), []).append(line)
    return [(", ".join(dict.fromkeys(str(line["task"]) for line in run)), run) for run in runs.values()]


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


def _cell(line: Line | None, needs: str, text: Callable[[Line], str]) -> str:
    return "-" if line is None or needs not in line else text(line)


def _ratio_cell(runs: dict[str, list[Line]], layer: str, name: str) -> str:
    """Return the time ratios of row ``name`` for one layer, one per dtype."""
    lines = (_row((x for x in of_dtype if x["case"] == layer), name) for of_dtype in runs.values())
    return " / ".join(_cell(line, "ratio", lambda x: f"{x['ratio']['fwd_bwd']['p50']:.2f}") for line in lines)


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
