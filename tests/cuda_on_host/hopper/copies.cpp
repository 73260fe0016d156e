// Tensor maps, loads and stores of boxes.
#include <algorithm>

#include "machine.h"

namespace hopper {
namespace emulation {

uint32_t swizzled(uint32_t address, Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::k32:
            return address ^ (address >> 7 & 1) << 4;
        case Swizzle::k64:
            return address ^ (address >> 7 & 3) << 4;
        case Swizzle::k128:
            return address ^ (address >> 7 & 7) << 4;
        default:
            return address;
    }
}

int span_of(Swizzle swizzle) {
    const int spans[] = {0, 32, 64, 128};
    return spans[static_cast<int>(swizzle)];
}

namespace {

constexpr int kElement = 2;  // bytes
constexpr int kChunk = 16;   // bytes that stay together under a swizzle

int bytes_of(const TensorMap& map) { return map.box[0] * map.box[1] * map.box[2] * kElement; }

// Calls visit(address of the chunk in shared memory, of its first element in the tensor, bytes of it that lie
// inside the tensor) for every chunk of a box.
template <typename Visit>
void for_each_chunk(const TensorMap& map, At3 at, uint32_t shared, Visit visit) {
    const int row_bytes = map.box[0] * kElement;
    for (int z = 0; z < map.box[2]; ++z) {
        for (int y = 0; y < map.box[1]; ++y) {
            const bool inside =
                at.y + y >= 0 && at.y + y < map.size[1] && at.z + z >= 0 && at.z + z < map.size[2];
            const int64_t row = (at.y + y) * map.stride[1] + (at.z + z) * map.stride[2];
            for (int x = 0; x < row_bytes; x += kChunk, shared += kChunk) {
                const int64_t first = int64_t{at.x} * kElement + x;
                const int64_t end = map.size[0] * kElement;
                // A negative coordinate starts inside a chunk only if it is no multiple of a chunk's
                // elements.
                if (first < 0 && first > -kChunk) fail("a box starts a part of 16 bytes before its tensor");
                const int64_t bytes =
                    inside && first >= 0 ? std::clamp<int64_t>(end - first, 0, kChunk) : int64_t{0};
                visit(swizzled(shared, map.swizzle), map.address + row + first, static_cast<int>(bytes));
            }
        }
    }
}

void check_box(const TensorMap& map, int rank, uint32_t shared, const char* what) {
    if (map.rank != rank) fail(std::string(what) + ": the position and the tensor map differ in rank");
    // The swizzle's pattern repeats every 8 spans, and the box has to start where it does.
    const int alignment = map.swizzle == Swizzle::kNone ? 128 : 8 * span_of(map.swizzle);
    block().at(shared, bytes_of(map), alignment, what);
    block().require_fenced(shared, bytes_of(map), what, self().index);
}

void load(uint32_t to, const TensorMap& map, int rank, At3 at, uint32_t barrier, uint32_t blocks) {
    if (blocks == 0 || blocks >> machine.blocks.size() != 0)
        fail("load_box: blocks that the cluster has not");
    check_box(map, rank, to, "load_box");
    const int bytes = bytes_of(map);
    for (int i = 0; i < static_cast<int>(machine.blocks.size()); ++i) {
        if ((blocks >> i & 1) == 0) continue;
        Block& target = machine.blocks[i];
        if (target.running == 0) fail("loads into block " + std::to_string(i) + ", which has ended");
        barrier_of(i, barrier, true);
        target.require_fenced(to, bytes, "load_box", i == self().block ? self().index : -1);
        for (int byte = 0; byte < bytes; byte += kWord) {
            if (target.writer[(to - kSharedStart + byte) / kWord] == kBarrierWord)
                fail("loads over a barrier");
        }
        // From now until it lands nobody may rely on what is there.
        std::memset(target.at(to, bytes, 1, "load_box"), 0xff, bytes);
        machine.loads.push_back(Load{map, at, i, to, barrier, static_cast<uint32_t>(bytes)});
        if (machine.schedule.loads == When::kEarly) land(std::prev(machine.loads.end()));
    }
}

void store(const TensorMap& map, int rank, At3 at, uint32_t from) {
    check_box(map, rank, from, "store_box");
    machine.stores.push_back(Store{map, at, self().block, self().index, from, {}, false});
    Thread& thread = self();
    if (!thread.open_store) thread.stores.emplace_back();
    thread.open_store = true;
    thread.stores.back().stores.push_back(&machine.stores.back());
    if (machine.schedule.stores == When::kEarly) write_now(machine.stores.back());
}

}  // namespace

void land(std::list<Load>::iterator load) {
    Block& target = machine.blocks[load->block];
    for_each_chunk(load->map, load->at, load->to, [&](uint32_t shared, const uint8_t* global, int bytes) {
        uint8_t* to = target.memory.data() + (shared - kSharedStart);
        std::memcpy(to, global, bytes);
        std::memset(to + bytes, 0, kChunk - bytes);
    });
    const Load landed = *load;
    machine.loads.erase(load);
    receive_bytes(landed.block, landed.barrier, landed.bytes);
}

void read_now(Store& store) {
    if (!store.data.empty()) return;
    const Block& from = machine.blocks[store.block];
    from.require_fenced(store.from, bytes_of(store.map), "store_box", store.thread);
    for_each_chunk(store.map, store.at, store.from, [&](uint32_t shared, const uint8_t*, int) {
        const uint8_t* chunk = from.memory.data() + (shared - kSharedStart);
        store.data.insert(store.data.end(), chunk, chunk + kChunk);
    });
}

void write_now(Store& store) {
    if (store.written) return;
    read_now(store);
    const uint8_t* data = store.data.data();
    for_each_chunk(store.map, store.at, store.from, [&](uint32_t, uint8_t* global, int bytes) {
        std::memcpy(global, data, bytes);
        data += kChunk;
    });
    store.written = true;
}

void check_end_of_thread(Thread& thread) {
    for (const StoreGroup& group : thread.stores) {
        if (!group.read_waited) fail("ends before it has waited until its stores have read shared memory");
    }
    const Warpgroup& group = machine.blocks[thread.block].warpgroups[thread.index / kGroup];
    if (!group.products.empty()) fail("ends while products are under way");
}

}  // namespace emulation

