// Threads of a block as fibers: one runs until it meets others or ends, then the order says which is next.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <random>

#include "cuda_runtime.h"
#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t STACK = 256 * 1024, PAGE = 4096, MOST_THREADS = 1024;
constexpr int SHARED_LIMIT = 48 * 1024, RAISED_SHARED_LIMIT = 227 * 1024;

enum State : char { READY, MEETING, EXITED };
enum Order { FORWARD, REVERSE, RANDOM, GREEDY };

std::vector<State> states;
Order order = FORWARD;
unsigned seed;
std::mt19937 random_numbers;
std::vector<unsigned> rank;  // GREEDY: who goes first
cudaError_t error, last_error;
std::string report;
void* scheduler[5];
char* stacks[MOST_THREADS];
std::map<const void*, int> raised;  // shared memory of kernels that asked for more

// ---- fibers ---------------------------------------------------------------------------------------------------------

__attribute__((noinline, noreturn)) void jump(void** to) { __builtin_longjmp(to, 1); }
__attribute__((noinline)) void change(void** from, void** to) {
    if (!__builtin_setjmp(from)) jump(to);
}

void run_thread() {
    call.body(call.data);
    states[running->number] = EXITED;
    jump(scheduler);
}

__attribute__((noinline)) void start(char*& stack) {
    if (!stack) {
        void* const made = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (made == MAP_FAILED) return fail(cudaErrorLaunchFailure, "no memory for the stacks of the threads");
        stack = static_cast<char*>(made);
        mprotect(stack, PAGE, PROT_NONE);  // a stack that is too small ends the process, not another stack
    }
    static ucontext_t context, unused;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    makecontext(&context, run_thread, 0);
    if (!__builtin_setjmp(scheduler)) swapcontext(&unused, &context);
}

void resume(Thread& t) {
    running = &t, threadIdx = t.index;
    std::exchange(t.started, true) ? change(scheduler, t.context) : start(stacks[t.number]);
    running = nullptr;
}

int next(int last) {
    const int n = int(threads.size()), first = order == RANDOM ? int(random_numbers() % n) : last;
    if (order == GREEDY && states[last] == READY) return last;
    for (int i = 0; i < n; i++) {
        const int t = order == GREEDY ? int(rank[i]) : order == REVERSE ? (first - 1 - i + n) % n : (first + 1 + i) % n;
        if (states[t] == READY) return t;
    }
    return -1;
}

// ---- meetings -------------------------------------------------------------------------------------------------------

std::string place_of(const Thread& t) {
    static const char* const names[] = {"__syncthreads", "__syncwarp", "a shuffle", "a vote"};
    char text[300], mask[20];
    std::snprintf(mask, sizeof(mask), t.kind == BLOCK ? "" : " (mask %08x)", t.mask);
    std::snprintf(text, sizeof(text), "%s at %s:%d%s", names[t.kind], t.site.file, t.site.line, mask);
    return text;
}

void meet_block() {
    const Thread* first = nullptr;
    for (Thread& t : threads) {
        if (states[t.number] == EXITED) continue;
        if (states[t.number] != MEETING || t.kind != BLOCK) return;
        if (!first) first = &t;
        if (t.site.line != first->site.line || std::string(t.site.file) != first->site.file)
            return fail(cudaErrorLaunchFailure, "%s is in %s, but %s in %s", name_of(first->number).c_str(),
                        place_of(*first).c_str(), name_of(t.number).c_str(), place_of(t).c_str());
    }
    if (!first) return;
    counts.barriers++;
    for (Thread& t : threads) t.at_barrier = ++t.clock;
    for (Thread& t : threads) {
        const Thread* const warp = &threads[t.warp * 32];
        for (unsigned i = 0; i < 32 && t.warp * 32 + i < threads.size(); i++) t.sees[i] = t.passed[i] = warp[i].clock;
        if (states[t.number] == MEETING) states[t.number] = READY;
        if (t.lane == 0) count_requests(t.warp);
    }
}

void meet_warp(const Thread& last) {
    Thread* const warp = &threads[last.warp * 32];
    const unsigned lanes = std::min<unsigned>(32, unsigned(threads.size()) - last.warp * 32);
    const unsigned mask = last.mask & unsigned((uint64_t(1) << lanes) - 1);  // a block may end within a warp
    unsigned votes = 0, alive = 0;
    for (unsigned i = 0; i < lanes; i++) {
        const Thread& t = warp[i];
        const State state = states[t.number];
        alive |= unsigned(state != EXITED) << i;
        if (!(mask >> i & 1)) continue;
        if (state == EXITED)
            return fail(cudaErrorLaunchFailure, "%s waits in %s for lane %u, which has ended",
                        name_of(last.number).c_str(), place_of(last).c_str(), i);
        if (state != MEETING || t.kind != last.kind || t.mask != last.mask || t.site.line != last.site.line) return;
        votes |= unsigned(t.value != 0) << i;
    }
    counts.barriers += last.kind == WARP;
    counts.shuffles += last.kind == SHUFFLE;
    uint32_t sees[32] = {}, passed[32] = {};
    for (unsigned i = 0; i < lanes; i++) {
        if (!(mask >> i & 1)) continue;
        Thread& t = warp[i];
        if (t.kind == SHUFFLE && !(t.source < lanes && mask >> t.source & 1))
            return fail(cudaErrorLaunchFailure, "%s reads from lane %u, which is not in %s", name_of(t.number).c_str(),
                        t.source, place_of(t).c_str());
        t.result = t.kind == SHUFFLE ? warp[t.source].value : votes;
        t.passed[i] = ++t.clock;
        if (t.kind == WARP) t.sees[i] = t.clock;
        for (unsigned j = 0; j < 32; j++) sees[j] = std::max(sees[j], t.sees[j]), passed[j] = std::max(passed[j], t.passed[j]);
    }
    for (unsigned i = 0; i < lanes; i++) {
        if (!(mask >> i & 1)) continue;
        std::copy(passed, passed + 32, warp[i].passed);
        if (last.kind == WARP) std::copy(sees, sees + 32, warp[i].sees);
        states[warp[i].number] = READY;
    }
    if (mask == alive) count_requests(last.warp);
}

