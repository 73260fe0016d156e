// Merged linear experts on Hopper: m(x_b) = x_b V_b + v_b with V_b = sum_j gate[b, j] W_index[b, j], and the
// gradient dx_b = dm_b V_b^T, as one kernel in two orientations. V_b exists in registers only.
//
// The product is transposed, out^T = V^T x^T, because wgmma takes its first operand from registers: a
// consumer warpgroup merges 64 columns of V_b there, 16 summed elements at a time, and multiplies them with
// the tokens of x, which TMA has laid in shared memory. A block owns 64 kGroups outputs of 256 tokens of a
// sample. The two blocks of a cluster own neighbouring outputs of the same tokens, and each loads half of the
// tokens for both. One warpgroup only loads. Blocks stay, and take tile after tile in the order of samples,
// whatever the routing is.
//
// Legend: B samples, T tokens, M experts, k experts chosen per sample, K summed elements, N outputs. In the
// forward K = Din and N = Dout, in the gradient K = Dout and N = Din.
#pragma once

#include <cmath>
#include <cstdint>

#include "hopper.h"

namespace switch_moe {

using hopper::At3;
using hopper::Swizzle;
using hopper::TensorMap;

template <typename T>
struct MergedProductMaps {
    TensorMap tokens;   // [B, T, K]: x, or dm
    TensorMap weight;   // [M, Din, Dout]
    TensorMap factor;   // [B, T, N]: with kModulate x, or the gradient of the output
    TensorMap mixture;  // [B, T, N]: with kModulate m(x), written where kept and read by the gradient
    TensorMap out;      // [B, T, N]
};

struct MergedProductSizes {
    int batch, tokens, summed, outputs, experts;  // B, T, K, N, M
    bool keep;                                    // the forward with kModulate writes m(x)
};

// What blocks of 64 kGroups outputs keep in shared memory, in bytes.
template <int kGroups, int kTopK, bool kModulate>
struct MergedProductLayout {
    static constexpr int kTokens = 256, kDeep = 32;  // of a stage
    static constexpr uint32_t kTokenBytes = kTokens * kDeep * 2;
    static constexpr uint32_t kWeightBytes = 64 * kDeep * 2;  // for one warpgroup, of one expert
    static constexpr uint32_t kExpertBytes = kGroups * kWeightBytes;
    static constexpr uint32_t kStageBytes = kTokenBytes + kTopK * kExpertBytes;
    // Outputs leave, and what they are combined with arrives, in pieces of 32 tokens, which take turns in
    // slots.
    static constexpr int kPiece = 32, kPieces = kTokens / kPiece;
    static constexpr uint32_t kPieceBytes = kPiece * 64 * 2;
    static constexpr int kSlots = kModulate ? 3 : 2;
    static constexpr uint32_t kSlotBytes = (kModulate ? 2 : 1) * kPieceBytes;
    static constexpr uint32_t kAvailable = 227 * 1024 - 1024;  // the rest is for barriers
    static constexpr int kMostStages = (kAvailable - kGroups * kSlots * kSlotBytes) / kStageBytes;
    static constexpr int kStages = kMostStages < 8 ? kMostStages : 8;
    static_assert(kStages >= 2);
    static constexpr uint32_t kSlotsAt = kStages * kStageBytes;
    static constexpr uint32_t kFull = kSlotsAt + kGroups * kSlots * kSlotBytes;
    static constexpr uint32_t kEmpty = kFull + 8 * kStages;
    static constexpr uint32_t kReady = kEmpty + 8 * kStages;  // kSlots for each warpgroup
    static constexpr uint32_t kBytes = kReady + 8 * kGroups * kSlots;
    static constexpr int kThreads = 128 * (kGroups + 1);
};

constexpr int kMergedCluster = 2;

// A turn in a ring of kSize: its place, and the parity of the barrier phase that ends when it is filled.
template <int kSize>
struct Turn {
    int place = 0;
    uint32_t parity = 0;

