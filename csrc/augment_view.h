// The host's augmentation of one picture: inner loops over rows of pixels that compilers vectorise.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "augment.h"

// The pixel loops are compiled for wider vectors as well; the processor decides when the module is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RCMSTR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3"), flatten))
#else
#define RCMSTR_CLONES
#endif

namespace rcmstr {
namespace {

// A pixel and its first neighbour's red; a pixel, the one to its right and two floats more.
typedef float Pixel __attribute__((vector_size(16)));
typedef float TwoPixels __attribute__((vector_size(32)));

// Eight floats turned so that the second pixel comes first.
#if defined(__clang__)
#define RCMSTR_SECOND(v) __builtin_shufflevector(v, v, 3, 4, 5, 6, 7, 0, 1, 2)
#else
typedef int TwoPlaces __attribute__((vector_size(32)));
#define RCMSTR_SECOND(v) __builtin_shuffle(v, TwoPlaces{3, 4, 5, 6, 7, 0, 1, 2})
#endif

// One thread's buffers and the operations on them.
class View {
 public:
  View(int height, int width)
      : height_(height), width_(width), line_(CHANNELS * width), y_(width), x_(width), corner_(width),
        image_(size_t(height + 1) * line_ + BEYOND), other_(image_.size()),
        padded_(line_ + 2 * CHANNELS * MAX_RADIUS) {}

  RCMSTR_CLONES void make(const uint8_t* source, const float* row) {
    for (int i = 0; i < height_ * line_; ++i) image_[i] = source[i];
    levels_ = Levels();
    Prepared prepared;
    prepare(row, prepared);
    const int count = static_cast<int>(row[ROW_COUNT]);
    int order[MAX_CHAIN];
    for (int i = 0; i < count; ++i) order[i] = static_cast<int>(row[ROW_ORDER + i]);
    for (int i = 0; i < count;) {
      int end = i;
      while (end < count && is_geometric(order[end])) ++end;
      if (end > i) {
        if (std::all_of(order + i, order + end, is_separable))
          move_lines(row, prepared, order + i, end - i);
        else
          warp(row, prepared, order + i, end - i);
        i = end;
        continue;
      }
      if (order[i] == CONTRAST) levels_ = contrasted(levels_, row[ROW_CONTRAST]);
      if (order[i] == BLUR) blur(prepared);
      if (order[i] == SHARPEN) sharpen(row[ROW_SHARPEN], row[ROW_SHARPEN + 1]);
      if (order[i] == GREY) grey();
      if (order[i] == SOLARISE) solarise(row[ROW_THRESHOLD]);
      if (order[i] == COLOUR_JITTER)
        for (int k = 0; k < JITTER_STEPS; ++k) jitter(static_cast<int>(row[ROW_JITTER_ORDER + k]), row + ROW_JITTER);
      ++i;
    }
    levels_ = normalising(levels_);
  }

  template <class T>
  RCMSTR_CLONES void write(T* out) const {
    const float* const stored = image_.data();
    const Levels levels = levels_;
    for (int i = 0; i < height_ * line_; ++i) store(at_levels(stored[i], levels), out + i);
  }

  // One of `patches` strips, to the place of strip `to` of another picture.
  template <class T>
  RCMSTR_CLONES void write_strip(int from, int to, int patches, T* out) const {
    const int length = line_ / patches;
    const Levels levels = levels_;
    for (int y = 0; y < height_; ++y) {
      const float* source = image_.data() + size_t(y) * line_ + from * length;
      T* target = out + size_t(y) * line_ + to * length;
      for (int i = 0; i < length; ++i) store(at_levels(source[i], levels), target + i);
    }
  }

 private:
  // Floats after the image that `sample_line` may read, with weight 0; a line before them as well.
  static constexpr int BEYOND = 8;

  const float* line(int y) const { return image_.data() + size_t(std::clamp(y, 0, height_ - 1)) * line_; }

  // The middle of `padded_`, to be filled with a line; `extend` then repeats its first and last pixel.
  float* middle() { return padded_.data() + CHANNELS * MAX_RADIUS; }
  void extend(int radius) {
    float* m = middle();
    for (int i = 1; i <= CHANNELS * radius; ++i) {
      m[-i] = m[(CHANNELS - i % CHANNELS) % CHANNELS];
      m[line_ - 1 + i] = m[line_ - CHANNELS + (i - 1) % CHANNELS];
    }
  }