void after_exit(const Thread& gone) {
    for (const Thread& t : threads)
        if (t.warp == gone.warp && states[t.number] == MEETING && t.kind != BLOCK && t.mask >> gone.lane & 1) meet_warp(t);
    meet_block();
}

void report_deadlock() {
    std::map<std::string, std::vector<unsigned>> waiting;
    for (const Thread& t : threads)
        if (states[t.number] == MEETING) waiting[place_of(t)].push_back(t.number);
    std::string text;
    for (const auto& [place, who] : waiting)
        text += "; " + std::to_string(who.size()) + " wait in " + place + ", among them " + name_of(who[0]);
    fail(cudaErrorLaunchTimeout, "the threads wait for each other%s", text.c_str());
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

void run_block() {
    const unsigned n = blockDim.x * blockDim.y * blockDim.z;
    threads.assign(n, Thread());
    states.assign(n, READY);
    rank.resize(n);
    for (unsigned i = 0; i < n; i++) {
        Thread& t = threads[i];
        t.number = rank[i] = i, t.warp = i / 32, t.lane = i % 32;
        t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    if (order == GREEDY) std::shuffle(rank.begin(), rank.end(), random_numbers);
    block_number++;
    counts.blocks++;
    begin_block();
    for (int t = next(order == FORWARD ? int(n) - 1 : 0); t >= 0 && !failed(); t = next(t)) {
        resume(threads[t]);
        if (failed()) return;
        if (states[t] == EXITED)
            after_exit(threads[t]);
        else if (threads[t].kind == BLOCK)
            meet_block();
        else
            meet_warp(threads[t]);
    }
    if (failed()) return;
    if (std::count(states.begin(), states.end(), EXITED) != n) return report_deadlock();
    for (unsigned warp = 0; warp * 32 < n; warp++) count_requests(warp);
}

bool within(dim3 size, unsigned x, unsigned y, unsigned z) {
    return size.x - 1 < x && size.y - 1 < y && size.z - 1 < z;  // 0 wraps around
}

}  // namespace

bool failed() { return error != cudaSuccess; }

std::string name_of(unsigned thread) {
    const uint3 b = blockIdx;
    return "thread " + std::to_string(thread) + " of block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
           std::to_string(b.z) + ")";
}

bool on_own_stack(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(stacks[running->number]) < STACK; }

void fail(cudaError_t what, const char* format, ...) {
    char text[2000];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    error = what, report = text;
    if (running) jump(scheduler);
}

uint64_t meet(Kind kind, unsigned mask, uint64_t value, unsigned source, Site site) {
    Thread& t = *running;
    t.kind = kind, t.mask = mask, t.value = value, t.source = source, t.site = site;
    if (kind != BLOCK && !(mask >> t.lane & 1))
        fail(cudaErrorLaunchFailure, "%s is not in %s", name_of(t.number).c_str(), place_of(t).c_str());
    states[t.number] = MEETING;
    change(t.context, scheduler);
    return t.result;
}

void launch_bounds(unsigned most, unsigned, unsigned) {
    if (threads.size() > most)
        fail(cudaErrorInvalidConfiguration, "a block of %zu threads, with launch bounds of %u", threads.size(), most);
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared, const void* kernel, Call with) {
    const size_t most_shared = raised.count(kernel) ? raised[kernel] : SHARED_LIMIT;
    const bool fits = within(grid, 0x7fffffff, 65535, 65535) && within(block, MOST_THREADS, MOST_THREADS, 64) &&
                      block.x * block.y * block.z <= MOST_THREADS;
    error = !fits ? cudaErrorInvalidConfiguration : shared > most_shared ? cudaErrorInvalidValue : cudaSuccess;
    report.clear();
    if (!failed()) {
        gridDim = grid, blockDim = block, call = with;
        random_numbers.seed(seed);
        begin_launch(shared, most_shared);
        for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
            for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
                for (blockIdx.x = 0; blockIdx.x < grid.x && !failed(); blockIdx.x++) run_block();
    }
    if (failed()) last_error = error;
    return error;
}

}  // namespace emulator

cudaError_t emulator_set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > emulator::RAISED_SHARED_LIMIT)
        return cudaErrorInvalidValue;
    emulator::raised[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

// Of the last launch that failed, what the emulator knows of it
const char* cudaGetErrorString(cudaError_t error) {
    if (error == emulator::error && !emulator::report.empty()) return emulator::report.c_str();
    static const std::map<cudaError_t, const char*> names = {{cudaSuccess, "no error"},
                                                             {cudaErrorInvalidValue, "invalid argument"},
                                                             {cudaErrorInvalidConfiguration, "invalid configuration argument"},
                                                             {cudaErrorInvalidDevice, "invalid device ordinal"}};
    return names.count(error) ? names.at(error) : "unspecified launch failure";
}

EMULATOR_API void emulator_set_order(int order, unsigned seed) { emulator::order = emulator::Order(order), emulator::seed = seed; }
EMULATOR_API emulator::Counts* emulator_counts() { return &emulator::counts; }
