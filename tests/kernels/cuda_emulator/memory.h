// Every load and store of the kernels: bounds, alignment, races, bank conflicts, sectors. g++ -fsanitize=thread puts a
// call of __tsan_* before each, for a race detector that is not linked; here they are answered.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>

#include "cuda_runtime.h"
#include "runtime.h"

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];  // of this library, by the linker

namespace emulator {
namespace {

constexpr size_t ARENA = 256 * 1024, GAP = 128, SECTOR = 32, BANKS = 32;
constexpr int POISON = 0xff;  // NaN in every floating type, -1 in every integer

enum Access : uint8_t { READ, WRITE, ATOMIC };
const char* const VERBS[] = {"reads", "writes", "changes"}, *const PAST[] = {"read", "written", "changed"};

struct Record {
    uintptr_t pc;
    uint32_t block, clock;
    uint16_t thread;
    Access access;
    uint8_t bytes;  // of the four, as a mask
};

// Four bytes, and those accesses to them that a later one could conflict with
struct Word {
    uint32_t epoch = 0;
    std::vector<Record> records;
};

struct Region {
    uintptr_t end;
    bool shared;
    std::vector<Word> words;
};

// What the lanes of a warp asked for at one place in the code, each for the same time since they were together
struct Request {
    uintptr_t address[32];
    unsigned lanes, size;
    bool shared;
};
struct Place {
    unsigned times[32] = {};
    std::vector<Request> requests;
};

alignas(128) char arena[ARENA];
std::map<uintptr_t, Region> regions;  // by the first byte
std::map<std::string, size_t> variables;  // static, of the block: where in the arena
size_t dynamic_bytes, shared_limit, static_bytes, arena_end;
uint32_t launches;
std::unordered_map<uintptr_t, Place> places[32];  // of every warp, by program counter

uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

void add_region(uintptr_t begin, size_t bytes, bool shared) {
    Region& region = regions[begin];
    region.end = begin + bytes, region.shared = shared;
    region.words.resize((region.end + 3) / 4 - begin / 4);
}

// ---- races ----------------------------------------------------------------------------------------------------------

bool ordered(const Record& before, const Thread& now) {
    if (before.block != block_number) return false;
    if (before.thread == now.number) return true;
    const Thread& other = threads[before.thread];
    if (other.warp != now.warp) return before.clock < other.at_barrier;
    return before.clock < (before.access == READ ? now.passed : now.sees)[other.lane];
}

std::string place_of(uintptr_t pc) {
    char text[32];
    std::snprintf(text, sizeof(text), "[+0x%zx]", size_t(pc - 1 - address_of(__ehdr_start)));
    return text;
}

void report_race(const Region& region, uintptr_t begin, const Record& before, const Record& now, uintptr_t address) {
    const bool same_block = before.block == now.block;
    const std::string other = same_block ? "thread " + std::to_string(before.thread) : "another block";
    fail(cudaErrorLaunchFailure, "race in %s memory: %s %s byte %zu of %zu %s, which %s has %s %s, %s",
         region.shared ? "shared" : "global", name_of(now.thread).c_str(), VERBS[now.access], size_t(address - begin),
         size_t(region.end - begin), place_of(now.pc).c_str(), other.c_str(), PAST[before.access],
         place_of(before.pc).c_str(), same_block ? "with no barrier between" : "and blocks have no order");
}

void track(uintptr_t begin, Region& region, uintptr_t address, size_t size, Access access, uintptr_t pc) {
    Record now{pc, block_number, running->clock, uint16_t(running->number), access, 0};
    const uint32_t epoch = region.shared ? block_number : launches;
    for (uintptr_t word = address / 4; word * 4 < address + size; word++) {
        const uintptr_t from = std::max(address, word * 4), to = std::min(address + size, word * 4 + 4);
        now.bytes = uint8_t(((1u << (to - from)) - 1) << from % 4);
        Word& w = region.words[word - begin / 4];
        if (w.epoch != epoch) w.epoch = epoch, w.records.clear();
        bool foreign = false;  // one record of another block is enough to show that there is one
        size_t kept = 0;
        for (const Record& r : w.records) {
            const bool before = ordered(r, *running), covered = !(r.bytes & ~now.bytes);
            if (!before && r.bytes & now.bytes && (access == WRITE || access != r.access))
                report_race(region, begin, r, now, from);
            // what conflicts with r and comes after now will also conflict with now
            if (before && covered && (access == WRITE || access == r.access)) continue;
            if (r.block != block_number && covered && access == r.access && std::exchange(foreign, true)) continue;
            w.records[kept++] = r;
        }
        w.records.resize(kept, now);
        w.records.push_back(now);
    }
}

// ---- counts ---------------------------------------------------------------------------------------------------------

void note_request(bool shared, uintptr_t address, unsigned size, uintptr_t pc) {
    Place& place = places[running->warp][pc];
    const unsigned time = place.times[running->lane]++;
    if (place.requests.size() <= time) place.requests.resize(time + 1, Request{{}, 0, size, shared});
    place.requests[time].address[running->lane] = address;
    place.requests[time].lanes |= 1u << running->lane;
}

// 32 banks of 4 bytes; 8 bytes go in two halves of the warp, 16 in four quarters
void count_shared(const Request& r) {
    const unsigned parts = std::max(1u, r.size / 4), lanes = 32 / parts;
    counts.shared_requests++;
    for (unsigned part = 0; part < parts; part++) {
        std::vector<uintptr_t> words;
        for (unsigned i = part * lanes; i < (part + 1) * lanes; i++)
            for (unsigned j = 0; r.lanes >> i & 1 && j < parts; j++) words.push_back(r.address[i] / 4 + j);
        if (words.empty()) continue;
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        unsigned of_bank[BANKS] = {};
        for (uintptr_t word : words) of_bank[word % BANKS]++;
        counts.shared_wavefronts += *std::max_element(of_bank, of_bank + BANKS);
        counts.least_shared_wavefronts++;
    }
}

void count_global(const Request& r) {
    std::vector<uintptr_t> sectors, addresses;
    for (unsigned i = 0; i < 32; i++)
        if (r.lanes >> i & 1) {
            addresses.push_back(r.address[i]);
            for (uintptr_t s = r.address[i] / SECTOR; s * SECTOR < r.address[i] + r.size; s++) sectors.push_back(s);
        }
    for (auto* list : {&sectors, &addresses}) {
        std::sort(list->begin(), list->end());
        list->erase(std::unique(list->begin(), list->end()), list->end());
    }
    counts.global_requests++;
    counts.global_sectors += int64_t(sectors.size());
    counts.least_global_sectors += int64_t((addresses.size() * r.size + SECTOR - 1) / SECTOR);
}

// ---- accesses -------------------------------------------------------------------------------------------------------

void access(const void* p, size_t size, Access access, uintptr_t pc) {
    const uintptr_t address = address_of(p);
    if (!running || on_own_stack(address)) return;
    if (address - address_of(call.data) < call.size && access == READ) return;
    const bool in_arena = address - address_of(arena) < ARENA;
    if (!in_arena && address >= address_of(__ehdr_start) && address < address_of(_end)) return;  // constants, threadIdx
    auto found = regions.upper_bound(address);
    if (found == regions.begin() || address + size > std::prev(found)->second.end) {
        std::string near;
        if (found != regions.begin()) {
            --found;
            near = ", " + std::to_string(address - found->first) + " bytes from the start of one of " +
                   std::to_string(found->second.end - found->first) + (found->second.shared ? " bytes of shared memory" : " bytes");
        }
        fail(cudaErrorIllegalAddress, "%s %s %zu bytes at %p %s, outside of every allocation%s",
             name_of(running->number).c_str(), VERBS[access], size, p, place_of(pc).c_str(), near.c_str());
    }
    if (size <= 16 && !(size & (size - 1)) && address % size)
        fail(cudaErrorMisalignedAddress, "%s %s %zu bytes at %p %s, which is no multiple of %zu", name_of(running->number).c_str(),
             VERBS[access], size, p, place_of(pc).c_str(), size);
    auto& [begin, region] = *--found;
    track(begin, region, address, size, access, pc);
    note_request(region.shared, address, unsigned(size), pc);
}

}  // namespace

void begin_launch(size_t shared, size_t most_shared) {
    launches++;
    dynamic_bytes = shared, shared_limit = most_shared;
    for (auto& at : places) at.clear();
}

void begin_block() {
    for (auto at = regions.begin(); at != regions.end();) at = at->second.shared ? regions.erase(at) : std::next(at);
    variables.clear();
    std::memset(arena, POISON, dynamic_bytes);
    static_bytes = 0, arena_end = dynamic_bytes + GAP;
    if (dynamic_bytes) add_region(address_of(arena), dynamic_bytes, true);
}

void count_requests(unsigned warp) {
    for (const auto& [pc, place] : places[warp])
        for (const Request& r : place.requests) r.shared ? count_shared(r) : count_global(r);
    places[warp].clear();
}

void* dynamic_shared() { return arena; }

void* static_shared(size_t size, const char* name, Site site) {
    const std::string key = std::string(name) + ":" + site.file + ":" + std::to_string(site.line) + ":" + std::to_string(size);
    if (variables.count(key)) return arena + variables[key];
    static_bytes += size;
    if (dynamic_bytes + static_bytes > std::max<size_t>(shared_limit, 48 * 1024))
        fail(cudaErrorInvalidConfiguration, "%zu bytes of shared memory, of which %zu are static", dynamic_bytes + static_bytes,
             static_bytes);
    const size_t at = variables[key] = (arena_end + GAP - 1) / GAP * GAP;
    arena_end = at + size + GAP;
    add_region(address_of(arena) + at, size, true);
    return std::memset(arena + at, POISON, size);
}

void atomic(const void* address, unsigned size) {
    access(address, size, ATOMIC, address_of(__builtin_return_address(0)));
}

}  // namespace emulator

