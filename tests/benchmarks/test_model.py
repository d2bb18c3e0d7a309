"""Test the benchmark of complete models.

A row is one way to adapt a model. Each row must train the right parameters, and only accurate rows may be timed. The
frozen baseline (the row "floor") trains only the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import efft
from benchmarks.__main__ import main
from benchmarks.model import gate
from benchmarks.model.rows import FLOOR, NAIVE, PAPER, ROWS, ModelRow, adapted, select, targeted
from benchmarks.model.run import measure
from benchmarks.model.step import N_CLASSES, Setting, adapter_bytes, trainable, training_step
from benchmarks.timing import Captured
from efft_kernels import Backend, can_run
from efft_lab.record import read

timm = pytest.importorskip("timm", reason="needs the vision extra")
pytest.importorskip("peft", reason="needs the dev extra")

TINY = Setting("tiny", batch=2, rank=4)
EAGER = ROWS["efft:eager"]
#: For each row that uses a backend, the reason why the backend cannot run on this CPU, or None if it can.
MISSING = {name: can_run(row.backend, torch.ones(1)) for name, row in ROWS.items() if row.backend is not None}
RUNNABLE = [name for name in ROWS if MISSING.get(name) is None]


@pytest.fixture(params=["vit"], autouse=True)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Replace the model of every setting with a tiny ViT or Swin, and return its kind: "vit" or "swin".

    The ViT has the width 16. The stages of the Swin have the widths 8 and 16.
    """
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    kind = timm.models.VisionTransformer
    if request.param == "swin":
        sizes = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 2)}
        sizes |= {"num_heads": (1, 2), "drop_path_rate": 0.0}
        kind = timm.models.SwinTransformer

    def plain(self: Setting) -> nn.Module:
        torch.manual_seed(0)
        model = kind(**sizes, num_classes=N_CLASSES)
        model.default_cfg = {"input_size": (3, sizes["img_size"], sizes["img_size"])}
        return model

    monkeypatch.setattr(Setting, "plain", plain)
    gate.in_fp64.cache_clear()
    yield request.param
    gate.in_fp64.cache_clear()


both = pytest.mark.parametrize("architecture", ["vit", "swin"], indirect=True)


@both
def test_gradient_enters_the_floor_at_the_first_adapted_layer(architecture: str) -> None:
    model = TINY.build(FLOOR)
    first = model.get_submodule("blocks.0.attn.qkv" if architecture == "vit" else "layers.0.blocks.0.attn.qkv")
    seen = {}
    first.register_forward_hook(lambda module, args, y: seen.update(x=args[0].requires_grad, y=y.requires_grad))
    _, loss = TINY.loss(model, *TINY.examples(model))
    loss.backward()
    assert seen == {"x": False, "y": True}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"head.weight", "head.bias"} or with_gradient == {"head.fc.weight", "head.fc.bias"}


@both
def test_no_row_asks_for_a_gradient_before_the_first_adapted_layer(architecture: str) -> None:
    """Check that the backward pass of every row with adapters ends at the same layer as that of the frozen baseline."""
    for row in select([*(name for name in RUNNABLE if name not in ("bitfit", "full"))]):
        model = TINY.build(row)
        before = []
        embed = next(module for name, module in model.named_modules() if name.endswith("patch_embed"))
        embed.register_forward_hook(lambda module, args, y, to=before: to.append(y.requires_grad))
        with row.running():
            TINY.loss(model, *TINY.examples(model))
        assert before == [False], row.name


def test_what_each_row_trains() -> None:
    d, r, layers, head = 16, 4, 2, N_CLASSES * 17
    matrices = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    biases = layers * sum(d_out for _, d_out in matrices) + d + 2 * layers * d + d  # linear, patches, norms
    extra = {
        "floor": 0,
        "peft": layers * sum(r * (d_in + d_out) for d_in, d_out in matrices),
        "bitfit": biases,
        "full": sum(p.numel() for p in TINY.plain().parameters()) - head,
        **dict.fromkeys([name for name, row in ROWS.items() if row.is_efft], 7 * d * r + 6 * layers * r * r),
    }
    extra["biases:auto"] += layers * (d + 4 * d + d)  # proj, fc1, fc2
    assert extra.keys() == ROWS.keys()
    for name, parameters in ((name, extra[name]) for name in RUNNABLE):
        model = TINY.build(ROWS[name])
        assert trainable(model) == head + parameters, name
        assert adapter_bytes(model, TINY.plain()) == 4 * parameters, name


