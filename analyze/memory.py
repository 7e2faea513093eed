"""The memory that a step needs at most, beside what was there before it."""

import itertools
import os
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile

from ssm_train.common.timing import wait


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes that PyTorch's allocator had handed out at the same time during one `step`, on `device`.

    On CUDA the allocator itself keeps count. On the CPU it is the running sum of the allocations and frees that
    PyTorch's profiler records, and not resident memory, which contains PyTorch itself and what its libraries keep;
    scratch memory that oneDNN or our kernels take from the C library is left out.
    """
    if device.type == "cuda":
        wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else a PyTorch for CUDA complains that there is no GPU
    with profile(use_kineto=True, profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
