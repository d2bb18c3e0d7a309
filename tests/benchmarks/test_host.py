"""Test the benchmark that counts dispatcher and Python calls on the host, the CPU that launches the operations.

A row is one way to adapt a chain of linear layers. One adapted layer must stay below fixed numbers of dispatcher calls.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import host

#: The largest allowed number of dispatcher calls for one adapted layer in a chain of layers in fp32, by row and mode.
#: For a chain of linear layers, it is at most half of the number in the first recorded measurement
#: (benchmarks/results/host.jsonl). In the rows of MLPs, a layer is an entire MLP with its norm. With a separate op for
#: each linear layer, a training step on the CPU would need 32 calls.
MOST = {
    ("efft:eager", "forward"): 12,
    ("efft:eager", "forward_backward"): 28,
    ("efft:eager", "evaluation"): 10,
    ("efft:eager", "inference"): 10,
    ("efft:cpu", "forward"): 4,
    ("efft:cpu", "forward_backward"): 7,
    ("efft:cpu", "evaluation"): 1,
    ("efft:cpu", "inference"): 1,
    ("efft:triton", "forward"): 9,
    ("efft:triton", "forward_backward"): 24,
    ("efft:triton", "evaluation"): 8,
    ("efft:triton", "inference"): 8,
    ("efft:cuda", "forward"): 4,
    ("efft:cuda", "forward_backward"): 9,
    ("efft:cuda", "evaluation"): 3,
    ("efft:cuda", "inference"): 3,
    ("mlp-fused:cpu", "forward"): 8,
    ("mlp-fused:cpu", "forward_backward"): 14,
    ("mlp-fused:cuda", "forward"): 8,
    ("mlp-fused:cuda", "forward_backward"): 20,
}


@pytest.mark.parametrize(("row", "mode"), MOST)
def test_dispatcher_calls_of_a_layer(row: str, mode: str) -> None:
    reason = host.ROWS[row].reason()
    if reason is not None:
        pytest.skip(reason)
    calls = {
        depth: host.dispatcher_calls(
            host.pass_of(host.ROWS[row], mode, "float32", depth), host.ROWS[row].device == "meta"
        )
        for depth in host.DEPTHS
    }
    assert host.split(calls)[0] <= MOST[row, mode]


def test_dispatcher_calls_that_are_known() -> None:
    x = torch.ones(2, 2)
    assert host.dispatcher_calls(lambda: torch.empty(2)) == 1
    assert host.dispatcher_calls(lambda: x.t()) == 3  # t calls transpose, which calls as_strided


def test_python_calls_that_are_known() -> None:
    def inner() -> None:
        len("")

    assert host.python_calls(inner) == 3  # inner, len, and sys.setprofile, which ends the count


def test_the_shares_of_a_layer_and_of_a_pass() -> None:
    assert host.split({4: 50.0, 12: 90.0}) == (5.0, 30.0)


@pytest.mark.parametrize("row", ["linear", "efft:eager"])
def test_modes(row: str) -> None:
    """Check for each mode whether the output has a graph, is an inference tensor, and comes from training mode."""
    seen: list[tuple[bool, bool, bool]] = []
    for mode in host.MODES:
        run = host.pass_of(host.ROWS[row], mode, "float32", 1)

        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            seen.append((y.requires_grad, y.is_inference(), module.training))

        model = run.__closure__[run.__code__.co_freevars.index("model")].cell_contents  # type: ignore[index]
        model.register_forward_hook(hook)
        run()
    assert seen == [(True, False, True), (True, False, True), (False, False, False), (False, True, False)]


def test_lines(tmp_path: Path) -> None:
    rows = ["linear", "efft:eager", "efft:cuda"]
    assert host.main(["--rows", *rows, "--dtype", "float32", "--repeats", "1", "--results", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "host.jsonl").read_text().splitlines()]
    assert [(line["row"], line["mode"]) for line in lines] == [(row, mode) for row in rows for mode in host.MODES]
    assert all(line["dispatcher_calls"]["per_layer"] > 0 for line in lines)
    assert all(("microseconds" in line) == (line["device"] == "cpu") for line in lines)
    assert (
        host.main(["--rows", "linear", "--dtype", "float32", "--repeats", "0", "--results", str(tmp_path / "0")]) == 0
    )
    assert "microseconds" not in (tmp_path / "0" / "host.jsonl").read_text()
