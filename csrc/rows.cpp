// Host version of rows.h but for the norm: inner loops over channels, which compilers vectorise; threads over blocks of
// rows.
#include "rows.h"

#include <vector>

#include "rows_common.h"

namespace rcmstr {

void gather_rows(const void* source, const int32_t* index, void* out, int64_t n, int64_t bytes, int threads) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(out);
  for_rows(n, bytes / 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (index[i] < 0)
        std::memset(to + i * bytes, 0, bytes);
      else
        std::memcpy(to + i * bytes, from + index[i] * bytes, bytes);
    }
  });
}

template <class T>
void sum_rows(const T* source, const int32_t* table, T* out, int64_t n, int taps, int64_t channels, int threads) {
  using W = decltype(wide(T{}));
  for_rows(n, channels * taps, threads, [&](int64_t begin, int64_t end) {
    std::vector<W> sum(channels);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.begin(), sum.end(), W{0});
      for (int t = 0; t < taps; ++t) {
        if (table[i * taps + t] < 0) continue;
        const T* row = source + table[i * taps + t] * channels;
        for (int64_t c = 0; c < channels; ++c) sum[c] += wide(row[c]);
      }
      for (int64_t c = 0; c < channels; ++c) store(out[i * channels + c], sum[c]);
    }
  });
}

template <class T>
void max_rows(const T* source, const int32_t* table, T* out, int8_t* which, int64_t n, int taps, int64_t channels,
              int threads) {
  using W = decltype(wide(T{}));
  for_rows(n, channels * taps, threads, [&](int64_t begin, int64_t end) {
    std::vector<W> best(channels);
    for (int64_t i = begin; i < end; ++i) {
      int8_t* tap = which + i * channels;
      bool any = false;
      std::fill(best.begin(), best.end(), W{0});
      std::fill(tap, tap + channels, int8_t{-1});
      for (int t = 0; t < taps; ++t) {
        if (table[i * taps + t] < 0) continue;
        const T* row = source + table[i * taps + t] * channels;
        for (int64_t c = 0; c < channels; ++c) {
          const W v = wide(row[c]);
          const bool larger = !any || v > best[c] || v != v;  // NaN wins, as in torch
          best[c] = larger ? v : best[c];
          tap[c] = larger ? static_cast<int8_t>(t) : tap[c];
        }
        any = true;
      }
      for (int64_t c = 0; c < channels; ++c) store(out[i * channels + c], best[c]);
    }
  });
}

template <class T>
void max_rows_backward(const T* grad_out, const int8_t* which, const int32_t* inverse, T* grad, int64_t n, int taps,
                       int64_t channels, int threads) {
  using W = decltype(wide(T{}));
  for_rows(n, channels * taps, threads, [&](int64_t begin, int64_t end) {
    std::vector<W> sum(channels);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(sum.begin(), sum.end(), W{0});
      for (int t = 0; t < taps; ++t) {
        const int64_t o = inverse[i * taps + t];
        if (o < 0) continue;
        for (int64_t c = 0; c < channels; ++c) {
          const W g = wide(grad_out[o * channels + c]);
          sum[c] += which[o * channels + c] == t ? g : W{0};
        }
      }
      for (int64_t c = 0; c < channels; ++c) store(grad[i * channels + c], sum[c]);
    }
  });
}

#define RCMSTR_ROWS(T)                                                                                          \
  template void sum_rows<T>(const T*, const int32_t*, T*, int64_t, int, int64_t, int);                         \
  template void max_rows<T>(const T*, const int32_t*, T*, int8_t*, int64_t, int, int64_t, int);                \
  template void max_rows_backward<T>(const T*, const int8_t*, const int32_t*, T*, int64_t, int, int64_t, int);
RCMSTR_ROWS(float)
RCMSTR_ROWS(double)
RCMSTR_ROWS(bfloat16)
#undef RCMSTR_ROWS

}  // namespace rcmstr
