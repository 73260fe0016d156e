// Threads, barriers and the order in which things happen.
#include "machine.h"

#include <algorithm>
#include <numeric>
#include <set>

namespace hopper {
namespace emulation {

std::string hex(uint32_t address) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%x", address);
    return text;
}

void fail(const std::string& what) {
    if (machine.current == nullptr) throw Fault(what);
    throw Fault("block " + std::to_string(machine.first_block + self().block) + ", thread " +
                std::to_string(self().index) + ": " + what);
}

void wait_while(const uint32_t* word, uint32_t value, std::string (*reason)(uint32_t), uint32_t detail) {
    Thread& thread = self();
    while (*word == value) {
        thread.watched = word;
        thread.seen = value;
        thread.reason = reason;
        thread.reason_detail = detail;
        Fiber::yield();
    }
}

uint8_t* Block::at(uint32_t address, int bytes, int alignment, const char* what) {
    if (address % alignment != 0) {
        fail(std::string(what) + ": address " + hex(address) + " is no multiple of " +
             std::to_string(alignment));
    }
    if (address < kSharedStart || uint64_t{address} + bytes > kSharedStart + memory.size()) {
        fail(std::string(what) + ": address " + hex(address) + " is outside the block's shared memory");
    }
    return memory.data() + (address - kSharedStart);
}

void Block::require_fenced(uint32_t address, int bytes, const char* what, int thread) const {
    if (written == 0) return;
    const uint32_t first = (address - kSharedStart) / kWord;
    const uint32_t last = (address - kSharedStart + bytes - 1) / kWord;
    for (uint32_t word = first; word <= last; ++word) {
        if (writer[word] == 0 || writer[word] == kBarrierWord) continue;
        const int by = (writer[word] & kWriter) - 1;
        const bool unfenced = (writer[word] & kUnfenced) != 0;
        // The lanes of a warp can show one another what they write without meeting other warps.
        if (!unfenced && thread >= 0 && by / kLanes == thread / kLanes) continue;
        fail(std::string(what) + " touches " + hex(kSharedStart + word * kWord) + ", written by thread " +
             std::to_string(by) + ", which has " +
             (unfenced ? "not called fence_async since" : "met no other warp since"));
    }
}

void note_write(Thread& thread, uint32_t address, int bytes) {
    Block& block = machine.blocks[thread.block];
    const uint32_t first = (address - kSharedStart) / kWord;
    const uint32_t last = (address - kSharedStart + bytes - 1) / kWord;
    for (uint32_t word = first; word <= last; ++word) {
        uint16_t& writer = block.writer[word];
        if (writer == kBarrierWord) fail("writes over a barrier at " + hex(address));
        if (writer == 0) ++block.written;
        const uint16_t before = (writer & kWriter) == thread.index + 1 ? writer : 0;
        if ((before & kUnfenced) == 0) thread.unfenced.push_back(word);
        if ((before & kUnmet) == 0) thread.unmet.push_back(word);
        writer = static_cast<uint16_t>(thread.index + 1) | kUnfenced | kUnmet;
    }
}

namespace {

// Notes for the words that the running thread, or its warp, has written and that nobody has overwritten.
void clear(std::vector<uint32_t>& words, uint16_t flag, bool of_warp) {
    for (const uint32_t word : words) {
        uint16_t& writer = block().writer[word];
        if (writer == 0 || writer == kBarrierWord) continue;
        const int by = (writer & kWriter) - 1;
        if (of_warp ? by / kLanes != self().index / kLanes : by != self().index) continue;
        writer &= ~flag;
        if ((writer & ~kWriter) != 0) continue;
        writer = 0;
        --block().written;
    }
    words.clear();
}

}  // namespace

void note_meeting() {
    clear(self().unmet, kUnmet, false);
    clear(block().warps[self().index / kLanes].unmet, kUnmet, true);
}

Barrier& barrier_of(int block, uint32_t address, bool asynchronous) {
    Block& owner = machine.blocks[block];
    const bool mine = machine.current != nullptr && block == self().block;
    if (owner.running == 0) fail("barrier " + hex(address) + " is of a block that has ended");
    const auto found = owner.barriers.find(address);
    if (found == owner.barriers.end()) fail("barrier " + hex(address) + " is not initialised");
    if (!found->second.fenced && (asynchronous || !mine)) {
        fail("barrier " + hex(address) + " is used without a fence_barrier_init after its initialisation");
    }
    return found->second;
}

namespace {

void end_phase_if_complete(Barrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.parity ^= 1;
    barrier.pending = barrier.arrivals;
}

void arrive(int block, uint32_t address, int64_t bytes) {
    note_meeting();
    Barrier& barrier = barrier_of(block, address, false);
    if (barrier.pending == 0) {
        fail("barrier " + hex(address) + ": an arrival past its count of " +
             std::to_string(barrier.arrivals));
    }
    barrier.bytes += bytes;
    if (barrier.bytes >= 1 << 20) fail("barrier " + hex(address) + " expects 2^20 bytes or more");
    --barrier.pending;
    end_phase_if_complete(barrier);
}

void end_cluster_barrier_if_complete() {
    NamedBarrier& barrier = machine.cluster_barrier;
    if (barrier.arrived == 0 || barrier.arrived < machine.running) return;
    barrier.arrived = 0;
    ++barrier.generation;
}

// Runs a thread until it waits. A Fault passes from here to `launch` as a text: exceptions cannot leave a
// fiber.
void enter_kernel() {
    try {
        (*machine.kernel)();
        check_end_of_thread(self());
        --machine.running;
        if (--block().running == 0) check_end_of_block(self().block);
        end_cluster_barrier_if_complete();
    } catch (const Fault& fault) {
        machine.fault = fault.what();
    }
}

// Whether any of the first `count` lanes of the warp could run. In a random order a part of those that can is
// left out, sometimes all.
bool run_warp(int warp, int count) {
    bool could_run = false;
    int first = 0, lanes = kLanes;
    if (machine.schedule.random_warps) {
        const uint32_t choice = machine.random();
        first = choice % kLanes;
        if (choice >> 8 & 1) lanes = choice >> 16 & 1 ? 0 : choice >> 24 & (kLanes - 1);
    }
    for (int i = 0; i < kLanes; ++i) {
        const int at = (first + i) % kLanes, lane = machine.schedule.reversed ? kLanes - 1 - at : at;
        Thread& thread = *machine.threads[warp * kLanes + lane];
        if (thread.fiber.finished() || (thread.watched != nullptr && *thread.watched == thread.seen))
            continue;
        if (lane >= count) continue;
        could_run = true;
        if (i >= lanes) break;
        thread.watched = nullptr;
        machine.current = &thread;
        threadIdx.x = thread.index;
        blockIdx.x = machine.first_block + thread.block;
        thread.fiber.resume();
        machine.current = nullptr;
        if (!machine.fault.empty()) throw Fault(machine.fault);
    }
    return could_run;
}

// Whether a load has landed, for which a thread may wait.
bool do_random_work() {
    bool landed = false;
    auto now = [] { return machine.random() % 4 == 0; };
    if (machine.schedule.loads == When::kRandom) {
        for (auto load = machine.loads.begin(); load != machine.loads.end();) {
            const auto next = std::next(load);
            if (now()) {
                land(load);
                landed = true;
            }
            load = next;
        }
    }
    if (machine.schedule.stores == When::kRandom) {
        for (Store& store : machine.stores) {
            if (!now()) continue;
            store.data.empty() ? read_now(store) : write_now(store);
        }
    }
    if (machine.schedule.products == When::kRandom) {
        for (size_t i = 0; i < machine.blocks.size(); ++i) {
            for (Warpgroup& warpgroup : machine.blocks[i].warpgroups) {
                if (!warpgroup.products.empty() && now()) {
                    run_products_until(static_cast<int>(i), warpgroup, warpgroup.products.front().group);
                }
            }
        }
    }
    return landed;
}

void fail_of_deadlock() {
    std::set<std::string> waits;
    for (const auto& thread : machine.threads) {
        if (thread->fiber.finished()) continue;
        waits.insert("block " + std::to_string(machine.first_block + thread->block) + ", warpgroup " +
                     std::to_string(thread->index / kGroup) + " for " +
                     thread->reason(thread->reason_detail));
    }
    std::string text = "deadlock";
    for (const std::string& wait : waits) text += "; " + wait;
    fail(text);
}

void run_cluster() {
    const int warps_of_block = machine.launch.threads / kLanes;
    std::vector<int> order(machine.threads.size() / kLanes);
    std::iota(order.begin(), order.end(), 0);
    if (machine.schedule.reversed) std::reverse(order.begin(), order.end());
    auto lags = [&](int warp) {
        const int groups_of_block = (machine.launch.threads + kGroup - 1) / kGroup;
        const int group = warp / warps_of_block * groups_of_block + warp % warps_of_block * kLanes / kGroup;
        return group == machine.schedule.lagging;
    };
    while (machine.running > 0) {
        bool ran = false;
        if (machine.schedule.random_warps) std::shuffle(order.begin(), order.end(), machine.random);
        for (const int warp : order) {
            ran |= run_warp(warp, lags(warp) ? machine.schedule.lagging_lanes : kLanes);
        }
        ran |= do_random_work();
        if (ran) continue;
        for (const int warp : order) ran |= lags(warp) && run_warp(warp, kLanes);
        if (ran || machine.running == 0) continue;
        if (machine.loads.empty()) fail_of_deadlock();
        land(std::next(machine.loads.begin(), machine.random() % machine.loads.size()));
    }
    for (Store& store : machine.stores) write_now(store);
}

void start_cluster() {
    const Shape& launch = machine.launch;
    machine.blocks.assign(launch.cluster, Block{});
    machine.loads.clear();
    machine.stores.clear();
    machine.cluster_barrier = NamedBarrier{};
    machine.running = launch.cluster * launch.threads;
    for (Block& block : machine.blocks) {
        block.memory.assign(launch.shared_bytes, 0xff);  // NaN in every type
        block.writer.assign((launch.shared_bytes + kWord - 1) / kWord, 0);
        block.warps.resize(launch.threads / kLanes);
        block.warpgroups.resize((launch.threads + kGroup - 1) / kGroup);
        for (Warpgroup& warpgroup : block.warpgroups) warpgroup.registers = machine.registers;
        block.running = launch.threads;
    }
    while (static_cast<int>(machine.threads.size()) < machine.running) {
        machine.threads.push_back(std::make_unique<Thread>(static_cast<int>(machine.threads.size())));
    }
    machine.threads.resize(machine.running);
    for (int i = 0; i < machine.running; ++i) {
        Thread& thread = *machine.threads[i];
        thread.block = i / launch.threads;
        thread.index = i % launch.threads;
        thread.watched = nullptr;
        thread.in_cluster_barrier = thread.open_store = false;
        thread.unfenced.clear();
        thread.unmet.clear();
        thread.stores.clear();
        thread.fiber.start(enter_kernel);
    }
}

}  // namespace

void receive_bytes(int block, uint32_t address, int64_t bytes) {
    Barrier& barrier = barrier_of(block, address, true);
    barrier.bytes -= bytes;
    end_phase_if_complete(barrier);
}

void check_end_of_block(int block) {
    for (const Load& load : machine.loads) {
        if (load.block == block) fail("the block ends while a load into it is under way");
    }
    for (const auto& [address, barrier] : machine.blocks[block].barriers) {
        if (barrier.bytes != 0) {
            fail("the block ends while barrier " + hex(address) + " misses " + std::to_string(barrier.bytes) +
                 " bytes");
        }
    }
}

}  // namespace emulation