// Memory that kernels may use. What overlaps becomes one.
EMULATOR_API void emulator_map(const void* data, int64_t bytes) {
    using namespace emulator;
    uintptr_t begin = address_of(data), end = begin + uintptr_t(bytes);
    for (auto at = regions.begin(); at != regions.end();) {
        const bool overlaps = at->first < end && begin < at->second.end;
        if (overlaps) begin = std::min(begin, at->first), end = std::max(end, at->second.end);
        at = overlaps ? regions.erase(at) : std::next(at);
    }
    if (begin < end) add_region(begin, end - begin, false);
}

EMULATOR_API void emulator_unmap_all() { emulator::regions.clear(); }

// ---- what the compiler calls ----------------------------------------------------------------------------------------

#define EMULATOR_PC emulator::address_of(__builtin_return_address(0))
#define EMULATOR_ACCESS(name, size, kind) \
    void __tsan_##name##size(void* p) { emulator::access(p, size, emulator::kind, EMULATOR_PC); }
#define EMULATOR_ACCESSES(size)                  \
    EMULATOR_ACCESS(read, size, READ)            \
    EMULATOR_ACCESS(write, size, WRITE)          \
    EMULATOR_ACCESS(unaligned_read, size, READ)  \
    EMULATOR_ACCESS(unaligned_write, size, WRITE)

extern "C" {
EMULATOR_ACCESSES(1) EMULATOR_ACCESSES(2) EMULATOR_ACCESSES(4) EMULATOR_ACCESSES(8) EMULATOR_ACCESSES(16)
void __tsan_read_range(void* p, size_t n) { emulator::access(p, n, emulator::READ, EMULATOR_PC); }
void __tsan_write_range(void* p, size_t n) { emulator::access(p, n, emulator::WRITE, EMULATOR_PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
