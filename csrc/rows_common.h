// What the sources of rows.h share: element types and loops over rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "rows.h"
#include "threads.h"

namespace rcmstr {

constexpr int64_t kElements = 1 << 15;  // elements of one block of independent rows
constexpr int64_t kWorth = 1 << 16;     // elements from which other threads pay for their start

inline float wide(float v) { return v; }
inline double wide(double v) { return v; }
inline float wide(bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline void store(float& to, float v) { to = v; }
inline void store(double& to, double v) { to = v; }
// Round to nearest, ties to even; NaN stays NaN.
inline void store(bfloat16& to, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline int useful_threads(int threads, int64_t elements) { return elements < kWorth ? 1 : threads; }

// work(first row, past the last row) over all rows in blocks.
template <class Work>
void for_rows(int64_t n, int64_t channels, int threads, const Work& work) {
  const int64_t rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, channels));
  for_blocks((n + rows - 1) / rows, useful_threads(threads, n * channels),
             [&](int64_t b) { work(b * rows, std::min(n, (b + 1) * rows)); });
}

}  // namespace rcmstr
