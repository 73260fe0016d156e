// Matrices between registers and shared memory, 16-bit numbers, products of a warpgroup.
#include <algorithm>

#include "machine.h"

namespace hopper {

float to_float(BFloat16 value) { return std::bit_cast<float>(uint32_t{value.bits} << 16); }

BFloat16 to_bfloat16(float value) {
    if (std::isnan(value)) return BFloat16{0x7fff};
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return BFloat16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float to_float(Float16 value) {
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16, magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
    // Scaled by 2^112 the exponents of the two types agree, and subnormal numbers become normal ones.
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

Float16 to_float16(float value) {
    const uint16_t sign = std::bit_cast<uint32_t>(value) >> 16 & 0x8000;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return Float16{0x7fff};
    if (magnitude >= 65520.f) return Float16{static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24
        return Float16{
            static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
    }
    const uint32_t bits = std::bit_cast<uint32_t>(magnitude) - (112u << 23);
    return Float16{static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}

namespace emulation {
namespace {

// A signalling NaN: arithmetic with it gives other bits.
constexpr uint32_t kInFlight = 0x7fa05eed;
constexpr int kRows = 64, kDepth = 16, kMaxColumns = 256;

struct Matrices {
    uint32_t address;
    uint32_t* registers;
};

// Row and column of half `half` of lane `lane`'s register, within an 8 x 8 matrix.
struct Place {
    int row, column;
};
Place place(int lane, int half, bool transposed) {
    const int along = 2 * (lane % 4) + half, across = lane / 4;
    return transposed ? Place{along, across} : Place{across, along};
}

void move_matrices(uint32_t address, uint32_t* registers, bool transposed, bool store) {
    const char* names[2][2] = {{"load_matrices", "load_matrices_transposed"},
                               {"store_matrices", "store_matrices_transposed"}};
    const char* what = names[store][transposed];
    const Matrices mine{address, registers};
    const int first = self().index / kLanes * kLanes;
    meet_warp(what, &mine, [&](const void* const(&given)[kGroup]) {
        auto lane_of = [&](int lane) -> const Matrices& {
            return *static_cast<const Matrices*>(given[lane]);
        };
        uint8_t* rows[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
            rows[lane] = block().at(lane_of(lane).address, 16, 16, what);
        for (int lane = 0; lane < kLanes; ++lane) {
            Thread& thread = *machine.threads[self().block * machine.launch.threads + first + lane];
            for (int matrix = 0; matrix < 4; ++matrix) {
                uint32_t& packed = lane_of(lane).registers[matrix];
                uint16_t halves[2] = {static_cast<uint16_t>(packed), static_cast<uint16_t>(packed >> 16)};
                for (int half = 0; half < 2; ++half) {
                    const auto [row, column] = place(lane, half, transposed);
                    uint8_t* element = rows[matrix * 8 + row] + 2 * column;
                    if (store) {
                        std::memcpy(element, &halves[half], 2);
                        note_write(thread, lane_of(matrix * 8 + row).address + 2 * column, 2);
                    } else {
                        std::memcpy(&halves[half], element, 2);
                    }
                }
                if (!store) packed = halves[0] | uint32_t{halves[1]} << 16;
            }
        }
    });
}

float widen(uint16_t bits, bool is_bfloat16) {
    return is_bfloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

// Calls take(row, k, bits) for the 16 summed elements of `rows` rows of an operand in shared memory.
template <typename Take>
void read_operand(const Block& owner, uint64_t descriptor, int rows, bool transposed, Take take) {
    auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
    const uint32_t start = field(0), leading = field(16), stride = field(32);
    const int code = static_cast<int>(descriptor >> 62);
    if (code != 1 && code != 2) fail("product: only swizzles of 128 and 64 bytes are emulated");
    const Swizzle swizzle = code == 1 ? Swizzle::k128 : Swizzle::k64;
    const int span = span_of(swizzle), elements = span / 2;
    if (start % (8 * span) >= static_cast<uint32_t>(span)) {
        fail("product: operand " + hex(start) + " is not at the first row of a swizzle");
    }
    auto chunk = [&](uint32_t address) {  // of 8 elements
        address = swizzled(address, swizzle);
        const_cast<Block&>(owner).at(address, 16, 16, "product");
        owner.require_fenced(address, 16, "product");
        return owner.memory.data() + (address - kSharedStart);
    };
    uint16_t bits[8];
    if (transposed) {
        for (int row = 0; row < rows; row += 8) {
            const uint32_t column = start + row / elements * leading + row % elements * 2;
            for (int k = 0; k < kDepth; ++k) {
                std::memcpy(bits, chunk(column + k / 8 * stride + k % 8 * span), 16);
                for (int i = 0; i < 8; ++i) take(row + i, k, bits[i]);
            }
        }
    } else {
        for (int row = 0; row < rows; ++row) {
            for (int k = 0; k < kDepth; k += 8) {
                std::memcpy(bits, chunk(start + row / 8 * stride + row % 8 * span + k * 2), 16);
                for (int i = 0; i < 8; ++i) take(row, k + i, bits[i]);
            }
        }
    }
}

// Where number i of a thread's accumulator lies.
Place accumulator_place(int thread, int i) {
    return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

Accumulator& accumulator_of(Warpgroup& group, float* const (&d)[kGroup], int columns, bool add) {
    for (Accumulator& one : group.accumulators) {
        if (one.threads[0] != d[0]) continue;
        if (one.columns != columns) fail("product: an accumulator is used in two shapes without a wait");
        return one;
    }
    const auto found = group.returned.find(d[0]);
    if (group.fences == 0 || (found != group.returned.end() && found->second.fences == group.fences)) {
        fail("product: no product_fence since its accumulator was with the threads");
    }
    if (add && found != group.returned.end() && found->second.columns == columns) {
        const float* at_fence = found->second.at_fence.data();
        for (int thread = 0; thread < kGroup; ++thread, at_fence += columns / 2) {
            if (std::memcmp(d[thread], at_fence, sizeof(float) * (columns / 2)) != 0) {
                fail("product: no product_fence since its accumulator changed");
            }
        }
    }
    group.accumulators.emplace_back();
    Accumulator& one = group.accumulators.back();
    one.columns = columns;
    one.matrix.resize(kRows * columns);
    for (int thread = 0; thread < kGroup; ++thread) {
        one.threads[thread] = d[thread];
        for (int i = 0; i < columns / 2; ++i) {
            const auto [row, column] = accumulator_place(thread, i);
            one.matrix[row * columns + column] = d[thread][i];
            std::memcpy(&d[thread][i], &kInFlight, sizeof kInFlight);
        }
    }
    return one;
}

void run(const Block& owner, Product& product) {
    static float a[kRows][kDepth], b[kDepth][kMaxColumns];
    const Operands& given = product.operands;
    const int columns = given.columns;
    if (given.registers != nullptr) {
        for (int thread = 0; thread < kGroup; ++thread) {
            for (int r = 0; r < 4; ++r) {
                for (int half = 0; half < 2; ++half) {
                    a[thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8][thread % 4 * 2 + half + r / 2 * 8] =
                        widen(product.a[thread][r] >> 16 * half, given.is_bfloat16);
                }
            }
        }
    } else {
        read_operand(owner, given.a, kRows, given.transposed_a,
                     [&](int row, int k, uint16_t bits) { a[row][k] = widen(bits, given.is_bfloat16); });
    }
    read_operand(owner, given.b, columns, given.transposed_b,
                 [&](int column, int k, uint16_t bits) { b[k][column] = widen(bits, given.is_bfloat16); });
    float* matrix = product.accumulator->matrix.data();
    if (!given.add) std::fill(matrix, matrix + kRows * columns, 0.f);
    for (int row = 0; row < kRows; ++row) {
        float* sums = matrix + row * columns;
        for (int k = 0; k < kDepth; ++k) {
            const float factor = a[row][k];
            for (int column = 0; column < columns; ++column) sums[column] += factor * b[k][column];
        }
    }
    product.done = true;
}

}  // namespace

void run_products_until(int block, Warpgroup& group, int64_t last) {
    for (Product& product : group.products) {
        if (product.group > last) break;
        if (!product.done) run(machine.blocks[block], product);
    }
}

}  // namespace emulation

using namespace emulation;

void load_matrices(uint32_t (&to)[4], uint32_t address) { move_matrices(address, to, false, false); }
void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
    move_matrices(address, to, true, false);
}
void store_matrices(uint32_t address, const uint32_t (&from)[4]) {
    move_matrices(address, const_cast<uint32_t*>(from), false, true);
}
void store_matrices_transposed(uint32_t address, const uint32_t (&from)[4]) {
    move_matrices(address, const_cast<uint32_t*>(from), true, true);
}

void multiply(const Operands& operands) {
    meet_warpgroup("product", &operands, [&](const void* const(&given)[kGroup]) {
        Warpgroup& group = warpgroup();
        float* d[kGroup];
        Product product{operands, nullptr, {}, {}, group.committed};
        for (int thread = 0; thread < kGroup; ++thread) {
            const Operands& one = *static_cast<const Operands*>(given[thread]);
            if (one.a != operands.a || one.b != operands.b || one.add != operands.add ||
                one.columns != operands.columns ||
                (one.registers == nullptr) != (operands.registers == nullptr)) {
                fail("product: the threads of a warpgroup disagree");
            }
            d[thread] = one.d;
            product.registers[thread] = one.registers;
            if (one.registers != nullptr) std::copy(one.registers, one.registers + 4, product.a[thread]);
        }
        if (operands.registers != nullptr) {
            for (int thread = 0; thread < kGroup; ++thread) {
                const auto [found, first] = group.operands_seen.try_emplace(product.registers[thread]);
                auto& seen = found->second;
                const uint32_t* before = seen.fences == group.fences ? seen.a : seen.at_fence;
                const bool changed = !first && !std::equal(before, before + 4, product.a[thread]);
                if (group.fences == 0 || changed) {
                    fail("product: no product_fence since its registers were written");
                }
                std::copy(product.a[thread], product.a[thread] + 4, seen.a);
                seen.fences = group.fences;
            }
        }
        product.accumulator = &accumulator_of(group, d, operands.columns, operands.add);
        product.accumulator->last_group = group.committed;
        group.products.push_back(product);
        if (machine.schedule.products == When::kEarly) run(block(), group.products.back());
    });
}

void product_fence() {
    meet_warpgroup("product_fence", nullptr, [](auto&) {
        Warpgroup& group = warpgroup();
        ++group.fences;
        for (auto& [registers, seen] : group.operands_seen)
            std::copy(registers, registers + 4, seen.at_fence);
        for (auto& [first, returned] : group.returned) {
            float* at_fence = returned.at_fence.data();
            for (const float* one : returned.threads) {
                at_fence = std::copy(one, one + returned.columns / 2, at_fence);
            }
        }
    });
}

void product_commit() {
    meet_warpgroup("product_commit", nullptr, [](auto&) { ++warpgroup().committed; });
}

void wait_for_products(int pending) {
    meet_warpgroup("product_wait", nullptr, [&](auto&) {
        Warpgroup& group = warpgroup();
        const int64_t last = group.committed - pending - 1;
        run_products_until(self().block, group, last);
        while (!group.products.empty() && group.products.front().group <= last) {
            const Product& product = group.products.front();
            for (int thread = 0; thread < kGroup && product.operands.registers != nullptr; ++thread) {
                if (!std::equal(product.a[thread], product.a[thread] + 4, product.registers[thread])) {
                    fail("writes registers that a product under way reads");
                }
            }
            group.products.pop_front();
        }
        for (auto one = group.accumulators.begin(); one != group.accumulators.end();) {
            if (one->last_group > last) {
                ++one;
                continue;
            }
            for (int thread = 0; thread < kGroup; ++thread) {
                for (int i = 0; i < one->columns / 2; ++i) {
                    const auto [row, column] = accumulator_place(thread, i);
                    if (std::memcmp(&one->threads[thread][i], &kInFlight, sizeof kInFlight) != 0) {
                        fail("writes an accumulator of a product under way");
                    }
                    one->threads[thread][i] = one->matrix[row * one->columns + column];
                }
            }
            auto& returned = group.returned[one->threads[0]];
            std::copy(one->threads, one->threads + kGroup, returned.threads);
            returned.columns = one->columns;
            returned.fences = group.fences;
            returned.at_fence.resize(kGroup * one->columns / 2);
            one = group.accumulators.erase(one);
        }
    });
}

}  // namespace hopper
