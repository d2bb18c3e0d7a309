"""Print the predictions of benchmarks/steps.py and benchmarks/steps_mlp.py as tables.

python -m benchmarks steps                  # prints the tables
python -m benchmarks steps --write          # writes them to benchmarks/results/steps.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks import steps_mlp
from benchmarks.markdown import table
from benchmarks.steps import (
    RANK,
    SECOND_GENERATION,
    STEPS,
    THIRD_GENERATION,
    TOKENS,
    by_gpu,
    counts,
    error,
    fit,
    predict,
)
from efft_lab import record


def render() -> str:
    """Return the text of benchmarks/results/steps.md: the fitted constants, the predictions and the counts."""
    groups = by_gpu()
    fitted = {gpu: fit(of) for gpu, of in groups.items()}
    rows = []
    for gpu, by in fitted.items():
        for run in groups[gpu]:
            modeled = sum(predict(by, run.floor).values()) / sum(run.floor.values())
            cells = (f"{by.own:.3f}", f"{by.launch:.2f} us", f"{by.bandwidth:.2f} ({run.copy:.2f}) TB/s")
            rms = error(by, groups[gpu])
            rows.append([f"{gpu}, commit {run.commit}", *cells, f"{by.beside:.2f}", f"{rms:.1f} us"])
            rows[-1] += [f"{run.ratio:.3f}", f"{modeled:.3f}"]
    header = ["medians of", "product / vendor's", "launch", "bandwidth (copy)", "column of h / of tile", "RMS error"]
    parts = [table([*header, "block, measured", "block, modeled"], rows)]
    last = {gpu: (of[-1], fitted[gpu]) for gpu, of in groups.items()}

    def ratio(gpu: str, steps: str) -> float:
        run, by = last[gpu]
        return sum(predict(by, run.floor, steps).values()) / sum(run.floor.values())

    rows = []
    for i, (step, text) in enumerate(STEPS.items()):
        sofar = "".join(STEPS)[: i + 1]
        gains = [1e2 * (ratio(gpu, "") - ratio(gpu, step)) for gpu in last]
        rows.append([f"{step}: {text}", *(f"{gain:.1f} %" for gain in gains), sofar, *_counted(sofar)])
        rows[-1] += [f"{ratio(gpu, sofar):.2f}" for gpu in last]
    gain = [f"gain on {gpu}" for gpu in last]
    header = ["step", *gain, "steps together", "launches", "MB", *(f"block on {gpu}" for gpu in last)]
    nothing = ["none", *("" for _ in last), "", *_counted(""), *(f"{ratio(gpu, ''):.2f}" for gpu in last)]
    parts.append(table(header, [nothing, *rows]))
    rows = []
    for name, of in (("first", ""), ("second", SECOND_GENERATION), ("third", THIRD_GENERATION)):
        contained = f" ({', '.join(of)})" if of else ""
        rows.append([f"{name} generation{contained}", *_counted(of), *(f"{ratio(gpu, of):.2f}" for gpu in last)])
    parts.append(table(["kernels", "launches", "MB", *(f"block on {gpu}" for gpu in last)], rows))
    parts.append(steps_mlp.render(last))
    return _PAGE.format(*parts, tokens=TOKENS, rank=RANK)


def _counted(steps: str) -> list[str]:
    launched, megabytes = counts(steps)
    return [str(launched), f"{megabytes:.0f}"]


_PAGE = """# Planned changes to the cuda backend: modeled gains

This page is written by `python -m benchmarks steps --write`. The case is a ViT-B block with {tokens} tokens, rank
{rank}, bf16, and compute capability 9.0. Each of its four layers computes y = x Wᵀ + h G with h = x D. W is frozen, and
D and G are the factors of the update. The frozen baseline computes only x Wᵀ and its input gradient, with cuBLAS ("the
vendor"). The columns "block" contain the time of the forward and backward calls of the four layers, divided by the time
of the frozen baseline.

## Fit

The model is fitted to the medians in `ops.jsonl`. "Block, measured" and the bandwidth of a copy, in parentheses, are
measurements. All other numbers in this table are results of the fit. "Product / vendor's" compares the time of our
product with that of cuBLAS. "Column of h / of tile" is the time in which a product computes a column of h, divided by
the time for a column of its tile.

{0}

## Steps (modeled, not measured)

A step is one planned change. A gain is the effect of the step when it is the only change, in percent of the frozen
baseline. Gains do not add up. "Launches" counts the kernels of a block, and "MB" the bytes of their operands and
results. These numbers and those of the columns "block" include all steps up to this one. The tail of a product is the
rank-r product that is added in the same kernel. A reduction computes dD and dG as sums over tokens. To pack D and G is
to convert them to bf16 for the product. Step B packs the factors of all layers with copies, once per forward pass.
These copies are not counted. All blocks of a ViT-B together need twelve copies, three for each of the four kinds of
layer.

{1}

## Generations (modeled, not measured)

The second and the third generation consist of kernels with the steps in parentheses. No GPU has run these kernels yet.
`tests/csrc/test_emulated.py` counts the same launches and bytes in the emulator.

{2}

## The MLP as one op, and the whole block (modeled, not measured)

The MLP of the block consists of a layer norm with frozen parameters, fc1, a GELU and fc2. The columns "MLP" contain the
time of its forward and backward passes, divided by the time of its frozen baseline. This baseline consists of the
recorded medians for fc1 and fc2 and of a modeled time for torch's norm and GELU. No run has recorded this modeled time:
it is a launch time for each kernel, and the time in which the bytes of the kernel move at the fitted bandwidth.
"Launches" and "MB" count the kernels of the adapted MLP and their bytes. The kernels of the norm and the GELU are
included in all columns. Here, the columns "block" contain the time of a layer norm, qkv, o and the MLP, divided by the
time of their frozen baseline. Attention and the residual sums are not included.

In the third generation, the products next to the GELU also compute the GELU. The model assumes that the arithmetic of
the GELU takes no time, because the other warp group multiplies meanwhile. Such a product takes at least the time in
which its bytes move at the fitted bandwidth. From the second generation on, `tt_mlp` launches the reductions of both
layers together (step F within the MLP).

{3}
"""


def main(words: Sequence[str] | None = None) -> int:
    """Print or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results/steps.md")
    args = parser.parse_args(words)
    page = render()
    if args.write:
        (record.RESULTS / "steps.md").write_text(page)
    else:
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
