// Kernels that measure what a Hopper kernel of merged experts rests on; calibrate.py starts and times them.
//
// Each is one loop over steps of 64 inner elements, with parts of it left out. A step of a block is that of a
// 192 x 256 tile of outputs and tokens: 32 KB of tokens and two experts' 24 KB of weights come into shared
// memory, each of three warpgroups reads its weights with ldmatrix, merges them in registers and multiplies
// them by the tokens with wgmma (A in registers). A fourth warpgroup issues the copies.

#include <cuda_runtime.h>

#include <cstdint>

#include "../csrc/hopper.h"

struct Span {
    long long cycles, nanoseconds;
};

namespace {

enum Copies { NONE, OWN, SHARED_TOKENS, SHARED };  // SHARED: multicast to a cluster of two blocks

constexpr int kStages = 2, kGroups = 3, kThreads = 128 * (kGroups + 1);
constexpr int kTokenBytes = 32 << 10, kExpertBytes = 24 << 10, kTileBytes = 8 << 10, kPiece = 8 << 10;
constexpr int kStageBytes = kTokenBytes + 2 * kExpertBytes;
constexpr int kChunks = 200;  // 16 MB in all: the L2 cache of every GPU with bulk copies holds them
constexpr int kSharedMemory = kStages * kStageBytes + 1024;  // the tiles begin at a multiple of 1024
template <int kCopies>
constexpr int kShared = kCopies == SHARED          ? kStageBytes
                        : kCopies == SHARED_TOKENS ? kTokenBytes
                                                   : 0;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kBulk = true, kHopper = true;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulk = true, kHopper = false;
#else
constexpr bool kBulk = false, kHopper = false;
#endif

__device__ long long nanoseconds() {
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

// Copies [begin, end) of a stage, to this block or to both blocks of a cluster.
template <bool kMulticast>
__device__ void copy(uint32_t stage, const char* chunk, uint32_t barrier, int begin, int end) {
    for (int at = begin; at < end; at += kPiece) {
        if constexpr (kMulticast)
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                " [%0], [%1], %2, [%3], %4;" ::"r"(stage + at),
                "l"(chunk + at), "n"(kPiece), "r"(barrier), "h"((uint16_t)3)
                : "memory");
        else
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                    "r"(stage + at),
                "l"(chunk + at), "n"(kPiece), "r"(barrier)
                : "memory");
    }
}

// One thread fills a stage as soon as every warp that reads it, here and in the peer, is done.
template <int kCopies>
__device__ void produce(uint32_t tiles, uint32_t full, uint32_t empty, const char* source, int steps) {
    const int rank = hopper::cluster_rank();
    for (int step = 0; step < steps; ++step) {
        const int slot = step % kStages, own = (blockIdx.x + step) % kChunks;
        const uint32_t stage = tiles + slot * kStageBytes, barrier = full + 8 * slot;
        hopper::barrier_wait(empty + 8 * slot, (step / kStages & 1) ^ 1);
        hopper::barrier_expect(barrier, kStageBytes);
        if constexpr (kShared<kCopies> != 0) {
            const int both = (blockIdx.x - rank + step) % kChunks, half = kShared<kCopies> / 2;
            copy<true>(stage, source + both * kStageBytes, barrier, rank * half, (rank + 1) * half);
        }
        copy<false>(stage, source + own * kStageBytes, barrier, kShared<kCopies>, kStageBytes);
    }
}

// One step of a warpgroup: A of every 16 inner elements is two experts' weights, merged, or stays as it is.
template <bool kLoad>
__device__ void multiply_step(float (&low)[64], float (&high)[64], uint32_t (&a)[4], uint32_t stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128 - 1;
    const uint32_t weights = stage + kTokenBytes + group * kTileBytes;
    auto tokens = [&](int k, int half) {
        return hopper::operand<hopper::Swizzle::k128>(stage + half * (kTokenBytes / 2) + 32 * k, 1024);
    };
    if constexpr (!kLoad) hopper::product_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if constexpr (kLoad) {
            const int row = 16 * k + lane % 16;
            const uint32_t at = weights + 128 * row + 16 * ((2 * warp + lane / 16) ^ (row % 8));
            uint32_t other[4];
            hopper::load_matrices_transposed(a, at);
            hopper::load_matrices_transposed(other, at + kExpertBytes);
#pragma unroll
            for (int i = 0; i < 4; ++i)  // 0.5 times the one, plus the other
                asm volatile("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(0x3f003f00), "r"(other[i]));
            hopper::product_fence();
        }
        hopper::product<hopper::BFloat16, 128>(low, a, tokens(k, 0), true);
        hopper::product<hopper::BFloat16, 128>(high, a, tokens(k, 1), true);
        if (kLoad || k == 3) {  // A is overwritten next, or the stage
            hopper::product_commit();
            hopper::product_wait<0>();
        }
    }
}