using namespace emulation;

TensorMap tensor_map(const void* address, std::initializer_list<int64_t> size,
                     std::initializer_list<int64_t> stride, std::initializer_list<int> box, Swizzle swizzle) {
    auto require = [](bool condition, const std::string& what) {
        if (!condition) throw Fault("tensor map: " + what);
    };
    const int rank = static_cast<int>(size.size());
    require(rank == 2 || rank == 3, "2 or 3 dimensions are emulated");
    require(static_cast<int>(stride.size()) == rank - 1, "a stride for each dimension but the first");
    require(static_cast<int>(box.size()) == rank, "the box has as many dimensions as the tensor");
    require(reinterpret_cast<uintptr_t>(address) % 16 == 0, "the address is no multiple of 16");
    TensorMap map{static_cast<uint8_t*>(const_cast<void*>(address)),
                  rank,
                  {1, 1, 1},
                  {kElement, 0, 0},
                  {1, 1, 1},
                  swizzle};
    std::copy(size.begin(), size.end(), map.size);
    std::copy(stride.begin(), stride.end(), map.stride + 1);
    std::copy(box.begin(), box.end(), map.box);
    for (int i = 0; i < rank; ++i) {
        require(map.size[i] >= 1 && map.size[i] <= int64_t{1} << 32, "a size is 1 to 2^32");
        require(map.box[i] >= 1 && map.box[i] <= 256, "a side of the box is 1 to 256");
        require(i == 0 || (map.stride[i] % 16 == 0 && map.stride[i] >= 0 && map.stride[i] < int64_t{1} << 40),
                "a stride is a multiple of 16 below 2^40");
    }
    const int row_bytes = map.box[0] * kElement;
    require(row_bytes % kChunk == 0, "a row of the box is no multiple of 16 bytes");
    require(swizzle == Swizzle::kNone || row_bytes == span_of(swizzle),
            "a row of the box does not fill the swizzle");
    return map;
}

void load_box(uint32_t to, const TensorMap* map, At2 at, uint32_t barrier) {
    load_box(to, map, at, barrier, static_cast<uint16_t>(1 << cluster_rank()));
}
void load_box(uint32_t to, const TensorMap* map, At3 at, uint32_t barrier) {
    load_box(to, map, at, barrier, static_cast<uint16_t>(1 << cluster_rank()));
}
void load_box(uint32_t to, const TensorMap* map, At2 at, uint32_t barrier, uint16_t blocks) {
    load(to, *map, 2, At3{at.x, at.y, 0}, barrier, blocks);
}
void load_box(uint32_t to, const TensorMap* map, At3 at, uint32_t barrier, uint16_t blocks) {
    load(to, *map, 3, at, barrier, blocks);
}
void store_box(const TensorMap* map, At2 at, uint32_t from) { store(*map, 2, At3{at.x, at.y, 0}, from); }
void store_box(const TensorMap* map, At3 at, uint32_t from) { store(*map, 3, at, from); }

void store_commit() {
    Thread& thread = self();
    if (!thread.open_store) thread.stores.emplace_back();
    thread.stores.back().committed = true;
    thread.open_store = false;
}

void wait_for_stores(int pending, bool only_read) {
    Thread& thread = self();
    int committed = 0;
    for (const StoreGroup& group : thread.stores) committed += group.committed;
    for (int i = 0; i < committed - pending; ++i) {
        StoreGroup& group = thread.stores[i];
        for (Store* store : group.stores) only_read ? read_now(*store) : write_now(*store);
        group.read_waited = true;
    }
    while (!only_read && committed-- > pending) thread.stores.pop_front();
}

}  // namespace hopper
