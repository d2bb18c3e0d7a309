"""Select adapters of a pool on the device of the model without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers as a tensor ``[n]`` on a device. The host does not wait for the copy to a GPU.

    A copy from ordinary memory would wait until the GPU has finished all earlier work.
    """
    host = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class FixedBatch:
    """Hold the choice of an adapter for each sample of a batch, in a tensor whose address never changes.

    A CUDA graph that reads this tensor can be replayed with other adapters. :meth:`efft.AdapterPool.fixed_batch`
    creates objects of this class. All samples use the base model at first. Capture the graph within
    ``with pool.use(batch)``, and call :meth:`select` between replays.

    Attributes:
        slots: the rows of the stacks, int64 ``[samples]``, on the device of the model.
    """

    def __init__(
        self, samples: int, device: torch.device, choose: Callable[[FixedBatch, Sequence[Any]], list[int]]
    ) -> None:
        self.slots = torch.zeros(samples, dtype=torch.int64, device=device)
        self._choose = choose

    def select(self, names: Sequence[str | None]) -> None:
        """Use these adapters from now on, one name for each sample; None is the base.

        On a GPU, the change is made in the order of the current stream. Earlier replays on that stream therefore still
        use the old adapters. The host does not wait. Selected adapters cannot be removed from the pool.

        Raises:
            ValueError: the number of names differs from the number of samples, or :meth:`efft.AdapterPool.use` refuses
                an adapter.
            RuntimeError: the batch was released.
        """
        if isinstance(names, str) or len(names) != len(self.slots):
            raise ValueError(f"FixedBatch.select: expected {len(self.slots)} names, one per sample, got {names!r}")
        numbers = self._choose(self, names)
        self.slots.copy_(to_device(numbers, torch.int64, self.slots.device))
