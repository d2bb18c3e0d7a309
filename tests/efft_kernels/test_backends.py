"""Test the choice of a backend, and the tools of efft_kernels.testing that check backends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import efft_kernels
from efft_kernels import Backend, backends, can_run, explain, testing, tt_linear, use_backend
from efft_kernels.backends import AUTO_ORDER, current_backend
from efft_kernels.testing import assert_close_budget, make_inputs, poisoned_empty, with_layout

ROOT = Path(__file__).parents[2]
NAMES = "'auto', 'reference', 'eager', 'cpu', 'triton', 'cuda'"
OPS = ("tt_linear", "tt_contract", "tt_merge_")
#: The backend that ``auto`` chooses on this machine for fp32 tensors on the CPU.
FIRST = next(backend.value for backend in AUTO_ORDER if can_run(backend, torch.ones(1)) is None)
needs_default = pytest.mark.skipif("EFFT_BACKEND" in os.environ, reason="EFFT_BACKEND changes the default backend")


class Registered(TorchDispatchMode):
    """Record the names of the registered ops that run inside the ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [func.name()] if func.namespace == "efft" else []
        return func(*args, **(kwargs or {}))


def call(op: str, **kwargs: Any) -> str:
    """Call ``op`` and return the backend that ran it."""
    with Registered() as seen:
        getattr(efft_kernels, op)(**make_inputs(op), **kwargs)
    ran = {name.rpartition(".")[2] for name in seen.names}
    assert len(ran) <= 1
    return ran.pop() if ran else "reference"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [b for b in testing.backends() if can_run(b, torch.ones(1)) is None])
def test_the_backend_asked_for_runs(op: str, backend: Backend) -> None:
    assert call(op, backend=backend) == call(op, backend=backend.value) == backend.value
    with use_backend(backend):
        assert call(op) == backend.value


@needs_default
@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_first_that_can_run(op: str) -> None:
    assert current_backend() is Backend.AUTO
    assert call(op) == call(op, backend="auto") == FIRST


def test_argument_before_context() -> None:
    with use_backend("reference"):
        assert call("tt_linear", backend="eager") == "eager"
        with use_backend("auto"):
            assert call("tt_linear") == FIRST


@needs_default
def test_contexts_nest_and_restore() -> None:
    with use_backend("eager"):
        with use_backend(Backend.REFERENCE):
            assert current_backend() is Backend.REFERENCE
        assert current_backend() is Backend.EAGER
        with pytest.raises(ZeroDivisionError), use_backend("reference"):
            1 / 0  # noqa: B018
        assert current_backend() is Backend.EAGER
        with pytest.raises(ValueError, match="unknown backend"), use_backend("nothing"):
            pass
        assert current_backend() is Backend.EAGER
    assert current_backend() is Backend.AUTO


def test_a_context_holds_for_threads() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == [Backend.REFERENCE]


def test_backward_runs_on_the_backend_of_its_forward() -> None:
    inputs = make_inputs("tt_linear")
    with use_backend("eager"):
        y = tt_linear(**{**inputs, "D": inputs["D"].requires_grad_()})
    with use_backend("reference"), Registered() as seen:
        y.sum().backward()
    assert seen.names == ["efft::tt_linear_bwd.eager"]


@pytest.mark.parametrize("op", OPS)
def test_unknown_names(op: str) -> None:
    message = f"unknown backend 'cudnn': expected one of {NAMES}"
    for ask in (
        lambda: call(op, backend="cudnn"),
        lambda: can_run("cudnn"),
        lambda: use_backend("cudnn").__enter__(),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize("op", OPS)
def test_only_auto_falls_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {Backend.CPU: "it is not built", Backend.EAGER: "its library is missing"}
    monkeypatch.setattr(backends, "can_run", lambda backend, *_: broken.get(Backend.parse(backend)))
    assert call(op, backend="auto") == "reference"
    message = f"^{op}: backend 'eager' was requested but cannot run: its library is missing$"
    with pytest.raises(RuntimeError, match=message):
        call(op, backend="eager")
    with pytest.raises(RuntimeError, match=message), use_backend("eager"):
        call(op)
    broken[Backend.REFERENCE] = "it is Sunday"
    with pytest.raises(RuntimeError, match=f"^{op}: no backend can run this call\n") as raised:
        call(op, backend="auto")
    assert "\n  cpu: it is not built\n  eager: its library is missing\n  reference: it is Sunday\n" in str(raised.value)


def test_explain() -> None:
    wide, eight = torch.ones(1).double(), torch.ones(1).to(torch.int8)
    cpu, chosen, other, *named = explain(wide).splitlines()
    assert cpu == "  cpu: cpu runs bfloat16, float32 tensors, got torch.float64"
    assert (chosen, other) == ("* eager: can run", "  reference: can run")
    assert named == [
        f"  {name}: {name} runs float16, bfloat16, float32 tensors, got torch.float64" for name in ("triton", "cuda")
    ]
    reason = "runs float16, bfloat16, float32, float64 tensors, got torch.int8"
    assert explain(eight).splitlines()[1:3] == [f"  eager: eager {reason}", f"  reference: reference {reason}"]


@pytest.mark.skipif(can_run("cpu", torch.ones(1)) is not None, reason="the backend cpu cannot run here")
def test_auto_prefers_the_compiled_extension() -> None:
    assert explain(torch.ones(1)).splitlines()[:2] == ["* cpu: can run", "  eager: can run"]


def test_why_the_compiled_extension_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MISSING, "cpu", "it is not there: build it")
    with pytest.raises(RuntimeError, match="'cpu' was requested but cannot run: it is not there: build it"):
        tt_linear(**make_inputs("tt_linear"), backend="cpu")
    with pytest.raises(
        RuntimeError, match="'cpu' was requested but cannot run: cpu runs bfloat16, float32 tensors, got"
    ):
        tt_linear(**make_inputs("tt_linear", dtype=torch.float16), backend="cpu")


