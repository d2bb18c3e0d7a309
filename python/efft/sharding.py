"""Models whose parameters ``torch.distributed.fsdp.fully_shard`` has spread over the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# By what they can do, not by type: torch.distributed is not part of every build of torch, and slow to import.


def is_sharded(model: nn.Module) -> bool:
    """Whether some module of ``model`` is a unit of ``fully_shard``."""
    return any(hasattr(module, "reshard") for module in model.modules())


def check_whole(model: nn.Module, operation: str) -> None:
    """Raise ValueError if ``model`` is sharded, for an ``efft.operation`` that changes layers or reads all factors."""
    if is_sharded(model):
        raise ValueError(
            f"expected a whole model, this {type(model).__name__} is sharded by fully_shard, which holds its layers: "
            f"call efft.{operation} before fully_shard (a plain model gets the factors by save_adapter, load_adapter)"
        )


def reshard(model: nn.Module) -> None:
    """Make all parameters shards: a pass without backward leaves the root's whole, in memory that is thrown away."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def architecture(model: nn.Module) -> str:
    """The name of the model's class, without what ``fully_shard`` put before it."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if hasattr(model, "reshard") else name


def whole(tensor: Any) -> Tensor:
    """The tensor that a shard is of, gathered, so every process must ask for it; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Copy ``source``, the same and whole in every process, into ``target``, which may be a shard."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def once(model: nn.Module, action: Callable[[], None]) -> None:
    """Run ``action``: in rank 0 alone if ``model`` is sharded, and no process goes on before it is done.

    Raises:
        RuntimeError: in the other processes, if it failed there.
    """
    mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)
    if mesh is None:
        action()
        return
    dist = torch.distributed
    failed = torch.zeros(1, device=mesh.device_type)
    if dist.get_rank() != 0:
        dist.all_reduce(failed)
        if failed:
            raise RuntimeError("rank 0 failed; what it raised says why")
        return
    try:
        action()
    except BaseException:
        failed += 1
        raise
    finally:
        dist.all_reduce(failed)