  template <int operation>
  void map_line(const float* row, const Prepared& prepared) {
    const float half_y = 0.5f / static_cast<float>(height_), half_x = 0.5f / static_cast<float>(width_);
    float* const ys = y_.data();
    float* const xs = x_.data();
    for (int i = 0; i < width_; ++i) {
      const Position at = source_position(operation, row, prepared, {ys[i], xs[i]}, half_y, half_x);
      ys[i] = at.y;
      xs[i] = at.x;
    }
  }

  // Coefficients of the piecewise affine shift as a sum over i, j of c[i][j] b_i(3 y) b_j(3 x) with the functions
  // b = 1, t, max(t - 1, 0), max(t - 2, 0): without a table look-up, so that lines are worked on as vectors.
  struct Grid {
    float y[4][4], x[4][4];
  };

  static Grid grid_of(const float* shifts) {
    Grid grid;
    for (int axis = 0; axis < 2; ++axis) {
      auto& c = axis == 0 ? grid.y : grid.x;
      for (int i = 0; i < 16; ++i) c[i / 4][i % 4] = shifts[2 * i + axis];
      for (int pass = 0; pass < 2; ++pass)  // along the rows, then, transposed, along the columns
        for (int i = 0; i < 4; ++i) {
          const auto at = [&](int j) -> float& { return pass == 0 ? c[i][j] : c[j][i]; };
          const float a = at(0), b = at(1), d = at(2), e = at(3);
          at(1) = b - a;
          at(2) = d - 2 * b + a;
          at(3) = e - 2 * d + b;
        }
    }
    return grid;
  }

  // A line whose positions have the height `level` where that is given; otherwise each has its own.
  template <bool is_level>
  void shift_line(const Grid& grid, float level) {
    const float half_y = 0.5f / static_cast<float>(height_), half_x = 0.5f / static_cast<float>(width_);
    float* const ys = y_.data();
    float* const xs = x_.data();
    const int count = width_;
    const auto basis = [](float at) {
      return std::array<float, 3>{3.0f * at, std::max(3.0f * at - 1.0f, 0.0f), std::max(3.0f * at - 2.0f, 0.0f)};
    };
    const auto column = [](const std::array<float, 3>& b, const float (&c)[4][4], int j) {
      return c[0][j] + b[0] * c[1][j] + b[1] * c[2][j] + b[2] * c[3][j];
    };
    const std::array<float, 3> by_level = basis(level);
    float level_y[4], level_x[4];
    for (int j = 0; j < 4; ++j) level_y[j] = column(by_level, grid.y, j), level_x[j] = column(by_level, grid.x, j);
    for (int i = 0; i < count; ++i) {
      const std::array<float, 3> in_x = basis(xs[i]), in_y = basis(ys[i]);
      const auto shift = [&](const float (&c)[4][4], const float (&at_level)[4]) {
        const auto along = [&](int j) { return is_level ? at_level[j] : column(in_y, c, j); };
        return along(0) + in_x[0] * along(1) + in_x[1] * along(2) + in_x[2] * along(3);
      };
      const float y = is_level ? level : ys[i];
      const Position at = inside({y + shift(grid.y, level_y), xs[i] + shift(grid.x, level_x)}, half_y, half_x);
      ys[i] = at.y;
      xs[i] = at.x;
    }
  }

  void warp(const float* row, const Prepared& prepared, const int* run, int length) {
    const Grid grid = grid_of(row + ROW_GRID);
    for (int y = 0; y < height_; ++y) {
      start_line(y);
      bool level = true;
      for (int k = length - 1; k >= 0; --k) {
        if (run[k] == CROP_ROWS) map_line<CROP_ROWS>(row, prepared);
        if (run[k] == CROP_COLUMNS) map_line<CROP_COLUMNS>(row, prepared);
        if (run[k] == RESIZED_CROP) map_line<RESIZED_CROP>(row, prepared);
        if (run[k] == FLIP) map_line<FLIP>(row, prepared);
        if (run[k] == ROTATE) map_line<ROTATE>(row, prepared);
        if (run[k] == PIECEWISE_AFFINE) level ? shift_line<true>(grid, y_[0]) : shift_line<false>(grid, 0.0f);
        if (run[k] == PERSPECTIVE) map_line<PERSPECTIVE>(row, prepared);
        level = level && is_separable(run[k]);
      }
      sample_line(other_.data() + size_t(y) * line_);
    }
    image_.swap(other_);
  }