// Takes each stage, multiplies where that is wanted, and hands it back to every block that fills it.
template <int kCopies, bool kLoad, bool kMultiply>
__device__ void consume(uint32_t tiles, uint32_t full, uint32_t empty, int steps, float* sums) {
    float low[64] = {}, high[64] = {}, sum = 0;
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = 0x3f80bf00 + 97 * threadIdx.x + i;
    for (int step = 0; step < steps; ++step) {
        const int slot = step % kStages;
        if constexpr (kCopies != NONE) hopper::barrier_wait(full + 8 * slot, step / kStages & 1);
        __syncwarp();
        if constexpr (kMultiply) multiply_step<kLoad>(low, high, a, tiles + slot * kStageBytes);
        __syncwarp();
        if (kCopies != NONE && threadIdx.x % 32 == 0)
            for (int rank = 0; rank < (kShared<kCopies> ? 2 : 1); ++rank)
                hopper::barrier_arrive_at(empty + 8 * slot, rank);
    }
    for (int i = 0; i < 64; ++i) sum += low[i] + high[i];
    sums[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <int kCopies, bool kLoad, bool kMultiply>
__device__ void work_of_block(const char* source, int steps, float* sums, Span* spans) {
    extern __shared__ char memory[];
    __shared__ uint64_t barriers[2 * kStages];
    const uint32_t full = (uint32_t)__cvta_generic_to_shared(barriers), empty = full + 8 * kStages;
    const uint32_t begin = (uint32_t)__cvta_generic_to_shared(memory), tiles = (begin + 1023) & ~1023u;
    for (int at = 16 * threadIdx.x; at < kStages * kStageBytes; at += 16 * kThreads)
        *(uint4*)(memory + (tiles - begin) + at) = *(const uint4*)(source + at);
    if (threadIdx.x < 2 * kStages) {
        const int warps = 4 * kGroups * (kShared<kCopies> ? 2 : 1), count = threadIdx.x < kStages ? 1 : warps;
        hopper::barrier_init(full + 8 * threadIdx.x, count);
    }
    hopper::fence_barrier_init();
    hopper::fence_async();
    __syncwarp();
    hopper::cluster_sync();
    const long long cycles = clock64(), start = nanoseconds();
    if (threadIdx.x < 128) {
        if constexpr (kMultiply) hopper::give_registers<32>();
        if (kCopies != NONE && threadIdx.x == 0) produce<kCopies>(tiles, full, empty, source, steps);
    } else {
        if constexpr (kMultiply) hopper::take_registers<160>();
        consume<kCopies, kLoad, kMultiply>(tiles, full, empty, steps, sums);
    }
    __syncwarp();
    hopper::cluster_sync();  // no block leaves while its peer writes to it
    if (threadIdx.x == 0) spans[blockIdx.x] = {clock64() - cycles, nanoseconds() - start};
}

template <int kCopies, bool kLoad, bool kMultiply>
__global__ void __launch_bounds__(kThreads, 1) work(const char* source, int steps, float* sums, Span* spans) {
    if constexpr (kHopper || (kBulk && !kMultiply && !kShared<kCopies>))
        work_of_block<kCopies, kLoad, kMultiply>(source, steps, sums, spans);
}

// Starts a kernel on every multiprocessor and sets `blocks` to their number.
template <int kCopies, bool kLoad, bool kMultiply>
cudaError_t start(const char* source, int steps, float* sums, Span* spans, int* blocks, cudaStream_t stream) {
    auto* kernel = work<kCopies, kLoad, kMultiply>;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kShared<kCopies> ? 2u : 1u, 1, 1};
    cudaLaunchConfig_t config = {cluster.val.clusterDim.x, kThreads, kSharedMemory, stream, &cluster, 1};
    int clusters = 0;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedMemory);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    config.gridDim.x = *blocks = clusters * cluster.val.clusterDim.x;
    return cudaLaunchKernelEx(&config, kernel, source, steps, sums, spans);
}

constexpr decltype(&start<NONE, false, true>) kStarts[] = {
    start<OWN, false, false>, start<SHARED, false, false>, start<NONE, false, true>,
    start<NONE, true, true>,  start<OWN, true, true>,      start<SHARED_TOKENS, true, true>,
};

}  // namespace

// Starts kernel `which` of calibrate.py's list; the message of an error, or nothing.
extern "C" const char* calibrate(int which, const char* source, int steps, float* sums, Span* spans,
                                 int* blocks, cudaStream_t stream) {
    const cudaError_t error = kStarts[which](source, steps, sums, spans, blocks, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
