// Batch norm over rows, forward and backward.
#include <cmath>
#include <vector>

#include "rows_common.h"
#include "vectors.h"

namespace rcmstr {

namespace {

constexpr int64_t kRows = 64;  // rows of one block: its sums stay accurate in float

#define RCMSTR_LOOPS "norm_blocks.h"
#include "two_widths.h"

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

// work(group, first row, past the last row) over the rows of every group, at most kRows at a time: the stripes of so few
// rows meet each other's cache lines.
template <class Work>
void for_group_rows(Groups groups, int64_t channels, int threads, const Work& work) {
  for_rows(groups.starts[groups.count], channels, threads, [&](int64_t begin, int64_t end) {
    int64_t g = std::upper_bound(groups.starts, groups.starts + groups.count + 1, begin) - groups.starts - 1;
    for (; begin < end; ++g) {
      const int64_t stop = std::min(end, groups.starts[g + 1]);
      for (; begin < stop; begin = std::min(stop, begin + kRows)) work(g, begin, std::min(stop, begin + kRows));
    }
  });
}

}  // namespace

template <class T, class W>
void norm_rows(const T* x, const W* weight, const W* bias, const T* residual, T* out, W* mean, W* rstd, W* var,
               Groups groups, int64_t channels, double eps, bool relu, int threads) {
  // Sums are taken about the group's first row: E[x^2] - E[x]^2 then loses no digits to a large mean.
  const auto sums = group_sums<W>(groups, channels, 2, threads, [&](int64_t g, int64_t begin, int64_t end, W* sum) {
    RCMSTR_LOOP(sums_block, x + begin * channels, x + groups.starts[g] * channels, sum, end - begin, channels);
  });
  std::vector<W> scale(groups.count * channels);
  for (int64_t g = 0; g < groups.count; ++g) {
    const double n = static_cast<double>(groups.starts[g + 1] - groups.starts[g]);
    for (int64_t c = 0; c < channels && n > 0; ++c) {
      const int64_t i = g * channels + c;
      const double m = sums[(2 * g) * channels + c] / n;
      const double biased = std::max(0.0, sums[(2 * g + 1) * channels + c] / n - m * m);
      mean[i] = static_cast<W>(m + wide(x[groups.starts[g] * channels + c]));
      rstd[i] = static_cast<W>(1.0 / std::sqrt(biased + eps));
      var[i] = static_cast<W>(biased * n / std::max(1.0, n - 1));
      scale[i] = rstd[i] * weight[c];
    }
  }
  for_group_rows(groups, channels, threads, [&](int64_t g, int64_t begin, int64_t end) {
    const int64_t i = begin * channels, c = g * channels;
    RCMSTR_LOOP(normalise_block, x + i, residual ? residual + i : nullptr, out + i, mean + c, scale.data() + c, bias,
                 end - begin, channels, relu);
  });
}

template <class T, class W>
void norm_rows_backward(const T* grad_out, const T* x, const T* out, const W* weight, const W* mean, const W* rstd,
                        T* grad_x, T* grad_residual, W* grad_weight, W* grad_bias, Groups groups, int64_t channels,
                        int threads) {
  const auto sums = group_sums<W>(groups, channels, 2, threads, [&](int64_t g, int64_t begin, int64_t end, W* sum) {
    const int64_t i = begin * channels, c = g * channels;
    RCMSTR_LOOP(gradient_sums_block, grad_out + i, x + i, out ? out + i : nullptr, mean + c, rstd + c, sum, end - begin,
                 channels);
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
    const int64_t i = begin * channels, c = g * channels;
    RCMSTR_LOOP(gradients_block, grad_out + i, x + i, out ? out + i : nullptr, weight, mean + c, rstd + c,
                 average.data() + 2 * c, grad_x + i, grad_residual ? grad_residual + i : nullptr, end - begin, channels);
  });
}

#define RCMSTR_NORM(T, W)                                                                                              \
  template void norm_rows<T, W>(const T*, const W*, const W*, const T*, T*, W*, W*, W*, Groups, int64_t, double, bool, \
                                int);                                                                                  \
  template void norm_rows_backward<T, W>(const T*, const T*, const T*, const W*, const W*, const W*, T*, T*, W*, W*,   \
                                         Groups, int64_t, int);
RCMSTR_NORM(float, float)
RCMSTR_NORM(double, double)
RCMSTR_NORM(bfloat16, float)
#undef RCMSTR_NORM

}  // namespace rcmstr
