// Between the headers that stand for CUDA's, which kernels include, and the runtime (scheduler.cpp, memory.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
    cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDevice = 101,
    cudaErrorIllegalAddress = 700, cudaErrorLaunchTimeout = 702, cudaErrorMisalignedAddress = 716, cudaErrorLaunchFailure = 719
};

extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

namespace emulator {

// Where threads meet: all of a block or, of a warp, those in a mask. A place in the source, so that lanes which meet in
// different places are noticed.
enum Kind { BLOCK, WARP, SHUFFLE, VOTE };
struct Site {
    const char* file;
    int line;
};
#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Returns when all have come: of a SHUFFLE the value of lane `source`, of a VOTE the mask of lanes whose value is not 0.
uint64_t meet(Kind kind, unsigned mask, uint64_t value, unsigned source, Site site);

// An atomic operation by the running thread on `size` bytes is about to happen.
void atomic(const void* address, unsigned size);

// The dynamic shared memory of the block, and a static variable in it.
void* dynamic_shared();
void* static_shared(size_t size, const char* name, Site site);
template <typename T>
T& shared(const char* name, EMULATOR_SITE) {
    return *static_cast<T*>(static_shared(sizeof(T), name, {file, line}));
}

// What __launch_bounds__ says, at the start of the kernel's body.
void launch_bounds(unsigned threads, unsigned blocks = 0, unsigned cluster = 0);

// Runs body(data) in every thread of the grid; it may read the `size` bytes of data, the kernel's arguments.
struct Call {
    void (*body)(void*);
    void* data;
    size_t size;
};
cudaError_t launch(dim3 grid, dim3 block, size_t shared, const void* kernel, Call call);

}  // namespace emulator
