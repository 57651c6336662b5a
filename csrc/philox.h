// Philox4x32-10, the words of rcmstr_fast/random.py in C++ and CUDA.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define RCMSTR_HD __host__ __device__
#else
#define RCMSTR_HD
#endif

namespace rcmstr {

struct Words4 {
  uint32_t w[4];
};

RCMSTR_HD inline Words4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A number in [0, 1), a multiple of 2^-24, from a word, and a standard normal one from two.
RCMSTR_HD inline float uniform_of(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }
RCMSTR_HD inline float normal_of(uint32_t first, uint32_t second) {
  const double u = ((first >> 8) + 0.5) * 0x1p-24, v = ((second >> 8) + 0.5) * 0x1p-24;
  return static_cast<float>(sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
}

// The sequence of words of one (seed, stream, epoch, index), any word at any time.
struct Stream {
  uint64_t seed;
  uint32_t index_low, index_high_and_stream, epoch;

  RCMSTR_HD Stream(uint64_t seed_, uint32_t stream, uint32_t epoch_, uint64_t index)
      : seed(seed_),
        index_low(static_cast<uint32_t>(index)),
        index_high_and_stream(static_cast<uint32_t>((index >> 32) & 0xFFFF) | (stream << 16)),
        epoch(epoch_) {}

  RCMSTR_HD uint32_t word(uint32_t i) const {
    return philox(seed, i / 4, index_low, index_high_and_stream, epoch).w[i % 4];
  }
};

}  // namespace rcmstr