using namespace emulation;

void launch(const Shape& launch, const Schedule& schedule, const std::function<void()>& kernel,
            int registers) {
    auto require = [](bool condition, const char* what) {
        if (!condition) throw Fault(std::string("launch: ") + what);
    };
    require(launch.cluster >= 1 && launch.cluster <= 8, "a cluster has 1 to 8 blocks");
    require(launch.grid >= 1 && launch.grid % launch.cluster == 0, "the grid is not made of whole clusters");
    require(launch.threads >= 32 && launch.threads <= 1024 && launch.threads % 32 == 0,
            "a block has 32 to 1024 threads, in whole warps");
    if (registers == 0) registers = std::min(65536 / launch.threads / 8 * 8, 255);
    require(registers >= 24 && registers <= 255 && registers * launch.threads <= 65536,
            "a thread has 24 to 255 registers, a block 65536");
    require(launch.shared_bytes <= 227 * 1024, "a block has at most 227 KiB of shared memory");
    machine.launch = launch;
    machine.registers = registers;
    machine.schedule = schedule;
    machine.kernel = &kernel;
    machine.random.seed(schedule.seed);
    machine.current = nullptr;
    machine.fault.clear();
    gridDim.x = launch.grid;
    std::vector<int> clusters(launch.grid / launch.cluster);
    std::iota(clusters.begin(), clusters.end(), 0);
    if (schedule.reversed) std::reverse(clusters.begin(), clusters.end());
    if (schedule.random_warps) std::shuffle(clusters.begin(), clusters.end(), machine.random);
    for (const int cluster : clusters) {
        machine.first_block = cluster * launch.cluster;
        start_cluster();
        run_cluster();
    }
}

