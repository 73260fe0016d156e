// Gradients of the weights, biases and gates of linear experts on Hopper, for one or two experts a sample:
// P_b = x_b^T dm_b and s_b = sum_t dm_bt give dW_e = sum_b gate[b, e] P_b, db_e = sum_b gate[b, e] s_b and
// dgate[b, j] = <P_b, W_j> + <s_b, b_j>.
//
// There is one product for each sample, whatever k is. Samples come in the order in which those with the same
// experts are neighbours. A block owns a tile of 128 x 128 and goes through a part of the samples: P and
// the sums of up to two experts are in the registers of two warpgroups, and a sum is written when a sample
// has other experts. The first warpgroup has a thread that loads and a warp for what is small: s, and the
// sums of the other warps' shares in dgate. Every number is written by one thread, and a second kernel adds
// the parts in a fixed order (expert_linear_weight_sum.h).
//
// The two blocks of a cluster have tiles that are neighbours in a row or a column, and each loads half of
// what both read.
//
// Legend: as in expert_linear_hopper.h. Rows of a tile are of Din, columns of Dout.
#pragma once

#include <cstdint>

#include "expert_linear_weight_plan.h"

namespace switch_moe {

struct WeightGradientMaps {
    TensorMap x;       // [B, T, Din]
    TensorMap grad;    // [B, T, Dout]: dm
    TensorMap weight;  // [M, Din, Dout]
};

// What a block keeps in shared memory, in bytes.
template <int kTopK>
struct WeightGradientLayout {
    static constexpr int kDeep = 64;                  // tokens of a stage
    static constexpr uint32_t kBox = 64 * kDeep * 2;  // 64 columns of x or of dm
    static constexpr uint32_t kGradAt = 2 * kBox;     // in a stage
    static constexpr uint32_t kStageBytes = 4 * kBox;
    static constexpr uint32_t kWeightBox = kGradientTile * 64 * 2;
    static constexpr uint32_t kWeightBytes = 2 * kWeightBox;  // a tile of one expert
    static constexpr uint32_t kShareBytes = 8 * kTopK * 4;    // of each warp in dgate, for one sample
    static constexpr uint32_t kRouteBytes = 4 * (1 + 2 * kTopK);
    static constexpr uint32_t kAvailable = 227 * 1024 - 1024;
    static constexpr int kStages = (kAvailable - kTopK * kWeightBytes) / kStageBytes;
    static constexpr uint32_t kWeightsAt = kStages * kStageBytes;
    static constexpr uint32_t kSharesAt = kWeightsAt + kTopK * kWeightBytes;  // of two samples in turn
    static constexpr uint32_t kFull = kSharesAt + 2 * kShareBytes;
    static constexpr uint32_t kEmpty = kFull + 8 * kStages;
    static constexpr uint32_t kWeightFull = kEmpty + 8 * kStages;
    static constexpr uint32_t kWeightEmpty = kWeightFull + 8 * kTopK;
    static constexpr uint32_t kShareFull = kWeightEmpty + 8 * kTopK;
    static constexpr uint32_t kShareEmpty = kShareFull + 8 * 2;
    static constexpr uint32_t kRoutesAt = kShareEmpty + 8 * 2;  // of the sample that a stage begins
    static constexpr uint32_t kBytes = kRoutesAt + kStages * kRouteBytes;
    static constexpr int kThreads = 3 * 128;
    static_assert(kStages >= 4 && kBytes <= 227 * 1024);
};

HOPPER_INLINE float sum_of_warp(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// What the three kinds of warps have in common: they go through the same units and samples.
template <int kTopK>
struct GradientWarp {
    using Layout = WeightGradientLayout<kTopK>;

    const WeightGradientSizes& sizes;
    int rank;
    uint32_t memory;
    Turn<Layout::kStages> stage;
    uint32_t samples = 0;        // that are done
    uint32_t weight_parity = 0;  // a bit for each place: set after an odd number of changes
    Places<kTopK> places;

    HOPPER_INLINE explicit GradientWarp(const WeightGradientSizes& sizes) : sizes(sizes) {
        rank = static_cast<int>(hopper::cluster_rank());
        memory = hopper::shared_memory();
    }

    HOPPER_INLINE uint32_t barrier(uint32_t first, int number) const { return memory + first + 8 * number; }
    HOPPER_INLINE uint32_t weights(int place) const {
        return memory + Layout::kWeightsAt + place * Layout::kWeightBytes;
    }

    // Tells both blocks that a stage has been read; `thread` counts those that tell.
    HOPPER_INLINE void release(int place, int thread) const {
        if (thread < kMergedCluster) hopper::barrier_arrive_at(barrier(Layout::kEmpty, place), thread);
    }

    HOPPER_INLINE uint32_t route_at() const {
        return memory + Layout::kRoutesAt + stage.place * Layout::kRouteBytes;
    }

    // The route of the sample that begins with the present stage, as the loader has left it there.
    HOPPER_INLINE Route<kTopK> wait_for_route() const {
        hopper::barrier_wait(barrier(Layout::kFull, stage.place), stage.parity);
        Route<kTopK> route;
        route.sample = hopper::load_shared<int>(route_at());
#pragma unroll
        for (int j = 0; j < kTopK; ++j) {
            route.expert[j] = hopper::load_shared<int>(route_at() + 4 * (1 + j));
            route.gate[j] = hopper::load_shared<float>(route_at() + 4 * (1 + kTopK + j));
        }
        return route;
    }

    // Calls begin(unit), sample(unit, left) and end(unit) of the derived class; `left` counts the samples of
    // the unit from this one on.
    template <typename Derived>
    HOPPER_INLINE void run(Derived& derived) {
        const int count = sizes.tiles.count * sizes.splits;
        for (int number = blockIdx.x / kMergedCluster; number < count; number += gridDim.x / kMergedCluster) {
            const GradientUnit unit(sizes, number, rank);
            places.clear();
            derived.begin(unit);
            const uint32_t end = samples + (unit.last - unit.first);
#pragma unroll 1
            for (; samples != end; ++samples) derived.sample(unit, static_cast<int>(end - samples));
            derived.end(unit);
        }
    }
};

// The thread that loads.
template <int kTopK>
struct GradientLoader : GradientWarp<kTopK> {
    using Base = GradientWarp<kTopK>;
    using Layout = typename Base::Layout;

    const WeightGradientMaps& maps;
    const Routing& routing;
    Route<kTopK> next;

    HOPPER_INLINE GradientLoader(const WeightGradientMaps& maps, const WeightGradientSizes& sizes,
                                 const Routing& routing)
        : Base(sizes), maps(maps), routing(routing) {}

    HOPPER_INLINE void begin(const GradientUnit& unit) { next = routing.at<kTopK>(unit.first); }
    HOPPER_INLINE void end(const GradientUnit&) {}

    HOPPER_INLINE void sample(const GradientUnit& unit, int left) {
        using namespace hopper;
        const Route<kTopK> route = next;
        if (left > 1) next = routing.at<kTopK>(unit.last - left + 1);  // while this one is loaded
        const int row = unit.row * kGradientTile, column = unit.column * kGradientTile;
#pragma unroll 1
        for (int token = 0; token < this->sizes.tokens; token += Layout::kDeep, this->stage.next()) {
            const uint32_t x = this->memory + this->stage.place * Layout::kStageBytes,
                           grad = x + Layout::kGradAt;
            const uint32_t full = this->barrier(Layout::kFull, this->stage.place);
            barrier_wait(this->barrier(Layout::kEmpty, this->stage.place), this->stage.parity ^ 1);
            if (token == 0) {
                store_shared(this->route_at(), route.sample);
#pragma unroll
                for (int j = 0; j < kTopK; ++j) {
                    store_shared(this->route_at() + 4 * (1 + j), route.expert[j]);
                    store_shared(this->route_at() + 4 * (1 + kTopK + j), route.gate[j]);
                }
            }
            barrier_expect(full, Layout::kStageBytes);
            const int half = this->rank * 64;
            const uint32_t half_at = this->rank * Layout::kBox;
            if (unit.same_x) {
                load_box(x + half_at, &maps.x, At3{row + half, token, route.sample}, full, 3);
                load_box(grad, &maps.grad, At3{column, token, route.sample}, full);
                load_box(grad + Layout::kBox, &maps.grad, At3{column + 64, token, route.sample}, full);
            } else {
                load_box(grad + half_at, &maps.grad, At3{column + half, token, route.sample}, full, 3);
                load_box(x, &maps.x, At3{row, token, route.sample}, full);
                load_box(x + Layout::kBox, &maps.x, At3{row + 64, token, route.sample}, full);
            }
        }
        // After the stages, because these need no wait for the sample before to be finished.
        this->places.take(route, [&](int place, int expert) {
            const uint32_t full = this->barrier(Layout::kWeightFull, place), to = this->weights(place);
            barrier_wait(this->barrier(Layout::kWeightEmpty, place), this->weight_parity >> place & 1);
            this->weight_parity ^= 1u << place;
            barrier_expect(full, Layout::kWeightBytes);
            load_box(to, &maps.weight, At3{column, row, expert}, full);
            load_box(to + Layout::kWeightBox, &maps.weight, At3{column + 64, row, expert}, full);
        });
    }
};

// A warpgroup that multiplies: 64 rows of the tile. It is the group-th of two; thread is 0 to 127.
template <typename T, int kTopK>
struct GradientConsumer : GradientWarp<kTopK> {
    using Base = GradientWarp<kTopK>;
    using Layout = typename Base::Layout;

    Quad* weight;
    int thread, group;
    int part;          // which of all S * tiles, or -1 outside the matrix
    uint32_t written;  // experts that have their sum, or some of it, in memory
    float product[64];
    float sums[kTopK][64];

    HOPPER_INLINE GradientConsumer(const WeightGradientSizes& sizes, Quad* weight)
        : Base(sizes), weight(weight) {
        thread = threadIdx.x % 128;
        group = threadIdx.x / 128 - 1;
    }

    HOPPER_INLINE void begin(const GradientUnit& unit) {
        const GradientTiles& tiles = this->sizes.tiles;
        part = (unit.split * tiles.rows + unit.row) * tiles.columns + unit.column;
        if (!unit.in_matrix(this->sizes)) part = -1;
        written = 0;
#pragma unroll
        for (int place = 0; place < kTopK; ++place) {
#pragma unroll
            for (int i = 0; i < 64; ++i) sums[place][i] = 0.f;
        }
    }

    HOPPER_INLINE void sample(const GradientUnit&, int) {
        using namespace hopper;
        const Route<kTopK> route = this->wait_for_route();
        this->places.take(route, [&](int place, int) {
            write(place);
            this->weight_parity ^= 1u << place;
            __syncwarp();
            if (thread % 32 == 0) barrier_arrive(this->barrier(Layout::kWeightEmpty, place));
        });
        float gates[kTopK];
        bool used[kTopK];
#pragma unroll
        for (int place = 0; place < kTopK; ++place)
            gates[place] = this->places.gate(place, route, used[place]);
        multiply();
        const uint32_t slot = this->samples % 2;
        barrier_wait(this->barrier(Layout::kShareEmpty, slot), (this->samples / 2 + 1) % 2);
        const uint32_t shares = this->memory + Layout::kSharesAt + slot * Layout::kShareBytes +
                                (threadIdx.x / 32 - 4) * (kTopK * 4);
#pragma unroll
        for (int place = 0; place < kTopK; ++place) {
            float share = 0.f;
            if (used[place]) {
                barrier_wait(this->barrier(Layout::kWeightFull, place), ~this->weight_parity >> place & 1);
                share = sum_of_warp(add(place, gates[place]));
            }
            if (threadIdx.x % 32 == 0) store_shared(shares + 4 * place, share);
        }
        if (threadIdx.x % 32 == 0) barrier_arrive(this->barrier(Layout::kShareFull, slot));
    }

    HOPPER_INLINE void end(const GradientUnit&) {
#pragma unroll
        for (int place = 0; place < kTopK; ++place) write(place);
        // What no sample chose is zero.
        for (int expert = 0; expert < this->sizes.experts; ++expert) {
            if (part < 0 || (written >> expert & 1)) continue;
#pragma unroll
            for (int i = 0; i < 16; ++i) quads(expert)[i * 128] = Quad{};
        }
    }

    // product = P of a sample.
    HOPPER_INLINE void multiply() {
        using namespace hopper;
        // A first product that does not add would make ptxas 12.8 serialise all of them (C7515).
#pragma unroll
        for (int i = 0; i < 64; ++i) product[i] = 0.f;
#pragma unroll 1
        for (int token = 0; token < this->sizes.tokens; token += Layout::kDeep, this->stage.next()) {
            const uint32_t at = this->memory + this->stage.place * Layout::kStageBytes;
            barrier_wait(this->barrier(Layout::kFull, this->stage.place), this->stage.parity);
            product_fence();
#pragma unroll
            for (int j = 0; j < Layout::kDeep / 16; ++j) {
                const uint32_t x = at + group * Layout::kBox + j * 16 * 128,
                               grad = at + Layout::kGradAt + j * 16 * 128;
                hopper::product<T, 128, true, true>(product, operand<Swizzle::k128>(x, 1024),
                                                    operand<Swizzle::k128>(grad, 1024, Layout::kBox), true);
            }
            product_commit();
            if (token > 0) {
                product_wait<1>();
                this->release(this->stage.before(), thread);
            }
        }
        product_wait<0>(product);
        this->release(this->stage.before(), thread);
    }

    // Adds gate P to the sum of a place, and returns this thread's share of <P, W>.
    HOPPER_INLINE float add(int place, float gate) {
        using namespace hopper;
        const int row = group * 64 + thread / 32 * 16 + thread % 16;
        const uint32_t at = this->weights(place) + row * 128 + (thread % 32 / 16 ^ row % 8) * 16;
        float share = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // 16 columns
            uint32_t packed[4];
            load_matrices(packed, (at ^ i % 4 * 32) + i / 4 * Layout::kWeightBox);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float low = product[8 * i + 2 * r], high = product[8 * i + 2 * r + 1];
                share = fmaf(low, first_of<T>(packed[r]), share);
                share = fmaf(high, second_of<T>(packed[r]), share);
                sums[place][8 * i + 2 * r] = fmaf(gate, low, sums[place][8 * i + 2 * r]);
                sums[place][8 * i + 2 * r + 1] = fmaf(gate, high, sums[place][8 * i + 2 * r + 1]);
            }
        }
        return share;
    }

