"""The emulator of CUDA by itself: kernels of a few lines, each of which does one thing right or wrong."""

import ctypes
import re

import pytest
import torch

from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator import ORDERS, Emulator

pytestmark = pytest.mark.skipif(not cuda_emulator.WORKS_HERE, reason="needs g++ on Linux")

KERNELS = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ALL 0xffffffffu
using Kernel = void(float*, const float*, int);

__global__ void copy(float* out, const float* in, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i];
}
__global__ void copy_strided(float* out, const float* in, int n) { out[threadIdx.x] = in[threadIdx.x * n]; }
__global__ void copy_vectors(float* out, const float* in, int n) {
    reinterpret_cast<float4*>(out)[threadIdx.x] = __ldg(reinterpret_cast<const float4*>(in + n) + threadIdx.x);
}
template <bool BARRIER>
__global__ void reversed(float* out, const float* in, int n) {
    extern __shared__ float values[];
    values[threadIdx.x] = in[threadIdx.x];
    if (BARRIER) __syncthreads();
    out[threadIdx.x] = values[n - 1 - threadIdx.x];
}
__global__ void unwritten(float* out, const float* in, int n) {
    extern __shared__ float dynamic[];
    __shared__ float fixed[4][2];
    __shared__ int number;
    if (in[blockIdx.x] > 0.0f) dynamic[0] = fixed[3][1] = in[blockIdx.x], number = n;
    out[3 * blockIdx.x] = dynamic[0], out[3 * blockIdx.x + 1] = fixed[3][1], out[3 * blockIdx.x + 2] = float(number);
}
__global__ void stride_shared(float* out, const float* in, int n) {
    extern __shared__ float values[];
    values[threadIdx.x * n] = 1.0f;
}
__global__ void vectors_shared(float* out, const float* in, int n) {
    extern __shared__ float4 vectors[];
    vectors[threadIdx.x * n] = reinterpret_cast<const float4*>(in)[threadIdx.x];
}
__global__ void shuffles(float* out, const float* in, int n) {
    const float x = in[threadIdx.x];
    float* to = out + 4 * threadIdx.x;
    to[0] = __shfl_sync(ALL, x, 5, n), to[1] = __shfl_up_sync(ALL, x, 3, n);
    to[2] = __shfl_down_sync(ALL, x, 3, n), to[3] = __shfl_xor_sync(ALL, x, 6, n);
}
__global__ void votes(float* out, const float* in, int n) {
    const unsigned mask = threadIdx.x < 8 ? 0xffu : ~0xffu;
    const bool yes = in[threadIdx.x] > 0.0f;
    out[3 * threadIdx.x] = float(__popc(__ballot_sync(mask, yes)));
    out[3 * threadIdx.x + 1] = float(__any_sync(mask, yes)), out[3 * threadIdx.x + 2] = float(__all_sync(mask, yes));
}
__global__ void __launch_bounds__(64, 2) bounded(float* out, const float* in, int n) { out[threadIdx.x] = 1.0f; }
__global__ void nothing(float* out, const float* in, int n) {}
__global__ void barrier_for_some(float* out, const float* in, int n) {
    if (int(threadIdx.x) < n) __syncthreads();
    else if (n > 0) __syncwarp(1u << threadIdx.x % 32), __syncthreads();
}
__global__ void shuffle_without_a_lane(float* out, const float* in, int n) {
    if (threadIdx.x == 7) __syncthreads();
    else out[threadIdx.x] = __shfl_xor_sync(ALL, in[threadIdx.x], 1);
}
__global__ void shuffle_with_a_lane_that_left(float* out, const float* in, int n) {
    if (int(threadIdx.x) >= n) return;
    out[threadIdx.x] = __shfl_xor_sync(ALL, in[threadIdx.x], 1);
}
__global__ void shuffle_from_outside(float* out, const float* in, int n) {
    if (threadIdx.x < 8) out[threadIdx.x] = __shfl_sync(0xffu, in[threadIdx.x], n);
}
__global__ void vote_of_others(float* out, const float* in, int n) { __any_sync(0xffu, 1); }
__global__ void leave_early(float* out, const float* in, int n) {
    if (int(threadIdx.x) >= n) return;
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}
template <int SYNC>  // 0: a shuffle, 1: a barrier of the warp, 2: of half of it
__global__ void written_before(float* out, const float* in, int n) {
    __shared__ float values[64];
    values[threadIdx.x] = 1.0f;
    SYNC == 0 ? void(__shfl_xor_sync(ALL, 1, 1)) : __syncwarp(SYNC == 1 ? ALL : 0xffffu << (threadIdx.x & 16));
    out[threadIdx.x] = values[threadIdx.x ^ n];
}
__global__ void read_before(float* out, const float* in, int n) {
    out[threadIdx.x] = __shfl_xor_sync(ALL, out[threadIdx.x ^ 1], 0);
}
__global__ void blocks_share(float* out, const float* in, int n) { out[blockIdx.x / n] = 1.0f; }
__global__ void count(float* out, const float* in, int n) { atomicAdd(out, 1.0f); }
__global__ void count_and_read(float* out, const float* in, int n) {
    atomicAdd(out, 1.0f);
    if (threadIdx.x == 3) out[1] = out[0];
}
__global__ void who_runs(float* out, const float* in, int n) {
    for (int i = 0; i < n; i++) {
        out[1 + int(atomicAdd(out, 1.0f))] = float(threadIdx.x);
        __syncwarp(1u << threadIdx.x);
    }
}
__global__ void later_than_thread_0(float* out, const float* in, int n) {
    if (threadIdx.x == 0) out[1] = 1.0f, atomicExch(out, 1.0f);
    else if (atomicAdd(out, 0.0f) == 0.0f) out[1] = 2.0f;
}

