// Host version of rows.h: inner loops over channels, which compilers vectorise; threads over blocks of rows.
#include "rows.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"

namespace rcmstr {

namespace {

constexpr int64_t kRows = 64;           // rows of one block: its sums stay accurate in float
constexpr int64_t kElements = 1 << 15;  // elements of one block of independent rows
constexpr int64_t kWorth = 1 << 17;     // elements from which another thread pays for its start

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

int useful_threads(int threads, int64_t elements) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, elements / kWorth)));
}

// work(first row, past the last row) over all rows in blocks.
template <class Work>
void for_rows(int64_t n, int64_t channels, int threads, const Work& work) {
  const int64_t rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, channels));
  for_blocks((n + rows - 1) / rows, useful_threads(threads, n * channels),
             [&](int64_t b) { work(b * rows, std::min(n, (b + 1) * rows)); });
}

// Sums over the rows of each group in blocks of kRows. add(first, last, sums [outputs, channels] in W) fills the sums of
// one block; blocks are then added in order, in double. Result [groups, outputs, channels].
template <class W, class Add>
std::vector<double> group_sums(Groups groups, int64_t channels, int outputs, int threads, const Add& add) {
  std::vector<int64_t> first(groups.count + 1, 0);
  for (int64_t g = 0; g < groups.count; ++g)
    first[g + 1] = first[g] + (groups.starts[g + 1] - groups.starts[g] + kRows - 1) / kRows;
  const int64_t size = outputs * channels, blocks = first[groups.count];
  std::vector<W> partial(blocks * size, W{0});
  for_blocks(blocks, useful_threads(threads, blocks * kRows * channels), [&](int64_t b) {
    const int64_t g = std::upper_bound(first.begin(), first.end(), b) - first.begin() - 1;
    const int64_t begin = groups.starts[g] + (b - first[g]) * kRows;
    add(g, begin, std::min(groups.starts[g + 1], begin + kRows), partial.data() + b * size);
  });
  std::vector<double> sums(groups.count * size, 0.0);
  for (int64_t g = 0; g < groups.count; ++g)
    for (int64_t b = first[g]; b < first[g + 1]; ++b)
      for (int64_t i = 0; i < size; ++i) sums[g * size + i] += partial[b * size + i];
  return sums;
}

// work(group, first row, past the last row) over the rows of every group.
template <class Work>
void for_group_rows(Groups groups, int64_t channels, int threads, const Work& work) {
  for_rows(groups.starts[groups.count], channels, threads, [&](int64_t begin, int64_t end) {
    int64_t g = std::upper_bound(groups.starts, groups.starts + groups.count + 1, begin) - groups.starts - 1;
    for (; begin < end; ++g) {
      const int64_t stop = std::min(end, groups.starts[g + 1]);
      if (begin < stop) work(g, begin, stop);
      begin = std::max(begin, stop);
    }
  });
}

}  // namespace

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

template <class T, class W>
void norm_rows(const T* x, const W* weight, const W* bias, const T* residual, T* out, W* mean, W* rstd, Groups groups,
               int64_t channels, double eps, bool relu, int threads) {
  // Sums are taken about the group's first row: E[x^2] - E[x]^2 then loses no digits to a large mean.
  const auto sums = group_sums<W>(groups, channels, 2, threads, [&](int64_t g, int64_t begin, int64_t end, W* sum) {
    const T* shift = x + groups.starts[g] * channels;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < channels; ++c) {
        const W d = wide(x[i * channels + c]) - wide(shift[c]);
        sum[c] += d;
        sum[channels + c] += d * d;
      }
  });
  for (int64_t g = 0; g < groups.count; ++g) {
    const double n = static_cast<double>(groups.starts[g + 1] - groups.starts[g]);
    for (int64_t c = 0; c < channels && n > 0; ++c) {
      const double m = sums[(2 * g) * channels + c] / n;
      const double var = std::max(0.0, sums[(2 * g + 1) * channels + c] / n - m * m);
      mean[g * channels + c] = static_cast<W>(m + wide(x[groups.starts[g] * channels + c]));
      rstd[g * channels + c] = static_cast<W>(1.0 / std::sqrt(var + eps));
    }
  }
  for_group_rows(groups, channels, threads, [&](int64_t g, int64_t begin, int64_t end) {
    const W *m = mean + g * channels, *r = rstd + g * channels;
    for (int64_t i = begin * channels; i < end * channels; i += channels)
      for (int64_t c = 0; c < channels; ++c) {
        W v = (wide(x[i + c]) - m[c]) * r[c] * weight[c] + bias[c];
        if (residual) v += wide(residual[i + c]);
        store(out[i + c], relu && v < 0 ? W{0} : v);
      }
  });
}

