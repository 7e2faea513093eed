"""How the processes of one start find each other in a store that may hold what earlier starts have left.

torchrun --max-restarts keeps one store for all attempts, in which new processes would find the addresses of dead ones
and wait for them. Its count of restarts does not tell attempts apart: each machine counts its own failures. So the
processes of an attempt agree on a name for it:

    rank r > 0   writes a fresh word of its own, hello/r, and waits for the answer to this very word
    rank 0       answers each hello/r that it has not answered yet with the name, until r has said that it got it

A word of a dead process is answered, too, but nobody waits for that answer.
"""

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

from ssm_train.common.errors import UserError

_PAUSE = 0.05  # seconds between two looks at the store


def store_of_this_start(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Where the processes of this start alone exchange addresses. UserError where some do not come within `timeout`."""
    store, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=timeout))
    while isinstance(store, dist.PrefixStore):  # of one machine's count of restarts
        store = store.underlying_store
    name = _name(store, size, timeout) if rank == 0 else _ask(store, rank, timeout)
    return dist.PrefixStore(f"start/{name}", store)


def _ask(store: dist.Store, rank: int, timeout: timedelta) -> str:
    word = secrets.token_hex(8)
    store.set(f"hello/{rank}", word)
    try:
        store.wait([f"answer/{rank}/{word}"], timeout)
    except dist.DistStoreError as error:
        raise UserError(
            f"process {rank} waited {timeout.seconds} s for process 0: start all processes within this time (TIMEOUT), "
            "and see what became of it"
        ) from error
    name = store.get(f"answer/{rank}/{word}").decode()
    store.set(f"got/{rank}/{name}", "")
    return name


def _name(store: dist.Store, size: int, timeout: timedelta) -> str:
    name, answered, end = secrets.token_hex(8), {}, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello/{rank}"]):
                word = store.get(f"hello/{rank}").decode()
                if answered.get(rank) != word:
                    store.set(f"answer/{rank}/{word}", name)
                    answered[rank] = word
            if store.check([f"got/{rank}/{name}"]):
                missing.remove(rank)
        if missing and time.monotonic() > end:
            raise UserError(
                f"process 0 waited {timeout.seconds} s for process(es) {', '.join(map(str, sorted(missing)))}: start "
                "all processes within this time (TIMEOUT), and see what became of them"
            )
        if missing:
            time.sleep(_PAUSE)
    return name
