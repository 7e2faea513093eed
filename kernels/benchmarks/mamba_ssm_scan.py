"""The CUDA scan that the mamba_ssm package publishes, compiled at our sizes to predict its cost beside ours.

Its source is not part of this repository: `pip download --no-deps --no-binary :all: mamba-ssm==2.3.0`, unpacked, is the
folder that `static.py --mamba-ssm` takes. One kernel is compiled per size: input-dependent B and C, real, no gate.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from binaries import Binary, cuda_binaries
from gpus import WARP
from launches import Launch

CHUNK = 2048  # tokens between the states that its forward keeps
THREADS_AND_ITEMS = ((128, (32, 4)), (256, (32, 8)), (512, (32, 16)), (1024, (64, 16)), (None, (128, 16)))
"""Its launches up to so many tokens: threads of a block, which scans one channel, and tokens of a thread."""
TYPES = {torch.float32: "float", torch.float16: "at::Half", torch.bfloat16: "at::BFloat16"}

INSTANCE = """
#include "selective_scan_{short}_kernel.cuh"

using Traits = Selective_Scan_{short}_kernel_traits<{threads}, {items}, {switches}, {type}, float>;
template __global__ void selective_scan_{short}_kernel<Traits>({parameters});

template <int bytes>
__global__ void shared_bytes() {{}}  // tells, by its name, what a launch asks for
template __global__ void shared_bytes<int(Traits::kSmemSize + {more_shared})>();
"""


def published(launch: Launch) -> Launch:
    """Their launch for the same call as `launch`, one of our CUDA library's."""
    forward, tensors = "forward" in launch.kernel, dict(launch.tensors)
    (batch, dim, length), n_state = tensors["u"].shape, tensors["A"].shape[1]
    threads, items = next(of for most, of in THREADS_AND_ITEMS if most is None or length <= most)
    chunks = -(-length // CHUNK)
    states = torch.empty(batch, dim, chunks, 2 * n_state, device="meta")
    for ours in ("states", "last", "dA", "dD", "dbias", "dB", "dC"):
        tensors.pop(ours, None)
    if forward or chunks > 1:
        tensors["states"] = states
    if not forward:  # gradients of parameters are summed in place, those of B and C in float32
        tensors |= {"dA": tensors["A"], "dD": tensors["D"], "dbias": tensors["delta_bias"]}
        tensors |= {f"d{x}": torch.empty_like(tensors[x], dtype=torch.float32, device="meta") for x in "BC"}
    return dataclasses.replace(
        launch,
        implementation="mamba_ssm",
        grid=batch * dim,
        warps=threads // WARP,
        tensors=tensors,
        trips=(chunks, n_state),
        source=("fwd" if forward else "bwd", threads, items, length % (threads * items) == 0),
        widest=16,
        tile=None,
        shared=0,
    )


def compile_published(launch: Launch, folder: Path, capability: int) -> Binary:
    """The kernel of a launch, with the shared memory that the launch asks for. `folder`: the unpacked source."""
    sources = folder / "csrc" / "selective_scan"
    if not sources.is_dir():
        raise FileNotFoundError(f"no {sources}: --mamba-ssm takes the unpacked source of mamba_ssm 2.2.5 or later")
    short, threads, items, even = launch.source
    even, forward = str(even).lower(), short == "fwd"
    text = INSTANCE.format(
        short=short,
        threads=threads,
        items=items,
        switches=f"1, {even}, true, true, false" if forward else f"{even}, true, true, true, false",
        type=TYPES[launch.dtype],
        parameters="SSMParamsBase" if forward else "SSMParamsBwd",
        more_shared="2 * 4 * MAX_DSTATE" if forward else f"4 * (6 * MAX_DSTATE + {threads})",
    )
    headers = f"-I{sources}", f"-I{Path(torch.__file__).parent / 'include'}"
    found = cuda_binaries(text, capability, *headers, "--use_fast_math", "--expt-relaxed-constexpr")
    shared = next(int(m[1]) for name in found if (m := re.search(r"shared_bytesILi(\d+)E", name)))
    kernel = next(binary for name, binary in found.items() if f"selective_scan_{short}_kernel" in name)
    return dataclasses.replace(kernel, shared=kernel.shared + shared)
