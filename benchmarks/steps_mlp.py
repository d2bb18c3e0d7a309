"""Predict the times of a whole MLP and of a whole block, with the model of benchmarks/steps.py.

The MLP of a ViT-B block consists of a layer norm, fc1, a GELU and fc2. The parameters of the norm are frozen. The
adapted MLP runs in one of three forms:

- "layers": torch computes the norm and the GELU, and each linear layer is a call of ``tt_linear``.
- "fused": ``tt_norm_linear`` and ``tt_gelu_linear``, which ``efft.fuse`` uses.
- "mlp": one call of ``tt_mlp``.

In the third generation, the products next to the GELU can compute it (``GeluOfProduct`` in csrc/cuda/kernels.h). The
model assumes that the other warp group hides the arithmetic of the GELU. Such a product takes at least the time in
which its bytes move at the fitted bandwidth. The frozen baseline is the frozen baseline of fc1 and fc2 together with
torch's norm and GELU. The recorded runs contain no times of torch's norm and GELU. The model therefore takes a launch
time and the time in which their bytes move at the fitted bandwidth.

The block consists of a layer norm, qkv, o and the MLP. Attention and the residual sums are not counted, because they
are the same with and without adapters.

``tests/csrc/test_emulated.py`` compares the launches and the bytes with those of the emulated kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from benchmarks import steps
from benchmarks.markdown import table
from benchmarks.steps import SECOND_GENERATION, THIRD_GENERATION, Constants, Launch, Run, Sizes

#: The forms in which the adapted MLP runs; the module docstring describes them.
FORMS = ("layers", "fused", "mlp")
#: The rows of the table: a name, the form, and the changes that the kernels contain.
_ROWS = (
    ("`tt_linear` with torch's norm and GELU, first generation", "layers", ""),
    ("`efft.fuse`, first generation", "fused", ""),
    ("`tt_mlp`, first generation", "mlp", ""),
    ("`efft.fuse`, second generation", "fused", SECOND_GENERATION),
    ("`tt_mlp`, second generation", "mlp", SECOND_GENERATION),
    ("`efft.fuse`, third generation", "fused", THIRD_GENERATION),
    ("`tt_mlp`, third generation", "mlp", THIRD_GENERATION),
)


class Part(NamedTuple):
    """Describe one kernel of the MLP.

    Attributes:
        layer: "fc1" or "fc2". The sums over tokens that one launch computes for both layers are counted to fc1.
        launch: the kernel.
        has_gelu: whether the kernel is a product that also computes the GELU.
    """

    layer: str
    launch: Launch
    has_gelu: bool = False


def launches(
    tokens: int,
    width: int,
    hidden: int,
    rank: int,
    form: str,
    direction: str,
    changes: Collection[str] = (),
    processors: int = steps.PROCESSORS,
) -> list[Part]:
    """Return the kernels of one call of the MLP in the order of their launches.

    Args:
        tokens: number of rows of the input.
        width: width of the input and of the output.
        hidden: width between the layers.
        rank: rank of both layers.
        form: one of :data:`FORMS`.
        direction: "fwd" for the forward pass, or "bwd" for a backward pass that computes the gradients of the input
            and of the factors.
        changes: the changes (keys of :data:`benchmarks.steps.STEPS`) that the kernels contain.
        processors: number of multiprocessors of the GPU.
    """
    narrow, wide = 2 * tokens * width, 2 * tokens * hidden  # bytes of an activation
    statistics, parameters = 8 * tokens, 4 * width  # mean and rstd of the norm, and its bf16 weight and bias
    sizes = {"fc1": Sizes(tokens, width, hidden, rank), "fc2": Sizes(tokens, hidden, width, rank)}
    of = {
        name: [Part(name, launch) for launch in steps.launches(layer, direction, changes, processors)]
        for name, layer in sizes.items()
    }
    is_own = form != "layers"
    # torch's kernels for the forward pass do the same as ours. In the backward pass, our kernels also write the output.
    again = 1 if is_own and direction == "bwd" else 0
    backward = "_backward" if direction == "bwd" else ""
    norm = Part("fc1", Launch(f"norm{backward}", (3 if backward else 2) * narrow + again * narrow + statistics))
    norm = norm._replace(launch=replace(norm.launch, bytes=norm.launch.bytes + parameters))
    gelu = Part("fc2", Launch(f"gelu{backward}", (3 if backward else 2) * wide + again * wide))
    has_gelu = "D" in changes and (form == "mlp" or (form == "fused" and direction == "bwd"))
    if has_gelu:
        # In the forward pass, the product of fc1 also writes the output of the GELU. In the backward pass, the product
        # of fc2 reads the input of the GELU, and writes the gradient of this input and the output of the GELU.
        layer = "fc2" if backward else "fc1"
        of[layer] = [
            Part(layer, replace(one.launch, bytes=one.launch.bytes + (2 if backward else 1) * wide), True)
            if one.launch.depth
            else one
            for one in of[layer]
        ]
    if not backward:
        first, second = (_after_pack(of[name], part) for name, part in (("fc1", norm), ("fc2", gelu)))
        return first + (of["fc2"] if has_gelu else second)
    products = {name: [part for part in parts if not _is_sum(part)] for name, parts in of.items()}
    sums = {name: [part for part in parts if _is_sum(part)] for name, parts in of.items()}
    second = products["fc2"] + ([] if has_gelu else [gelu])
    first = [*products["fc1"], norm]
    if form != "mlp" or "B" not in changes:
        return second + sums["fc2"] + first + sums["fc1"]
    together = Launch("reduce_tokens", sum(part.launch.bytes for parts in sums.values() for part in parts))
    return [*second, *first, Part("fc1", together)]


def _is_sum(part: Part) -> bool:
    return part.launch.kernel in ("reduce_tokens", "finish")


def _after_pack(parts: list[Part], producer: Part) -> list[Part]:
    """Return the kernels of a layer with its producer, which runs after the copies of the factors."""
    packs = sum(part.launch.kernel == "pack" for part in parts)
    return [*parts[:packs], producer, *parts[packs:]]


def of_mlp(form: str, changes: Collection[str] = ()) -> list[tuple[str, Part]]:
    """Return the kernels of the MLP of a ViT-B block, each with its direction."""
    width, hidden = steps.LAYERS["fc1"]
    sizes = steps.TOKENS, width, hidden, steps.RANK
    return [(way, part) for way in steps.PASSES for part in launches(*sizes, form, way, changes)]


def predict(by: Constants, run: Run, form: str, changes: Collection[str] = ()) -> float:
    """Return the microseconds of the forward and the backward pass of the MLP of a ViT-B block."""
    return sum(_time(by, run, direction, part, changes) for direction, part in of_mlp(form, changes))


def baseline(by: Constants, run: Run) -> float:
    """Return the microseconds of the frozen baseline of the MLP."""
    producers = [part for _, part in of_mlp("layers") if part.launch.kernel.startswith(("norm", "gelu"))]
    products = sum(run.floor[layer, way] for layer in ("fc1", "fc2") for way in steps.PASSES)
    return products + sum(steps.time_of(part.launch, 0, by) for part in producers)


def ratio_of_block(by: Constants, run: Run, form: str, changes: Collection[str] = ()) -> float:
    """Return the time of the block, divided by the time of its frozen baseline."""
    linear = {key: floor for key, floor in run.floor.items() if key[0] in ("qkv", "o")}
    ours = sum(steps.predict(by, linear, changes).values()) + _norm(by, form) + predict(by, run, form, changes)
    return ours / (sum(linear.values()) + _norm(by, "layers") + baseline(by, run))


def _norm(by: Constants, form: str) -> float:
    """Return the microseconds of the forward and the backward kernel of one layer norm."""
    norms = [part.launch for _, part in of_mlp(form) if part.launch.kernel.startswith("norm")]
    return sum(steps.time_of(launch, 0, by) for launch in norms)


def _time(by: Constants, run: Run, direction: str, part: Part, changes: Collection[str]) -> float:
    # The kernels for the norm and the GELU are not launched dependently, so that change C does not hide their launch.
    if part.launch.kernel.startswith(("norm", "gelu")):
        return steps.time_of(part.launch, 0, by)
    time = steps.time_with(changes, part.layer, part.launch, run.floor[part.layer, direction], by)
    if part.has_gelu:
        time = max(time, part.launch.bytes / by.bandwidth / 1e6)
    return time


def render(last: Mapping[str, tuple[Run, Constants]]) -> str:
    """Return a table of the forms and generations. ``last`` holds a run and the fitted constants of each GPU."""
    rows = []
    for name, form, changes in _ROWS:
        parts = [part for _, part in of_mlp(form, changes)]
        ratios = [predict(by, run, form, changes) / baseline(by, run) for run, by in last.values()]
        ratios += [ratio_of_block(by, run, form, changes) for run, by in last.values()]
        megabytes = sum(part.launch.bytes for part in parts) / 1e6
        rows.append([name, str(len(parts)), f"{megabytes:.0f}", *(f"{ratio:.2f}" for ratio in ratios)])
    columns = [f"{part} on {gpu}" for part in ("MLP", "block") for gpu in last]
    return table(["kernels", "launches", "MB", *columns], rows)
