"""Run the GPU tests and the benchmarks on a GPU that is available only for minutes.

    make bench-gpu PART=tests BUDGET=330
    make bench-gpu PART=speed BUDGET=330
    python -m benchmarks gpu --part tests speed --budget 300 --device cpu --quick   # try the command without a GPU

The jobs are divided into three parts. ``tests`` checks the results of the CUDA kernels: tests, sanitizers and a list of
kernels with their times. ``speed`` measures the times on which the next changes depend. ``more`` measures everything
else. The default is to run all parts in this order.

The budget is a number of seconds for all selected parts. The most important jobs run first. Each job is a process with
a time limit, which is a share of the budget. At this limit, the job and all its child processes are stopped. Most jobs
write results after each setting, so a stopped job loses little. If a job fails, the next jobs still run, and the exit
code is 1. If something that a job needs is missing, the job is not run, and the report states the reason. A job that is
stopped or not run does not count as a failure.

The file ``gpu.jsonl`` gets a line about each job as soon as the job ends. The file ``gpu.log`` gets the output of all
jobs, and each line starts with the name of the job. Both files are in the folder of the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.generations import GENERATIONS, VARIABLE
from efft_kernels.build import find
from efft_lab.record import RESULTS, append, machine_facts

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """Describe one job.

    Attributes:
        name: name of the job in the report and in the result files.
        arguments: arguments of the Python interpreter.
        share: the part of the budget that the job may use at most, between 0 and 1.
        fine: exit codes that mean success.
        environment: additional environment variables.
        under: a program with its options that runs the Python interpreter, such as a sanitizer.
        needs: functions that return None, or the reason why the job cannot run on this machine. They are called when it
            is the job's turn, because an earlier job may have provided what is missing.
        group: name of a group. Neighboring jobs of a group run at the same time. Jobs without a group run alone.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    fine: tuple[int, ...] = (0,)
    environment: dict[str, str] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    needs: tuple[Callable[[], str | None], ...] = ()
    group: str = ""

    def command(self) -> str:
        """Return the command line as in a shell, with the names of programs instead of their paths."""
        program = [Path(self.under[0]).name, *self.under[1:]] if self.under else []
        words = [*(f"{name}={value}" for name, value in self.environment.items()), *program, "python", *self.arguments]
        return " ".join(f"'{word}'" if " " in word else word for word in words)


# --- the jobs ---------------------------------------------------------------------------------------------------------


def jobs(parts: Sequence[str], device: str, quick: bool, results: Path | None) -> list[Job]:
    """Return the jobs of the selected parts, the most important one first.

    Args:
        parts: keys of :data:`PARTS`.
        device: ``cuda`` or ``cpu``.
        quick: whether the benchmarks use tiny sizes.
        results: folder for the result files, or None for the folder of this checkout.
    """
    return [job for part in parts for job in PARTS[part](device, quick, results)]


def _bench(name: str, share: float, command: str, device: str, results: Path | None, **fields: Any) -> Job:
    to = ("--device", device, *(() if results is None else ("--results", str(results))))
    return Job(name, ("-m", "benchmarks", *command.split(), *to), share, **fields)


#: Tiny sizes of the commands ``generations`` and ``timeline``, on a backend that every machine has.
_TINY = "--backend eager --layers-of swin_b.4 --images 1 --model test_vit --batch 2 --rank 4 --repeats 1"
#: The tests of the ops, an expression for those that use no backend but ``cuda``, and one for all others.
_OPS = ("tests/efft_kernels/ops",)
_CUDA, _NOT_CUDA = "not triton and not eager and not reference", "triton or eager or reference"
#: The other folders with tests that need a GPU. pytest would need more than a minute to import all tests.
OTHER_TESTS = (
    "tests/efft/graphs",
    "tests/efft/pool",
    "tests/efft_kernels/nn",
    "tests/efft_kernels/triton",
    "tests/benchmarks",
    "tests/efft_lab/train",
)
#: Groups of cases with tiny sizes that run every instance of the kernels for compute capability 9.0.
_CASES = "tiles bfloat16,tiles float16,sums"
SANITIZERS = ("memcheck", "synccheck", "racecheck")


