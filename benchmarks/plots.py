"""Draw pictures from result files: time ratios, time by tokens and rank, achieved FLOP/s, and results of studies.

    python -m benchmarks plot --out build/plots

A row is one implementation in a comparison. Ratios divide the time of a row by the time of the frozen baseline (the row
"floor"), which is the layer or model without an update. A setting is a combination of values such as device, model,
rank and dtype. Each picture of times or speeds shows the newest run of one setting and names the machine. Predictions
of the analytical model (``benchmarks.model_roofline``) have hollow markers and are labeled as modeled. Pictures of
studies, and of the suites of ``efft compare``, show accuracies.

This module needs matplotlib, which ``pip install "efft-kernels[train]"`` installs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.model_roofline import block_times, vit_block
from benchmarks.ops.cases import MODELS
from benchmarks.roofline_gpu import Machine
from benchmarks.tables import Line, newest_runs, read
from efft_lab import record
from efft_lab.compare import report, store
from efft_lab.compare import suite as suites
from efft_lab.compare.agenda import Agenda

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Pairs of a file name, without its suffix, and the picture for that file.
Pictures = Iterator[tuple[str, "Figure"]]


def ops_ratios(lines: Sequence[Line]) -> Pictures:
    """Draw one bar per row and layer, with the time ratios of a layer's forward and backward pass.

    For ViTs in bf16 on a GPU, hollow diamonds show the predictions of the analytical model.
    """
    for key, run in newest_runs(lines, ["device", "model", "images", "rank", "dtype"]).items():
        device, model, images, rank, dtype = key
        layers = list(dict.fromkeys(line["case"] for line in run))
        rows = _measured_rows(run)
        if not rows:
            continue
        figure, axes = _new(f"{model}, {images} images, rank {rank}, {dtype}: forward and backward", run)
        height = 0.8 / len(layers)
        for i, layer in enumerate(layers):
            of_layer = {
                line["row"]: line["ratio"]["fwd_bwd"] for line in run if line["case"] == layer and "ratio" in line
            }
            at = [rows.index(row) + i * height for row in of_layer]
            _bars(axes, at, list(of_layer.values()), height, f"{layer}, measured")
        if device == "cuda" and dtype == "bfloat16" and model.startswith("vit"):
            _draw_model(axes, run[0]["tokens"], rank, MODELS[model][0], rows, layers, height)
        _finish_ratios(axes, rows, 0.4 - height / 2)
        yield "_".join(["ops", *map(str, key)]), figure


def _draw_model(
    axes: Axes, tokens: int, rank: int, width: int, rows: Sequence[str], layers: Sequence[str], height: float
) -> None:
    """Draw the analytical model's predictions at the positions of the bars."""
    times = block_times(Machine(), tokens, rank, vit_block(width))
    points = [
        (times[row][layer] / times["floor"][layer], rows.index(row) + i * height)
        for i, layer in enumerate(layers)
        for row in rows
        if row in times
    ]
    label = "modeled (H200), not measured"
    axes.plot(*zip(*points, strict=True), linestyle="none", marker="D", fillstyle="none", color="black", label=label)


def model_ratios(lines: Sequence[Line]) -> Pictures:
    """Draw one bar per row, with the time ratio of a training step of a complete model."""
    for key, run in newest_runs(lines, ["device", "model", "batch", "rank", "dtype", "cuda_graphs"]).items():
        _, model, batch, rank, dtype, graphs = key
        rows = _measured_rows(run)
        if not rows:
            continue
        title = f"training step of {model}, batch {batch}, rank {rank}, {dtype}{', CUDA graphs' if graphs else ''}"
        figure, axes = _new(title, run)
        ratios = [line["ratio"] for row in rows for line in run if line["row"] == row]
        _bars(axes, range(len(rows)), ratios, 0.8, "measured")
        _finish_ratios(axes, rows, 0)
        yield "_".join(["model", *map(str, key[:-1]), *(["graphs"] if graphs else [])]), figure