    HOPPER_INLINE void next() {
        if (++place == kSize) {
            place = 0;
            parity ^= 1;
        }
    }
    HOPPER_INLINE int before() const { return place == 0 ? kSize - 1 : place - 1; }
};

struct MergedTile {
    int sample, token, output;
};

// The tiles of a cluster: outputs fastest, so that neighbours share tokens, then tokens, then samples.
template <int kGroups>
struct MergedTiles {
    int wide, high, count;

    HOPPER_BOTH explicit MergedTiles(const MergedProductSizes& sizes)
        : wide((sizes.outputs + 64 * kGroups * kMergedCluster - 1) / (64 * kGroups * kMergedCluster)),
          high((sizes.tokens + 255) / 256),
          count(wide * high * sizes.batch) {}

    HOPPER_INLINE MergedTile at(int number, int rank) const {
        return {number / wide / high, number / wide % high * 256,
                (number % wide * kMergedCluster + rank) * 64 * kGroups};
    }
};

// An expert out of range counts as expert 0 with a gate of NaN.
HOPPER_INLINE int expert_in_range(int expert, int experts) {
    return static_cast<unsigned>(expert) < static_cast<unsigned>(experts) ? expert : 0;
}

// The thread that loads the operands of all tiles.
template <int kGroups, int kTopK, bool kGradient, typename Layout, typename T>
HOPPER_INLINE void load_operands(const MergedProductMaps<T>& maps, const int32_t* index,
                                 const MergedProductSizes& sizes) {
    using namespace hopper;
    const uint32_t memory = shared_memory();
    const int rank = static_cast<int>(cluster_rank());
    const MergedTiles<kGroups> tiles(sizes);
    Turn<Layout::kStages> turn;
    for (int number = blockIdx.x / kMergedCluster; number < tiles.count;
         number += gridDim.x / kMergedCluster) {
        const MergedTile tile = tiles.at(number, rank);
        int experts[kTopK];
#pragma unroll
        for (int j = 0; j < kTopK; ++j) {
            experts[j] = expert_in_range(index[int64_t{tile.sample} * kTopK + j], sizes.experts);
        }
#pragma unroll 1
        for (int k = 0; k < sizes.summed; k += Layout::kDeep, turn.next()) {
            const uint32_t stage = memory + turn.place * Layout::kStageBytes;
            const uint32_t full = memory + Layout::kFull + 8 * turn.place;
            barrier_wait(memory + Layout::kEmpty + 8 * turn.place, turn.parity ^ 1);
            barrier_expect(full, Layout::kStageBytes);
            const int half = rank * (Layout::kTokens / 2);
            load_box(stage + half * Layout::kDeep * 2, &maps.tokens, At3{k, tile.token + half, tile.sample},
                     full, 3);
#pragma unroll
            for (int j = 0; j < kTopK; ++j) {
                const uint32_t weight = stage + Layout::kTokenBytes + j * Layout::kExpertBytes;
                if constexpr (kGradient) {
                    load_box(weight, &maps.weight, At3{k, tile.output, experts[j]}, full);
                } else {
#pragma unroll
                    for (int group = 0; group < kGroups; ++group) {
                        load_box(weight + group * Layout::kWeightBytes, &maps.weight,
                                 At3{tile.output + group * 64, k, experts[j]}, full);
                    }
                }
            }
        }
    }
}

// A warpgroup that merges and multiplies. It is the group-th of its block; thread is 0 to 127.
template <typename T, int kGroups, int kTopK, bool kGradient, bool kModulate, typename Layout>
struct MergedConsumer {
    // With three warpgroups each needs the tensor cores for a third of the time, and one buffer of merged
    // weights will do; a second one would not fit their 160 registers. Two warpgroups run ahead with two.
    static constexpr int kBuffers = kGroups == 2 ? 2 : 1;
    // Both steps of a stage in one piece save a quarter of the instructions. With 160 registers that fits up
    // to two experts in bfloat16, which needs none to widen a number; beyond, ptxas would serialise the
    // products.
    static constexpr int kUnrolled = kGroups == 2 || (kTopK <= 2 && hopper::kIsBFloat16<T>) ? 2 : 1;