static const struct { const char* name; Kernel* kernel; } KERNELS[] = {
#define K(name) {#name, name}
    K(copy), K(copy_strided), K(copy_vectors), K(reversed<true>), K(reversed<false>), K(unwritten), K(stride_shared),
    K(vectors_shared), K(shuffles), K(votes), K(bounded), K(nothing), K(barrier_for_some), K(shuffle_without_a_lane),
    K(shuffle_with_a_lane_that_left), K(shuffle_from_outside), K(vote_of_others), K(leave_early),
    K(written_before<0>), K(written_before<1>), K(written_before<2>), K(read_before), K(blocks_share), K(count),
    K(count_and_read), K(who_runs), K(later_than_thread_0),
};
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* run(
    const char* name, dim3 grid, dim3 block, int shared, int raised, float* out, const float* in, int n) {
    for (const auto& k : KERNELS) {
        if (strcmp(k.name, name)) continue;
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        if (raised && cudaFuncSetAttribute(k.kernel, attribute, raised) != cudaSuccess) return "too much";
        Kernel* const kernel = k.kernel;
        kernel<<<grid, block, shared>>>(out, in, n);
        const cudaError_t error = cudaGetLastError();
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
    return "no such kernel";
}

EXPORT void convert(const float* from, __half* halves, __nv_bfloat16* brains, float* back, int n) {
    for (int i = 0; i < n; i++) {
        halves[i] = __float2half_rn(from[i]), brains[i] = __float2bfloat16_rn(from[i]);
        back[2 * i] = __half2float(halves[i]), back[2 * i + 1] = __bfloat162float(brains[i]);
    }
}
"""


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    sources = tmp_path_factory.mktemp("kernels")
    (sources / "kernels.cu").write_text(KERNELS)
    made = Emulator(cuda_emulator.build_once(tmp_path_factory, "itself", sources, ["kernels.cu"]))
    made.library.run.restype = ctypes.c_char_p
    return made


class Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


@pytest.fixture
def run(emulator):
    """run(kernel, blocks, threads, out, in, n): the report, or None. A tensor is all that the kernel may touch."""

    def run(name, grid, block, out=None, given=None, n=0, shared=0, raised=0):
        tensors = [x for x in (out, given) if x is not None]
        emulator.allow(*tensors)
        sizes = (Dim3(*(x if isinstance(x, tuple) else (x, 1, 1))) for x in (grid, block))
        pointers = (ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (out, given))
        said = emulator.library.run(name.encode(), *sizes, shared, raised, *pointers, n)
        emulator.forbid()
        return None if said is None else emulator.explain(said.decode())

    emulator.order("forward")
    return run


def counted(emulator, run, *what):
    before = emulator.counts()
    assert run(*what) is None
    return {name: value - before[name] for name, value in emulator.counts().items()}


# ---- what kernels compute -------------------------------------------------------------------------------------------


def test_blocks_and_threads(run):
    given, out = torch.randn(1000), torch.zeros(1000)
    assert run("copy", 8, 128, out, given, 1000) is None
    assert torch.equal(out, given)


@pytest.mark.parametrize("order", ORDERS)
def test_a_barrier_of_the_block(order, emulator, run):
    given, out = torch.randn(96), torch.zeros(96)
    emulator.order(order, 3)
    assert run("reversed<true>", 1, 96, out, given, 96, 4 * 96) is None
    assert torch.equal(out, given.flip(0))


@pytest.mark.parametrize("width", [8, 16, 32])
def test_shuffles(width, run):
    given, out = torch.arange(64.0), torch.zeros(64, 4)
    assert run("shuffles", 1, 64, out, given, width) is None
    lane = torch.arange(64)
    first, last = lane // width * width, lane // width * width + width - 1
    up, down = torch.where(lane - 3 < first, lane, lane - 3), torch.where(lane + 3 > last, lane, lane + 3)
    # xor reaches into earlier segments, not into later ones
    across = torch.where(lane ^ 6 > last, lane, lane ^ 6)
    assert torch.equal(out, torch.stack([first + 5, up, down, across], 1).float())


def test_votes_of_the_lanes_in_a_mask(run):
    given, out = torch.zeros(32), torch.zeros(32, 3)
    given[:8], given[20] = 1, 1
    assert run("votes", 1, 32, out, given) is None
    assert out[:8].tolist() == [[8, 1, 1]] * 8 and out[8:].tolist() == [[1, 1, 0]] * 24


def test_half_types_round_as_torch_does(emulator):
    every_half = torch.arange(-(2**15), 2**15).to(torch.int16)
    from_half, from_brain = every_half.view(torch.float16).float(), every_half.view(torch.bfloat16).float()
    between = (from_half[:-1] + from_half[1:]) / 2
    odd = torch.tensor([0.0, -0.0, 65519.996, 65520, 2.0**-25, 2.0**-25 * 1.0001, 3e38, float("inf"), float("nan")])
    x = torch.cat([from_half, from_brain, between, between * 1.0001, 1e5 * torch.randn(1000), odd, -odd])
    halves, brains = torch.zeros_like(x, dtype=torch.float16), torch.zeros_like(x, dtype=torch.bfloat16)
    back = torch.zeros(len(x), 2)
    emulator.library.convert(*(ctypes.c_void_p(t.data_ptr()) for t in (x, halves, brains, back)), len(x))
    for got, want, again in ((halves, x.half(), back[:, 0]), (brains, x.bfloat16(), back[:, 1])):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(again, want.float(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())


def test_shared_memory_is_poisoned_before_every_block(run):
    out = torch.zeros(3, 3)
    assert run("unwritten", 3, 1, out, torch.tensor([0.0, 5.0, -1.0]), 7, 4) is None
    assert out[1].tolist() == [5, 5, 7]
    for block in (0, 2):
        assert out[block, :2].isnan().all() and out[block, 2] == -1


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_an_access_out_of_bounds(run):
    given, out = torch.zeros(99), torch.zeros(100)
    said = run("copy", 1, 128, out, given, 100)
    assert re.fullmatch(
        r"thread 99 of block \(0, 0, 0\) reads 4 bytes at 0x\w+ \(at kernels.cu:\d+\), outside of every allocation, "
        r"396 bytes from the start of one of 396 bytes",
        said,
    )
    assert "writes 4 bytes" in run("copy", 1, 128, torch.zeros(99), torch.zeros(100), 100)
    assert "40 bytes of shared memory" in run("reversed<true>", 1, 11, out, given, 11, 40)


def test_a_vector_off_its_alignment(run):
    given = torch.zeros(64)
    assert run("copy_vectors", 1, 8, torch.zeros(32), given, 4) is None
    assert "which is no multiple of 16" in run("copy_vectors", 1, 8, torch.zeros(32), given, 2)


@pytest.mark.parametrize(("stride", "wavefronts"), [(0, 1), (1, 1), (2, 2), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts(stride, wavefronts, emulator, run):
    # one lane where all would write the same word, which is a race
    found = counted(emulator, run, "stride_shared", 1, 32 if stride else 1, None, None, stride, 4 * (31 * stride + 1))
    assert (found["shared_requests"], found["shared_wavefronts"]) == (1, wavefronts)
    assert found["least_shared_wavefronts"] == 1


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 4), (2, 8), (3, 4)])
def test_bank_conflicts_of_vectors_count_by_quarters_of_a_warp(stride, wavefronts, emulator, run):
    found = counted(emulator, run, "vectors_shared", 1, 32, None, torch.zeros(128), stride, 16 * (31 * stride + 1))
    assert (found["shared_wavefronts"], found["least_shared_wavefronts"]) == (wavefronts, 4)


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (1, 4), (2, 8), (8, 32), (100, 32)])
def test_sectors(stride, sectors, emulator, run):
    out = torch.empty(256 + 32)  # the library starts tensors of this size at multiples of 64 bytes
    given = torch.zeros(32 * 100)
    assert out.data_ptr() % 32 == given.data_ptr() % 32 == 0
    found = counted(emulator, run, "copy_strided", 1, 32, out, given, stride)
    assert (found["global_requests"], found["global_sectors"]) == (2, sectors + 4)
    assert found["least_global_sectors"] == (1 if stride == 0 else 4) + 4


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "block", "shared", "said"),
    [
        (0, 32, 0, "invalid configuration argument"),
        ((1, 65536, 1), 32, 0, "invalid configuration argument"),
        ((1, 1, 65536), 32, 0, "invalid configuration argument"),
        (2**31, 32, 0, "invalid configuration argument"),
        (1, 1025, 0, "invalid configuration argument"),
        (1, (1, 1, 65), 0, "invalid configuration argument"),
        (1, (32, 33, 1), 0, "invalid configuration argument"),
        (1, 32, 48 * 1024 + 1, "invalid argument"),
        ((1, 65535, 1), 1, 48 * 1024, None),
        (1, (16, 16, 4), 0, None),
    ],
    ids=str,
)
def test_limits_of_a_launch(grid, block, shared, said, run):
    assert run("nothing", grid, block, shared=shared) == said


def test_limits_that_a_kernel_sets(run):
    assert run("bounded", 1, 64, torch.zeros(64)) is None
    assert run("bounded", 1, 65, torch.zeros(65)) == "a block of 65 threads, with launch bounds of 64"
    assert run("stride_shared", 1, 32, n=400, shared=60000, raised=60000) is None
    assert run("stride_shared", 1, 32, n=400, shared=60001) == "invalid argument"
    assert run("nothing", 1, 1, shared=10**6, raised=10**6) == "too much"


# ---- threads that do not meet ---------------------------------------------------------------------------------------


def test_a_barrier_that_some_threads_do_not_reach(run):
    assert run("barrier_for_some", 1, 64, n=64) is None
    said = run("barrier_for_some", 1, 64, n=40)
    assert re.search(r"is in __syncthreads at .*kernels.cu:\d+, but thread 40 .* at .*kernels.cu", said)
    given, out = torch.randn(64), torch.zeros(64)
    said = run("shuffle_without_a_lane", 1, 64, out, given)
    assert said.startswith("the threads wait for each other") and "; 1 wait in __syncthreads" in said
    assert "; 31 wait in a shuffle" in said
    assert "(mask ffffffff), among them thread 0 of block (0, 0, 0)" in said


def test_threads_that_left(run):
    given, out = torch.randn(64), torch.zeros(64)
    assert run("leave_early", 1, 64, out, given, 40) is None  # a block does not wait for them
    assert torch.equal(out[:40], given[:40]) and not out[40:].any()
    said = run("shuffle_with_a_lane_that_left", 1, 64, out, given, 40)
    assert re.search(r"waits in a shuffle at .* for lane \d+, which has ended", said)
    assert run("shuffle_with_a_lane_that_left", 1, 40, out, given, 40) is None  # a warp that is not full


def test_lanes_that_are_not_in_the_mask(run):
    given, out = torch.randn(32), torch.zeros(32)
    assert run("shuffle_from_outside", 1, 32, out, given, 7) is None
    said = run("shuffle_from_outside", 1, 32, out, given, 8)
    assert re.search(r"reads from lane 8, which is not in a shuffle at .*kernels.cu:\d+ \(mask 000000ff\)", said)
    assert run("vote_of_others", 1, 32).startswith("thread 8 of block (0, 0, 0) is not in a vote at ")


# ---- races ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_a_race_in_every_order(order, emulator, run):
    emulator.order(order, 1)
    said = run("reversed<false>", 1, 64, torch.zeros(64), torch.zeros(64), 64, 4 * 64)
    assert re.match(
        r"race in shared memory: thread \d+ of block \(0, 0, 0\) (reads|writes) byte \d+ of 256 "
        r"\(at kernels.cu:\d+.*\), "
        r"which thread \d+ has (read|written) \(at kernels.cu:\d+.*\), with no barrier between",
        said,
    )


@pytest.mark.parametrize(
    ("kernel", "partner", "races"),
    [
        ("written_before<0>", 1, True),  # a shuffle makes no write visible
        ("written_before<1>", 31, False),
        ("written_before<1>", 32, True),  # in the other warp
        ("written_before<2>", 15, False),
        ("written_before<2>", 16, True),  # in the other half
        ("written_before<0>", 0, False),  # its own
        ("read_before", 0, False),  # what a lane brings to a shuffle it has read
    ],
)
def test_what_orders_two_accesses(kernel, partner, races, run):
    said = run(kernel, 1, 64, torch.zeros(64), None, partner)
    assert said is None if not races else said.startswith("race in shared memory")


def test_blocks_have_no_order(run):
    assert run("blocks_share", 4, 1, torch.zeros(4), None, 1) is None
    assert run("blocks_share", 4, 1, torch.zeros(4), None, 2).endswith("and blocks have no order")


def test_atomics_race_with_plain_accesses_alone(run):
    out = torch.zeros(2)
    assert run("count", 3, 64, out) is None
    assert out[0] == 192
    assert run("count_and_read", 1, 64, out).startswith("race in global memory")


def test_orders(emulator, run):
    def runs(order, seed):
        out = torch.zeros(9)
        emulator.order(order, seed)
        assert run("who_runs", 1, 4, out, None, 2) is None
        return out[1:].int().tolist()

    assert runs("forward", 0) == [0, 1, 2, 3] * 2
    assert runs("reverse", 0) == [3, 2, 1, 0] * 2
    greedy = runs("greedy", 1)  # each as far as it can
    assert greedy[::2] == greedy[1::2] and sorted(greedy[::2]) == [0, 1, 2, 3]
    for order in ("greedy", "random"):
        assert runs(order, 2) == runs(order, 2) and len({tuple(runs(order, seed)) for seed in range(8)}) > 2


def test_a_race_that_only_some_orders_show(emulator, run):
    said = {}
    for order in ("forward", "reverse"):
        emulator.order(order)
        said[order] = run("later_than_thread_0", 1, 2, torch.zeros(2))
    assert said["forward"] is None and said["reverse"].startswith("race in global memory")
