"""Test stacks, which train several runs at once: each run must equal a separate run of the trainer.

Other tests cover additional trained parameters ("extras", such as biases and norms), the lists of runs, the files with
the packed images and backbone, and the summaries of the results.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from efft_lab.data.task import ArrayImages, ImageDataset, Preprocess, Split
from efft_lab.studies.extras import command, lists, packed, runs
from efft_lab.studies.extras.variants import LAYERS, SPECIAL, Run, Variant, config_of, kind_of, start_of
from efft_lab.studies.stacked import Stack, Start
from efft_lab.studies.stacked.precondition import DAMPING, preconditioned
from efft_lab.train import read_metrics, run

for package in ("accelerate", "timm", "peft"):
    pytest.importorskip(package, reason="needs the dev extra")

SIZE, CLASSES, IMAGES, BATCH, EPOCHS = 28, 4, 48, 8, 2
FIELDS: dict[str, Any] = {
    **{"image_size": SIZE, "epochs": EPOCHS, "batch_size": BATCH, "schedule_per": "update", "drop_path": 0.0},
    **{"lr": 1e-2, "amp": "no", "efft": {"rank": 4, "dropout": 0.0}},
}


class Task:
    """Provide noise images whose red channel is brighter for higher classes."""

    classes = CLASSES

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        labels = np.arange(IMAGES) % CLASSES
        pixels = rng.integers(0, 120, (IMAGES, SIZE, SIZE, 3)).astype(np.uint8)
        pixels[..., 0] += (labels * 40).astype(np.uint8)[:, None, None]
        self.pixels, self.labels = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(labels)
        split = Split(ArrayImages(pixels, labels), np.arange(IMAGES))
        self.trainval = self.train = ImageDataset(split, Preprocess(SIZE, "imagenet"))
        self.test = self.val = Subset(self.trainval, range(16))


@pytest.fixture
def base(tiny_vit: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    model = tiny_vit(img_size=SIZE, patch_size=7, embed_dim=32, num_classes=CLASSES, init_values=0.5)
    for name, parameter in model.named_parameters():  # no parameter may be exactly zero or one
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    return model


def stack(variants: Sequence[Variant], seeds: Sequence[int], base: nn.Module, task: Task) -> Stack:
    starts = [start_of(v, seed, base, FIELDS) for v, seed in zip(variants, seeds, strict=True)]
    config = config_of(variants[0], seeds[0], FIELDS)
    roles: Any = type("Roles", (), {"roles": {("t", f"trainval/{seed}"): torch.arange(IMAGES) for seed in seeds}})
    of_list = [Run(v, "t", seed, "final") for v, seed in zip(variants, seeds, strict=True)]
    batches = runs.batches_of(of_list, roles, EPOCHS, BATCH)
    trained = {k for v in variants for n in starts[0].parameters if (k := kind_of(n, v)) and v.rate(k)}
    kinds = {n: k for n in starts[0].parameters if (k := kind_of(n, variants[0])) in trained and k}
    rates = [{kind: v.rate(kind) for kind in trained} for v in variants]
    classes, updates = [CLASSES] * len(variants), IMAGES // BATCH
    of = variants[0].precondition
    return Stack(starts, classes, kinds, rates, batches, task.pixels, task.labels, config, updates, of)


def plain(name: str, method: str = "efft", **fields: Any) -> Variant:
    return Variant(name, method, lr=1e-2, epochs=EPOCHS, **fields)


ORDINARY = [
    plain("efft2", settings={"rank": 4}),
    plain("efft1", settings={"variant": "efft1", "rank": 4, "init": "u"}),
    plain("shared", settings={"rank": [3, 4], "core_sharing": "shared", "init": "vu"}),
    plain("fact", "fact_tt", settings={"rank": 4, "scale": 3.0}),
    plain("lora", "peft_lora", settings={"rank": 2, "alpha": 6.0, "targets": ["qkv", "proj", "fc1", "fc2"]}),
    plain("linear", "linear"),
    plain("full", "full"),
]


@pytest.mark.parametrize("variant", ORDINARY, ids=lambda variant: variant.name)
def test_losses_and_weights_of_the_trainer(variant: Variant, base: nn.Module, tmp_path: Path) -> None:
    task = Task()
    variants = [variant, dataclasses.replace(variant, lr=3e-3)]
    both = stack(variants, [3, 5], base, task)
    assert both.train(len(both.batches))
    accuracy = both.evaluate(torch.arange(16).expand(2, -1))
    for i, (v, seed) in enumerate(zip(variants, [3, 5], strict=True)):
        config = dataclasses.replace(config_of(v, seed, FIELDS), log_every=1)
        model = copy.deepcopy(base)
        result = run(config, tmp_path / str(i), model=model, task=task, progress=False)  # type: ignore[arg-type]
        losses = [row["loss"] for row in read_metrics(tmp_path / str(i) / "metrics.jsonl", "step")]
        torch.testing.assert_close(both.losses[:, i].tolist(), losses, rtol=2e-3, atol=2e-4)
        assert result.summary["test_accuracy"] == pytest.approx(accuracy[i].item(), abs=1e-6)
        ends = Start.of(result.model).parameters  # type: ignore[arg-type]
        for name, value in both.forward.parameters(both.flat).items():
            got = value[i] if name in both.kinds else value
            torch.testing.assert_close(got, ends[name], rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
        trained = result.summary["trainable_parameters"]
        assert trained == sum(both.forward.sizes)


EXTRAS: dict[str, float] = {"biases": 3, "norms": 2, "gammas": 1, **dict.fromkeys(SPECIAL, 1.0)}


@pytest.mark.parametrize("method", ["efft", "peft_lora", "fact_tt"])
def test_extras_act_as_in_a_dense_model(method: str, base: nn.Module) -> None:
    """The logits after training equal those of a plain model into which all trained parameters were merged."""
    targets = ["qkv", "proj", "fc1", "fc2"]
    settings = {"efft": {"rank": 3, "dropout": 0.2}, "peft_lora": {"rank": 2, "targets": targets}}.get(method, {})
    variant = plain("all", method, settings=settings, rates=EXTRAS, own=1)
    task = Task()
    of = stack([variant, dataclasses.replace(variant, lr=0.03)], [0, 1], base, task)
    of.train(len(of.batches))
    images = of.images(torch.arange(6).expand(2, -1))
    got = of.forward(of.flat, images, training=False)
    p = of.forward.parameters(of.flat)
    for i in range(2):
        model = copy.deepcopy(base).eval()
        own = {name: value[i] if name in of.kinds else value for name, value in p.items()}
        state = model.state_dict()
        for name in state:
            state[name] = own[name].clone()
        updates = dense_updates(of.forward.first, own, method)
        for name in [n.removesuffix(".gain") for n in own if n.endswith(".gain")]:
            delta = own[f"{name}.diagonal_in"][:, None] * updates[name] * own[f"{name}.diagonal_out"]
            delta = delta + (own[f"{name}.own_B"] @ own[f"{name}.own_A"]).T
            state[f"{name}.weight"] = own[f"{name}.weight"] * own[f"{name}.gain"][:, None] + delta.T
        model.load_state_dict(state)
        for name in ("blocks.1.mlp.fc2.bias", "blocks.0.norm1.weight", "norm.bias", "blocks.0.ls1.gamma"):
            assert not torch.equal(state[name], base.state_dict()[name])
        torch.testing.assert_close(got[i], model(images[i]), rtol=1e-4, atol=1e-4)


def dense_updates(start: Start, p: dict[str, Any], method: str) -> dict[str, Any]:
    """Return delta [d_in, d_out] of each layer by the formulas of the methods."""
    found = {}
    for block in range(2):
        qkv, proj, fc1, fc2 = (f"blocks.{block}.{layer}" for layer in LAYERS)
        if method == "peft_lora":
            for name in (qkv, proj, fc1, fc2):
                found[name] = (p[f"{name}.lora_B"] @ p[f"{name}.lora_A"]).T * start.scales["lora"]
        elif method == "efft":
            U, C, V = (p[f"efft.mhsa.{factor}"] for factor in "UCV")
            q, k, v, o = (start.scales["mhsa"] * U @ C[block, i] @ V for i in range(4))
            found |= {qkv: torch.cat([q, k, v], 1), proj: o}
            U, C, V = (p[f"efft.ffn.{factor}"] for factor in "UCV")
            up, down = (start.scales["ffn"] * U @ C[block, i] @ V for i in range(2))
            found |= {fc1: up, fc2: down.T}
        else:
            (bank,) = start.scales
            U, C, V = (p[f"efft.{bank}.{factor}"] for factor in "UCV")
            each = [start.scales[bank] * U @ C[block, i] @ V for i in range(12)]
            found |= {qkv: torch.cat(each[:3], 1), proj: each[3]}
            found |= {fc1: torch.cat(each[4:8], 1), fc2: torch.cat(each[8:], 0)}
    return found


def test_rates_of_zero_leave_what_others_train(base: nn.Module) -> None:
    bare, rich = plain("bare", settings={"rank": 3}), plain("rich", settings={"rank": 3}, rates={"norms": 3})
    together, alone = stack([bare, rich], [0, 0], base, Task()), stack([bare], [0], base, Task())
    for each in (together, alone):
        each.train(len(each.batches))
    torch.testing.assert_close(together.losses[:, :1], alone.losses, rtol=1e-4, atol=1e-5)
    p = together.forward.parameters(together.flat)
    assert torch.equal(p["norm.weight"][0], base.norm.weight)  # type: ignore[arg-type, union-attr]
    assert not torch.equal(p["norm.weight"][1], base.norm.weight)  # type: ignore[arg-type, union-attr]


def test_gradients_in_the_metric_of_the_updates() -> None:
    torch.manual_seed(0)
    shapes = {"U": (2, 20, 3), "C": (2, 2, 4, 3, 5), "V": (2, 5, 30)}
    factors = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    gradients = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    got = preconditioned(factors, gradients)
    for i in range(2):
        U, C, V = (factors[name][i] for name in "UCV")
        dU, dC, dV = (gradients[name][i] for name in "UCV")

        def inverse(stacked: Any) -> Any:
            matrix = stacked @ stacked.T
            return torch.linalg.inv(matrix / matrix.diagonal().mean() + DAMPING * torch.eye(len(matrix)).double())

        left = inverse(torch.cat([c @ V for c in C.flatten(0, 1)], 1))
        right = inverse(torch.cat([(U @ c).T for c in C.flatten(0, 1)], 1))
        torch.testing.assert_close(got["U"][i], dU @ left, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got["V"][i], right @ dV, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got["C"][i], inverse(U.T) @ dC @ inverse(V), rtol=1e-4, atol=1e-4)


def test_lists_go_in_stacks_of_one_structure() -> None:
    variants = lists.explore()
    names = [variant.name for variant in variants]
    assert len(set(names)) == len(names)
    of_list = runs.runs_of(variants, ["count", "orientation"], [10, 11], "explore")
    stacked = list(runs.stacks(of_list, 16, 4))
    assert sorted(map(repr, of_list)) == sorted(repr(run) for each in stacked for run in each)
    for each in stacked:
        assert len({run.variant.structure() for run in each}) == 1
        assert len(each) <= (4 if each[0].variant.method == "full" else 16)
    assert [each[0].variant.name for each in stacked][:2] == ["efft2 r16 x0 c1", "lora r8 lr 0.0003"]


def test_packed_runs_end_in_rows_and_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="needs the dev extra")
    monkeypatch.setenv("EFFT_HOME", str(tmp_path))
    monkeypatch.setattr(packed, "SEEDS", (0,))
    monkeypatch.setattr(packed, "EXPLORED", (10,))
    monkeypatch.setattr(packed, "DEV", 100)
    monkeypatch.setattr(packed, "TRAINED", 64)
    fields = {**FIELDS, "model": "test_vit", "pretrained": False, "image_size": 32, "max_test": 60, "amp": "bf16"}
    fields["batch_size"] = 16
    packed.pack_task("digits", tmp_path, fields)
    packed.pack_base(tmp_path, fields, [10])
    held = packed.Packed(tmp_path, ["digits"], fields)
    task = packed.data.load("digits", image_size=32, max_test=60)
    for role, split in (("trainval", "trainval/0"), ("test", "test")):
        expected: Any = getattr(task, role)
        positions = held.roles["digits", split]
        assert held.labels[positions].tolist() == expected.labels.tolist()
        pixels = Preprocess(32, "none")(expected.raw(3)) * 255
        assert torch.equal(held.pixels[positions[3]].float(), pixels.round())
    assert not set(held.roles["digits", "dev"].tolist()) & set(held.roles["digits", "explore/10"].tolist())
    variants = [plain("a lr 1", settings={"rank": 4}), plain("a lr 2", settings={"rank": 4}, rates={"norms": 3})]
    rows = runs.train_stack(runs.runs_of(variants, ["digits"], [10], "explore"), held, fields, "cpu")
    assert [row["variant"] for row in rows] == ["a lr 1", "a lr 2"]
    assert all(0 <= row[f"{role}_accuracy"] <= 1 for row in rows for role in ("dev", "test"))
    assert rows[1]["trained"] - rows[0]["trained"] == 13 * 2 * 64  # six blocks with two norms each, and the last norm
    best = max(row["dev_accuracy"] for row in rows)
    (line,) = [line for line in command.summarize(rows).splitlines() if line.startswith("a *")]
    assert f"{100 * best:.1f}" in line


def test_every_structure_of_the_list_trains(base: nn.Module) -> None:
    for variant in lists.smoke():
        short = dataclasses.replace(variant, epochs=1)
        of = stack([short], [0], base, Task())
        of.train(6)
        assert of.losses[:6].isfinite().all(), variant.name
        assert not torch.equal(of.flat, of.forward.flat([start_of(short, 0, base, FIELDS)])), variant.name


def test_stochastic_depth_drops_whole_images(base: nn.Module) -> None:
    of = stack([plain("linear", "linear")], [0], base, Task()).forward
    x = torch.ones(1, 40 * 17, 6)
    assert of.kept(x, 0.0, 40) is x
    per_image = of.kept(x, 0.5, 40).view(40, -1)
    assert set(per_image.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(per_image, per_image[:, :1].expand_as(per_image))


def test_rates_are_chosen_on_validation_images() -> None:
    def row(name: str, task: str, **scores: float) -> dict[str, Any]:
        return {"variant": name, "task": task, "trained": 5, **{f"{k}_accuracy": v for k, v in scores.items()}}

    searched = [row("lora lr 1", "a", val=0.5), row("lora lr 2", "a", val=0.6), row("lora lr 1", "b", val=0.7)]
    final = [row("lora lr 1", "a", test=0.9), row("lora lr 2", "a", test=0.2), row("lora lr 2", "a", test=0.4)]
    final += [row("lora lr 1", "b", test=0.5), row("efft", "a", test=0.6), row("efft", "b", test=0.2)]
    assert command.chosen([*searched, *final])["lora", "a"] == "lora lr 2"
    lines = {
        " ".join(line.split()[:-5]): line.split()[-3:]
        for line in command.summarize([*searched, *final], "test").splitlines()
    }
    assert lines["lora *"] == ["40.00", "30.0", "50.0"]
    assert lines["efft"] == ["40.00", "60.0", "20.0"]
    failed = [{**row("lora lr 2", "a", val=0.9), "failed": "the loss is nan"}, *searched[:1]]
    assert command.chosen(failed)["lora", "a"] == "lora lr 1"