namespace {

// One row of the two passes of norm_rows_backward; kRelu: the gradient stops where out is not above 0.
template <bool kRelu, class T, class W>
void norm_row_sums(const T* __restrict grad_out, const T* __restrict x, const T* __restrict out,
                   const W* __restrict mean, const W* __restrict rstd, W* __restrict sum, int64_t channels) {
  W* __restrict moment = sum + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const W g = wide(grad_out[c]);  // loaded either way: no branch, so the loop becomes vector code
    const W d = !kRelu || wide(out[c]) > 0 ? g : W{0};
    sum[c] += d;
    moment[c] += d * (wide(x[c]) - mean[c]) * rstd[c];
  }
}

template <bool kRelu, class T, class W>
void norm_row_gradient(const T* __restrict grad_out, const T* __restrict x, const T* __restrict out,
                       const W* __restrict weight, const W* __restrict mean, const W* __restrict rstd,
                       const W* __restrict average, T* __restrict grad_x, int64_t channels) {
  const W* __restrict moment = average + channels;
  for (int64_t c = 0; c < channels; ++c) {
    const W g = wide(grad_out[c]);  // loaded either way: no branch, so the loop becomes vector code
    const W d = !kRelu || wide(out[c]) > 0 ? g : W{0};
    const W normal = (wide(x[c]) - mean[c]) * rstd[c];
    store(grad_x[c], weight[c] * rstd[c] * (d - average[c] - normal * moment[c]));
  }
}

}  // namespace

template <class T, class W>
void norm_rows_backward(const T* grad_out, const T* x, const T* out, const W* weight, const W* mean, const W* rstd,
                        T* grad_x, T* grad_residual, W* grad_weight, W* grad_bias, Groups groups, int64_t channels,
                        int threads) {
  const auto sums = group_sums<W>(groups, channels, 2, threads, [&](int64_t g, int64_t begin, int64_t end, W* sum) {
    const W *m = mean + g * channels, *r = rstd + g * channels;
    for (int64_t i = begin * channels; i < end * channels; i += channels) {
      if (out)
        norm_row_sums<true>(grad_out + i, x + i, out + i, m, r, sum, channels);
      else
        norm_row_sums<false>(grad_out + i, x + i, x + i, m, r, sum, channels);
    }
  });
  std::vector<W> average(groups.count * 2 * channels);
  std::fill(grad_weight, grad_weight + channels, W{0});
  std::fill(grad_bias, grad_bias + channels, W{0});
  for (int64_t g = 0; g < groups.count; ++g) {
    const double n = static_cast<double>(std::max<int64_t>(1, groups.starts[g + 1] - groups.starts[g]));
    for (int64_t c = 0; c < channels; ++c) {
      grad_bias[c] += static_cast<W>(sums[2 * g * channels + c]);
      grad_weight[c] += static_cast<W>(sums[(2 * g + 1) * channels + c]);
    }
    for (int64_t c = 0; c < 2 * channels; ++c)
      average[2 * g * channels + c] = static_cast<W>(sums[2 * g * channels + c] / n);
  }
  for_group_rows(groups, channels, threads, [&](int64_t g, int64_t begin, int64_t end) {
    const W *m = mean + g * channels, *r = rstd + g * channels, *a = average.data() + 2 * g * channels;
    for (int64_t i = begin * channels; i < end * channels; i += channels) {
      if (out)
        norm_row_gradient<true>(grad_out + i, x + i, out + i, weight, m, r, a, grad_x + i, channels);
      else
        norm_row_gradient<false>(grad_out + i, x + i, x + i, weight, m, r, a, grad_x + i, channels);
      if (!grad_residual) continue;
      for (int64_t c = i; c < i + channels; ++c) {
        const T g = grad_out[c];
        grad_residual[c] = !out || wide(out[c]) > 0 ? g : T{};
      }
    }
  });
}

#define RCMSTR_ROWS(T, W)                                                                                             \
  template void sum_rows<T>(const T*, const int32_t*, T*, int64_t, int, int64_t, int);                               \
  template void max_rows<T>(const T*, const int32_t*, T*, int8_t*, int64_t, int, int64_t, int);                      \
  template void max_rows_backward<T>(const T*, const int8_t*, const int32_t*, T*, int64_t, int, int64_t, int);       \
  template void norm_rows<T, W>(const T*, const W*, const W*, const T*, T*, W*, W*, Groups, int64_t, double, bool,   \
                                int);                                                                                \
  template void norm_rows_backward<T, W>(const T*, const T*, const T*, const W*, const W*, const W*, T*, T*, W*, W*, \
                                         Groups, int64_t, int);
RCMSTR_ROWS(float, float)
RCMSTR_ROWS(double, double)
RCMSTR_ROWS(bfloat16, float)
#undef RCMSTR_ROWS

}  // namespace rcmstr
