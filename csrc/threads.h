// Work in fixed blocks over a few threads: which thread takes a block varies, what a block computes does not.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace rcmstr {

// work(block) for every block in 0..blocks, in up to `threads` threads, one of them the caller's. work must not throw.
template <class Work>
void for_blocks(int64_t blocks, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  auto take = [&] {
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) work(b);
  };
  std::vector<std::thread> team;
  try {
    for (int64_t t = 1; t < std::min<int64_t>(threads, blocks); ++t) team.emplace_back(take);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do all of the work.
  }
  take();
  for (std::thread& thread : team) thread.join();
}

}  // namespace rcmstr