def scaling(lines: Sequence[Line]) -> Pictures:
    """Draw the time of each row against the number of tokens or the rank, on logarithmic axes.

    The legend contains the fitted exponents.
    """
    for key, run in newest_runs(lines, ["device", "model", "case", "sweep", "dtype"]).items():
        _, model, case, sweep, dtype = key
        exponents = {line["row"]: line["exponent"] for line in run if line.get("exponent") is not None}
        figure, axes = _new(f"{case} of {model} against {sweep}, {dtype}: forward and backward", run)
        for row in _measured_rows(run):
            of_row = sorted((line for line in run if line["row"] == row and "seconds" in line), key=lambda x: x[sweep])
            seconds = [line["seconds"]["fwd_bwd"]["p50"] for line in of_row]
            fitted = f", exponent {exponents[row]:.2f}" if row in exponents else ""
            axes.plot([line[sweep] for line in of_row], seconds, marker="o", label=f"{row}, measured{fitted}")
        axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel="seconds")
        axes.legend()
        yield "_".join(["scaling", *map(str, key)]), figure


def roofline(lines: Sequence[Line]) -> Pictures:
    """Draw the achieved FLOP/s of each measured layer against its FLOPs per byte, below the machine's measured peaks.

    Only the FLOPs and bytes that the result requires are counted. The peaks are those of a large product and a large
    copy.
    """
    for key, run in newest_runs(lines, ["device", "dtype"]).items():
        measured = [line for line in run if "peaks" in line]
        if not measured:
            continue
        figure, axes = _new(f"roofline, {key[1]}: forward and backward of one layer", run)
        peaks = measured[0]["peaks"]
        everywhere: list[float] = []
        for row in dict.fromkeys(line["row"] for line in measured):
            of_row = [line for line in measured if line["row"] == row]
            speeds = [line["of_gemm_peak"]["fwd_bwd"] * peaks["flops_per_s"] for line in of_row]
            traffic = [line["of_copy_peak"]["fwd_bwd"] * peaks["bytes_per_s"] for line in of_row]
            intensities = [speed / moved for speed, moved in zip(speeds, traffic, strict=True)]
            everywhere += intensities
            axes.plot(intensities, speeds, linestyle="none", marker="o", label=f"{row}, measured")
        ridge = peaks["flops_per_s"] / peaks["bytes_per_s"]
        span = [min(ridge / 4, *everywhere), ridge, max(ridge * 4, *everywhere)]
        roof = [min(peaks["flops_per_s"], at * peaks["bytes_per_s"]) for at in span]
        axes.plot(span, roof, color="black", label="measured peaks: product, copy")
        axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that the result needs", ylabel="FLOP/s")
        axes.legend(fontsize="small")
        yield "_".join(["roofline", *map(str, key)]), figure


def subspaces(lines: Sequence[Line]) -> Pictures:
    """Draw the shares of full fine-tuning's gradients and updates that low-rank bases keep, as means over tasks.

    The bars compare separate bases for each matrix, one pair of bases for all matrices of a set, and one pair of bases
    for matrices with equal singular values but random directions.
    """
    newest = {(line["of"], line["set"], line["task"], line["seed"]): line for line in lines}
    if not newest:
        return
    rank = lines[-1]["rank"]
    figure, axes = _new(f"gradients and updates of full fine-tuning at rank {rank}, mean over tasks", lines[-1:])
    labels = {
        "own": "separate bases per matrix",
        "shared": "one pair of bases",
        "independent": "one pair, random directions",
    }
    sets = [(of, name) for of in ("gradient", "update") for name in dict.fromkeys(line["set"] for line in lines)]
    for i, (measure, label) in enumerate(labels.items()):
        kept = [fmean(line[measure] for key, line in newest.items() if key[:2] == each) for each in sets]
        axes.barh([at + 0.27 * i for at in range(len(sets))], kept, 0.27, label=label)
    axes.set_yticks([at + 0.27 for at in range(len(sets))], [f"{of}: {name}" for of, name in sets])
    axes.invert_yaxis()
    axes.set_xlabel(f"share of the squared norm within rank {rank}")
    axes.legend()
    yield "subspaces", figure