    const MergedProductMaps<T>& maps;
    const int32_t* index;
    const float* gate;
    const T* bias;  // [M, N] or null
    const MergedProductSizes& sizes;
    MergedTiles<kGroups> tiles;
    int thread, group, rank;
    uint32_t memory, slots, ready;
    float sums[2][64];  // of 128 tokens each
    uint32_t merged[kBuffers][4];

    HOPPER_INLINE MergedConsumer(const MergedProductMaps<T>& maps, const int32_t* index, const float* gate,
                                 const T* bias, const MergedProductSizes& sizes)
        : maps(maps), index(index), gate(gate), bias(bias), sizes(sizes), tiles(sizes) {
        thread = threadIdx.x % 128;
        group = threadIdx.x / 128 - 1;
        rank = static_cast<int>(hopper::cluster_rank());
        memory = hopper::shared_memory();
        slots = memory + Layout::kSlotsAt + group * (Layout::kSlots * Layout::kSlotBytes);
        ready = memory + Layout::kReady + group * (8 * Layout::kSlots);
    }

    HOPPER_INLINE void run() {
        Turn<Layout::kStages> stage;
        Turn<Layout::kSlots> slot;
        const int first = blockIdx.x / kMergedCluster, step = gridDim.x / kMergedCluster;
        if constexpr (kModulate) {
            if (thread == 0) {
                load_piece(first, 0, 0);
                load_piece(first, 1, 1);
            }
        }
        for (int number = first; number < tiles.count; number += step) {
            const MergedTile tile = tiles.at(number, rank);
            float gates[kTopK];
#pragma unroll
            for (int j = 0; j < kTopK; ++j) {
                const int64_t at = int64_t{tile.sample} * kTopK + j;
                const bool in_range = static_cast<unsigned>(index[at]) < static_cast<unsigned>(sizes.experts);
                gates[j] = in_range ? gate[at] : NAN;
            }
            multiply(stage, gates);
            finish(slot, tile, number, step, gates);
        }
        if (thread == 0) hopper::store_wait_read<0>();
    }

    // The row of 16 bytes that this lane names of 16 rows of 64 outputs, for transposed matrices.
    HOPPER_INLINE uint32_t place_in_outputs() const {
        const int row = thread % 32 / 16 * 8 + thread % 8, chunk = thread / 32 * 2 + thread / 8 % 2;
        return row * 128 + (chunk ^ row % 8) * 16;
    }

    // The same of 64 rows of 32 summed elements, for the first 16 of these.
    HOPPER_INLINE uint32_t place_in_summed() const {
        const int row = thread / 32 * 16 + thread % 16, chunk = thread % 32 / 16;
        return row * 64 + (chunk ^ row / 2 % 4) * 16;
    }

    // sums = (tokens V_b)^T of a tile.
    HOPPER_INLINE void multiply(Turn<Layout::kStages>& stage, const float (&gates)[kTopK]) {
        using namespace hopper;
        // A first product that does not add would save this, but then ptxas 12.8 serialises all products
        // (C7515).
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = 0.f;
#pragma unroll 1
        for (int k = 0; k < sizes.summed; k += Layout::kDeep, stage.next()) {
            const uint32_t at = memory + stage.place * Layout::kStageBytes;
            barrier_wait(memory + Layout::kFull + 8 * stage.place, stage.parity);
#pragma unroll(kUnrolled)
            for (int j = 0; j < Layout::kDeep / 16; ++j) {
                float wide[8];
                merge(wide, at + Layout::kTokenBytes + group * Layout::kWeightBytes, j, gates);
                // The products that read this buffer before are done. With the buffer's last use in the stage
                // before, so are all of that stage.
                product_wait<kBuffers - 1>();
                if (j == kBuffers - 1 && k > 0) release(stage.before());
                uint32_t (&operand_a)[4] = merged[j % kBuffers];
#pragma unroll
                for (int r = 0; r < 4; ++r) operand_a[r] = pack<T>(wide[2 * r], wide[2 * r + 1]);
                product_fence();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t tokens = at + half * (Layout::kTokenBytes / 2) + j * 32;
                    product<T, 128>(sums[half], operand_a, operand<Swizzle::k64>(tokens, 512), true);
                }
                product_commit();
            }
        }
        product_wait<0>(sums[0], sums[1]);
        release(stage.before());
    }

