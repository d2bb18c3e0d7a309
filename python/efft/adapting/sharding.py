"""Support models whose parameters torch's ``fully_shard`` or DeepSpeed's ZeRO-3 has distributed over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Sharded parameters are recognized by their attributes, not by their types, because torch.distributed is missing in
# some builds of torch and is slow to import.


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``model`` or a part of it is sharded by ``fully_shard``."""
    units = any(hasattr(module, "reshard") for module in model.modules())
    return units or any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _is_zeros(tensor: Any) -> bool:
    """Return whether DeepSpeed's ZeRO-3 manages this parameter, which is then empty unless its module runs."""
    return hasattr(tensor, "ds_id")


def full_shape(tensor: Any) -> torch.Size:
    """Return the shape of the whole tensor that a shard belongs to."""
    shape: torch.Size = tensor.ds_shape if _is_zeros(tensor) else tensor.shape
    return shape


def check_whole(model: nn.Module, operation: str) -> None:
    """Check that ``model`` is not sharded, for an ``efft.operation`` that changes layers or reads all factors.

    Raises:
        ValueError: the model is sharded.
    """
    if is_sharded(model):
        raise ValueError(
            f"expected a whole model, but this {type(model).__name__} is sharded by fully_shard, which refers to its "
            f"layers: call efft.{operation} before fully_shard (save_adapter and load_adapter transfer the factors to "
            "a plain model)"
        )
    check_not_zeros(model, operation)


def check_not_zeros(model: nn.Module, operation: str) -> None:
    """Check that DeepSpeed's ZeRO-3 does not manage the parameters of ``model``, for an ``efft.operation``.

    ZeRO-3 has its own copies of the parameters, which the operation would not change.

    Raises:
        ValueError: ZeRO-3 manages the parameters.
    """
    if any(map(_is_zeros, model.parameters())):
        raise ValueError(
            f"expected a whole model, but DeepSpeed's ZeRO-3 manages the parameters of this {type(model).__name__}: "
            f"call efft.{operation} before deepspeed.initialize (save_adapter and load_adapter transfer the factors to "
            "a plain model)"
        )


def reshard(model: nn.Module) -> None:
    """Shard all gathered parameters again.

    If no backward pass follows a forward pass, the parameters of the outermost module are still gathered.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def architecture(model: nn.Module) -> str:
    """Return the name of the model's class, without the prefix that ``fully_shard`` adds."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if hasattr(model, "reshard") else name


def whole(tensor: Any) -> Tensor:
    """Gather the tensor that a shard belongs to; all processes must call this. Return any other tensor unchanged."""
    if _is_zeros(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]), torch.no_grad():
            return tensor.clone()
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def copy_whole_(target: Tensor, source: Tensor) -> None:
    """Copy the complete tensor ``source``, which all processes have, into ``target``, which may be a shard."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


def once(model: nn.Module, action: Callable[[], None]) -> None:
    """Run ``action``. If ``model`` is sharded, only rank 0 runs it, and the other processes wait until it is done.

    Raises:
        RuntimeError: raised in the other processes if ``action`` failed in rank 0.
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
            raise RuntimeError("rank 0 failed; its error message gives the reason")
        return
    try:
        action()
    except BaseException:
        failed += 1
        raise
    finally:
        dist.all_reduce(failed)
