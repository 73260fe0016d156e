// The emulated cluster: its state, and what the files that emulate instructions share.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../fibers.h"
#include "hopper.h"

namespace hopper::emulation {

constexpr int kLanes = 32, kGroup = 128;  // threads of a warp, of a warpgroup
constexpr uint32_t kSharedStart = 1024;   // so that address 0 is a fault
constexpr int kWord = 4;                  // bytes that one entry of Block::writer stands for
constexpr uint16_t kBarrierWord = 0xffff;
// What Block::writer has beside a thread: that it has not called fence_async since it wrote, that it has not
// met other warps since.
constexpr uint16_t kUnfenced = 0x4000, kUnmet = 0x2000, kWriter = 0x1fff;

// Threads that execute one instruction together. What each gives lies at its place until the last has come.
struct Meeting {
    const char* what = nullptr;
    int arrived = 0;
    uint32_t generation = 0;
    const void* given[kGroup];
    std::vector<uint32_t> unmet;  // words that a warp's lanes had written before its last __syncwarp
};

struct Barrier {
    uint32_t parity = 0;
    int arrivals = 0, pending = 0;
    int64_t bytes = 0;
    int made_by = 0;
    bool fenced = false;
};

struct NamedBarrier {
    int arrived = 0, threads = 0;
    uint32_t generation = 0;
};

// What a warpgroup multiplies with. Between the first product and the wait that covers the last the numbers
// are here, and NaN is in the threads' variables.
struct Accumulator {
    int columns;
    float* threads[kGroup];
    std::vector<float> matrix;  // [64, columns]
    int64_t last_group = 0;
};

struct Product {
    Operands operands;
    Accumulator* accumulator;
    const uint32_t* registers[kGroup];
    uint32_t a[kGroup][4];  // their contents when it was issued
    int64_t group;
    bool done = false;
};

struct Warpgroup {
    Meeting meeting;
    int registers = 0;
    int64_t committed = 0;
    std::list<Accumulator> accumulators;
    std::list<Product> products;
    // How many fences there were. A product's registers may not change after the last: what operands were in
    // the last product and at the last fence, and accumulators that are with the threads, at the last fence.
    int64_t fences = 0;
    struct Seen {
        uint32_t a[4], at_fence[4];
        int64_t fences;
    };
    struct Returned {
        float* threads[kGroup];
        int columns;
        int64_t fences;
        std::vector<float> at_fence;  // [threads, columns / 2]
    };
    std::map<const uint32_t*, Seen> operands_seen;
    std::map<const float*, Returned> returned;
};

struct Block {
    std::vector<uint8_t> memory;
    // What every word has: 0, or 1 + the thread that wrote it with what this has not done since.
    std::vector<uint16_t> writer;
    int written = 0;  // words whose entry is a thread
    std::map<uint32_t, Barrier> barriers;
    NamedBarrier named[16];
    std::vector<Meeting> warps;
    std::vector<Warpgroup> warpgroups;
    int free_registers = 0;
    uint32_t register_changes = 0;
    int running = 0;  // threads that have not ended

    uint8_t* at(uint32_t address, int bytes, int alignment, const char* what);
    // Raises a Fault if threads have written there and not fenced, or not met other warps since. Asynchronous
    // work calls it, with the thread that asked for it; a product is of four warps and of no thread.
    void require_fenced(uint32_t address, int bytes, const char* what, int thread = -1) const;
};

struct StoreGroup;

struct Thread {
    Thread(int number) : fiber(size_t{1} << 16, number % 61 * 64) {}

    Fiber fiber;
    int block, index;
    const uint32_t* watched;  // it can run when this is null or not `seen`
    uint32_t seen;
    std::string (*reason)(uint32_t);
    uint32_t reason_detail;
    bool in_cluster_barrier;
    uint32_t cluster_generation;
    std::vector<uint32_t> unfenced, unmet;  // words that it has written
    std::deque<StoreGroup> stores;
    bool open_store;
};

struct Load {
    TensorMap map;
    At3 at;
    int block;
    uint32_t to, barrier, bytes;
};

struct Store {
    TensorMap map;
    At3 at;
    int block, thread;
    uint32_t from;
    std::vector<uint8_t> data;  // when it has been read
    bool written = false;
};

struct StoreGroup {
    std::list<Store*> stores;
    bool committed = false, read_waited = false;
};

struct Machine {
    Shape launch;
    int registers = 0;  // of a thread when it starts
    Schedule schedule;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Block> blocks;
    NamedBarrier cluster_barrier;
    int running = 0;
    int first_block = 0;
    std::list<Load> loads;
    std::list<Store> stores;
    std::mt19937 random;
    const std::function<void()>* kernel;
    std::string fault;
    Thread* current = nullptr;
};
inline Machine machine;

[[noreturn]] void fail(const std::string& what);
std::string hex(uint32_t address);

inline Thread& self() { return *machine.current; }
inline Block& block() { return machine.blocks[self().block]; }
inline Warpgroup& warpgroup() { return block().warpgroups[self().index / kGroup]; }

// Lets others run until *word is not `value`.
void wait_while(const uint32_t* word, uint32_t value, std::string (*reason)(uint32_t), uint32_t detail = 0);

// Waits until `size` threads have come, `what` being the same for all; the last one calls action(given).
template <typename Action>
void meet(Meeting& meeting, int size, const char* what, const void* mine, Action action) {
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what) {
        fail(std::string("executes ") + what + " while others of its warp or warpgroup execute " +
             meeting.what);
    }
    meeting.given[self().index % size] = mine;
    if (++meeting.arrived < size) {
        wait_while(&meeting.generation, meeting.generation,
                   [](uint32_t) { return std::string("the other threads of an instruction"); });
        return;
    }
    action(meeting.given);
    meeting.arrived = 0;
    ++meeting.generation;
}

template <typename Action>
void meet_warp(const char* what, const void* mine, Action action) {
    meet(block().warps[self().index / kLanes], kLanes, what, mine, action);
}
template <typename Action>
void meet_warpgroup(const char* what, const void* mine, Action action) {
    meet(warpgroup().meeting, kGroup, what, mine, action);
}

// Notes that a thread of the running block has written.
void note_write(Thread& thread, uint32_t address, int bytes);
// Notes that the running thread shows other warps what it, and its warp before a __syncwarp, have written.
void note_meeting();

Barrier& barrier_of(int block, uint32_t address, bool asynchronous);
void receive_bytes(int block, uint32_t address, int64_t bytes);

// Work that is under way: done now if it is time.
void land(std::list<Load>::iterator load);
void read_now(Store& store);
void write_now(Store& store);
void run_products_until(int block, Warpgroup& warpgroup, int64_t group);

uint32_t swizzled(uint32_t address, Swizzle swizzle);
int span_of(Swizzle swizzle);  // bytes of a row

void check_end_of_thread(Thread& thread);
void check_end_of_block(int block);

}  // namespace hopper::emulation
