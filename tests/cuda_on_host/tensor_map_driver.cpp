// In place of the CUDA runtime and driver, so that tensor_map.cu runs without a GPU. It prints what
// cuTensorMapEncodeTiled is given. As in a new thread, no context is current until cudaSetDevice.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>

namespace {

constexpr int kDevice = 3;
bool has_context = false;

template <typename T>
void print(const char* name, const T* numbers, unsigned count) {
    std::printf(" %s", name);
    for (unsigned i = 0; i < count; ++i) {
        std::printf("%c%llu", i == 0 ? ' ' : ',', static_cast<unsigned long long>(numbers[i]));
    }
}

CUresult encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address,
                const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
    if (stride[0] % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    std::printf("address %p", address);
    print("size", size, rank);
    print("stride", stride, rank - 1);
    print("box", box, rank);
    print("step", step, rank);
    const int kinds[] = {type == CU_TENSOR_MAP_DATA_TYPE_UINT16, interleave, swizzle, fill};
    print("kinds", kinds, 4);
    std::printf("\n");
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = kDevice;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    has_context = device == kDevice;
    return cudaSuccess;
}

#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
#else
cudaError_t cudaGetDriverEntryPoint(const char*, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* found) {
#endif
    *function = reinterpret_cast<void*>(encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// What nvcc calls at a program's start.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
}
