"""Predict the gain of each planned change (step) to the cuda backend, with a model that is fitted to recorded medians.

benchmarks/steps_page.py prints the predictions, and benchmarks/steps_mlp.py applies the model to a whole MLP.

The case is a ViT-B block, which has the layers qkv, o, fc1 and fc2, on a GPU of compute capability 9.0. Activations are
in bf16 and factors in fp32. Each layer computes y = x Wᵀ + h G with h = x D, in one forward and one backward call. W is
frozen, and D and G are the factors of the update. The frozen baseline computes only x Wᵀ and its input gradient gy W,
with cuBLAS ("the vendor").

The model lists the kernels of each call and the bytes that they move. One of these kernels packs D and G: it converts
the factors to bf16 for the product. Another kernel, the reduction, computes dD and dG as sums over tokens.
``tests/csrc/test_emulated.py`` compares this list with the launches and the bytes that the emulator of the kernels
counts.

The time of a kernel is a launch time plus the time of its work. A kernel that is limited by memory moves its bytes at
the bandwidth. For the main loop of our product x Wᵀ or gy W, the model takes the time of the vendor's product (the
recorded median of the frozen baseline minus a launch time) and multiplies it by the constant ``own``. The model adds
time for the tail of the product (the rank-r product that is added in the same kernel), and for columns of h if the
product also computes h. :func:`fit` determines the four constants from the medians in ``ops.jsonl``.

The predictions for changes are modeled, not measured. They assume that the fitted constants do not change, and make the
assumptions in :data:`STEPS`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.tables import Line, read

#: For each planned change, a description of its effect and of the model's assumptions.
STEPS = {
    "A": "the tail of a product takes ceil(r / 16) steps of depth 16, and h has ceil(r / 16) times 16 columns",
    "B": "D and G are packed once per forward pass for all layers, and a reduction adds its ranges of tokens itself",
    "C": "programmatic dependent launch, which is assumed to hide half of the launch time",
    "D": "ping-pong tiles, which are assumed to halve the difference between our product and the vendor's",
    "E": "each block of a cluster computes half of h, for all widths, so that no separate kernel computes h",
    "F": "one launch computes the reductions of all layers of a transformer block",
    "G": "dG of fc1 and dD of fc2 are summed in the kernels that compute gy and x, so that these are not read again",
    "H": "reductions overlap with the next product, which is assumed to hide half of their time",
}
#: The changes that the second and the third generation of kernels contain. EFFT_SM90_GENERATION selects a generation.
SECOND_GENERATION, THIRD_GENERATION = "ABCE", "ABCDE"
LAYERS = {"qkv": (768, 2304), "o": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
PASSES = ("fwd", "bwd")
TOKENS, RANK = 64 * 197, 32

PROCESSORS = 132  # multiprocessors of an H100 or H200
_DEPTH, _TILE = 64, 192  # the size along k of one iteration of the main loop, and the number of columns of a tile
# From lowrank_gemm_sm90.h: a product also computes h if h and the output have at most these numbers of columns.
_MADE_RANKS, _MADE_BESIDE = 32, 2048
# From lowrank_gemm_sm90.cu: if k is larger than this, the two thread blocks of a cluster share the computation of h.
_SHARING_DEPTH = 3 * _DEPTH
# From reduce_tokens.cu: the number of columns of a thread block. The number of tokens divided by the second value,
# rounded up, limits the number of ranges.
_REDUCED_COLUMNS, _REDUCED_TOKENS = 64, 256


class Sizes(NamedTuple):
    """Hold the sizes of one layer."""

    tokens: int
    d_in: int
    d_out: int
    rank: int


@dataclass(frozen=True)
class Launch:
    """Describe one kernel of a call.

    Attributes:
        kernel: the name of the kernel in csrc/cuda.
        bytes: bytes of the operands and results, each counted once.
        depth: for a product, the size of its main loop plus its tail along k, divided by the size of the main loop.
            For other kernels, 0.
        beside: for a product that computes h, the columns of h that each tile computes, divided by the columns of a
            tile. Otherwise 0.
    """

    kernel: str
    bytes: int
    depth: float = 0.0
    beside: float = 0.0


def launches(of: Sizes, direction: str, steps: Collection[str] = (), processors: int = PROCESSORS) -> list[Launch]:
    """Return the kernels of one call of ``tt_linear`` in the order of their launches.

    Args:
        of: sizes of the layer, which has bf16 activations and fp32 factors.
        direction: "fwd" for the forward pass, or "bwd" for a backward pass that computes dx, dD and dG.
        steps: the changes (keys of :data:`STEPS`) that the kernels contain.
        processors: number of multiprocessors of the GPU.
    """
    tokens, rank = of.tokens, of.rank
    k, n = (of.d_in, of.d_out) if direction == "fwd" else (of.d_out, of.d_in)
    h, factors = 2 * tokens * rank, rank * (of.d_in + of.d_out)
    made = rank <= _MADE_RANKS and (k > _SHARING_DEPTH if "E" in steps else n <= _MADE_BESIDE)
    found = [] if "B" in steps else [Launch("pack", 6 * factors)]
    if not made:
        found.append(Launch("project", 2 * tokens * k + 2 * rank * k + h))
    steps_of_16 = ceil(rank / 16) if "A" in steps else 4 * ceil(rank / _DEPTH)
    columns = 16 * ceil(rank / 16) if "A" in steps else _MADE_RANKS
    product = Launch(
        "lowrank_gemm_sm90",
        2 * (tokens * k + k * n + tokens * n + rank * n) + h + 2 * rank * k * made + 2 * n * (direction == "fwd"),
        1 + (columns / 16 if made else steps_of_16) * 16 / k,
        made * columns / _TILE / (2 if "E" in steps else 1),
    )
    found.append(product)
    if direction == "bwd":
        blocks = ceil(of.d_in / _REDUCED_COLUMNS) + ceil(of.d_out / _REDUCED_COLUMNS)
        splits = max(1, min(ceil(2 * processors / blocks), ceil(tokens / _REDUCED_TOKENS)))
        operands = 2 * tokens * (of.d_in + of.d_out) + 2 * h
        if "B" in steps:
            found.append(Launch("reduce_tokens", operands + 4 * factors))
        else:
            found.append(Launch("reduce_tokens", operands + 4 * splits * factors))
            found.append(Launch("finish", 4 * (splits + 1) * factors))
    return found


#: The layer and the direction ("fwd" or "bwd") of a call.
Key = tuple[str, str]


class Run(NamedTuple):
    """Hold the medians of one recorded run.

    Attributes:
        gpu: type of the GPU, such as "H100".
        commit: the commit that was measured.
        floor: microseconds of the frozen baseline.
        ours: microseconds of the cuda backend.
        copy: measured bandwidth of a copy, in TB/s.
    """

    gpu: str
    commit: str
    floor: dict[Key, float]
    ours: dict[Key, float]
    copy: float

    @property
    def ratio(self) -> float:
        """Return the measured time of the block divided by that of the frozen baseline."""
        return sum(self.ours.values()) / sum(self.floor.values())


class Constants(NamedTuple):
    """Hold the fitted constants.

    Attributes:
        own: time of our product without tail and h, divided by the time of the vendor's product.
        launch: time of a launch in microseconds.
        bandwidth: bandwidth of kernels that are limited by memory, in TB/s.
        beside: time in which a product computes a column of h, divided by the time for a column of its tile.
    """

    own: float
    launch: float
    bandwidth: float
    beside: float


def runs(lines: Iterable[Line]) -> list[Run]:
    """Return the complete runs of this case on Hopper GPUs among the lines of ``ops.jsonl``."""
    found: dict[tuple[str, str], Run] = {}
    for line in lines:
        names = line["device"] == "cuda" and line["gpu"]["name"].split()
        of_case = (line["model"], line["tokens"], line["rank"], line["dtype"]) == ("vit_b", TOKENS, RANK, "bfloat16")
        if not names or not names[1].startswith("H") or not of_case or not line.get("seconds"):
            continue
        key = names[1], line["commit"]
        run = found.setdefault(key, Run(*key, {}, {}, line["peaks"]["bytes_per_s"] / 1e12))
        times = {"floor": run.floor, "efft:cuda": run.ours}.get(line["row"])
        if times is not None:
            times.update({(line["case"], way): 1e6 * line["seconds"][way]["p50"] for way in PASSES})
    return [run for run in found.values() if len(run.floor) == len(run.ours) == len(LAYERS) * len(PASSES)]


def time_of(launch: Launch, floor: float, by: Constants) -> float:
    """Return the microseconds of one kernel.

    ``floor`` is the recorded time in which the frozen baseline computes the product of the same call.
    """
    if launch.depth == 0:
        return by.launch + launch.bytes / by.bandwidth / 1e6
    return by.launch + by.own * (floor - by.launch) * (launch.depth + by.beside * launch.beside)


def predict(by: Constants, floor: dict[Key, float], steps: Collection[str] = ()) -> dict[Key, float]:
    """Return the microseconds of our backend with the given changes, for each layer and direction in ``floor``.

    ``floor`` holds the recorded microseconds of the frozen baseline.
    """
    found = {}
    for layer, direction in floor:
        of = launches(Sizes(TOKENS, *LAYERS[layer], RANK), direction, steps)
        found[layer, direction] = sum(time_with(steps, layer, launch, floor[layer, direction], by) for launch in of)
    return found


def time_with(steps: Collection[str], layer: str, launch: Launch, floor: float, by: Constants) -> float:
    """Return the microseconds of one kernel with the given changes.

    This function applies the changes C, D, F, G and H. The changes A, B and E are already in ``launch``.
    """
    reduces = launch.kernel in ("reduce_tokens", "finish")
    hidden = by.launch / 2 if "C" in steps else 0.0
    if "D" in steps:
        by = by._replace(own=(1 + by.own) / 2)
    time = time_of(launch, floor, by)
    if launch.kernel == "reduce_tokens":
        time -= _saved(steps, layer) / by.bandwidth / 1e6
    if reduces and "H" in steps:
        time -= (time - by.launch) / 2
    if reduces and "F" in steps:
        hidden = by.launch * (1 - 1 / len(LAYERS)) + hidden / len(LAYERS)
    return time - hidden


def _saved(steps: Collection[str], layer: str) -> int:
    """Return the bytes of gy of fc1, or of x of fc2, that step G does not read again."""
    return 2 * TOKENS * max(LAYERS[layer]) * ("G" in steps and layer in ("fc1", "fc2"))


def fit(of: Sequence[Run]) -> Constants:
    """Return the constants that minimize the sum of squared errors over the medians of ``of``."""

    def errors(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        by = Constants(float(x[0]), float(x[1]), float(1 / x[2]), float(x[3]))
        return np.array(
            [run.ours[key] - time for run in of for key, time in predict(by, run.floor).items()], dtype=np.float64
        )

    x = np.array([1.1, 3.0, 0.3, 0.5])
    for _ in range(30):  # Gauss-Newton
        slopes = np.stack([(errors(x + e) - errors(x - e)) / 2e-4 for e in 1e-4 * np.eye(4)], 1)
        x = x - np.linalg.lstsq(slopes, errors(x), rcond=None)[0]
    return Constants(float(x[0]), float(x[1]), float(1 / x[2]), float(x[3]))


def error(by: Constants, of: Sequence[Run]) -> float:
    """Return the root mean square of the differences between measured and modeled times, in microseconds."""
    squares = [(run.ours[key] - time) ** 2 for run in of for key, time in predict(by, run.floor).items()]
    return float(np.sqrt(np.mean(squares)))


def counts(steps: Collection[str]) -> tuple[int, float]:
    """Return the number of launches of a block with the given changes, and the megabytes that they move."""
    found = [
        one for sizes in LAYERS.values() for way in PASSES for one in launches(Sizes(TOKENS, *sizes, RANK), way, steps)
    ]
    launched = len(found) - ("F" in steps) * (len(LAYERS) - 1) * (1 if "B" in steps else 2)
    return launched, (sum(launch.bytes for launch in found) - sum(_saved(steps, layer) for layer in LAYERS)) / 1e6


def by_gpu() -> dict[str, list[Run]]:
    """Return the runs that are recorded in ``ops.jsonl``, by type of GPU."""
    found: dict[str, list[Run]] = {}
    for run in runs(read("ops")):
        found.setdefault(run.gpu, []).append(run)
    return found