def accuracies(stem: str, lines: Sequence[Line]) -> Pictures:
    """Draw one bar per row and task of a study, with the mean test accuracy over seeds.

    The whiskers extend from the lowest to the highest accuracy. ``stem`` is the name of the study and of the picture.
    """
    seeds: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:  # if a run was repeated, its newest line counts
        row = line["row"] if "row" in line else f"{line['source']}, {line['kind']}"
        seeds.setdefault((row, line["task"]), {})[line["seed"]] = 100 * line["test_accuracy"]
    if not seeds:
        return
    rows, tasks = (list(dict.fromkeys(key[at] for key in seeds)) for at in (0, 1))
    figure, axes = _new(f"{stem}: test accuracy, mean and range of seeds", lines[-1:])
    height = 0.8 / len(tasks)
    for i, task in enumerate(tasks):
        of_task = {row: [*values.values()] for (row, of), values in seeds.items() if of == task}
        means = [fmean(values) for values in of_task.values()]
        ranges = list(zip(means, of_task.values(), strict=True))
        spread = [[mean - min(values) for mean, values in ranges], [max(values) - mean for mean, values in ranges]]
        axes.barh([rows.index(row) + i * height for row in of_task], means, height, xerr=spread, label=task)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_xlabel("%")
    axes.legend()
    yield stem, figure


#: Pairs of a result file's name and a function that draws pictures from the lines of this file.
PICTURES: tuple[tuple[str, Callable[[Sequence[Line]], Pictures]], ...] = (
    ("ops", ops_ratios),
    ("ops", roofline),
    ("model", model_ratios),
    ("scaling", scaling),
    ("subspaces", subspaces),
    *((study, partial(accuracies, study)) for study in ("starts", "text", "convolutions")),
)


#: Suites of ``efft compare`` whose accuracies are drawn. The file ``compare_SUITE.jsonl`` holds the results of a suite.
COMPARED = ("local", "local_efft2", "local_long", "local_grid")


def draw(results: Path | None, out: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write the pictures of all result files that exist into the folder ``out`` and return the paths of the pictures.

    ``results`` is the folder of the result files, by default that of this checkout. If ``names`` are given, only these
    result files are drawn.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, pictures in PICTURES:
        if names and name not in names:
            continue
        for stem, figure in pictures(read(name, results)):
            path = out / f"{stem}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            written.append(path)
    for suite in COMPARED:
        name = f"compare_{suite}"
        file = (results or record.RESULTS) / f"{name}.jsonl"
        if file.is_file() and (not names or name in names):
            written += report.draw(Agenda(suites.load(suite)), store.read(file), out / name).values()
    return written


def _new(title: str, run: Sequence[Line]) -> tuple[Figure, Axes]:
    """Return a figure and its axes. The subtitle names the machine, the commit and the date of ``run``.

    The figure does not need a display.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "efft-kernels[train]"') from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    line = run[0]
    machine = line["gpu"]["name"] if line.get("device") == "cuda" else line["machine"]
    figure.suptitle(title)
    axes.set_title(f"{machine}; commit {line['commit']}; {line['date'][:10]}", fontsize="small")
    return figure, axes


def _bars(axes: Axes, at: Sequence[float], ratios: Sequence[dict[str, float]], height: float, label: str) -> None:
    """Draw the medians as bars, with the 20 % and 80 % quantiles as whiskers."""
    middle = [ratio["p50"] for ratio in ratios]
    spread = [[r["p50"] - r["p20"] for r in ratios], [r["p80"] - r["p50"] for r in ratios]]
    axes.barh(at, middle, height, xerr=spread, label=label)


def _finish_ratios(axes: Axes, rows: Sequence[str], middle: float) -> None:
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([i + middle for i in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_xlabel("time / frozen baseline in the same repetition (median; whiskers: 20 % and 80 % quantiles)")
    axes.legend()


def _measured_rows(run: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(line["row"] for line in run if "ratio" in line))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures and print the names of the files."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = sorted({*(name for name, _ in PICTURES), *(f"compare_{suite}" for suite in COMPARED)})
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"result files to draw: {', '.join(known)}; default: all"
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="folder of the result files")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("build/plots"))
    args = parser.parse_args(arguments)
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"unknown result file {unknown[0]!r}; expected some of {', '.join(known)}")
    written = draw(args.results, args.out, args.names)
    print("\n".join(map(str, written)) or "nothing to draw: no result file has data for a picture")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