  // The position of every pixel of line y.
  void start_line(int y) {
    std::fill(y_.begin(), y_.end(), (static_cast<float>(y) + 0.5f) / static_cast<float>(height_));
    for (int x = 0; x < width_; ++x) x_[x] = (static_cast<float>(x) + 0.5f) / static_cast<float>(width_);
  }

  // `warp` by separable operations: every line is read between two lines, and all of them at the same columns.
  void move_lines(const float* row, const Prepared& prepared, const int* run, int length) {
    const float half_y = 0.5f / static_cast<float>(height_), half_x = 0.5f / static_cast<float>(width_);
    start_line(0);
    for (int k = length - 1; k >= 0; --k) {
      if (run[k] == CROP_COLUMNS) map_line<CROP_COLUMNS>(row, prepared);
      if (run[k] == RESIZED_CROP) map_line<RESIZED_CROP>(row, prepared);
      if (run[k] == FLIP) map_line<FLIP>(row, prepared);
    }
    std::fill(y_.begin(), y_.end(), 0.0f);  // columns are looked up in a line, wherever that is
    locate();
    const bool columns = length > 1 || run[0] != CROP_ROWS;
    const int floats = line_, count = width_;
    const int* const corners = corner_.data();
    const float* const shares = x_.data();
    for (int y = 0; y < height_; ++y) {
      Position at = {(static_cast<float>(y) + 0.5f) / static_cast<float>(height_), 0.5f};
      for (int k = length - 1; k >= 0; --k) at = source_position(run[k], row, prepared, at, half_y, half_x);
      const Between in_y = between(at.y * static_cast<float>(height_) - 0.5f, height_);
      const float *above = line(in_y.first), *below = line(in_y.second), share = in_y.share;
      float* const out = other_.data() + size_t(y) * floats;
      float* const read = columns ? middle() : out;
      for (int i = 0; i < floats; ++i) read[i] = above[i] + share * (below[i] - above[i]);
      for (int x = 0; columns && x < count; ++x) {
        TwoPixels pixel;
        std::memcpy(&pixel, read + corners[x], sizeof pixel);
        pixel += shares[x] * (RCMSTR_SECOND(pixel) - pixel);
        std::memcpy(out + CHANNELS * x, &pixel, sizeof(Pixel));
      }
    }
    image_.swap(other_);
  }

  // The positions of a line as the place of the pixel before each (`corner_`) and the shares of the ones after it.
  void locate() {
    float* const ys = y_.data();
    float* const xs = x_.data();
    int* const corners = corner_.data();
    const int line = line_, count = width_;
    const float height = static_cast<float>(height_), width = static_cast<float>(width_);
    for (int x = 0; x < count; ++x) {
      const float in_y = clamped(ys[x] * height - 0.5f, 0.0f, height - 1.0f);
      const float in_x = clamped(xs[x] * width - 0.5f, 0.0f, width - 1.0f);
      const int first_y = static_cast<int>(in_y), first_x = static_cast<int>(in_x);
      ys[x] = in_y - static_cast<float>(first_y);
      xs[x] = in_x - static_cast<float>(first_x);
      corners[x] = first_y * line + CHANNELS * first_x;
    }
  }

  // `sample` at the positions of a line. A pixel and the one to its right are read as eight floats; beyond the border
  // these are others, with a share of 0. It is written as four, of which the next pixel overwrites the last.
  void sample_line(float* out) {
    locate();
    const float* const ys = y_.data();
    const float* const xs = x_.data();
    const int* const corners = corner_.data();
    const float* const image = image_.data();
    const int line = line_, count = width_;
    for (int x = 0; x < count; ++x) {
      const float* const corner = image + corners[x];
      TwoPixels above, below;
      std::memcpy(&above, corner, sizeof above);
      std::memcpy(&below, corner + line, sizeof below);
      above += ys[x] * (below - above);
      above += xs[x] * (RCMSTR_SECOND(above) - above);
      std::memcpy(out + CHANNELS * x, &above, sizeof(Pixel));
    }
  }

  // out = centre * taps[0] + sum_k taps[k] * (centre[-k * step] + centre[k * step]) over one line, where `step` is
  // given, and otherwise the k-th lines before and after it.
  template <int radius, class Around>
  void weigh(const Prepared& p, float* out, const Around& around) const {
    const float *before[MAX_RADIUS + 1], *after[MAX_RADIUS + 1];
    float taps[radius + 1];
    for (int k = 0; k <= radius; ++k) before[k] = around(-k), after[k] = around(k), taps[k] = p.taps[k];
    for (int i = 0; i < line_; ++i) {
      float sum = taps[0] * before[0][i];
      for (int k = 1; k <= radius; ++k) sum += taps[k] * (before[k][i] + after[k][i]);
      out[i] = sum;
    }
  }

