// What the two halves of the runtime share: the threads of the running block (scheduler.cpp) and memory (memory.cpp).
#pragma once

#include <string>
#include <vector>

#include "emulator.h"

#define EMULATOR_API extern "C" __attribute__((visibility("default")))

namespace emulator {

struct Thread {
    unsigned number, warp, lane;
    uint3 index;
    bool started;
    void* context[5];

    // what it waits for, and what it gets
    Kind kind;
    unsigned mask, source;
    uint64_t value, result;
    Site site;

    // Its accesses carry `clock`, which grows whenever threads meet. Those of lane i of its warp before `sees[i]` have
    // happened for this thread. Before `passed[i]`, lane i has at least got what it read: shuffles and votes, which make
    // no write visible, tell so much. Of another warp's thread, what was before its `at_barrier` has happened.
    uint32_t clock, at_barrier, sees[32], passed[32];
};

struct Counts {
    int64_t blocks, barriers, shuffles;
    int64_t global_requests, global_sectors, least_global_sectors;
    int64_t shared_requests, shared_wavefronts, least_shared_wavefronts;
};

inline std::vector<Thread> threads;  // of the block
inline Thread* running;              // null while the scheduler or the host runs
inline uint32_t block_number;        // one after the other, over all launches
inline Call call;                    // what they run
inline Counts counts;

// Ends the launch with an error and what is to be known of it. Returns only where no thread runs.
void fail(cudaError_t error, const char* format, ...) __attribute__((format(printf, 2, 3)));
bool failed();
std::string name_of(unsigned thread);
bool on_own_stack(uintptr_t address);

// memory.cpp
void begin_launch(size_t shared, size_t most_shared);
void begin_block();
void count_requests(unsigned warp);  // of a warp whose lanes are together: what they have asked for since they were

}  // namespace emulator
