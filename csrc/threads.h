// Work in fixed blocks over a few threads: which thread takes a block varies, what a block computes does not.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace rcmstr {

// Runs take() on up to `threads` threads, one of them the caller's: those of the OpenMP runtime that the process has
// loaded, which is torch's own. They wait awake between torch's loops, so that others would share their cores; and the
// number is always torch's, as another one would make the runtime end and start threads. Without it: new threads.
template <class Take>
void on_threads(int threads, const Take& take) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel) {
    parallel([](void* run) { (*static_cast<const Take*>(run))(); }, const_cast<Take*>(&take),
             static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  try {
    for (int t = 1; t < threads; ++t) team.emplace_back(take);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do all of the work.
  }
  take();
  for (std::thread& thread : team) thread.join();
}

// work(block) for every block in 0..blocks, on `threads` threads where there are several blocks. work must not throw.
template <class Work>
void for_blocks(int64_t blocks, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) work(b);
  };
  if (threads > 1 && blocks > 1)
    on_threads(threads, take);
  else
    take();
}

}  // namespace rcmstr
