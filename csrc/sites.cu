// CUDA version of list_jobs: count the classes of every image, scan them in the order (class, image), place the sites.
// One warp places an image in the order of its sites, so lists repeat bit for bit; counts stay on the device.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "sites.h"

namespace rcmstr {
namespace {

constexpr int COUNT_THREADS = 128, SCAN_THREADS = 1024, WARP = 32;

struct Jobs {
  SiteJob job[kMaxJobs];
};

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("active_sites: ") + what + ": " + cudaGetErrorString(error));
}

// slots[c * images + image] = members of class c in the image. Grid: images, jobs.
__global__ void count_kernel(Jobs jobs, int64_t images) {
  __shared__ int members[kMaxClasses];
  const SiteJob& job = jobs.job[blockIdx.y];
  const int sites = job.height() * job.width(), classes = job.classes();
  const int64_t image = blockIdx.x;
  for (int c = threadIdx.x; c < classes; c += COUNT_THREADS) members[c] = 0;
  __syncthreads();
  for (int site = threadIdx.x; site < sites; site += COUNT_THREADS) {
    if (!job.active[image * sites + site]) continue;
    const int word = job.word(image, site);
    if (job.words) {
      atomicAdd(&members[word], 1);
    } else {
      for (int c = 0; c < classes; ++c)
        if (word >> c & 1) atomicAdd(&members[c], 1);
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < classes; c += COUNT_THREADS) job.slots[c * images + image] = members[c];
}

// The sum of a value over the lanes up to this one.
__device__ int lane_scan(int value, int lane) {
  for (int step = 1; step < WARP; step *= 2) {
    const int before = __shfl_up_sync(~0u, value, step);
    if (lane >= step) value += before;
  }
  return value;
}

// Exclusive scan of slots in place, the total behind it, and counts. Grid: jobs. Each warp owns a run of entries and goes
// through it a line at a time, lane beside lane: once to add it up, once, after the sums of all runs, to scan it.
__global__ void scan_kernel(Jobs jobs, int64_t images) {
  __shared__ int sums[SCAN_THREADS / WARP];
  const SiteJob& job = jobs.job[blockIdx.x];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = SCAN_THREADS / WARP;
  const int64_t entries = job.classes() * images;
  const int64_t run = (entries + SCAN_THREADS - 1) / SCAN_THREADS * WARP;
  const int64_t begin = min(entries, run * warp), end = min(entries, begin + run);
  int own = 0;
#pragma unroll 8
  for (int64_t i = begin + lane; i < end; i += WARP) own += job.slots[i];
  own = __shfl_sync(~0u, lane_scan(own, lane), WARP - 1);
  if (lane == 0) sums[warp] = own;
  __syncthreads();
  int total = 0, all = 0;
  for (int other = 0; other < warps; ++other) {
    total += other < warp ? sums[other] : 0;
    all += sums[other];
  }
  int next = begin + lane < end ? job.slots[begin + lane] : 0;
  for (int64_t i = begin + lane; i - lane < end; i += WARP) {
    const int members = next;
    next = i + WARP < end ? job.slots[i + WARP] : 0;  // on its way while this line is scanned
    const int up_to = lane_scan(members, lane);
    if (i < end) job.slots[i] = total + up_to - members;
    total += __shfl_sync(~0u, up_to, WARP - 1);
  }
  if (threadIdx.x == 0) job.slots[entries] = all;
  __syncthreads();
  if (job.words) {
    if (threadIdx.x == 0) job.counts[0] = all;
  } else if (threadIdx.x < job.window.taps()) {
    job.counts[threadIdx.x] = job.slots[(threadIdx.x + 1) * images] - job.slots[threadIdx.x * images];
  }
}

// Grid: images, jobs; one warp walks the image's sites in chunks of 32.
__global__ void place_kernel(Jobs jobs, int64_t images) {
  __shared__ int next[kMaxClasses];
  const SiteJob& job = jobs.job[blockIdx.y];
  const int sites = job.height() * job.width(), classes = job.classes(), lane = threadIdx.x;
  const int64_t image = blockIdx.x;
  const unsigned earlier = (1u << lane) - 1;
  for (int c = lane; c < classes; c += WARP)
    next[c] = job.slots[c * images + image] - (job.words ? 0 : job.slots[c * images]);
  __syncwarp();
  for (int first = 0; first < sites; first += WARP) {
    const int site = first + lane;
    const bool listed = site < sites && job.active[image * sites + site];
    const int word = listed ? job.word(image, site) : 0;
    const int32_t position = static_cast<int32_t>(image * sites + site);
    if (job.words) {
      const unsigned same = __match_any_sync(~0u, listed ? word : -1);
      const int slot = listed ? next[word] + __popc(same & earlier) : 0;
      __syncwarp();
      if (listed) {
        job.positions[slot] = position;
        job.words[slot] = word;
        if (!(same & earlier)) next[word] += __popc(same);
      }
      __syncwarp();
    } else {
      for (int c = 0; c < classes; ++c) {
        const unsigned have = __ballot_sync(~0u, word >> c & 1);
        const int slot = next[c] + __popc(have & earlier);
        if (word >> c & 1) {
          job.positions[c * images * sites + slot] = position;
          job.positions[(classes + c) * images * sites + slot] = job.input_under(image, site, c);
        }
        __syncwarp();
        if (lane == 0) next[c] += __popc(have);
        __syncwarp();
      }
    }
  }
}

}  // namespace

std::string cuda_refusal() {
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(scan_kernel));
  cudaGetLastError();  // it is answered: no later call shall meet it
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

void list_jobs_cuda(const SiteJob* jobs, int count, int64_t images, void* stream) {
  if (!images || !count) return;
  Jobs all;
  std::copy(jobs, jobs + count, all.job);
  const auto queue = static_cast<cudaStream_t>(stream);
  const dim3 grid(static_cast<unsigned>(images), count);
  count_kernel<<<grid, COUNT_THREADS, 0, queue>>>(all, images);
  scan_kernel<<<count, SCAN_THREADS, 0, queue>>>(all, images);
  place_kernel<<<grid, WARP, 0, queue>>>(all, images);
  check(cudaGetLastError(), "launch");
}

}  // namespace rcmstr