def test_can_run() -> None:
    assert can_run("eager", torch.ones(1), None, torch.ones(1).bfloat16()) is None
    assert can_run(Backend.REFERENCE) is None
    assert can_run("eager", torch.ones(1), torch.ones(1, device="meta")) == (
        "all tensors must be on one device, got cpu and meta"
    )
    assert "got torch.complex64" in can_run("reference", torch.ones(1), torch.ones(1).to(torch.complex64))
    assert can_run("triton", torch.ones(1).double()) == (
        "triton runs float16, bfloat16, float32 tensors, got torch.float64"
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"_TRITON": False}, r"the triton package is not installed: pip install 'efft-kernels\[triton\]'"),
        ({"_TRITON": True, "_INTERPRETED": False}, r"triton runs on GPUs, got cpu .* set TRITON_INTERPRET=1"),
    ],
)
def test_why_triton_cannot_run(variables: dict[str, bool], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setattr(backends, name, value)
    with pytest.raises(RuntimeError, match=f"'triton' was requested but cannot run: {message}"):
        tt_linear(**make_inputs("tt_linear"), backend="triton")


@pytest.mark.parametrize(
    ("missing", "device", "capability", "reason"),
    [
        ("it was not built", "cuda", 9, "it was not built"),
        (None, "cpu", 9, "cuda runs on NVIDIA GPUs, got cpu"),
        (None, "cuda", 7, r"cuda needs a GPU of compute capability 8\.0, got 7\.5"),
        (None, "cuda", 8, None),
        (None, "meta", 9, None),
    ],
)
def test_why_cuda_cannot_run(
    missing: str | None, device: str, capability: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.MISSING, "cuda", missing)
    gpu = mock.Mock(major=capability, minor=5)
    tensor = mock.Mock(spec=Tensor, device=torch.device(device), dtype=torch.bfloat16)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu):
        found = can_run("cuda", tensor)
    assert found is reason is None or re.fullmatch(reason, found)
    assert can_run("cuda", torch.ones(1).double()) == "cuda runs float16, bfloat16, float32 tensors, got torch.float64"


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, "-c", program]
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_environment_variable() -> None:
    program = (
        "from efft_kernels import use_backend\n"
        "from efft_kernels.backends import current_backend\n"
        "print(current_backend().value)\n"
        "with use_backend('eager'): print(current_backend().value)\n"
        "print(current_backend().value)"
    )
    done = python(program, EFFT_BACKEND="reference")
    assert done.stdout.split() == ["reference", "eager", "reference"], done.stderr
    done = python(program, EFFT_BACKEND="")
    assert done.stdout.split() == ["auto", "eager", "auto"], done.stderr


def test_wrong_environment_variable() -> None:
    done = python("import efft_kernels", EFFT_BACKEND="fastest")
    assert done.returncode != 0
    assert done.stderr.endswith(
        f"ValueError: environment variable EFFT_BACKEND: unknown backend 'fastest': expected one of {NAMES}\n"
    )


