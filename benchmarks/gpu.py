"""Run the build, the GPU tests and the benchmarks on a GPU that is available only for minutes.

    make bench-gpu BUDGET=480
    python -m benchmarks gpu --budget 300 --device cpu --quick   # try the command without a GPU, on tiny sizes

The budget is a number of seconds. The most important jobs run first. Each job is a process with a time limit, which is
a share of the budget. At this limit the job and all its child processes are stopped. Most jobs write results after each
setting. A stopped job therefore loses little. If a job fails, the next jobs still run, and the exit code is 1. A job
that is stopped or not started does not count as a failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """Describe one job.

    Attributes:
        name: name of the job in the printed report.
        arguments: arguments of the Python interpreter.
        share: the part of the budget that the job may use at most, between 0 and 1.
        fine: exit codes that mean success.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    fine: tuple[int, ...] = (0,)


def jobs(device: str, quick: bool, results: Path | None) -> list[Job]:
    """Return the jobs, the most important one first.

    Args:
        device: ``cuda`` or ``cpu``.
        quick: whether the benchmarks use tiny sizes.
        results: folder for the result files, or None for the folder of this checkout.
    """
    to = ("--device", device, *(() if results is None else ("--results", str(results))))

    def bench(name: str, share: float, command: str) -> Job:
        return Job(name, ("-m", "benchmarks", *command.split(), *to), share)

    # The tests spend most of their time in Triton's compiler. Therefore they run in parallel if pytest-xdist exists.
    several = ("-n", "auto") if importlib.util.find_spec("xdist") else ()
    first = [
        Job("compiled extension", ("-m", "efft_kernels", "build"), 0.4),
        Job("environment", ("-m", "efft_kernels"), 0.1),
        # pytest returns 5 if no test has the mark.
        Job("GPU tests", ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *several), 0.3, fine=(0, 5)),
    ]
    if quick:
        return [
            *first,
            bench("layers", 0.3, "ops --quick --images 1 --case o --dtype float32 --repeats 1"),
            bench("training step", 0.3, "model --model test_vit --batch 2 --rank 4 --dtype float32 --repeats 1"),
            bench("memory", 0.3, "memory --level model --model test_vit --rank 4 --rows efft:eager --quick"),
            bench("inference", 0.3, f"serve --model test_vit --batch 1 --rank 4 --dtype float32 --repeats 1 {_SERVED}"),
            bench("quantized backbones", 0.3, "quantized --model test_vit --batch 2 --rank 4 --repeats 1"),
            bench("experts", 0.3, "experts --model tiny --tokens 64 --rank 4 --repeats 1"),
            bench("scaling", 0.3, "scaling --quick --case o --sweep rank --repeats 1"),
        ]
    return [
        *first,
        bench("layers of ViT-B, bf16", 0.25, "ops --model vit_b --images 64 --rank 32 --dtype bfloat16"),
        bench("training step of ViT-B, bf16", 0.25, "model --dtype bfloat16"),
        bench("training step of ViT-B, bf16, CUDA graphs", 0.25, "model --dtype bfloat16 --cuda-graphs"),
        bench("memory of ViT-B, bf16", 0.2, "memory --level model --batch 64 --dtype bfloat16"),
        *([_choice(results)] if device.startswith("cuda") else []),
        bench("layers of ViT-B, bf16, by rank", 0.2, "ops --model vit_b --images 64 --rank 8 16 64 --dtype bfloat16"),
        bench("layers of ViT-B, fp16 and fp32", 0.2, "ops --model vit_b --images 64 --rank 32 --dtype float16 float32"),
        bench("layers of ViT-B, bf16, by batch", 0.2, "ops --model vit_b --images 1 8 256 --rank 32 --dtype bfloat16"),
        bench("inference of ViT-B", 0.2, f"serve {_SERVED} pool:100"),
        bench("quantized backbones of ViT-B", 0.2, "quantized"),
        bench("experts of Qwen3-30B, bf16", 0.2, "experts --model qwen3_30b --tokens 4096 --dtype bfloat16"),
        bench("scaling", 0.2, "scaling --dtype bfloat16"),
        bench(
            "training step of ViT-L and Swin-B, bf16",
            0.3,
            "model --model vit_large_patch16_224 swin_base_patch4_window7_224 --dtype bfloat16",
        ),
        bench("training step of ViT-B, fp32", 0.3, "model --dtype float32"),
        bench("layers of the other models, bf16", 0.5, f"ops --model {_OTHERS} --images 64 --rank 32 --dtype bfloat16"),
    ]


#: Option that selects rows of the command ``serve``. It leaves out the backends reference and cpu, and the rows
#: ``pool:100`` and ``pool:1000``, which hold 100 and 1000 adapters and take long to prepare.
_SERVED = "--rows base efft:eager efft:triton efft:cuda merged peft pool:1 pool:10"
_OTHERS = "vit_l vit_h swin_b.1 swin_b.2 swin_b.3 swin_b.4"


def _choice(results: Path | None) -> Job:
    """Return the job that measures which backend ``auto`` should choose for the layers of ViT-B.

    The job writes its measurements to ``choice.json`` in the folder of the results.
    """
    table = (ROOT / "benchmarks" / "results" if results is None else results) / "choice.json"
    sizes = "--tokens 1576 12608 --d-in 768 3072 --d-out 768 2304 3072 --rank 16 32 64"
    ops = "--op tt_linear tt_gelu_linear tt_norm_linear"
    return Job("choice", ("-m", "efft_kernels.autotune", "--out", str(table), *f"{sizes} {ops}".split()), 0.3)


def run_all(todo: Sequence[Job], budget: float) -> dict[str, str]:
    """Run the jobs in turn within ``budget`` seconds and return a text about the outcome of each, by name.

    The text starts with "done", "failed", "stopped" or "not started".
    """
    end = time.monotonic() + budget
    outcomes: dict[str, str] = {}
    for job in todo:
        left = end - time.monotonic()
        if left <= 0:
            outcomes[job.name] = "not started: the budget is used up"
            continue
        limit = min(left, job.share * budget)
        print(f"\n=== {job.name} (at most {limit:.0f} s): python {' '.join(job.arguments)}", flush=True)
        start = time.monotonic()
        outcomes[job.name] = f"{_run(job, limit)} ({time.monotonic() - start:.0f} s)"
    return outcomes


def _run(job: Job, limit: float) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # the job must find the same modules as this process
    # The job gets a new process group, so that its child processes can be stopped with it.
    process = subprocess.Popen([sys.executable, *job.arguments], cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit:.0f} s; results written before that are kept"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if code in job.fine else f"failed with exit code {code}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all jobs and print the outcome of each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds (default: %(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="use tiny sizes, which check that everything runs; the times mean nothing"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="folder for the result files (default: benchmarks/results)"
    )
    args = parser.parse_args(arguments)
    if args.budget <= 0:
        raise ValueError(f"--budget must be a positive number of seconds, got {args.budget:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device; to try the command without a GPU, pass --device cpu --quick")
    outcomes = run_all(jobs(args.device, args.quick, args.results), args.budget)
    print()
    for name, outcome in outcomes.items():
        print(f"{name:<43}{outcome}")
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
