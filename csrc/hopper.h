// What a kernel for Hopper (sm_90a) needs beyond C++: asynchronous copies, barriers in shared memory, matrix
// products of warpgroups. Each function is one instruction of PTX, whose manual says what it does in full.
// A compiler that is not nvcc takes the same functions from hopper_on_host.h, an emulation on the CPU.
//
// Shared memory is addressed by 32 bits, as the instructions do; shared_memory() is where it starts. Threads
// touch it through load_shared and store_shared, or by matrices. 128 threads are a warpgroup, and a kernel is
// launched as clusters of blocks.
//
// An asynchronous operation reads and writes at any time between the call and the wait that covers it. What
// threads have written to shared memory is visible to it after fence_async(). What a thread reads there it
// may overwrite once the read is over: after fence_async(), or when something that needed the read's result
// is done, such as a product.
#pragma once

#include <cstdint>

namespace hopper {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <typename T>
constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

// A position in a tensor, the fastest dimension first. It is an index of elements, and may lie outside.
struct At2 {
    int x, y;
};
struct At3 {
    int x, y, z;
};

// How the chunks of 16 bytes of a box lie in shared memory. The rows of a box fill the swizzle: they have as
// many bytes as its name says.
enum class Swizzle { kNone, k32, k64, k128 };

// How a kernel is started; a cluster is of this many blocks.
struct Shape {
    int grid, cluster, threads;
    uint32_t shared_bytes;
};

#ifdef __CUDACC__
#define HOPPER_INLINE __device__ __forceinline__
#define HOPPER_BOTH __host__ __device__ __forceinline__  // on the host too
#else
#define HOPPER_INLINE inline
#define HOPPER_BOTH inline
#endif

// Whether what is compiled can be run: a kernel has no body for other architectures.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE 1
#define HOPPER_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define HOPPER_CODE 0
#define HOPPER_CLUSTER(blocks)
#endif

// How a product finds a 16-bit operand in boxes in shared memory. `address` is that of the first element; the
// pattern of the swizzle starts at a multiple of eight rows. Where rows run along the summed dimension,
// `stride` is the distance in bytes of groups of eight rows and `leading` is not used. Where rows run along
// the operand's other dimension (it is "transposed"), `stride` is the distance of groups of eight summed
// elements and `leading` that of groups of as many elements of the other as a row has.
template <Swizzle kSwizzle>
HOPPER_INLINE uint64_t operand(uint32_t address, uint32_t stride, uint32_t leading = 0) {
    static_assert(kSwizzle == Swizzle::k64 || kSwizzle == Swizzle::k128);
    return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
           uint64_t{kSwizzle == Swizzle::k128 ? 1 : 2} << 62;
}

}  // namespace hopper

#ifndef __CUDACC__
#include "hopper_on_host.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace hopper {

using TensorMap = CUtensorMap;

// ---- On the host

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A tensor of 2 or 3 dimensions of 16-bit elements and the boxes of it that are copied. Dimensions are given
// fastest first, strides in bytes and without that of the first.
inline TensorMap tensor_map(const void* address, std::initializer_list<int64_t> size,
                            std::initializer_list<int64_t> stride, std::initializer_list<int> box,
                            Swizzle swizzle) {
    // Asked of the runtime, so that the module loads where there is no driver.
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                               &found),
              "cuTensorMapEncodeTiled");
#else
        check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
              "cuTensorMapEncodeTiled");
#endif
        if (found != cudaDriverEntryPointSuccess) {
            throw std::runtime_error(
                "the CUDA driver has no cuTensorMapEncodeTiled; it must be that of CUDA 12 or later");
        }
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    cuuint64_t sizes[3], strides[2];
    cuuint32_t boxes[3];
    const cuuint32_t steps[3] = {1, 1, 1};
    int i = 0;
    for (const int64_t one : size) sizes[i++] = static_cast<cuuint64_t>(one);
    i = 0;
    for (const int64_t one : stride) strides[i++] = static_cast<cuuint64_t>(one);
    i = 0;
    for (const int one : box) boxes[i++] = static_cast<cuuint32_t>(one);
    const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                           CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    TensorMap map;
    auto run = [&] {
        return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, static_cast<cuuint32_t>(size.size()),
                      const_cast<void*>(address), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      swizzles[static_cast<int>(swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    CUresult result = run();
    if (result == CUDA_ERROR_INVALID_CONTEXT) {
        // The runtime makes the device's context current by itself, the driver does not. Autograd's thread
        // has none where a backward is the first that it runs.
        int device;
        check(cudaGetDevice(&device), "the current device");
        check(cudaSetDevice(device), "the context of the current device");
        result = run();
    }
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
    }
    return map;
}

// The kernel's own __cluster_dims__ are those of the shape.
template <typename... Parameters>
void launch_kernel(void (*kernel)(Parameters...), const Shape& shape, void* stream,
                   Parameters... parameters) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          "shared memory of a kernel");
    void* addresses[] = {&parameters...};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(shape.grid), dim3(shape.threads),
                           addresses, shape.shared_bytes, static_cast<cudaStream_t>(stream)),
          "launch of a kernel");
}