def test_compiled_code_follows_the_choice() -> None:
    graphs: list[str] = []

    def collect(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(lambda inputs: tt_linear(**inputs), backend=collect, fullgraph=True)
    inputs = make_inputs("tt_linear")
    for backend in ("eager", "reference", "eager"):
        with use_backend(backend):
            compiled(inputs)
    assert ["efft" in code for code in graphs] == [True, False], (
        "each backend has one graph, and the third call reuses the first"
    )


# efft_kernels.testing


def test_backends_and_devices() -> None:
    assert testing.backends() == [Backend(name) for name in ("reference", "eager", "cpu", "triton", "cuda")]
    assert testing.devices()[0] == "cpu"
    assert ("cuda" in testing.devices()) == torch.cuda.is_available()


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_the_same_every_time(op: str) -> None:
    one, two = (make_inputs(op, masks=True, seed=3) for _ in range(2))
    other = make_inputs(op, masks=True, seed=4)
    assert one.keys() == two.keys() == other.keys()
    for name in (name for name, value in one.items() if isinstance(value, Tensor)):
        assert torch.equal(one[name], two[name])
        assert not torch.equal(one[name], other[name])


def test_inputs_whose_base_cancels() -> None:
    inputs = make_inputs("tt_linear", base_cancels=True, update=0.1)
    x, W, D, G = (inputs[k].double() for k in ("x", "W", "D", "G"))
    assert (x @ W.t()).abs().max() < 1e-12
    gy = torch.randn(5, 20).double()
    assert (torch.cat([gy, -gy], 1) @ W).abs().max() < 1e-12
    assert 0.05 < (D @ G).norm() / W.norm() < 0.2
    with pytest.raises(ValueError, match="base_cancels needs even d_in and d_out, got 24 and 41"):
        make_inputs("tt_linear", base_cancels=True, d_out=41)


def test_inputs_of_an_unknown_op() -> None:
    with pytest.raises(ValueError, match="unknown op 'tt_merge': expected one of 'tt_linear', 'tt_gelu_linear', "):
        make_inputs("tt_merge")


def test_layouts() -> None:
    tensor = torch.randn(3, 4, 5)
    strides = {layout: with_layout(tensor, layout).stride() for layout in testing.LAYOUTS}
    assert strides["contiguous"] == (20, 5, 1)
    assert strides["transposed"] == (20, 1, 4)
    assert strides["sliced"] == (44, 11, 2)
    assert strides["expanded"] == (0, 5, 1)
    assert all(torch.equal(with_layout(tensor, layout), tensor) for layout in testing.LAYOUTS[:3])
    assert torch.equal(with_layout(tensor, "expanded")[2], tensor[0])
    assert with_layout(torch.tensor([True, False]), "sliced").tolist() == [True, False]
    with pytest.raises(ValueError, match="unknown layout 'blocked': expected one of 'contiguous', 'transposed'"):
        with_layout(tensor, "blocked")


def test_budget() -> None:
    exact = torch.randn(50, 50, dtype=torch.float64)
    nearest = exact.bfloat16()
    assert_close_budget(nearest, exact, nearest)
    assert_close_budget((exact * 1.002).bfloat16(), exact, (exact * 1.004).bfloat16())
    for wrong in (exact * 1.02, exact.roll(1), exact * torch.nan, torch.zeros_like(exact)):
        with pytest.raises(AssertionError, match=r"^dG: error \S+ against fp64, more than 2 times \d\.\d+e-\d+ \(same"):
            assert_close_budget(wrong.bfloat16(), exact, nearest, name="dG")
    assert_close_budget((exact * 1.02).bfloat16(), exact, nearest, factor=20)


def test_budget_of_zero() -> None:
    zero = torch.zeros(3, 4)
    assert_close_budget(zero, zero.double(), zero)
    assert_close_budget(zero[:0], zero[:0].double(), zero[:0])
    with pytest.raises(AssertionError, match=r"more than 2 times 0\.00e"):
        assert_close_budget(zero + 1e-30, zero.double(), zero)


def test_budget_compares_like_with_like() -> None:
    one = torch.ones(3, 4)
    with pytest.raises(AssertionError, match=r"shape \[3, 4\], but reference_fp64 has \[4, 3\]"):
        assert_close_budget(one, one.double().t(), one)
    with pytest.raises(AssertionError, match=r"shape \[3, 4\], but same_precision_reference has \[4\]"):
        assert_close_budget(one, one.double(), one[0])
    with pytest.raises(AssertionError, match=r"dtype torch.float32, expected torch.bfloat16"):
        assert_close_budget(one, one.double(), one.bfloat16())


@contextmanager
def a_kernel_that_forgets_to_write() -> Iterator[Callable[[Tensor], Tensor]]:
    library = torch.library.Library("efft_test", "DEF")
    library.define("forgets(Tensor x) -> Tensor")
    library.impl("forgets", lambda x: x.new_empty(x.shape).add_(0), "CompositeExplicitAutograd")
    yield torch.ops.efft_test.forgets
    library._destroy()


def test_poison_reaches_registered_ops() -> None:
    with a_kernel_that_forgets_to_write() as forgets, poisoned_empty():
        assert forgets(torch.ones(4)).isnan().all()
        assert forgets(torch.ones(2, 3).bfloat16()).isnan().all()
        for made in (torch.empty(3), torch.empty_like(torch.ones(3)), torch.empty_strided((2, 2), (1, 2)).half()):
            assert made.isnan().all()
        assert (torch.empty(3, dtype=torch.int8) == 127).all()
        assert torch.mm(torch.ones(2, 3), torch.ones(3, 2)).eq(3).all()


def test_poison_is_gone_afterwards() -> None:
    settings = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    for mode, warn_only in ((False, False), (True, True), (True, False)):
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        with pytest.raises(ZeroDivisionError), poisoned_empty(), poisoned_empty():
            1 / 0  # noqa: B018
        assert torch.are_deterministic_algorithms_enabled() == mode
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
        assert settings.fill_uninitialized_memory == before
    torch.use_deterministic_algorithms(False)
