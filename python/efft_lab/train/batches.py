"""The order of training images: a pure function of seed and epoch, so that a resumed run sees the same batches."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Shuffled batches of indices; an incomplete last batch is dropped.

    Args:
        size: number of images.
        batch_size: images per batch, over all processes.
        seed: with the epoch, decides the order.

    Raises:
        ValueError: there are fewer images than one batch needs.
    """

    drop_last = True

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if size < batch_size:
            raise ValueError(
                f"the training split has {size} images, fewer than one batch of {batch_size}; lower batch_size"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._epoch, self._skip = 0, 0

    def start(self, epoch: int, skip: int = 0) -> None:
        """Makes the next iteration that of the given epoch, without its first `skip` batches (they are not read)."""
        self._epoch, self._skip = epoch, skip

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self._epoch)).permutation(self.size).tolist()
        for batch in range(self._skip, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
