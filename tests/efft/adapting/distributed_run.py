"""Run the training steps of ``test_distributed.py`` in each of several processes, with DDP, accelerate or FSDP2.

``python -m torch.distributed.run --nproc-per-node 2 distributed_run.py FOLDER WAY...`` trains a model in each WAY,
which is a key of ``WAYS``. Every process writes one file per way, such as ``FOLDER/ddp0.pt`` (way ``ddp``, process 0).
The file holds the results of training without and with activation checkpointing: the losses and the trained tensors.
For ``ddp`` and ``quantized``, it also holds the number of bytes that each step sent. Finally, the processes test
adapters of models that FSDP2 shards, and write the saved adapter and the error messages (:func:`adapter_files`).
"""

# This module does not postpone annotations, because DDP reads the annotations of its communication hook.
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard

import efft
from efft.adapting.inject import adapter_of
from efft.saving.files import write_adapter
from tests.quantized import Int8, to_int8

STEPS = 3
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def adapted(rank: int, checkpointing: bool) -> nn.Module:
    """Return a model with random factors, biases and norms, which depend on ``rank``.

    They differ between the processes until DDP sends those of process 0.
    """
    torch.manual_seed(0)
    config = efft.EfftConfig(rank=4, dropout=0.0, trainable_scale="global", bias="all", norms=True)
    model = efft.apply(timm.models.VisionTransformer(**SIZES), config)
    torch.manual_seed(rank)
    extras = set(adapter_of(model).extras)
    with torch.no_grad():
        for _, factor in efft.named_factors(model):
            factor.normal_(0, 0.2)
        for name, parameter in model.named_parameters():
            if name in extras:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.set_grad_checkpointing(checkpointing)
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    """Return images and labels that can be split evenly among the processes."""
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(8) % 5


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # The gradient of the keys' bias is zero except for rounding errors. With a smaller eps, AdamW would scale
    # these errors up to the size of the learning rate.
    return torch.optim.AdamW(efft.parameter_groups(model, lr=0.01), eps=1e-5)


def trained(model: nn.Module) -> dict[str, Tensor]:
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def plain(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train in one process on the complete batch."""
    steps, losses = optimizer(model), []
    for _ in range(STEPS):
        steps.zero_grad()
        value = loss(model, x, y)
        value.backward()
        steps.step()
        losses.append(value.item())
    return {"losses": losses, "trained": trained(model)}


def ddp(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train on this process's part of the batch, in two halves. DDP sends the gradients only in the second half."""
    parallel = nn.parallel.DistributedDataParallel(model, init_sync=not is_quantized(model))
    sent: list[int] = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    parallel.register_comm_hook(None, count)
    steps, losses, per_step = optimizer(model), [], []
    for _ in range(STEPS):
        steps.zero_grad()
        sent.clear()
        values = []
        for i, (part, target) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            with parallel.no_sync() if i == 0 else contextlib.nullcontext():
                values.append(loss(parallel, part, target) / 2)
                values[-1].backward()
        steps.step()
        losses.append(mean(torch.stack(values).sum()))
        per_step.append(sum(sent))
    return {"losses": losses, "trained": trained(model), "sent": per_step}


def accelerated(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train with accelerate, which wraps the model and uses the processes that the launcher started."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    parallel, steps = accelerator.prepare(model, optimizer(model))
    assert isinstance(parallel, nn.parallel.DistributedDataParallel)
    losses = []
    for _ in range(STEPS):
        steps.zero_grad()
        value = loss(parallel, x, y)
        accelerator.backward(value)
        steps.step()
        losses.append(mean(value))
    return {"losses": losses, "trained": trained(accelerator.unwrap_model(parallel))}


def fsdp(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Train with each block as an FSDP unit; all other parameters (embedding, head, factors) belong to the root."""
    sharded(model)
    steps, losses = optimizer(model), []
    for _ in range(STEPS):
        steps.zero_grad()
        value = loss(model, x, y)
        value.backward()
        steps.step()
        losses.append(mean(value))
    return {"losses": losses, "trained": trained(model)}


def sharded(model: nn.Module) -> nn.Module:
    """Shard the model with FSDP2 and return it."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def late_write(*arguments: Any) -> None:
    """Write the files of an adapter half a second late, so that the other process must wait for them."""
    time.sleep(0.5)
    write_adapter(*arguments)


def adapter_files(folder: Path) -> None:
    """Save and load adapters in a sharded model, and write the errors for unsupported calls to ``refused.json``."""
    x, _ = batch()
    model = sharded(adapted(0, False)).eval()
    with torch.no_grad():
        model(x)  # after this first pass, FSDP2 leaves the parameters of the root unsharded
    torch.manual_seed(0)
    base = timm.models.VisionTransformer(**SIZES).eval()
    with torch.no_grad():
        trained_logits = model(x)
        with efft.disabled(model):
            torch.testing.assert_close(model(x), base(x))
        torch.testing.assert_close(model(x), trained_logits, rtol=0, atol=0)
    with mock.patch("efft.saving.io.files.write_adapter", late_write):
        efft.save_adapter(model, folder / "saved")
    assert (folder / "saved" / "README.md").is_file(), "save_adapter returned before the files were complete"
    other = sharded(adapted(1, False)).eval()
    with torch.no_grad():
        assert not torch.allclose(other(x), model(x), atol=1e-3)
        efft.load_adapter(other, folder / "saved")
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    alone = adapted(0, False)
    fully_shard(alone.efft)
    plain = sharded(timm.models.VisionTransformer(**SIZES))
    refused = {}
    for name, function in {
        "merge": lambda: efft.merge(model),
        "merged_state_dict": lambda: efft.merged_state_dict(model),
        "remove": lambda: efft.remove(model),
        "apply": lambda: efft.apply(plain, efft.EfftConfig(rank=4)),
        "alone": lambda: alone(x),
    }.items():
        try:
            function()
        except (ValueError, RuntimeError) as error:
            refused[name] = str(error)
    if dist.get_rank() == 0:
        (folder / "refused.json").write_text(json.dumps(refused))


def mean(value: Tensor) -> float:
    """Return the mean over the values of all processes."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def same(rank: int, checkpointing: bool) -> nn.Module:
    """Return a model with equal factors in every process, because FSDP2 does not send the initial values."""
    return adapted(0, checkpointing)


def quantized(rank: int, checkpointing: bool) -> nn.Module:
    """Return a quantized model with equal weights in every process, because DDP cannot send such weights."""
    model = adapted(0, checkpointing)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            to_int8(module)
    return model


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(p, Int8) for p in model.parameters())


#: For each way, a function that creates the model of a process and a function that trains the model.
WAYS: dict[str, tuple[Callable[[int, bool], nn.Module], Callable[[nn.Module, Tensor, Tensor], dict[str, Any]]]] = {
    "ddp": (adapted, ddp),
    "accelerate": (adapted, accelerated),
    "quantized": (quantized, ddp),
    "fsdp": (same, fsdp),
}


def main(folder: Path, ways: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = (t.chunk(dist.get_world_size())[rank] for t in batch())
    for way in ways:
        make, train = WAYS[way]
        results = [train(make(rank, checkpointing), x, y) for checkpointing in (False, True)]
        torch.save(results, folder / f"{way}{rank}.pt")
    adapter_files(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