uint32_t shared_memory() { return kSharedStart; }

void read_shared(uint32_t address, void* to, int bytes) {
    std::memcpy(to, block().at(address, bytes, bytes, "load_shared"), bytes);
}

void write_shared(uint32_t address, const void* from, int bytes) {
    std::memcpy(block().at(address, bytes, bytes, "store_shared"), from, bytes);
    note_write(self(), address, bytes);
}

void fence_async() { clear(self().unfenced, kUnfenced, false); }

uint32_t cluster_rank() { return self().block; }

void cluster_arrive() {
    meet_warp("cluster_arrive", nullptr, [](auto&) {});
    note_meeting();
    Thread& thread = self();
    if (thread.in_cluster_barrier) fail("arrives twice at the cluster's barrier without a wait");
    thread.in_cluster_barrier = true;
    thread.cluster_generation = machine.cluster_barrier.generation;
    ++machine.cluster_barrier.arrived;
    end_cluster_barrier_if_complete();
}

void cluster_wait() {
    meet_warp("cluster_wait", nullptr, [](auto&) {});
    Thread& thread = self();
    if (!thread.in_cluster_barrier) fail("waits at the cluster's barrier without an arrival");
    wait_while(&machine.cluster_barrier.generation, thread.cluster_generation,
               [](uint32_t) { return std::string("the cluster's barrier"); });
    thread.in_cluster_barrier = false;
}