    HOPPER_INLINE Quad* quads(int expert) const {
        return weight + (int64_t{part} * this->sizes.experts + expert) * kTileQuads + group * (16 * 128) +
               thread;
    }

    // Adds the sum of a place to what memory has of its expert, and clears it.
    HOPPER_INLINE void write(int place) {
        const int expert = this->places.expert[place];
        if (expert < 0) return;
        float (&sum)[64] = sums[place];
        Quad* at = quads(expert);
        if (written >> expert & 1) {
#pragma unroll
            for (int first = 0; first < 16; first += 4) {  // loads that are under way together
                Quad before[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) before[i] = part < 0 ? Quad{} : at[(first + i) * 128];
#pragma unroll
                for (int i = 0; i < 16; ++i) sum[first * 4 + i] += before[i / 4].numbers[i % 4];
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (part >= 0) at[i * 128] = Quad{{sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]}};
        }
        written |= 1u << expert;
#pragma unroll
        for (int i = 0; i < 64; ++i) sum[i] = 0.f;
    }
};

// The warp for what is small. A lane has four columns of dm. The tiles of a column share its tokens: each
// takes those of every so many stages.
template <typename T, int kTopK>
struct GradientSmallSums : GradientWarp<kTopK> {
    using Base = GradientWarp<kTopK>;
    using Layout = typename Base::Layout;

