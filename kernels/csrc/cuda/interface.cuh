// The arguments of this library's functions, and the numbers that their caller counts with. ssm_ops/_interface.py says the
// same in Python, and ssm_ops_abi (abi.cu) tells what was compiled: a library that differs is not used. Whoever changes the
// order or the meaning of a field, which the sizes there do not show, raises VERSION on both sides.
//
// All functions return null, or what is wrong with the call.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../buffers.h"

constexpr int VERSION = 3;
constexpr int MAX_STATE = 256;  // N
constexpr int K = 8;            // tokens of a run
constexpr int CHUNK = 64;       // tokens between saved states
constexpr int FORWARD_THREADS = 256, BACKWARD_THREADS = 256, GATED_THREADS = 128;  // at most; the gate takes registers
constexpr int FORWARD_ROWS = 2, BACKWARD_ROWS = 4;  // of N floats of shared memory per channel
constexpr int SHARED_BYTES = 48 * 1024;  // what a block gets without asking
constexpr int SUMS = 512;  // floats of a warp's slot for sums over its channels, of dB and dC together; there are two slots

// (batch, channel, time), strides in elements, that of time is 1
struct Map {
    void* data;
    int64_t dtype, size[3];
    int64_t batch, channel;
};

// (batch, group, state, time), likewise
struct StateMap {
    void* data;
    int64_t dtype, size[4];
    int64_t batch, group, state;
};

struct ScanArguments {
    Map u, delta, z, dout;             // delta has Dd channels; z may be absent
    StateMap B, C;                     // (B, G, N, L)
    Buffer<const float> A, D, bias;    // (D, N), (D) or absent, (Dd) or absent
    Buffer<void> out;                  // (B, D, L)
    Buffer<float> last, states;        // (B, D, N), (S + 1, B, G, N, E): the forward may go without
    Buffer<void> du, ddelta, dz;       // (B, D, L); ddelta per channel of u
    Buffer<float> dA, dD, dbias;       // (B, D, N), (B, D), (B, D): the caller sums over the samples
    Buffer<float> dB, dC;              // (blocks of channels, B, G, N, L)
    int64_t batch, dim, length, state, groups;
    int64_t repeat;                    // channels that share a channel of delta
    int32_t softplus;
    int32_t vector;                    // elements, a power of 2 to which all rows of all maps are aligned
    int32_t wide, wide_delta;          // out and dout, ddelta: float32 instead of the dtype of the inputs
    int32_t lanes, warps;              // R; warps of a block
    int32_t device;
    cudaStream_t stream;
};

#define SSM_EXPORT extern "C" __attribute__((visibility("default")))
