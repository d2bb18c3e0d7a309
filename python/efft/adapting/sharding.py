"""Models whose parameters torch's ``fully_shard`` or DeepSpeed's ZeRO-3 has spread over the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# By what they can do, not by type: torch.distributed is not part of every build of torch, and slow to import.


def is_sharded(model: nn.Module) -> bool:
    """Whether some module of ``model`` is a unit of ``fully_shard``, or inside one."""
    units = any(hasattr(module, "reshard") for module in model.modules())
    return units or any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _is_zeros(tensor: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 keeps this parameter, which then is empty unless its module runs."""
    return hasattr(tensor, "ds_id")


def full_shape(tensor: Any) -> torch.Size:
    """Return the shape of the whole tensor that a shard belongs to."""
    shape: torch.Size = tensor.ds_shape if _is_zeros(tensor) else tensor.shape
    return shape


def check_whole(model: nn.Module, operation: str) -> None:
    """Check that ``model`` is not sharded, for an ``efft.operation`` that changes layers or reads all factors.

    Raises:
        ValueError: it is sharded.
    """
    if is_sharded(model):
        raise ValueError(
            f"expected a whole model, this {type(model).__name__} is sharded by fully_shard, which holds its layers: "
            f"call efft.{operation} before fully_shard (a plain model gets the factors by save_adapter, load_adapter)"
        )
    check_not_zeros(model, operation)


def check_not_zeros(model: nn.Module, operation: str) -> None:
    """Check that ZeRO-3, which has its own copies of parameters, does not keep those of ``model``.

    Raises:
        ValueError: it does.
    """
    if any(map(_is_zeros, model.parameters())):
        raise ValueError(
            f"expected a whole model, DeepSpeed's ZeRO-3 keeps the parameters of this {type(model).__name__}: call "
            f"efft.{operation} before deepspeed.initialize (a plain model gets the factors by save_adapter, "
            "load_adapter)"
        )


def reshard(model: nn.Module) -> None:
    """Shard all parameters again: a pass without backward leaves the root's whole, in memory that is then freed."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def architecture(model: nn.Module) -> str:
    """Return the name of the model's class, without the prefix that ``fully_shard`` adds."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if hasattr(model, "reshard") else name


def whole(tensor: Any) -> Tensor:
    """Gather the tensor that a shard belongs to, in all processes at once; return any other tensor as it is."""
    if _is_zeros(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]), torch.no_grad():
            return tensor.clone()
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Copy ``source``, which is whole and the same in every process, into ``target``, which may be a shard."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def once(model: nn.Module, action: Callable[[], None]) -> None:
    """Run ``action``. If ``model`` is sharded, only rank 0 runs it, and the other processes wait until it is done.

    Raises:
        RuntimeError: in the other processes, if it failed in rank 0.
    """
    kinds = [p.device_mesh.device_type for p in model.parameters() if hasattr(p, "device_mesh")]
    kinds += [p.device for p in model.parameters() if _is_zeros(p)]
    if not kinds:
        action()
        return
    dist = torch.distributed
    failed = torch.zeros(1, device=kinds[0])
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