    // This thread's part of 16 summed elements of V^T, in float32.
    HOPPER_INLINE void merge(float (&wide)[8], uint32_t weight, int j, const float (&gates)[kTopK]) {
        using namespace hopper;
#pragma unroll
        for (int expert = 0; expert < kTopK; ++expert) {
            uint32_t packed[4];
            if constexpr (kGradient) {
                load_matrices(packed, weight + (place_in_summed() ^ j * 32));
            } else {
                load_matrices_transposed(packed, weight + place_in_outputs() + j * (16 * 128));
            }
            weight += Layout::kExpertBytes;
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float low = first_of<T>(packed[r]), high = second_of<T>(packed[r]);
                wide[2 * r] = expert == 0 ? gates[0] * low : fmaf(gates[expert], low, wide[2 * r]);
                wide[2 * r + 1] = expert == 0 ? gates[0] * high : fmaf(gates[expert], high, wide[2 * r + 1]);
            }
        }
    }

    // Tells both blocks that this warpgroup has read a stage.
    HOPPER_INLINE void release(int stage) {
        if (thread < kMergedCluster) hopper::barrier_arrive_at(memory + Layout::kEmpty + 8 * stage, thread);
    }

    // Adds the bias, combines with what kModulate asks for, and stores.
    HOPPER_INLINE void finish(Turn<Layout::kSlots>& slot, const MergedTile& tile, int number, int step,
                              const float (&gates)[kTopK]) {
        using namespace hopper;
        const int output = tile.output + group * 64;
        const float shift[2] = {
            merged_bias(tile.sample, output + thread / 32 * 16 + thread % 32 / 4, gates),
            merged_bias(tile.sample, output + thread / 32 * 16 + thread % 32 / 4 + 8, gates)};
#pragma unroll
        for (int piece = 0; piece < Layout::kPieces; ++piece, slot.next()) {
            const uint32_t main = slots + slot.place * Layout::kSlotBytes, side = main + Layout::kPieceBytes;
            if constexpr (kModulate) {
                barrier_wait(ready + 8 * slot.place, slot.parity);
            } else {
                if (thread == 0) store_wait_read<Layout::kSlots - 1>();
                named_sync(group + 1, 128);
            }
#pragma unroll
            for (int part = 0; part < 2; ++part) {  // 16 tokens
                const float* sum = sums[piece / 4] + (piece % 4 * 2 + part) * 8;
                const uint32_t place = place_in_outputs() + part * (16 * 128);
                combine(sum, shift, main + place, side + place);
            }
            fence_async();
            named_sync(group + 1, 128);
            if (thread == 0) {
                const At3 at{output, tile.token + piece * Layout::kPiece, tile.sample};
                store_box(&maps.out, at, main);
                if (kModulate && !kGradient && sizes.keep) store_box(&maps.mixture, at, side);
                store_commit();
                if constexpr (kModulate) {
                    store_wait_read<1>();  // then the slot of the piece before is free
                    const bool same_tile = piece + 2 < Layout::kPieces;
                    load_piece(
                        same_tile ? number : number + step, (piece + 2) % Layout::kPieces,
                        slot.place + 2 < Layout::kSlots ? slot.place + 2 : slot.place + 2 - Layout::kSlots);
                }
            }
        }
    }

    // Eight sums of this thread: pairs of tokens in rows of two outputs, as store_matrices_transposed takes
    // them.
    HOPPER_INLINE void combine(const float* sum, const float (&shift)[2], uint32_t main, uint32_t side) {
        using namespace hopper;
        uint32_t packed[4], factor[4], mixture[4];
        if constexpr (kModulate) load_matrices_transposed(factor, main);
        if constexpr (kModulate && kGradient) load_matrices_transposed(mixture, side);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float low = sum[2 * r] + shift[r % 2], high = sum[2 * r + 1] + shift[r % 2];
            if constexpr (kModulate) {
                const float factor_low = first_of<T>(factor[r]), factor_high = second_of<T>(factor[r]);
                if constexpr (kGradient) {  // dx = dm V^T + dr (1 + m)
                    low += fmaf(factor_low, first_of<T>(mixture[r]), factor_low);
                    high += fmaf(factor_high, second_of<T>(mixture[r]), factor_high);
                } else {  // x (1 + m)
                    mixture[r] = pack<T>(low, high);
                    low = fmaf(factor_low, low, factor_low);
                    high = fmaf(factor_high, high, factor_high);
                }
            }
            packed[r] = pack<T>(low, high);
        }
        store_matrices_transposed(main, packed);
        if constexpr (kModulate && !kGradient) {
            if (sizes.keep) store_matrices_transposed(side, mixture);
        }
    }

    HOPPER_INLINE float merged_bias(int sample, int output, const float (&gates)[kTopK]) {
        float sum = 0.f;
        if (bias == nullptr || output >= sizes.outputs) return sum;
#pragma unroll
        for (int j = 0; j < kTopK; ++j) {
            const int expert = expert_in_range(index[int64_t{sample} * kTopK + j], sizes.experts);
            sum = fmaf(gates[j], hopper::to_float(bias[int64_t{expert} * sizes.outputs + output]), sum);
        }
        return sum;
    }

    // Loads what a piece is combined with into a slot that is free; does nothing past the last tile.
    HOPPER_INLINE void load_piece(int number, int piece, int slot) {
        if (number >= tiles.count) return;
        const MergedTile tile = tiles.at(number, rank);
        const At3 at{tile.output + group * 64, tile.token + piece * Layout::kPiece, tile.sample};
        const uint32_t main = slots + slot * Layout::kSlotBytes, barrier = ready + 8 * slot;
        hopper::barrier_expect(barrier, (kGradient ? 2 : 1) * Layout::kPieceBytes);
        hopper::load_box(main, &maps.factor, at, barrier);
        if constexpr (kGradient) hopper::load_box(main + Layout::kPieceBytes, &maps.mixture, at, barrier);
    }
};

template <typename T, int kGroups, int kTopK, bool kGradient, bool kModulate>
__global__ void HOPPER_CLUSTER(kMergedCluster) __launch_bounds__(128 * (kGroups + 1), 1)
    merged_product(const __grid_constant__ MergedProductMaps<T> maps,
                   const int32_t* __restrict__ index,  // [B, k]
                   const float* __restrict__ gate,     // [B, k]
                   const T* __restrict__ bias,         // [M, N] or null
                   const MergedProductSizes sizes) {
#if HOPPER_CODE
    using namespace hopper;
    using Layout = MergedProductLayout<kGroups, kTopK, kModulate>;
    const uint32_t memory = shared_memory();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Layout::kStages; ++stage) {
            barrier_init(memory + Layout::kFull + 8 * stage, 1);
            barrier_init(memory + Layout::kEmpty + 8 * stage, kGroups * kMergedCluster);
        }
        for (int slot = 0; slot < kGroups * Layout::kSlots; ++slot) {
            barrier_init(memory + Layout::kReady + 8 * slot, 1);
        }
        fence_barrier_init();
    }
    cluster_sync();
    // Together the warpgroups have the registers that the block started with: 128 a thread, or 168.
    if (threadIdx.x < 128) {
        give_registers<kGroups == 3 ? 32 : 40>();
        if (threadIdx.x == 0) load_operands<kGroups, kTopK, kGradient, Layout>(maps, index, sizes);
        __syncwarp();  // the cluster's barrier is an instruction of whole warps
    } else {
        take_registers<kGroups == 3 ? 160 : 232>();
        MergedConsumer<T, kGroups, kTopK, kGradient, kModulate, Layout>(maps, index, gate, bias, sizes).run();
    }
    cluster_sync();  // no block ends while the other may still arrive at its barriers or load into it
#endif
}

}  // namespace switch_moe