// How many multiprocessors the current device has.
inline int multiprocessors() {
    int device, count;
    check(cudaGetDevice(&device), "the current device");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "its multiprocessors");
    return count;
}

// ---- In a kernel

extern __shared__ __align__(1024) uint8_t dynamic_shared_memory[];

HOPPER_INLINE uint32_t shared_memory() {
    return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

template <typename T>
HOPPER_INLINE T load_shared(uint32_t address) {
    return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <typename T>
HOPPER_INLINE void store_shared(uint32_t address, T value) {
    *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// ---- Blocks of a cluster, warpgroups of a block

HOPPER_INLINE uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

HOPPER_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
HOPPER_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
HOPPER_INLINE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// `threads` of the block meet at barrier `id`, 1 to 15.
HOPPER_INLINE void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The registers that each thread of this warpgroup may use from here on.
template <int kRegisters>
HOPPER_INLINE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
HOPPER_INLINE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Barriers in shared memory that count arrivals and bytes (mbarrier)

HOPPER_INLINE void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes new barriers visible to other blocks, once these meet, and to copies.
HOPPER_INLINE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

HOPPER_INLINE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the same barrier of another block of the cluster, or of this one. It says that this thread has
// finished reading: it orders reads and asynchronous work that was waited for, but what the thread has
// written is not released to the other block, which would cost a fence of the whole GPU's memory in every
// step.
HOPPER_INLINE void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Arrives, and makes this phase wait for `bytes` more.
HOPPER_INLINE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity is over. The first phase has parity 0.
HOPPER_INLINE void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// ---- Copies of boxes of tensors (TMA)

// Global to shared memory; the barrier receives the box's bytes. Elements outside the tensor are zeros.
HOPPER_INLINE void load_box(uint32_t to, const TensorMap* map, At2 at, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at.x), "r"(at.y)
        : "memory");
}
HOPPER_INLINE void load_box(uint32_t to, const TensorMap* map, At3 at, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at.x), "r"(at.y), "r"(at.z)
        : "memory");
}

// The same into every block of the cluster whose bit is set, at the same address and barrier of each.
HOPPER_INLINE void load_box(uint32_t to, const TensorMap* map, At2 at, uint32_t barrier, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at.x), "r"(at.y), "h"(blocks)
        : "memory");
}
HOPPER_INLINE void load_box(uint32_t to, const TensorMap* map, At3 at, uint32_t barrier, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at.x), "r"(at.y), "r"(at.z), "h"(blocks)
        : "memory");
}

// Shared to global memory, what lies inside the tensor. The thread that stores commits and waits.
HOPPER_INLINE void store_box(const TensorMap* map, At2 at, uint32_t from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(from), "r"(at.x), "r"(at.y)
        : "memory");
}
HOPPER_INLINE void store_box(const TensorMap* map, At3 at, uint32_t from) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
        "r"(from), "r"(at.x), "r"(at.y), "r"(at.z)
        : "memory");
}
HOPPER_INLINE void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last kPending groups of this thread's stores have read shared memory; have been written.
template <int kPending>
HOPPER_INLINE void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
HOPPER_INLINE void store_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

HOPPER_INLINE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Matrices between registers and shared memory

// Four matrices of 8 x 8 elements of 16 bits. Lane 8 i + r has the address of row r of matrix i, which is a
// multiple of 16. Register i of lane l holds elements 2 (l % 4) and the next of row l / 4 of matrix i, or of
// its column l / 4 if transposed.
HOPPER_INLINE void load_matrices(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
HOPPER_INLINE void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
HOPPER_INLINE void store_matrices(uint32_t address, const uint32_t (&from)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}
HOPPER_INLINE void store_matrices_transposed(uint32_t address, const uint32_t (&from)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
                 : "memory");
}

// ---- Two 16-bit numbers in a register, the first in its low half

template <typename T>
HOPPER_INLINE uint32_t pack(float first, float second);
template <>
HOPPER_INLINE uint32_t pack<BFloat16>(float first, float second) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}
template <>
HOPPER_INLINE uint32_t pack<Float16>(float first, float second) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

HOPPER_INLINE float to_float(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
HOPPER_INLINE float to_float(Float16 value) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
}