def test_rows_of_one_method_start_from_the_same_numbers() -> None:
    weights = [TINY.build(row).state_dict() for row in (EAGER, NAIVE, PAPER)]
    factors = [{k: v for k, v in state.items() if k.startswith("efft.")} for state in weights]
    for other in factors[1:]:
        assert all(torch.equal(other[name], value) for name, value in factors[0].items())
    assert all(value.any() for value in factors[0].values())
    plain = TINY.plain().state_dict()
    assert all(torch.equal(weights[0][name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("vit", "float32"), ("vit", "bfloat16"), ("swin", "float32")],
    indirect=["architecture"],
)
def test_every_row_is_measured(architecture: str, dtype: str) -> None:
    lines = measure(replace(TINY, dtype=dtype), select(None), repeats=2)
    assert [line["row"] for line in lines] == list(ROWS)
    for line in lines:
        if line["row"] not in RUNNABLE:
            assert line["reason"] == f"not available: {MISSING[line['row']]}"
            continue
        assert "reason" not in line, line
        assert line["ratio"]["n"] == line["seconds"]["n"] == 2
        assert line["images_per_s"] == pytest.approx(2 / line["seconds"]["p50"])
        assert line["saved_bytes"] > 0
    floor = lines[0]
    assert floor["ratio"]["min"] == floor["ratio"]["p80"] == 1
    saved = {line["row"]: line["saved_bytes"] for line in lines if "saved_bytes" in line}
    assert saved["floor"] < saved["fused:eager"] < saved["efft:eager"]
    assert {"machine", "commit", "versions", "command", "model", "batch", "rank", "dtype"} <= floor.keys()


def _wrong_gradient(model: nn.Module, rank: int) -> nn.Module:
    model = adapted(model, rank)
    factor = dict(efft.named_factors(model))["efft.ffn.C"]
    factor.register_hook(lambda gradient: 1.001 * gradient)
    return model


def _wrong_output(model: nn.Module, rank: int) -> nn.Module:
    with torch.no_grad():
        model.get_submodule(targeted(model)[-1]).weight[0] *= 1.1  # type: ignore[operator,union-attr,index]
    return efft.remove(adapted(model, rank))


@pytest.mark.parametrize(
    ("planted", "reason"),
    [
        (
            ModelRow("planted", "", _wrong_gradient, is_efft=True, backend=Backend.EAGER),
            "wrong: gradient of efft.ffn.C: err",
        ),
        (ModelRow("planted", "", _wrong_output), "wrong: logits: error"),
    ],
    ids=["gradient", "output"],
)
def test_a_wrong_row_gets_no_time(planted: ModelRow, reason: str) -> None:
    floor, eager, wrong = measure(TINY, [FLOOR, EAGER, planted], repeats=1)
    assert wrong["reason"].startswith(reason)
    assert not {"seconds", "ratio", "images_per_s"} & wrong.keys()
    assert "ratio" in floor
    assert "ratio" in eager


def test_a_row_that_breaks_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(model: nn.Module, rank: int) -> nn.Module:
        raise RuntimeError("out of memory")

    floor, broken = measure(TINY, [FLOOR, ModelRow("broken", "", out_of_memory)], repeats=1)
    assert broken["reason"] == "failed: out of memory"
    assert "ratio" in floor


def test_a_step_that_no_graph_can_capture_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test replaces the two parts that need a GPU: the capture and an optimizer that can be captured."""
    adamw, pools = torch.optim.AdamW, []

    class Graph:
        def pool(self) -> str:
            return "pool"

    def capture(step: Any, warmup: int = 2, pool: Any = None) -> Captured:
        pools.append(pool)
        if len(pools) == 2:
            raise RuntimeError("a CUDA graph cannot capture the call: planted")
        return Captured(step, Graph())  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, capturable, **options: adamw(*args, **options))
    monkeypatch.setattr(Captured, "of", capture)
    monkeypatch.setattr(Captured, "__call__", lambda self: self.run())
    rows = [FLOOR, EAGER, NAIVE, ROWS["peft"]]
    floor, failed, after, last = measure(replace(TINY, cuda_graphs=True), rows, repeats=1)
    assert failed["reason"] == "failed: a CUDA graph cannot capture the call: planted"
    assert all("ratio" in line and line["cuda_graphs"] for line in (floor, after, last))
    assert pools == [None, "pool", None, "pool"], "after a failed capture, the next capture must not use its pool"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_train(dtype: str) -> None:
    setting = replace(TINY, dtype=dtype, device="cuda", cuda_graphs=True)
    waits = ModelRow("waits", "", lambda model, rank: _with_hook(model, lambda module, args, y: (y.sum().item(), y)[1]))
    lines = measure(setting, [*select(["efft:eager", "peft"]), waits], repeats=2)
    assert ["ratio" in line for line in lines] == [True, True, True, False]
    assert lines[-1]["reason"].startswith("failed: a CUDA graph cannot capture the call")

    model = setting.build(EAGER)
    step = Captured.of(training_step(EAGER, model, setting))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def _with_hook(model: nn.Module, hook: Any) -> nn.Module:
    model.get_submodule("head").register_forward_hook(hook)
    return model


def test_the_step_is_a_whole_training_step() -> None:
    model = TINY.build(EAGER)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training_step(EAGER, model, TINY)()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())


def test_command_writes_a_line_a_row(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["model", "--model", "tiny", "--batch", "2", "--rank", "4", "--dtype", "float32", "--device", "cpu"]
    assert main([*command, "--rows", "naive", "--repeats", "1", "--results", str(tmp_path)]) == 0
    assert [line["row"] for line in read(tmp_path / "model.jsonl")] == ["floor", "naive"]
    assert "ratio to floor" in capsys.readouterr().out


def test_cuda_graphs_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model", "--cuda-graphs", "--device", "cpu"])
    assert "--cuda-graphs needs a CUDA device, got --device cpu" in capsys.readouterr().err


def test_unknown_row_names_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--rows", "naiv"]) == 2
    assert "unknown row 'naiv': did you mean 'naive'?" in capsys.readouterr().err