void named_sync(int id, int threads) {
    if (id < 0 || id > 15) fail("named barrier " + std::to_string(id) + " is not one of 16");
    if (threads <= 0 || threads % kLanes != 0 || threads > machine.launch.threads) {
        fail("a named barrier of " + std::to_string(threads) + " threads");
    }
    const int mine[2] = {id, threads};
    meet_warp("named_sync", mine, [&](const void* const(&given)[kGroup]) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const int* other = static_cast<const int*>(given[lane]);
            if (other[0] != id || other[1] != threads) fail("named_sync: the threads of a warp disagree");
        }
    });
    note_meeting();
    NamedBarrier& barrier = block().named[id];
    if (barrier.arrived == 0) barrier.threads = threads;
    if (barrier.threads != threads) {
        fail("named barrier " + std::to_string(id) + " with two counts of threads");
    }
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    wait_while(
        &barrier.generation, barrier.generation,
        [](uint32_t number) { return "named barrier " + std::to_string(number); }, id);
}

void change_registers(int registers, bool more) {
    meet_warpgroup(more ? "take_registers" : "give_registers", nullptr, [](auto&) {});
    Warpgroup& group = warpgroup();
    Block& owner = block();
    if (registers < 24 || registers > 256 || registers % 8 != 0) {
        fail("a warpgroup of " + std::to_string(registers) + " registers: 24 to 256 in steps of 8");
    }
    while (group.registers != registers) {
        const int needed = (registers - group.registers) * kGroup;
        if (more != (needed > 0)) {
            fail(std::string(more ? "takes" : "gives") + " registers but has " +
                 std::to_string(group.registers) + " and asks for " + std::to_string(registers));
        }
        if (needed <= owner.free_registers) {
            owner.free_registers -= needed;
            group.registers = registers;
            ++owner.register_changes;
        } else {
            wait_while(
                &owner.register_changes, owner.register_changes,
                [](uint32_t number) { return std::to_string(number) + " registers"; }, registers);
        }
    }
}

