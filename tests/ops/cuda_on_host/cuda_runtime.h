// CUDA's words in C++, to run .cu files without a GPU: the threads of a block are threads, blocks follow one another.
// `kernel<<<grid, threads, bytes, stream>>>(..)` must be rewritten to `on_host(grid, threads, bytes, stream)(kernel, ..)`
// and `extern __shared__ T name[]` to `T* name = dynamic_shared<T>()` before compiling (test_cuda_sources.py does).
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline std::vector<double> dynamic_shared_memory;
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_memory.data());
}

inline pthread_barrier_t block_barrier;
inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }

// Warps: every lane leaves its value, all wait, each reads what it wants.
constexpr int kLanes = 32, kWarps = 32;
inline pthread_barrier_t warp_barriers[kWarps];
inline int lane_values[kWarps][kLanes];
inline void __syncwarp() { pthread_barrier_wait(&warp_barriers[threadIdx.x / kLanes]); }
template <class Read>
auto of_warp(int value, Read read) {
  int* const values = lane_values[threadIdx.x / kLanes];
  values[threadIdx.x % kLanes] = value;
  __syncwarp();
  const auto found = read(values, static_cast<int>(threadIdx.x % kLanes));
  __syncwarp();
  return found;
}
inline int __shfl_sync(unsigned, int value, int from) {
  return of_warp(value, [=](const int* values, int) { return values[from]; });
}
inline int __shfl_up_sync(unsigned, int value, int step) {
  return of_warp(value, [=](const int* values, int lane) { return values[lane < step ? lane : lane - step]; });
}
inline unsigned __match_any_sync(unsigned, int value) {
  return of_warp(value, [=](const int* values, int) {
    unsigned same = 0;
    for (int other = 0; other < kLanes; ++other) same |= unsigned{values[other] == value} << other;
    return same;
  });
}
inline unsigned __ballot_sync(unsigned, int value) {
  return of_warp(value != 0, [](const int* values, int) {
    unsigned set = 0;
    for (int other = 0; other < kLanes; ++other) set |= unsigned(values[other]) << other;
    return set;
  });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

inline auto on_host(dim3 grid, unsigned threads, size_t bytes, cudaStream_t) {
  return [=](auto kernel, auto... arguments) {
    gridDim = grid;
    blockDim = dim3(threads);
    pthread_barrier_init(&block_barrier, nullptr, threads);
    for (unsigned warp = 0; warp * kLanes < threads; ++warp)
      pthread_barrier_init(&warp_barriers[warp], nullptr, std::min<unsigned>(kLanes, threads - warp * kLanes));
    for (unsigned block = 0; block < grid.x * grid.y; ++block) {
      dynamic_shared_memory.assign(bytes / sizeof(double) + 1, NAN);  // as a GPU's: nothing useful is in it
      std::vector<std::thread> team;
      for (unsigned thread = 0; thread < threads; ++thread)
        team.emplace_back([=] {
          threadIdx = dim3(thread);
          blockIdx = dim3(block % grid.x, block / grid.x);
          kernel(arguments...);
        });
      for (std::thread& thread : team) thread.join();
    }
    pthread_barrier_destroy(&block_barrier);
    for (unsigned warp = 0; warp * kLanes < threads; ++warp) pthread_barrier_destroy(&warp_barriers[warp]);
  };
}
