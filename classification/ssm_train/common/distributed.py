"""One process or many: who am I, on which device, and how do all ranks agree on an error."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssm_train.common.errors import UserError
from ssm_train.common.fileio import disk_full_message, is_disk_full
from ssm_train.common.meeting import store_of_this_start
from ssm_train.common.preemption import Preempted

_SETTLING_SECONDS = 0.5

# of gloo's messages
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "gloo/transport")


@dataclass(frozen=True)
class World:
    """The processes of this run. Without a launcher: rank 0 of 1, and every method is local."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def wide(self) -> torch.dtype:
        """The dtype that sums are kept in on the device: fp64, or fp32 where Apple's GPUs have no other."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, in fp64, with one all-reduce."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def read_with_sums(self, values: torch.Tensor, flags: torch.Tensor) -> tuple[list[float], list[float]]:
        """`values` of this rank, and `flags` summed over all ranks: two vectors on the device, read in one go, for
        every reading lets a GPU run out of work."""
        flags = flags.to(self.wide, copy=True)
        if self.size > 1:
            dist.all_reduce(flags)
        read = torch.cat([values.to(self.wide), flags]).tolist()
        return read[: len(values)], read[len(values) :]

    def broadcast(self, tensors: list[torch.Tensor]) -> None:
        """Give the `tensors` of rank 0, of any dtypes, to all ranks, in place."""
        if self.size == 1:
            return
        for dtype in {tensor.dtype: None for tensor in tensors}:
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.detach().flatten() for tensor in same])
            dist.broadcast(flat, 0)
            for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank. For small picklable objects of our own."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank; a UserError on any of them is raised on all, so that none waits for the dead."""
        result, error = _attempt(action)
        self._raise_first(self.gather(error))
        return result

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 alone; its (small) result is returned, or its UserError raised, on all ranks."""
        outcomes = self.gather(_attempt(action) if self.is_main else (None, None))
        self._raise_first([outcomes[0][1]])
        return outcomes[0][0]

    @staticmethod
    def _raise_first(errors: list[str | None]) -> None:
        for error in errors:
            if error is not None:
                raise UserError(error)


def _attempt(action: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        if not is_disk_full(error):
            raise
        return None, disk_full_message(error)


def is_local_main() -> bool:
    """Whether this process speaks for its machine; known before any connection is made."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def local_processes() -> int:
    """How many processes of this run are on this machine, by its launcher; one where there is none."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def restarts() -> int:
    """How often the launcher has started the processes of this run anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextlib.contextmanager
def joined_world(device_name: str, memory_share: float = 0.0, timeout: int = 600) -> Iterator[World]:
    """Join the processes of the launcher, if there is one: torchrun and torch.distributed.launch set the environment.

    `device_name` is what `chosen_device` takes; `memory_share`, if not 0, is the most of the GPU's
    memory that this process may take; `timeout` is how many seconds processes wait for each other. LOCAL_RANK is the
    device index: the global rank is not, as soon as there are two machines. gloo connects CPU processes, nccl GPU
    processes. Raises UserError where another process has died or cannot be reached.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = chosen_device(device_name)
    use_cuda = device.type == "cuda"
    if device.type == "mps" and size > 1:
        raise UserError("--device mps: several processes cannot share Apple's GPU; start one, or use --device cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        if memory_share:
            torch.cuda.set_per_process_memory_fraction(memory_share, device)
        # batches of one size: let cuDNN measure its algorithms once
        torch.backends.cudnn.benchmark = True
    try:
        if size > 1:
            limit = timedelta(seconds=timeout)
            store = store_of_this_start(rank, size, limit)
            backend, device_id = ("nccl", device) if use_cuda else ("gloo", None)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, device_id=device_id, timeout=limit
            )
        try:
            yield World(rank, size, device)
        except (UserError, Preempted):
            # raised on all ranks alike, so none is left in the middle of an exchange; after any other error one may be
            _leave(size)
            raise
        _leave(size)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise UserError(
            f"process {rank} lost another process of this run, or waited {timeout} s (TIMEOUT) for it: see what became "
            f"of the others, and continue with --resume auto ({str(error).strip().splitlines()[0]:.150})"
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether the error says that another process is gone: gloo has no exception of its own, but words."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def _leave(size: int) -> None:
    if size > 1:
        # together: with torch 2.6, a rank that leaves early can keep another waiting for ever
        dist.barrier()
        # gloo's threads are releasing the tensors of the barrier, for which they need the interpreter. Ending the group
        # or the process at that moment waits for them without letting go of it, for ever, or aborts
        time.sleep(_SETTLING_SECONDS)
        dist.destroy_process_group()


def chosen_device(name: str) -> torch.device:
    """The device of this process: "cpu", "cuda" by LOCAL_RANK, "mps" (Apple's GPU), or "" for CUDA where there is one,
    else the CPU. UserError for one that this PyTorch or this machine does not have."""
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: this PyTorch sees no GPU of Apple's; use --device cpu")
        return torch.device("mps")
    if name == "cpu" or (not name and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    _check_cuda(device)
    return device


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu or install a CUDA build")
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {device.index} but this machine has {torch.cuda.device_count()} CUDA device(s): "
            "lower --nproc_per_node or use --device cpu"
        )