  template <int radius>
  void blur_with(const Prepared& p) {
    for (int y = 0; y < height_; ++y) {
      float* const m = middle();
      weigh<radius>(p, m, [&](int k) { return line(y + k); });
      extend(radius);
      weigh<radius>(p, other_.data() + size_t(y) * line_, [&](int k) { return m + CHANNELS * k; });
    }
    image_.swap(other_);
  }

  void blur(const Prepared& p) {
    static_assert(MAX_RADIUS == 6);
    if (p.radius <= 1) blur_with<1>(p);
    if (p.radius == 2) blur_with<2>(p);
    if (p.radius == 3) blur_with<3>(p);
    if (p.radius == 4) blur_with<4>(p);
    if (p.radius == 5) blur_with<5>(p);
    if (p.radius == 6) blur_with<6>(p);
  }

  void sharpen(float alpha, float lightness) {
    const Sharpening sharpened(levels_, alpha, lightness);
    float* const m = middle();
    for (int y = 0; y < height_; ++y) {
      const float *above = line(y - 1), *here = line(y), *below = line(y + 1);
      for (int i = 0; i < line_; ++i) m[i] = above[i] + here[i] + below[i];
      extend(1);
      float* const out = other_.data() + size_t(y) * line_;
      for (int i = 0; i < line_; ++i)
        out[i] = sharpened(here[i], m[i - CHANNELS] + m[i] + m[i + CHANNELS]);
    }
    image_.swap(other_);
    levels_ = Levels();
  }

  // f of every pixel; a linear f of weights that sum to 1 works on what is stored, others on grey levels.
  template <bool linear, class Recolour>
  void recolour(const Recolour& f) {
    const Levels levels = linear ? Levels() : levels_;
    float* const p = image_.data();
    const int count = height_ * width_;
    for (int i = 0; i < count; ++i) {
      const Colour made = f(Colour{at_levels(p[CHANNELS * i], levels), at_levels(p[CHANNELS * i + 1], levels),
                                   at_levels(p[CHANNELS * i + 2], levels)});
      p[CHANNELS * i] = made.red, p[CHANNELS * i + 1] = made.green, p[CHANNELS * i + 2] = made.blue;
    }
    if (!linear) levels_ = Levels();
  }

  RCMSTR_CLONES void grey() {
    recolour<true>([](Colour c) { return Colour{brightness(c), brightness(c), brightness(c)}; });
  }

  RCMSTR_CLONES void solarise(float threshold) {
    const Levels levels = levels_;
    for (int i = 0; i < height_ * line_; ++i) image_[i] = solarised(at_levels(image_[i], levels), threshold);
    levels_ = Levels();
  }

  // The mean brightness as a grey level. Sums are kept for LANES floats apart, so that they are added as vectors.
  float mean_brightness() const {
    constexpr int LANES = 8 * CHANNELS;
    float sums[LANES] = {};
    const int count = height_ * line_, whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES)
      for (int k = 0; k < LANES; ++k) sums[k] += image_[i + k];
    for (int i = whole; i < count; ++i) sums[i - whole] += image_[i];
    Colour total = {0.0f, 0.0f, 0.0f};
    for (int k = 0; k < LANES; k += CHANNELS)
      total.red += sums[k], total.green += sums[k + 1], total.blue += sums[k + 2];
    return at_levels(brightness(total) / static_cast<float>(height_ * width_), levels_);
  }

  // One step of the colour jitter.
  RCMSTR_CLONES void jitter(int step, const float* amounts) {
    const float amount = amounts[step];
    if (step == JITTER_HUE) recolour<false>([=](Colour c) { return hue_shifted(c, amount); });
    if (step == JITTER_SATURATION)
      recolour<false>([=](Colour c) { return jittered<JITTER_SATURATION>(c, amount, 0.0f); });
    if (step > JITTER_CONTRAST) return;
    const float base = step == JITTER_CONTRAST ? mean_brightness() : 0.0f;
    const Levels levels = levels_;
    for (int i = 0; i < height_ * line_; ++i) image_[i] = stretched(at_levels(image_[i], levels), base, amount);
    levels_ = Levels();
  }

  int height_, width_, line_;
  Levels levels_;
  std::vector<float> y_, x_;
  std::vector<int> corner_;
  std::vector<float> image_, other_, padded_;
};

}  // namespace
}  // namespace rcmstr