def tests(device: str, quick: bool, results: Path | None) -> list[Job]:
    """Return the jobs that check the CUDA kernels.

    Each generation of kernels is tested in its own processes, because a process uses only one generation.
    """
    hopper = (_no_library, _no_hopper)
    cuda = device == "cuda"
    build = ("-m", "efft_kernels", "build", *(("--targets", "cuda") if cuda else ()))
    found = [
        Job("compiled libraries", build, 0.5, needs=(_no_need_to_build,) if cuda else ()),
        Job("environment", ("-m", "efft_kernels"), 0.15),
    ]
    found += [_pytest(f"tests of generation {g}", 0.2, _OPS, _CUDA, generation=g, needs=hopper) for g in GENERATIONS]
    sanitizer = find_sanitizer()
    for g in GENERATIONS:
        script = ("tests/csrc/emulation/ragged.py", "installed", _CASES, "cuda")
        for tool in SANITIZERS:
            # Kernels of torch are not checked, because this would take minutes.
            options = ("--tool", tool, "--error-exitcode", "99", "--kernel-name", "kernel_substring=efft")
            found.append(
                Job(
                    f"{tool} of generation {g}",
                    script,
                    0.3,
                    environment={VARIABLE: str(g)},
                    under=(sanitizer or "compute-sanitizer", *options),
                    needs=(_no_sanitizer, *hopper),
                    group="sanitizers",
                )
            )
    for g in GENERATIONS:
        command = f"timeline {_TINY}" if quick else "timeline"
        needs = hopper if cuda else ()
        timeline = _bench(f"timeline of generation {g}", 0.12, command, device, results, needs=needs)
        found.append(_of_generation(timeline, g))
    return [
        *found,
        _pytest("tests outside of the ops", 0.4, OTHER_TESTS),
        _pytest("tests of the ops, other backends", 0.5, _OPS, _NOT_CUDA),
    ]


def speed(device: str, quick: bool, results: Path | None) -> list[Job]:
    """Return the jobs that measure the generations of kernels, CUDA graphs and inference."""

    def bench(name: str, share: float, command: str) -> Job:
        return _bench(name, share, command, device, results, needs=(_no_library,) if device == "cuda" else ())

    layers, step = "generations --measure layers", "generations --measure step"
    serve = "serve --batch 8 --dtype bfloat16 --rows base efft:cuda pool:10 graph:base graph:efft graph:pool:10"
    if quick:
        layers, step = f"{layers} {_TINY} --generation 1 2", f"{step} {_TINY} --generation 1 3"
        serve = "serve --model test_vit --batch 2 --rank 4 --dtype bfloat16 --repeats 1 --rows base pool:1 graph:base"
    return [
        bench("layers, all generations", 0.35, layers),
        bench("training step, all generations", 0.45, step),
        bench("inference, batch 8", 0.3, serve),
        _bench("fp8 products", 0.15, "fp8-products --quick" if quick else "fp8-products", device, results),
        # All rows are measured again, because the tables of the documentation show only the newest run.
        *([] if quick else [bench("inference, batch 8, 1000 adapters", 0.5, f"{serve} graph:pool:1000")]),
    ]


