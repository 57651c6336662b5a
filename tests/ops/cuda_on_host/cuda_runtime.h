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

inline auto on_host(dim3 grid, unsigned threads, size_t bytes, cudaStream_t) {
  return [=](auto kernel, auto... arguments) {
    gridDim = grid;
    blockDim = dim3(threads);
    pthread_barrier_init(&block_barrier, nullptr, threads);
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
  };
}
