"""Write the files of the demo: a report in Markdown, and a picture with plots and test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import efft_kernels
from efft_lab.demo.verify import Agreement
from efft_lab.record import machine_facts
from efft_lab.train import read_metrics

if TYPE_CHECKING:
    from efft_lab.data import TaskData

_SHOWN = 12  # number of test images to draw per task; at most half of these are classified wrongly


@dataclass(frozen=True)
class TaskReport:
    """The results of one task for the report.

    Attributes:
        task: the data.
        folders: maps each method to the folder of its run.
        results: maps each method to the summary of its run.
        seconds: maps each method to its time in seconds, evaluation and search included.
        agreements: results of :func:`efft_lab.demo.verify.verify`.
        shown: positions in the test split of n images, some of which are drawn.
        predictions: classes that EFFT predicts for these images [n].
        labels: true classes of these images [n].
    """

    task: TaskData
    folders: dict[str, Path]
    results: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    agreements: list[Agreement]
    shown: list[int]
    predictions: Tensor
    labels: Tensor


def table(reports: list[TaskReport]) -> str:
    """Return a Markdown table with one row per task and method."""
    lines = [
        "| task | method | trainable parameters | excluding the head | saved KB | test accuracy | seconds |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for report in reports:
        name, trivial = report.task.info.name, report.task.info.baselines
        if trivial:
            lines.append(f"| {name} | best trivial predictor | - | - | - | {max(trivial.values()):.1f} % | - |")
        for method, result in report.results.items():
            excluding_head = result["trainable_parameters"] - result["head_parameters"]
            lines.append(
                f"| {name} | {method} | {result['trainable_parameters']:,} | {excluding_head:,} | "
                f"{result['saved_bytes'] / 1000:.1f} | {result['test_accuracy']:.1%} | {report.seconds[method]:.0f} |"
            )
    return "\n".join(lines)


def write_report(reports: list[TaskReport], out: Path, note: str, command: str, seconds: float) -> str:
    """Write report.md and return its text.

    Args:
        reports: the results of each task.
        out: folder for the report.
        note: description of the backbone.
        command: command that started the demo.
        seconds: time of the complete demo.
    """
    efft_result = next(iter(reports)).results["EFFT"]
    config = efft_result["config"]
    checks = [f"- {report.task.info.name}: {agreement}" for report in reports for agreement in report.agreements]
    facts = {
        "backbone": note,
        "data": "; ".join(f"{report.task!r}" for report in reports),
        "EFFT": f"EfftConfig.auto(): rank {config['efft']['rank']}, scale {config['efft']['scale']}, biases "
        f"{config['efft']['bias']}; lr {config['lr']}, batch {config['batch_size']}, {config['epochs']} epochs, "
        f"seed {config['seed']}, amp {config['amp']}",
        "linear probe": "learning rate (validation): "
        + ", ".join(f"{r.task.info.name} {r.results['linear probe']['config']['lr']:g}" for r in reports),
        "machine": f"{machine_facts()['machine']}, {efft_result['device']}",
        "versions": ", ".join(f"{name} {version}" for name, version in efft_result["versions"].items()),
        "command": f"`{command}`",
        "time of the demo": f"{seconds:.0f} s",
    }
    text = "\n".join(
        [
            f"# efft-kernels {efft_kernels.__version__}: demo",
            "",
            table(reports),
            "",
            "Each method was trained on 800 images and tested once. Its epoch (and the learning rate of the probe) was "
            "chosen on 200 other images. Only one seed was used, so a difference of one or two points is noise. The "
            "seconds include evaluation and, for the probe, the search for the learning rate.",
            "",
            "![curves and test images](demo.png)",
            "",
            "## The saved adapter is the trained model",
            "",
            "The logits of three models are compared with those of the trained model, in fp32. A new process loaded "
            "these models from the files of the run:",
            "",
            *checks,
            "",
            "## Facts",
            "",
            *(f"- {name}: {value}" for name, value in facts.items()),
            "",
        ]
    )
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def draw(reports: list[TaskReport], path: Path) -> None:
    """Draw the training loss, the validation accuracy, and test images with predictions for each task into a file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = len(reports)
    figure = pyplot.figure(figsize=(15, 4.4 * rows), layout="constrained")
    parts = figure.subfigures(rows, 2, width_ratios=[1.1, 1], squeeze=False)
    for report, (left, right) in zip(reports, parts, strict=True):
        _draw_curves(report, left)
        _draw_images(report, right)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_curves(report: TaskReport, part: Any) -> None:
    loss, accuracy = part.subplots(1, 2)
    part.suptitle(report.task.info.name)
    for color, (method, folder) in zip(("C0", "C1"), report.folders.items(), strict=True):
        steps, epochs = (read_metrics(folder / "metrics.jsonl", kind) for kind in ("step", "epoch"))
        share = [record["update"] / epochs[-1]["update"] for record in steps]
        loss.plot(share, [record["loss"] for record in steps], color, label=method, linewidth=1)
        share = [record["update"] / epochs[-1]["update"] for record in epochs]
        accuracy.plot(share, [record["val_accuracy"] for record in epochs], f"{color}.-", label=method)
        test = report.results[method]["test_accuracy"]
        accuracy.plot(1.04, test, "o", color=color)
        accuracy.annotate(f"{test:.1%}", (1.04, test), (6, -3), textcoords="offset points", color=color)
    loss.set(title="training loss per update", xlabel="share of the run", ylim=(0, None))
    accuracy.set(title="validation accuracy (dot: test)", xlabel="share of the run", ylim=(0, 1), xlim=(0, 1.25))
    accuracy.legend(loc="lower right")


def _draw_images(report: TaskReport, part: Any) -> None:
    right = report.predictions == report.labels
    wrong_ones = (~right).nonzero().flatten().tolist()[: _SHOWN // 2]
    shown = right.nonzero().flatten().tolist()[: _SHOWN - len(wrong_ones)] + wrong_ones
    names = report.task.class_names
    part.suptitle(f"test images, EFFT: {len(shown) - len(wrong_ones)} right, {len(wrong_ones)} wrong")
    for axis, index in zip(part.subplots(2, _SHOWN // 2).flat, shown, strict=False):
        axis.imshow(report.task.raw("test", report.shown[index]))
        predicted, label = names[report.predictions[index]], names[report.labels[index]]
        color = "green" if predicted == label else "red"
        text = predicted if predicted == label else f"{predicted}, is {label}"
        axis.set_title(text, color=color, fontsize=10)
    for axis in part.axes:
        axis.set_axis_off()
