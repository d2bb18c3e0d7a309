"""Test common uses of adapted models: copies, pickles, mixed precision, gradient accumulation, threads and DDP."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import efft
from efft_kernels import EfftLinear, TTFactors
from tests.efft.adapting.gradients import assert_same, gradients, loss, step

Make = Callable[..., nn.Module]
ROOT = Path(__file__).parents[3]


# --- copies and pickles -----------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def torch_saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied: nn.Module = torch.load(buffer, weights_only=False)
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, torch_saved])
@pytest.mark.parametrize("state", ["fresh", "between forward and backward", "merged"])
def test_copies_are_complete_and_independent(
    state: str, duplicate: Callable[[nn.Module], nn.Module], adapted_vit: Make, images: Tensor, randomize: Make
) -> None:
    model = adapted_vit()
    expected = model(images)
    if state == "merged":
        efft.merge(model)
        expected = model(images)
    twin = duplicate(model)
    assert torch.equal(twin(images), expected)
    banks = [m for m in twin.modules() if isinstance(m, TTFactors)]
    assert {id(m.factors) for m in twin.modules() if isinstance(m, EfftLinear)} == {id(bank) for bank in banks}
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    if state == "merged":
        efft.unmerge(twin)
        assert model.blocks[0].attn.qkv.merged
    randomize(twin, seed=9)
    assert not torch.allclose(twin(images), expected, atol=1e-2)
    assert torch.equal(model(images), expected)
    efft.remove(twin)
    assert not twin._forward_hooks
    assert not twin._forward_pre_hooks
    assert torch.equal(model(images), expected)
    if state != "merged":
        expected.sum().backward()
        assert all(p.grad is not None for _, p in efft.named_factors(model))


def test_moving_average_of_a_model(adapted_vit: Make, images: Tensor, randomize: Make) -> None:
    utils = pytest.importorskip("timm.utils", reason="needs timm: pip install 'efft-kernels[vision]'")
    model = adapted_vit()
    average = utils.ModelEmaV3(model, decay=0.75)
    assert torch.equal(average(images), model(images))
    before = {n: p.detach().clone() for n, p in efft.named_factors(model)}
    randomize(model, seed=9)
    average.update(model)
    for name, factor in efft.named_factors(average.module):
        expected = 0.75 * before[name] + 0.25 * model.get_parameter(name)
        torch.testing.assert_close(factor, expected, msg=name)
    assert not torch.allclose(average(images), model(images), atol=1e-2)


def test_state_dict_restores_a_run(adapted_vit: Make, tiny_vit: Make, images: Tensor) -> None:
    model = adapted_vit(trainable_scale=True)
    again = efft.apply(tiny_vit().eval(), copy.deepcopy(model.efft.config))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images), model(images))


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_gradients_wide(dtype: torch.dtype, adapted_vit: Make, images: Tensor) -> None:
    """With fp16 and a GradScaler, or with bf16, gradients are fp32 and close to those of the fp32 run."""
    model = adapted_vit(std=0.2, dropout=0.0).train()
    expected = step(model, images)
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.02))
    with torch.autocast("cpu", dtype):
        y = model(images)
    assert y.dtype == dtype
    scaler.scale(loss(y)).backward()
    scaler.unscale_(optimizer)
    got = gradients(model)
    assert {g.dtype for g in got.values()} == {torch.float32}
    for name, gradient in got.items():
        assert ((gradient - expected[name]).norm() / expected[name].norm()).item() < 0.05, name
    before = {n: p.detach().clone() for n, p in efft.named_factors(model)}
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(p, before[n]) for n, p in efft.named_factors(model))


def test_scaler_skips_the_step_of_an_overflow(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(dropout=0.0).train()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.1))
    with torch.autocast("cpu", torch.float16):
        y = model(images)
    scaler.scale(y.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_base_with_wide_factors(dtype: torch.dtype, tiny_vit: Make, images: Tensor, randomize: Make) -> None:
    """If the base is converted before apply, activations are narrow, and factors and their gradients are fp32."""
    exact = randomize(efft.apply(tiny_vit(), efft.EfftConfig(rank=4, dropout=0.0)), std=0.2).eval()
    model = randomize(efft.apply(tiny_vit().to(dtype), efft.EfftConfig(rank=4, dropout=0.0)), std=0.2).eval()
    y = model(images.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact(images), rtol=0.05, atol=0.1)
    loss(y).backward()
    assert {p.grad.dtype for _, p in efft.named_factors(model)} == {torch.float32}
    assert model.head.weight.grad.dtype == dtype


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_converting_an_adapted_model_converts_its_factors(
    convert: Callable[[nn.Module], nn.Module], adapted_vit: Make, images: Tensor
) -> None:
    """If the model is converted after apply, all its tensors have the new dtype, like those of any module."""
    model = adapted_vit(std=0.2)
    expected = model(images)
    convert(model)
    (dtype,) = {p.dtype for p in model.parameters()}
    y = model(images.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    loss(y).backward()
    assert {p.grad.dtype for _, p in efft.named_factors(model)} == {dtype}


# --- ways to run ------------------------------------------------------------------------------------------------------


def test_gradient_accumulation(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(std=0.2, dropout=0.0).train()
    batch = torch.cat([images, images.flip(-1)])
    expected = step(model, batch)
    model.zero_grad()
    for part, first in zip(batch.split(2), (0, 2, 4), strict=True):
        target = (torch.arange(2) + first) % 5
        (nn.functional.cross_entropy(model(part), target) / 3).backward()
    assert_same(gradients(model), expected)


def test_two_passes_before_one_backward(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(std=0.2, dropout=0.0).train()
    one, two = step(model, images), step(model, images.flip(-1))
    model.zero_grad()
    first, second = model(images), model(images.flip(-1))
    (loss(first) + loss(second)).backward()
    assert_same(gradients(model), {n: one[n] + two[n] for n in one})


def test_parts_called_alone(adapted_vit: Make, images: Tensor) -> None:
    """``forward_features`` runs without ``forward``, so no hook of the model has multiplied the cores by V before."""
    model = adapted_vit(std=0.2, dropout=0.0)
    expected = step(model, images)
    model.zero_grad()
    y = model.forward_head(model.forward_features(images))
    assert_same(
        {"y": y}, {"y": model(images)}
    )  # not exactly equal: BLAS may sum the product of one core in a different order than that of all cores
    loss(y).backward()
    assert_same(gradients(model), expected)
    model.train()
    for factors in model.efft.values():
        factors.dropout = 0.5
    assert not torch.equal(model.forward_features(images), model.forward_features(images))


def test_train_and_eval(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(dropout=0.3)
    evaluated = model(images)
    assert torch.equal(model(images), evaluated)
    model.train()
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), evaluated)


def test_inference_mode_leaves_nothing_behind(adapted_vit: Make, images: Tensor) -> None:
    model = adapted_vit(std=0.2, dropout=0.0)
    expected = step(model, images)
    with torch.inference_mode():
        y = model(images)
    assert torch.equal(y, model(images))
    assert_same(step(model, images), expected)


def test_a_failing_pass_leaves_nothing_behind(adapted_vit: Make, images: Tensor, randomize: Make) -> None:
    model = adapted_vit()
    with pytest.raises(RuntimeError):
        model(images[:, :2])
    with pytest.raises(AssertionError):
        model(torch.randn(1, 3, 8, 8))
    randomize(model, seed=9)
    whole = model(images)
    assert_same(
        {"y": model.forward_head(model.forward_features(images))}, {"y": whole}
    )  # a pass of the parts must not use the factors of the failed pass


@pytest.mark.parametrize("architecture", ["vit", "swin"])
@pytest.mark.parametrize("variant", ["efft2", "efft1"])
def test_factors_alone_learn(architecture: str, variant: Any, tiny_vit: Make, tiny_swin: Make) -> None:
    """Base and head are random and frozen, so only the factors can learn to classify four noisy prototype images."""
    side, model = (
        (16, tiny_vit()) if architecture == "vit" else (32, tiny_swin(patch_size=4, depths=(2, 2), num_heads=(1, 2)))
    )
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    prototypes = torch.randn(4, 3, side, side, generator=generator)
    x = prototypes[labels] + 0.3 * torch.randn(16, 3, side, side, generator=generator)
    efft.apply(model, efft.EfftConfig(variant=variant, rank=4, scale=2.0, head=[], dropout=0.02)).train()
    model.get_classifier().weight.data.mul_(20)  # timm initializes this weight close to zero
    optimizer = torch.optim.AdamW(efft.parameter_groups(model, lr=0.02))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x)[:, :4], labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.4 * losses[0], losses[::8]

    def accuracy() -> float:
        return (model(x)[:, :4].argmax(1) == labels).float().mean().item()

    assert accuracy() > 0.9
    with efft.disabled(model.eval()):
        assert accuracy() < 0.6


# --- several threads and processes ------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Apply two layers. In the main thread, call ``gate`` after the hooks of the model and before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gate: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread():
            self.gate()
        return self.second(self.first(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_threads_do_not_mix_their_passes(mode: Callable[[], Any], randomize: Make) -> None:
    """While the main thread waits before its first layer, another thread runs one pass and starts a second one."""
    model: Any = randomize(efft.apply(Gated(), efft.EfftConfig(targets=["first", "second"], rank=2, head=[])).eval())
    factors, x = [p for _, p in efft.named_factors(model)], torch.randn(3, 8)
    expected = torch.autograd.grad(model(x).sum(), factors)
    started, resume, outputs = threading.Event(), threading.Event(), []

    def other() -> None:
        def hold(*_: object) -> None:
            if threading.current_thread() is not threading.main_thread():
                started.set()
                resume.wait(30)

        with mode():
            outputs.append(model(x))
            handle = model.second.register_forward_pre_hook(hold)
            outputs.append(model(x))
            handle.remove()

    thread = threading.Thread(target=other)

    def gate() -> None:
        thread.start()
        started.wait(30)

    model.gate = gate
    got = torch.autograd.grad(model(x).sum(), factors)
    resume.set()
    thread.join(30)
    torch.testing.assert_close(got, expected)
    model.gate = lambda: None
    for y in outputs:
        torch.testing.assert_close(y, model(x))
    assert model.efft["linear_8x8"]._thread is None, "the factors must not belong to a thread after its pass"


DDP = """
import sys, torch, timm, efft
import torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
saved = torch.load(f"{folder}/batch.pt")
results = []
for checkpointing in (False, True):
    torch.manual_seed(rank)  # DDP must send the factors of rank 0 to rank 1
    sizes = dict(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    model = efft.apply(timm.models.VisionTransformer(**sizes), efft.EfftConfig(rank=4, dropout=0.0))
    if rank == 0:
        model.load_state_dict(saved["model"])
    model.set_grad_checkpointing(checkpointing)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # DDP rebuilds its buckets before the second pass
        ddp.zero_grad()
        x, y = (saved[k].chunk(2)[rank] for k in "xy")
        torch.nn.functional.cross_entropy(ddp(x), y).backward()
    results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
torch.save(results, f"{folder}/gradients{rank}.pt")
del ddp  # must happen before the process group is destroyed
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ddp_gradients_equal_those_of_the_whole_batch(adapted_vit: Make, images: Tensor, tmp_path: Path) -> None:
    model = adapted_vit(std=0.2, dropout=0.0).train()
    x, y = torch.cat([images, images.flip(-1)]), torch.tensor([0, 1, 2, 3, 4, 0])
    torch.save({"model": model.state_dict(), "x": x, "y": y}, tmp_path / "batch.pt")
    nn.functional.cross_entropy(model(x), y).backward()
    expected = gradients(model)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    for rank in (0, 1):
        for result in torch.load(tmp_path / f"gradients{rank}.pt"):
            assert_same(result, expected)