    const T* bias;  // [M, Dout] or null
    WeightGradientParts parts;
    int lane, column;
    int64_t part;  // where this unit's part of db begins
    uint32_t written;
    float sums[kTopK][4];  // of db

    HOPPER_INLINE GradientSmallSums(const WeightGradientSizes& sizes, const T* bias,
                                    const WeightGradientParts& parts)
        : Base(sizes), bias(bias), parts(parts) {
        lane = threadIdx.x % 32;
    }

    HOPPER_INLINE bool has_bias(const GradientUnit& unit) const {
        return bias != nullptr && unit.in_matrix(this->sizes) && column < this->sizes.outputs;
    }

    HOPPER_INLINE void begin(const GradientUnit& unit) {
        column = unit.column * kGradientTile + lane * 4;
        part = (int64_t{unit.split} * this->sizes.tiles.rows + unit.row) * this->sizes.experts *
                   this->sizes.outputs +
               column;
        written = 0;
#pragma unroll
        for (int place = 0; place < kTopK; ++place) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[place][i] = 0.f;
        }
    }

    HOPPER_INLINE void sample(const GradientUnit& unit, int left) {
        using namespace hopper;
        const Route<kTopK> route = this->wait_for_route();
        const int rows = this->sizes.tiles.rows;
        float sum[4] = {0.f, 0.f, 0.f, 0.f};
        int turn = (unit.last - left) % rows;
#pragma unroll 1
        for (int token = 0; token < this->sizes.tokens; token += Layout::kDeep, this->stage.next()) {
            barrier_wait(this->barrier(Layout::kFull, this->stage.place), this->stage.parity);
            if (turn == unit.row && bias != nullptr) add_tokens(sum);
            if (++turn == rows) turn = 0;
            fence_async();  // no read is under way when a copy overwrites the stage
            __syncwarp();
            this->release(this->stage.place, lane);
        }
        this->places.take(route, [&](int place, int) {
            if (has_bias(unit)) write(place);
        });
        const uint32_t slot = this->samples % 2;
        barrier_wait(this->barrier(Layout::kShareFull, slot), this->samples / 2 % 2);
        float shares[kTopK];
#pragma unroll
        for (int place = 0; place < kTopK; ++place) {
            const uint32_t at =
                this->memory + Layout::kSharesAt + slot * Layout::kShareBytes + lane % 8 * (kTopK * 4);
            shares[place] = lane < 8 ? load_shared<float>(at + 4 * place) : 0.f;
            bool used;
            const float gate = this->places.gate(place, route, used);
            if (used && has_bias(unit)) {
                const T* row = bias + int64_t{this->places.expert[place]} * this->sizes.outputs + column;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    shares[place] = fmaf(sum[i], to_float(row[i]), shares[place]);
                    sums[place][i] = fmaf(gate, sum[i], sums[place][i]);
                }
            }
            shares[place] = sum_of_warp(shares[place]);
        }
        if (lane == 0) {
            barrier_arrive(this->barrier(Layout::kShareEmpty, slot));
            if (unit.in_matrix(this->sizes)) {
                const int64_t tile = unit.row * this->sizes.tiles.columns + unit.column;
                float* to = parts.gate + (tile * this->sizes.batch + route.sample) * kTopK;
                const float first = shares[0], last = shares[kTopK - 1];
#pragma unroll
                for (int j = 0; j < kTopK; ++j) {
                    to[j] = route.expert[j] == this->places.expert[0] ? first : last;
                }
            }
        }
    }

    HOPPER_INLINE void end(const GradientUnit& unit) {
        if (!has_bias(unit)) return;
#pragma unroll
        for (int place = 0; place < kTopK; ++place) write(place);
        for (int expert = 0; expert < this->sizes.experts; ++expert) {
            if (written >> expert & 1) continue;
            float* to = parts.bias + part + int64_t{expert} * this->sizes.outputs;
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] = 0.f;
        }
    }

    // Adds the tokens of a stage to the sum of each column.
    HOPPER_INLINE void add_tokens(float (&sum)[4]) {
        using namespace hopper;
        const uint32_t grad = this->memory + this->stage.place * Layout::kStageBytes + Layout::kGradAt +
                              lane / 16 * Layout::kBox;
#pragma unroll 4
        for (int token = 0; token < Layout::kDeep; ++token) {
            const uint32_t at = grad + token * 128 + ((lane % 16 / 2) ^ token % 8) * 16 + lane % 2 * 8;
            const uint32_t packed[2] = {load_shared<uint32_t>(at), load_shared<uint32_t>(at + 4)};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                sum[2 * i] += first_of<T>(packed[i]);
                sum[2 * i + 1] += second_of<T>(packed[i]);
            }
        }
    }

    HOPPER_INLINE void write(int place) {
        const int expert = this->places.expert[place];
        if (expert < 0) return;
        const bool more = written >> expert & 1;
        written |= 1u << expert;
        float* to = parts.bias + part + int64_t{expert} * this->sizes.outputs;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            to[i] = sums[place][i] + (more ? to[i] : 0.f);
            sums[place][i] = 0.f;
        }
    }
};

