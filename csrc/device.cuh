// What the .cu files take from CUDA: 16-bit types, launches, barriers. The same names come from emulation/device_on_host.h
// where a C++ compiler for the host runs them in tests.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace gtpo {

using BFloat16 = __nv_bfloat16;
using Half = __half;

__device__ inline float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(Half x) { return __half2float(x); }
__device__ inline void round_to(BFloat16& out, float x) { out = __float2bfloat16_rn(x); }
__device__ inline void round_to(Half& out, float x) { out = __float2half_rn(x); }

// Memory of the block, the same for all its threads: one object a type.
template <class T>
__device__ T& block_shared() {
    __shared__ T storage;
    return storage;
}

__device__ inline void sync_block() { __syncthreads(); }
// For kernels started by launch_cooperative.
__device__ inline void sync_grid() { cooperative_groups::this_grid().sync(); }

template <class T>
__device__ T shuffle_xor(T value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

constexpr std::int64_t kMaxBlocks = 2147483647;

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), std::int64_t blocks, int threads, cudaStream_t stream, Arguments arguments) {
    if (blocks == 0) return cudaSuccess;
    void* pointers[] = {&arguments};
    const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), pointers, 0, stream);
}

// At most as many blocks as run at once, which a barrier of the whole grid needs.
template <class Arguments>
cudaError_t launch_cooperative(void (*kernel)(Arguments), std::int64_t blocks, int threads, cudaStream_t stream,
                               Arguments arguments) {
    const void* function = reinterpret_cast<const void*>(kernel);
    int device = 0, processors = 0, blocks_each = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, function, threads, 0);
    if (status != cudaSuccess || blocks == 0) return status;
    const std::int64_t resident = static_cast<std::int64_t>(processors) * blocks_each;
    void* pointers[] = {&arguments};
    const dim3 grid(static_cast<unsigned>(blocks < resident ? blocks : resident));
    return cudaLaunchCooperativeKernel(function, grid, dim3(threads), pointers, 0, stream);
}

}  // namespace gtpo

#else
#include "emulation/device_on_host.h"
#endif
