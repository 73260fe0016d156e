// Kernels that measure what a Hopper kernel of merged experts rests on; calibrate.py starts and times them.
//
// Each is one loop over steps of 64 inner elements, with parts of it left out. A step of a block is that of a
// 192 x 256 tile of outputs and tokens: 32 KB of tokens and two experts' 24 KB of weights come into shared
// memory, each of three warpgroups reads its weights with ldmatrix, merges them in registers and multiplies
// them by the tokens with wgmma (A in registers). A fourth warpgroup issues the copies.

#include <cuda_runtime.h>

#include <cstdint>

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

__device__ int block_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra AGAIN;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ void barrier_arrive(uint32_t barrier, int rank) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
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
    const int rank = block_rank();
    for (int step = 0; step < steps; ++step) {
        const int slot = step % kStages, own = (blockIdx.x + step) % kChunks;
        const uint32_t stage = tiles + slot * kStageBytes, barrier = full + 8 * slot;
        barrier_wait(empty + 8 * slot, (step / kStages & 1) ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(kStageBytes)
                     : "memory");
        if constexpr (kShared<kCopies> != 0) {
            const int both = (blockIdx.x - rank + step) % kChunks, half = kShared<kCopies> / 2;
            copy<true>(stage, source + both * kStageBytes, barrier, rank * half, (rank + 1) * half);
        }
        copy<false>(stage, source + own * kStageBytes, barrier, kShared<kCopies>, kStageBytes);
    }
}

__device__ void load_weights(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

#define FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(d, i) FOUR(d, i), FOUR(d, i + 4), FOUR(d, i + 8), FOUR(d, i + 12)

__device__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t tokens) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, "
        "%11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "
        "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "
        "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, "
        "1, 0;"
        : SIXTEEN(d, 0), SIXTEEN(d, 16), SIXTEEN(d, 32), SIXTEEN(d, 48)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens));
}

__device__ void finish_products() {
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// One step of a warpgroup: A of every 16 inner elements is two experts' weights, merged, or stays as it is.
template <bool kLoad>
__device__ void multiply_step(float (&low)[64], float (&high)[64], uint32_t (&a)[4], uint32_t stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128 - 1;
    const uint32_t weights = stage + kTokenBytes + group * kTileBytes;
    // The descriptor: rows of 128 bytes in 128-byte swizzle, 1024 bytes from eight rows to the next eight.
    const uint64_t tokens = (uint64_t)(stage >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
    if constexpr (!kLoad) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if constexpr (kLoad) {
            const int row = 16 * k + lane % 16;
            const uint32_t at = weights + 128 * row + 16 * ((2 * warp + lane / 16) ^ (row % 8));
            uint32_t other[4];
            load_weights(a, at);
            load_weights(other, at + kExpertBytes);
#pragma unroll
            for (int i = 0; i < 4; ++i)  // 0.5 times the one, plus the other
                asm volatile("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a[i]) : "r"(0x3f003f00), "r"(other[i]));
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        }
        multiply(low, a, tokens + 2 * k);
        multiply(high, a, tokens + 2 * k + (kTokenBytes / 2 >> 4));
        if constexpr (kLoad) finish_products();  // A is overwritten next
    }
    if constexpr (!kLoad) finish_products();
}

// Takes each stage, multiplies where that is wanted, and hands it back to every block that fills it.
template <int kCopies, bool kLoad, bool kMultiply>
__device__ void consume(uint32_t tiles, uint32_t full, uint32_t empty, int steps, float* sums) {
    float low[64] = {}, high[64] = {}, sum = 0;
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) a[i] = 0x3f80bf00 + 97 * threadIdx.x + i;
    for (int step = 0; step < steps; ++step) {
        const int slot = step % kStages;
        if constexpr (kCopies != NONE) barrier_wait(full + 8 * slot, step / kStages & 1);
        __syncwarp();
        if constexpr (kMultiply) multiply_step<kLoad>(low, high, a, tiles + slot * kStageBytes);
        __syncwarp();
        if (kCopies != NONE && threadIdx.x % 32 == 0)
            for (int rank = 0; rank < (kShared<kCopies> ? 2 : 1); ++rank)
                barrier_arrive(empty + 8 * slot, rank);
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
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(full + 8 * threadIdx.x), "r"(count)
                     : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    cluster_sync();
    const long long cycles = clock64(), start = nanoseconds();
    if (threadIdx.x < 128) {
        if constexpr (kMultiply) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (kCopies != NONE && threadIdx.x == 0) produce<kCopies>(tiles, full, empty, source, steps);
    } else {
        if constexpr (kMultiply) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
        consume<kCopies, kLoad, kMultiply>(tiles, full, empty, steps, sums);
    }
    __syncwarp();
    cluster_sync();  // no block leaves while its peer writes to it
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