template <typename T>
HOPPER_INLINE float first_of(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed)});
}
template <typename T>
HOPPER_INLINE float second_of(uint32_t packed) {
    return to_float(T{static_cast<uint16_t>(packed >> 16)});
}
template <>
HOPPER_INLINE float second_of<BFloat16>(uint32_t packed) {
    return __uint_as_float(packed & 0xffff0000u);  // one instruction less than two shifts
}

// ---- Products of a warpgroup: d[64 x N] += a[64 x 16] b[16 x N] (wgmma)

// Fragments: lane l of warp w holds in d[4 c] the element in row 16 w + l / 4 and column 8 c + 2 (l % 4); the
// next number is in the next column, and the two after are eight rows below. Register 0 of a holds two
// elements of row 16 w + l / 4, in columns 2 (l % 4) and the next; register 1 is eight rows below, registers
// 2 and 3 are eight columns to the right of these.

// Orders accesses to registers before the products that follow.
HOPPER_INLINE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
HOPPER_INLINE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last kPending groups of products are done. The compiler may read the accumulators that
// are named only after it.
template <int kPending, int... kSizes>
HOPPER_INLINE void product_wait(float (&... accumulators)[kSizes]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    auto pin = [](float* accumulator, int size) {
#pragma unroll
        for (int i = 0; i < size; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
    };
    (pin(accumulators, kSizes), ...);
}

template <typename T, int kColumns>
struct Product;

// d += a b, or d = a b without `add`. The operands are 16-bit T.
template <typename T, int kColumns, bool kTransposedA = false, bool kTransposedB = false>
HOPPER_INLINE void product(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
    Product<T, kColumns>::template shared<kTransposedA, kTransposedB>(d, a, b, add);
}
template <typename T, int kColumns, bool kTransposedB = false>
HOPPER_INLINE void product(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    Product<T, kColumns>::template registers<kTransposedB>(d, a, b, add);
}

#define HOPPER_D8(i)                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define HOPPER_D32(i) HOPPER_D8(i), HOPPER_D8(i + 8), HOPPER_D8(i + 16), HOPPER_D8(i + 24)
#define HOPPER_D64(i) HOPPER_D32(i), HOPPER_D32(i + 32)
#define HOPPER_D128(i) HOPPER_D64(i), HOPPER_D64(i + 64)

#define HOPPER_NAMES32                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HOPPER_NAMES64                                                                                       \
    HOPPER_NAMES32                                                                                           \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HOPPER_NAMES128                                                                                      \
    HOPPER_NAMES64                                                                                           \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "     \
    "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, "       \
    "%119, %120, %121, %122, %123, %124, %125, %126, %127"

// n0 to n6 are the numbers of the operands that follow the accumulators.
#define HOPPER_PRODUCT(T, TYPE, COLUMNS, HALF, n0, n1, n2, n3, n4, n5, n6)                                  \
    template <>                                                                                             \
    struct Product<T, COLUMNS> {                                                                            \
        template <bool kTransposedA, bool kTransposedB>                                                     \
        static HOPPER_INLINE void shared(float (&d)[HALF], uint64_t a, uint64_t b, bool add) {              \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #n2                                       \
                         ", 0;\n"                                                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE              \
                         " {" HOPPER_NAMES##HALF "}, %" #n0 ", %" #n1 ", add, 1, 1, %" #n3 ", %" #n4 ";\n}" \
                         : HOPPER_D##HALF(0)                                                                \
                         : "l"(a), "l"(b), "r"(int{add}), "n"(int{kTransposedA}), "n"(int{kTransposedB}));  \
        }                                                                                                   \
        template <bool kTransposedB>                                                                        \
        static HOPPER_INLINE void registers(float (&d)[HALF], const uint32_t (&a)[4], uint64_t b,           \
                                            bool add) {                                                     \
            asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #n5                                       \
                         ", 0;\n"                                                                           \
                         "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE              \
                         " {" HOPPER_NAMES##HALF "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4       \
                                                 ", add, 1, 1, %" #n6 ";\n}"                                \
                         : HOPPER_D##HALF(0)                                                                \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{add}),               \
                           "n"(int{kTransposedB}));                                                         \
        }                                                                                                   \
    };
HOPPER_PRODUCT(BFloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
HOPPER_PRODUCT(BFloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
HOPPER_PRODUCT(BFloat16, "bf16", 256, 128, 128, 129, 130, 131, 132, 133, 134)
HOPPER_PRODUCT(Float16, "f16", 64, 32, 32, 33, 34, 35, 36, 37, 38)
HOPPER_PRODUCT(Float16, "f16", 128, 64, 64, 65, 66, 67, 68, 69, 70)
HOPPER_PRODUCT(Float16, "f16", 256, 128, 128, 129, 130, 131, 132, 133, 134)

}  // namespace hopper

#endif