template <typename T, int kTopK>
__global__ void HOPPER_CLUSTER(kMergedCluster) __launch_bounds__(WeightGradientLayout<kTopK>::kThreads, 1)
    weight_gradient(const __grid_constant__ WeightGradientMaps maps, const __grid_constant__ Routing routing,
                    const T* __restrict__ bias, const __grid_constant__ WeightGradientSizes sizes,
                    const __grid_constant__ WeightGradientParts parts) {
#if HOPPER_CODE
    using namespace hopper;
    using Layout = WeightGradientLayout<kTopK>;
    const uint32_t memory = shared_memory();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Layout::kStages; ++stage) {
            barrier_init(memory + Layout::kFull + 8 * stage, 1);
            barrier_init(memory + Layout::kEmpty + 8 * stage, 3 * kMergedCluster);
        }
        for (int place = 0; place < kTopK; ++place) {
            barrier_init(memory + Layout::kWeightFull + 8 * place, 1);
            barrier_init(memory + Layout::kWeightEmpty + 8 * place, 8);
        }
        for (int share = 0; share < 2; ++share) {
            barrier_init(memory + Layout::kShareFull + 8 * share, 8);
            barrier_init(memory + Layout::kShareEmpty + 8 * share, 1);
        }
        fence_barrier_init();
    }
    cluster_sync();
    if (threadIdx.x < 128) {
        give_registers<56>();
        if (threadIdx.x == 0) {
            GradientLoader<kTopK> warp(maps, sizes, routing);
            warp.run(warp);
        } else if (threadIdx.x / 32 == 1) {
            GradientSmallSums<T, kTopK> warp(sizes, bias, parts);
            warp.run(warp);
        }
        __syncwarp();
    } else {
        take_registers<224>();
        GradientConsumer<T, kTopK> warp(sizes, parts.weight);
        warp.run(warp);
    }
    cluster_sync();  // no block ends while the other may still arrive at its barriers or load into it
#endif
}

}  // namespace switch_moe