def more(device: str, quick: bool, results: Path | None) -> list[Job]:
    """Return the jobs that measure everything else."""

    def bench(name: str, share: float, command: str) -> Job:
        return _bench(name, share, command, device, results)

    if quick:
        return [
            bench("layers", 0.3, "ops --quick --images 1 --case o --dtype float32 --repeats 1"),
            bench("training step", 0.3, "model --model test_vit --batch 2 --rank 4 --dtype float32 --repeats 1"),
            bench("memory", 0.3, "memory --level model --model test_vit --rank 4 --rows efft:eager --quick"),
            bench("inference", 0.3, f"serve --model test_vit --batch 1 --rank 4 --dtype float32 --repeats 1 {_SERVED}"),
            bench("quantized backbones", 0.3, "quantized --model test_vit --batch 2 --rank 4 --repeats 1"),
            bench("experts", 0.3, "experts --model tiny --tokens 64 --rank 4 --repeats 1"),
            bench("scaling", 0.3, "scaling --quick --case o --sweep rank --repeats 1"),
        ]
    return [
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


#: The parts, in the order in which they run.
PARTS: dict[str, Callable[[str, bool, Path | None], list[Job]]] = {"tests": tests, "speed": speed, "more": more}

#: Option that selects rows of the command ``serve``. It leaves out the backends reference and cpu, and the rows
#: ``pool:100`` and ``pool:1000``, which hold 100 and 1000 adapters and take long to prepare.
_SERVED = "--rows base efft:eager efft:triton efft:cuda merged peft pool:1 pool:10"
_OTHERS = "vit_l vit_h swin_b.1 swin_b.2 swin_b.3 swin_b.4"


def _choice(results: Path | None) -> Job:
    """Return the job that measures which backend ``auto`` should choose for the layers of ViT-B.

    The job writes its measurements to ``choice.json`` in the folder of the results.
    """
    table = (results or RESULTS) / "choice.json"
    sizes = "--tokens 1576 12608 --d-in 768 3072 --d-out 768 2304 3072 --rank 16 32 64"
    ops = "--op tt_linear tt_gelu_linear tt_norm_linear"
    return Job("choice", ("-m", "efft_kernels.autotune", "--out", str(table), *f"{sizes} {ops}".split()), 0.3)


def _pytest(
    name: str,
    share: float,
    paths: Sequence[str],
    only: str = "",
    generation: int | None = None,
    needs: tuple[Callable[[], str | None], ...] = (),
) -> Job:
    """Return a job that runs the tests in ``paths`` that need a GPU, and whose names match the expression ``only``."""
    # Most of the time is spent in compilers and imports. Therefore the tests run in parallel if pytest-xdist exists.
    several = ("-n", "auto", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    options = ("-m", "gpu", *(("-k", only) if only else ()))
    quiet = ("-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:benchmark")
    # If a kernel never ends, the log shows the test that launched it. A file that cannot be imported stops no test.
    robust = ("-o", "faulthandler_timeout=40", "--continue-on-collection-errors")
    environment = {"OMP_NUM_THREADS": "1"} | ({} if generation is None else {VARIABLE: str(generation)})
    arguments = ("-m", "pytest", *paths, *options, *quiet, *robust, *several)
    # pytest returns 5 if it finds no test, for instance on a CPU.
    return Job(name, arguments, share, fine=(0, 5), environment=environment, needs=needs)


def _of_generation(job: Job, generation: int) -> Job:
    return dataclasses.replace(job, environment={VARIABLE: str(generation)})


# --- what a job needs -------------------------------------------------------------------------------------------------


def _no_library() -> str | None:
    if find("cuda") is None:
        return "there is no compiled library for these sources: see the job 'compiled libraries'"
    return None


def _no_need_to_build() -> str | None:
    if find("cuda") is None or find("cpu") is None:
        return None
    return "not necessary, because the libraries for these sources exist"


def _no_hopper() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return f"the kernels need compute capability 9.0, and {torch.cuda.get_device_name()} has {major}.{minor}"
    return None


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, from the PATH or from the CUDA toolkit that contains nvcc."""
    found = shutil.which("compute-sanitizer")
    nvcc = shutil.which("nvcc")
    if found is not None or nvcc is None:
        return found
    toolkit = Path(nvcc).resolve().parents[1]
    folders = (toolkit / "bin", toolkit / "compute-sanitizer")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, folders)))


def _no_sanitizer() -> str | None:
    if find_sanitizer() is None:
        return "compute-sanitizer is neither on the PATH nor in the CUDA toolkit that contains nvcc"
    return None


# --- running them -----------------------------------------------------------------------------------------------------

#: Number of lines at the end of a job's output that its result line contains.
_LAST_LINES = 3


@dataclass(frozen=True)
class Outcome:
    """Hold the outcome of a job.

    Attributes:
        text: a text that starts with "done", "failed", "stopped", "not run" or "not started".
        seconds: the time that the job took.
        last: the last lines of its output.
    """

    text: str
    seconds: float = 0.0
    last: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} ({self.seconds:.0f} s)" if self.seconds else self.text


class Log:
    """Print the output of all jobs, and append it to a file. Each line starts with the name of its job."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._lock = file, threading.Lock()

    def write(self, job: str, line: str) -> None:
        with self._lock:
            for file in (self._file, sys.stdout):
                print(f"[{job}] {line}", file=file, flush=True)


def run_all(todo: Sequence[Job], budget: float, results: Path | None = None) -> dict[str, Outcome]:
    """Run the jobs in turn within ``budget`` seconds, and return the outcome of each by its name.

    The functions in :attr:`Job.needs` decide whether a job runs. The outcomes and the output of the jobs are also
    written to files in ``results``, by default in the folder of this checkout.
    """
    end = time.monotonic() + budget
    outcomes: dict[str, Outcome] = {}
    folder = results or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    names = itertools.count()
    with (folder / "gpu.log").open("a") as file:
        log = Log(file)
        for _, neighbors in itertools.groupby(todo, key=lambda job: job.group or next(names)):
            group = list(neighbors)
            with ThreadPoolExecutor(len(group)) as pool:
                limits = [min(end - time.monotonic(), job.share * budget) for job in group]
                for job, outcome in zip(group, pool.map(_attempt, group, limits, [log] * len(group)), strict=True):
                    outcomes[job.name] = outcome
                    log.write(job.name, f"=== {outcome}")
                    append("gpu", [_line(job, outcome)], results)
    return outcomes


def _line(job: Job, outcome: Outcome) -> dict[str, Any]:
    about = {"command": job.command(), "suite": "gpu", "job": job.name}
    return {**machine_facts(), **about, "outcome": outcome.text, "wall_s": outcome.seconds, "last": list(outcome.last)}


def _attempt(job: Job, limit: float, log: Log) -> Outcome:
    missing = next((reason for need in job.needs if (reason := need()) is not None), None)
    if missing is not None:
        return Outcome(f"not run: {missing}")
    if limit <= 0:
        return Outcome("not started: the budget is used up")
    log.write(job.name, f"=== at most {limit:.0f} s: {job.command()}")
    start = time.monotonic()
    last: deque[str] = deque(maxlen=_LAST_LINES)
    text = _run(job, limit, log, last)
    return Outcome(text, round(time.monotonic() - start, 1), tuple(last))


def _run(job: Job, limit: float, log: Log, last: deque[str]) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),  # the job must find the same modules as this process
        "PYTHONUNBUFFERED": "1",
        **job.environment,
    }
    command = [*job.under, sys.executable, *job.arguments]
    # The job gets a new process group, so that its child processes can be stopped with it.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    reader = threading.Thread(target=_read, args=(process.stdout, job.name, log, last), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit:.0f} s; results written before that are kept"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(5)  # a process that left the group can keep the pipe open
    return "done" if code in job.fine else f"failed with exit code {code}"


def _read(output: IO[str], job: str, log: Log, last: deque[str]) -> None:
    for line in output:
        if line.strip():
            last.append(line.rstrip())
        log.write(job, line.rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all jobs and print the outcome of each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all parts, in this order"
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
    outcomes = run_all(jobs(args.part, args.device, args.quick, args.results), args.budget, args.results)
    print()
    for name, outcome in outcomes.items():
        print(f"{name:<43}{outcome}")
    return int(any(outcome.text.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
