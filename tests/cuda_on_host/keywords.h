// CUDA's keywords and built-in variables, for a compiler that knows only C++.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __shared__ static

struct Dim {
    int x;
};
inline thread_local Dim threadIdx{0};
inline thread_local Dim blockIdx{0};
inline thread_local Dim gridDim{1};
