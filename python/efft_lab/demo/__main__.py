"""Run the demo: train EFFT and a linear probe on two small tasks, and check the saved adapter.

The demo takes about ten minutes on two CPU cores. All numbers in its report are measured during the run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Subset

from efft_lab.cli import run_command
from efft_lab.demo.settings import IMAGE_SIZE, TASKS, efft_config, fast_bf16, probe_config


def main() -> int:
    """Parse the command line and run the demo."""
    parser = argparse.ArgumentParser(prog="python -m efft_lab.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write (default: demo_out)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="run a short check of a few minutes; its accuracies are not meaningful",
    )
    options = parser.parse_args()
    demo(options.out, options.quick)
    return 0


def demo(out: Path, quick: bool) -> None:
    """Train and check both methods on every task, and write report.md and demo.png to the folder ``out``.

    If ``quick`` is True, training is short, and only 200 test images are used.
    """
    from efft_lab.backbones import resolve_image_size
    from efft_lab.backbones.dinov2 import NOTE
    from efft_lab.data import load
    from efft_lab.demo.report import TaskReport, draw, write_report
    from efft_lab.demo.verify import verify
    from efft_lab.train import build, run
    from efft_lab.train.inference import predict
    from efft_lab.train.probe import linear_probe

    started, reports = time.perf_counter(), []
    precision = "bf16 (fast on this machine)" if fast_bf16() else "fp32 (bf16 is not fast on this machine)"
    print(
        f"EFFT demo: {' and '.join(TASKS)} at {IMAGE_SIZE} pixels, {torch.get_num_threads()} CPU threads, {precision}"
    )
    for number, name in enumerate(TASKS, 1):
        print(f"\n[{number}/{len(TASKS)}] {name}: data and linear probe", flush=True)
        own, head = efft_config(name, quick), probe_config(name, quick)
        task = load(name, image_size=resolve_image_size(own.model, own.image_size), max_test=200 if quick else None)
        folders = {"linear probe": out / f"{name}-linear", "EFFT": out / f"{name}-efft"}
        clock = [time.perf_counter()]
        probe = linear_probe(head, folders["linear probe"], build.create_model(head, task.classes), task)
        clock.append(time.perf_counter())
        print(f"linear probe: test accuracy {probe.summary['test_accuracy']:.1%}")
        print(f"[{number}/{len(TASKS)}] {name}: EFFT", flush=True)
        efft_run = run(own, folders["EFFT"], task=task, overwrite=True)
        clock.append(time.perf_counter())
        print(f"EFFT: test accuracy {efft_run.summary['test_accuracy']:.1%}")
        assert efft_run.model is not None  # it is None only if a finished run is resumed
        print("loading the adapter in a new process, merging it, comparing logits", flush=True)
        agreements = verify(efft_run.model, folders["EFFT"], task.val)
        for agreement in agreements:
            print(f"  {agreement}")
        # Random images, because a test set may be sorted by class.
        shown = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(0))[:200].tolist()
        predictions, labels = predict(efft_run.model, Subset(task.test, shown), title="pictures")
        seconds = {"linear probe": clock[1] - clock[0], "EFFT": clock[2] - clock[1]}
        results = {"linear probe": probe.summary, "EFFT": efft_run.summary}
        reports.append(TaskReport(task, folders, results, seconds, agreements, shown, predictions, labels))

    command = " ".join(["python -m efft_lab.demo", *sys.argv[1:]])
    print("\n" + write_report(reports, out, NOTE, command, time.perf_counter() - started))
    draw(reports, out / "demo.png")
    print(f"wrote {out / 'report.md'} and {out / 'demo.png'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