void barrier_init(uint32_t address, int arrivals) {
    Block& owner = block();
    owner.at(address, 8, 8, "barrier_init");
    if (arrivals < 1 || arrivals >= 1 << 20) fail("a barrier of " + std::to_string(arrivals) + " arrivals");
    if (owner.barriers.count(address)) fail("barrier " + hex(address) + " is initialised twice");
    note_write(self(), address, 8);
    for (uint32_t word = (address - kSharedStart) / kWord, end = word + 2; word < end; ++word) {
        owner.writer[word] = kBarrierWord;
        --owner.written;
    }
    owner.barriers[address] = Barrier{0, arrivals, arrivals, 0, self().index, false};
}

void fence_barrier_init() {
    for (auto& [address, barrier] : block().barriers) barrier.fenced |= barrier.made_by == self().index;
}

void barrier_arrive(uint32_t barrier) { arrive(self().block, barrier, 0); }

void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    if (rank >= machine.blocks.size()) fail("arrives at block " + std::to_string(rank) + " of its cluster");
    arrive(static_cast<int>(rank), barrier, 0);
}

void barrier_expect(uint32_t barrier, uint32_t bytes) { arrive(self().block, barrier, bytes); }

void barrier_wait(uint32_t address, uint32_t parity) {
    if (parity > 1) fail("waits for parity " + std::to_string(parity));
    wait_while(
        &barrier_of(self().block, address, false).parity, parity,
        [](uint32_t number) { return "barrier " + hex(number); }, address);
}

uint32_t exchange(uint32_t value, int from_lane) {
    struct Given {
        uint32_t value;
        int from;
        uint32_t result;
    } mine{value, from_lane, 0};
    meet_warp("a shuffle", &mine, [](const void* const(&given)[kGroup]) {
        for (int lane = 0; lane < kLanes; ++lane) {
            auto* one = static_cast<Given*>(const_cast<void*>(given[lane]));
            if (one->from < 0 || one->from >= kLanes)
                fail("a shuffle from lane " + std::to_string(one->from));
            one->result = static_cast<const Given*>(given[one->from])->value;
        }
    });
    return mine.result;
}

}  // namespace hopper

void __syncthreads() { hopper::named_sync(0, hopper::emulation::machine.launch.threads); }

void __syncwarp(unsigned mask) {
    if (mask != 0xffffffffu) hopper::emulation::fail("__syncwarp of a part of a warp is not emulated");
    hopper::emulation::meet_warp("__syncwarp", nullptr, [](auto&) {
        using namespace hopper::emulation;
        const int warp = self().index / kLanes;
        std::vector<uint32_t>& words = block().warps[warp].unmet;
        for (int lane = 0; lane < kLanes; ++lane) {
            auto& mine = machine.threads[self().block * machine.launch.threads + warp * kLanes + lane]->unmet;
            words.insert(words.end(), mine.begin(), mine.end());
            mine.clear();
        }
    });
}
