"""Batches as lists of (epoch, index) keys: the whole state of a sample's randomness travels with the key."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from classification.errors import UserError
from classification.seeding import epoch_order

Key = tuple[int, int]


class TrainBatches(Sampler[list[Key]]):
    """This rank's share of each epoch's shuffled training set.

    The epoch is cut into global batches of `batch` x `world_size` images, in an order that depends on (seed, epoch)
    only; rank r takes the r-th slice of each. So W processes with batch b see the same global batches as one process
    with W * b. The tail that does not fill an optimizer update (global batch x `accumulation`) is left out.
    """

    def __init__(
        self, count: int, batch: int, *, rank: int = 0, world_size: int = 1, accumulation: int = 1, seed: int = 0
    ) -> None:
        per_update = batch * world_size * accumulation
        self.updates_per_epoch = count // per_update
        if self.updates_per_epoch == 0:
            raise UserError(
                f"the training set has {count} images, but one optimizer update takes {per_update} (batch {batch} x "
                f"{world_size} process(es) x {accumulation} accumulation step(s)): lower --batch-size"
            )
        self.epoch = 0
        self._count, self._batch, self._rank, self._world_size = count, batch, rank, world_size
        self._length = self.updates_per_epoch * accumulation
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        return self._length

    def __iter__(self) -> Iterator[list[Key]]:
        order = epoch_order(self._seed, self.epoch, self._count)
        for number in range(self._length):
            start = (number * self._world_size + self._rank) * self._batch
            yield [(self.epoch, index) for index in order[start : start + self._batch]]


class EvalBatches(Sampler[list[Key]]):
    """Every `world_size`-th image, starting at `rank`: each image once over all ranks, none repeated as padding."""

    def __init__(self, count: int, batch: int, *, rank: int = 0, world_size: int = 1) -> None:
        self._indices = range(rank, count, world_size)
        self._batch = batch

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self._indices), self._batch):
            yield [(0, index) for index in self._indices[start : start + self._batch]]
