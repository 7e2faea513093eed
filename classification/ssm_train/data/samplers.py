"""Batches as lists of keys: the whole state of a sample's randomness travels with its key."""

from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from ssm_train.common.errors import UserError
from ssm_train.common.seeding import epoch_order


class Key(NamedTuple):
    epoch: int
    index: int
    repeat: int = 0  # number of the copy, where an epoch shows an image several times


class TrainBatches(Sampler[list[Key]]):
    """This rank's share of each epoch's shuffled training set.

    The epoch is cut into global batches of `batch` x `world_size` images, in an order that depends on (seed, epoch)
    only; rank r takes every `world_size`-th image of each, from the r-th on. So W processes with batch b see the same
    global batches as one process with W * b, or with b and W accumulation steps. The tail that does not fill an
    optimizer update (global batch x `accumulation`) is left out.

    With `repeats`, the first count / repeats images of the order come that many times in a row (Hoffer et al., Augment
    your batch, as sampled by DeiT): on as many ranks, with different augmentations.
    """

    def __init__(
        self,
        count: int,
        batch: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        repeats: int = 1,
    ) -> None:
        per_update = batch * world_size * accumulation
        self.updates_per_epoch = count // per_update
        if self.updates_per_epoch == 0:
            raise UserError(
                f"the training set has {count} images, but one optimizer update takes {per_update} (batch {batch} x "
                f"{world_size} process(es) x {accumulation} accumulation step(s)): lower --batch-size"
            )
        self._epoch = self._start = 0
        self._count, self._batch, self._rank, self._world_size = count, batch, rank, world_size
        self._accumulation, self._seed, self._repeats = accumulation, seed, repeats

    def set_position(self, epoch: int, update: int = 0) -> None:
        """Choose the epoch (from 0) that the next iteration yields, and the update in it that comes first."""
        self._epoch, self._start = epoch, update

    def __len__(self) -> int:
        """Micro-batches of this rank from the position to the end of the epoch."""
        return (self.updates_per_epoch - self._start) * self._accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        order = epoch_order(self._seed, self._epoch, self._count)
        width = self._batch * self._world_size
        first = self._start * self._accumulation
        for number in range(first, self.updates_per_epoch * self._accumulation):
            places = range(number * width + self._rank, (number + 1) * width, self._world_size)
            yield [Key(self._epoch, order[place // self._repeats], place % self._repeats) for place in places]


class EvalBatches(Sampler[list[Key]]):
    """Every `world_size`-th image, starting at `rank`: each image once over all ranks, none repeated as padding."""

    def __init__(self, count: int, batch: int, *, rank: int = 0, world_size: int = 1) -> None:
        self._indices = range(rank, count, world_size)
        self._batch = batch

    def __len__(self) -> int:
        return -(-len(self._indices) // self._batch)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self._indices), self._batch):
            yield [Key(0, index) for index in self._indices[start : start + self._batch]]
