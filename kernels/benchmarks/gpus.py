"""What NVIDIA publishes about GPUs, and the bounds on a kernel's time that follow from it.

Sources: [guide] CUDA C++ Programming Guide, tables "Technical Specifications per Compute Capability" and "Throughput of
Native Arithmetic Instructions" (results per clock and multiprocessor); [occupancy] cuda_occupancy.h of the
CUDA toolkit (allocation units); [nsight] Nsight Compute documentation, "Pipelines" (which instruction runs where);
[A100], [H100] the data sheets of the SXM modules.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

WARP = 32
SCHEDULERS = 4
"""Of a multiprocessor; each issues an instruction of a warp per clock (white papers of both architectures)."""


@dataclass(frozen=True)
class Capability:
    """Of a compute capability: what a multiprocessor holds, and lanes of its pipelines, in results per clock."""

    shared: int  # bytes, of which every block takes RESERVED more than it asks for [guide]
    fma: int  # float32 add, multiply, multiply-add [guide]
    warps: int = 64  # [guide]
    blocks: int = 32  # [guide]
    registers: int = 64 * 1024  # [guide]
    alu: int = 64  # 32-bit integer add, compare, logic [guide]
    mufu: int = 16  # 2^x, reciprocal, ... [guide]
    lsu: int = 32  # shuffles [guide]; loads and stores go through the same pipeline [nsight]


CAPABILITIES = {
    80: Capability(shared=164 * 1024, fma=64),
    90: Capability(shared=228 * 1024, fma=128),
    100: Capability(shared=228 * 1024, fma=128),
}
RESERVED = 1024  # bytes of shared memory per block, from 8.0 on [guide]
REGISTER_UNIT, WARP_UNIT, SHARED_UNIT = 256, 4, 128  # of a warp's registers, of warps, of bytes [occupancy]


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: int
    multiprocessors: int
    clock: float  # Hz, boost: the published float32 peak = 2 * fma lanes * multiprocessors * clock
    bandwidth: float  # bytes per second


GPUS = (
    Gpu("A100", 80, 108, 1.41e9, 2.039e12),  # SXM, 80 GB: 19.5 TFLOP/s, 2,039 GB/s [A100]
    Gpu("H100", 90, 132, 1.98e9, 3.35e12),  # SXM, 80 GB: 67 TFLOP/s, 3.35 TB/s [H100]
)


def resident_blocks(capability: int, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once. `registers` of a thread, `shared` bytes of a block."""
    c = CAPABILITIES[capability]
    warps = math.ceil(threads / WARP)
    of_warp = _rounded_up(max(registers, 1) * WARP, REGISTER_UNIT)
    by_registers = c.registers // of_warp // WARP_UNIT * WARP_UNIT // warps
    by_shared = c.shared // _rounded_up(shared + RESERVED, SHARED_UNIT)
    by_warps = c.warps // warps
    return min(c.blocks, by_registers, by_shared, by_warps)


def occupancy(capability: int, registers: int, threads: int, shared: int) -> float:
    """Share of a multiprocessor's warps that can be resident, 0 to 1."""
    blocks = resident_blocks(capability, registers, threads, shared)
    return blocks * math.ceil(threads / WARP) / CAPABILITIES[capability].warps


def pipelines(executed: Counter) -> Counter:
    """Instructions by pipeline, from those by (class, name). IMAD runs beside the multiply-adds [nsight]."""
    by_pipeline: Counter = Counter()
    for (kind, name), n in executed.items():
        pipeline = {"fma": "fma", "mufu": "mufu", "load_store": "lsu", "shuffle": "lsu", "integer": "alu"}.get(kind)
        if name in ("IMAD", "IMUL"):
            pipeline = "fma"
        elif name.startswith("U") and kind == "integer":  # the uniform datapath
            pipeline = None
        if pipeline:
            by_pipeline[pipeline] += n
    return by_pipeline


def issue_seconds(gpu: Gpu, executed: Counter, warps: int, blocks: int) -> dict[str, float]:
    """Least time to issue what every one of blocks * warps executes, by what would need it.

    "issue": all instructions, one per scheduler and clock; the others: the instructions of a pipeline. Counted is the
    multiprocessor with the most blocks. Waiting (latencies, barriers, bank conflicts) is not in it.
    """
    c = CAPABILITIES[gpu.capability]
    of_busiest = math.ceil(blocks / gpu.multiprocessors) * warps
    clocks = {"issue": sum(executed.values()) / SCHEDULERS}
    clocks |= {name: n * WARP / getattr(c, name) for name, n in pipelines(executed).items()}
    return {name: of_busiest * n / gpu.clock for name, n in clocks.items()}


def _rounded_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit
