// How expert_linear_weight_hopper.h divides its work: tiles and parts of the samples, what becomes of the
// parts, and which experts have a place in a block.
//
// Legend: as in expert_linear_hopper.h. Rows of a tile are of Din, columns of Dout.
#pragma once

#include <cmath>
#include <cstdint>

#include "expert_linear_hopper.h"

namespace switch_moe {

// The tiles of clusters. Pairs of neighbours in a row have the same x, and where their count is odd those of
// the last column pair up too, and have the same dm. The last of these may lack a neighbour: its row is then
// past the last one.
struct GradientTiles {
    int rows, columns, wide, count;  // `wide` pairs in a row; `count` pairs in all
};

struct WeightGradientSizes {
    int batch, tokens, inputs, outputs, experts;  // B, T, Din, Dout, M
    int splits;                                   // S parts of the samples
    GradientTiles tiles;
};

// Four numbers of a thread that multiplies: columns 8 i + 2 (lane % 4) and the next, in row lane / 4 of the
// 16 of its warp, and the same columns eight rows below.
struct alignas(16) Quad {
    float numbers[4];
};

// The parts of the gradients. A tile of weights is kept as its threads have it: [2 warpgroups, 16 values of
// i, 128 threads].
struct WeightGradientParts {
    Quad* weight;  // [S, tiles, M, 4096]
    float* bias;   // [S, rows of tiles, M, Dout], or null where there is no bias
    float* gate;   // [tiles, B, k]
};

constexpr int kGradientTile = 128;
constexpr int kTileQuads = kGradientTile * kGradientTile / 4;

// A block's tile and its part of the samples, which are numbered in their order.
struct GradientUnit {
    int row, column;  // of the tile
    bool same_x;      // else the cluster has the same dm
    int split, first, last;

    HOPPER_INLINE bool in_matrix(const WeightGradientSizes& sizes) const { return row < sizes.tiles.rows; }

    HOPPER_INLINE GradientUnit(const WeightGradientSizes& sizes, int number, int rank) {
        const GradientTiles& tiles = sizes.tiles;
        const int pair = number % tiles.count, across = tiles.rows * tiles.wide;
        same_x = pair < across;
        row = same_x ? pair / tiles.wide : (pair - across) * 2 + rank;
        column = same_x ? pair % tiles.wide * 2 + rank : tiles.columns - 1;
        split = number / tiles.count;
        first = static_cast<int>(int64_t{sizes.batch} * split / sizes.splits);
        last = static_cast<int>(int64_t{sizes.batch} * (split + 1) / sizes.splits);
    }
};

// A sample's experts and gates. An expert out of range counts as expert 0 with a gate of NaN.
template <int kTopK>
struct Route {
    int sample, expert[kTopK];
    float gate[kTopK];
};

struct Routing {
    const int32_t* order;  // [B]: samples, those with the same experts together
    const int32_t* index;  // [B, k]
    const float* gate;     // [B, k]
    int experts;

    template <int kTopK>
    HOPPER_INLINE Route<kTopK> at(int number) const {
        Route<kTopK> route;
        route.sample = order[number];
#pragma unroll
        for (int j = 0; j < kTopK; ++j) {
            const int64_t at = int64_t{route.sample} * kTopK + j;
            route.expert[j] = expert_in_range(index[at], experts);
            route.gate[j] = route.expert[j] == index[at] ? gate[at] : NAN;
        }
        return route;
    }
};

// Which expert each of the k places has: an accumulator of every thread that multiplies, and a tile of
// weights. All warps keep this account alike.
template <int kTopK>
struct Places {
    int expert[kTopK];

    HOPPER_INLINE void clear() {
#pragma unroll
        for (int place = 0; place < kTopK; ++place) expert[place] = -1;
    }

    // Gives a place to each expert of a sample. One that has a place keeps it, and one that is chosen twice
    // takes one place. Calls change(place, expert) before the place goes over to the expert.
    template <typename Change>
    HOPPER_INLINE void take(const Route<kTopK>& route, Change change) {
        if constexpr (kTopK == 1) {
            move(0, route.expert[0], change);
        } else {
            static_assert(kTopK == 2);
            const int first = route.expert[0], second = route.expert[1];
            const bool crossed = expert[1] == first || (expert[0] == second && first != second);
            if (first != second || !crossed) move(0, crossed ? second : first, change);
            if (first != second || crossed) move(1, crossed ? first : second, change);
        }
    }

    // The gate of what a place has, in the sample that took its places last; `used` says whether it has one.
    HOPPER_INLINE float gate(int place, const Route<kTopK>& route, bool& used) const {
        float sum = 0.f;
        used = false;
#pragma unroll
        for (int j = 0; j < kTopK; ++j) {
            if (route.expert[j] != expert[place]) continue;
            sum += route.gate[j];
            used = true;
        }
        return sum;
    }

  private:
    template <typename Change>
    HOPPER_INLINE void move(int place, int to, Change change) {
        if (expert[place] == to) return;
        change(place, to);
        expert[place] = to;
    }
};

}  // namespace switch_moe
