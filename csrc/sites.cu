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

// Exclusive scan of slots in place, the total behind it, and counts. Grid: jobs; each thread owns a run of entries.
__global__ void scan_kernel(Jobs jobs, int64_t images) {
  __shared__ int sums[SCAN_THREADS];
  const SiteJob& job = jobs.job[blockIdx.x];
  const int64_t entries = job.classes() * images, run = (entries + SCAN_THREADS - 1) / SCAN_THREADS;
  const int64_t begin = min(entries, run * threadIdx.x), end = min(entries, begin + run);
  int own = 0;
  for (int64_t i = begin; i < end; ++i) own += job.slots[i];
  sums[threadIdx.x] = own;
  for (int step = 1; step < SCAN_THREADS; step *= 2) {
    __syncthreads();
    const int before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
  }
  int total = sums[threadIdx.x] - own;
  for (int64_t i = begin; i < end; ++i) {
    const int members = job.slots[i];
    job.slots[i] = total;
    total += members;
  }
  if (threadIdx.x == SCAN_THREADS - 1) job.slots[entries] = sums[threadIdx.x];
  __syncthreads();
  if (job.words) {
    if (threadIdx.x == 0) job.counts[0] = job.slots[entries];
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
        if (word >> c & 1) job.positions[c * images * sites + slot] = position;
        __syncwarp();
        if (lane == 0) next[c] += __popc(have);
        __syncwarp();
      }
    }
  }
}

}  // namespace

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
