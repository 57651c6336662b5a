// Host driver of augment.h: threads over (view, image), inner loops over rows of pixels that compilers vectorise.
#include "augment.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

// The pixel loops are compiled for wider vectors as well; the processor decides when the module is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RCMSTR_CLONES __attribute__((target_clones("default", "arch=x86-64-v3"), flatten))
#else
#define RCMSTR_CLONES
#endif

namespace rcmstr {
namespace {

// work() in up to `threads` threads, one of them the caller's; the first exception is passed on.
template <class Work>
void in_threads(int threads, int64_t items, const Work& work) {
  std::exception_ptr failure;
  std::mutex guard;
  const auto guarded = [&] {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      failure = std::current_exception();
    }
  };
  std::vector<std::thread> team;
  try {
    for (int64_t t = 1; t < std::min<int64_t>(threads, items); ++t) team.emplace_back(guarded);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run do all of the work.
  }
  guarded();
  for (std::thread& thread : team) thread.join();
  if (failure) std::rethrow_exception(failure);
}

// A few floats that are worked on at once.
typedef float Shift __attribute__((vector_size(8)));
typedef float Pixel __attribute__((vector_size(16)));

template <class T>
T read(const float* from) {
  T values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

// One thread's buffers and the operations on them.
class View {
 public:
  View(int height, int width)
      : height_(height), width_(width), line_(CHANNELS * width), y_(width), x_(width),
        at_(width), image_(size_t(height) * line_ + 1), other_(size_t(height) * line_ + 1),
        padded_(line_ + 2 * CHANNELS * MAX_RADIUS) {}

  RCMSTR_CLONES void make(const uint8_t* source, const float* row) {
    for (int i = 0; i < height_ * line_; ++i) image_[i] = source[i];
    Prepared prepared;
    prepare(row, prepared);
    const int count = static_cast<int>(row[ROW_COUNT]);
    int order[MAX_SUBSET];
    for (int i = 0; i < count; ++i) order[i] = static_cast<int>(row[ROW_ORDER + i]);
    for (int i = 0; i < count;) {
      int end = i;
      while (end < count && is_geometric(order[end])) ++end;
      if (end > i) {
        warp(row, prepared, order + i, end - i);
        i = end;
        continue;
      }
      if (order[i] == CONTRAST) contrast(row[ROW_CONTRAST]);
      if (order[i] == BLUR) blur(prepared);
      if (order[i] == SHARPEN) sharpen(row[ROW_SHARPEN], row[ROW_SHARPEN + 1]);
      ++i;
    }
    for (float& value : image_) value = normalised(value);
  }

  template <class T>
  void write(T* out) const {
    for (int i = 0; i < height_ * line_; ++i) store(image_[i], out + i);
  }

  // One of `patches` strips, to the place of strip `to` of another picture.
  template <class T>
  void write_strip(int from, int to, int patches, T* out) const {
    const int length = line_ / patches;
    for (int y = 0; y < height_; ++y) {
      const float* source = image_.data() + size_t(y) * line_ + from * length;
      T* target = out + size_t(y) * line_ + to * length;
      for (int i = 0; i < length; ++i) store(source[i], target + i);
    }
  }

 private:
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
    for (int i = 0; i < width_; ++i) {
      Position at = {y_[i], x_[i]};
      if constexpr (operation == PIECEWISE_AFFINE) {  // as source_position, both shifts at once
        const Between in_y = between(3.0f * at.y, 4), in_x = between(3.0f * at.x, 4);
        const float* const top = row + ROW_GRID + 8 * in_y.first + 2 * in_x.first;
        const float* const bottom = top + 8 * (in_y.second - in_y.first);
        const int right = 2 * (in_x.second - in_x.first);
        const Shift shift = bilinear(read<Shift>(top), read<Shift>(top + right), read<Shift>(bottom),
                                     read<Shift>(bottom + right), in_y.share, in_x.share);
        at = inside({at.y + shift[0], at.x + shift[1]}, half_y, half_x);
      } else {
        at = source_position(operation, row, prepared, at, half_y, half_x);
      }
      y_[i] = at.y;
      x_[i] = at.x;
    }
  }

  void warp(const float* row, const Prepared& prepared, const int* run, int length) {
    for (int y = 0; y < height_; ++y) {
      std::fill(y_.begin(), y_.end(), (static_cast<float>(y) + 0.5f) / static_cast<float>(height_));
      for (int x = 0; x < width_; ++x) x_[x] = (static_cast<float>(x) + 0.5f) / static_cast<float>(width_);
      for (int k = length - 1; k >= 0; --k) {
        if (run[k] == CROP_ROWS) map_line<CROP_ROWS>(row, prepared);
        if (run[k] == CROP_COLUMNS) map_line<CROP_COLUMNS>(row, prepared);
        if (run[k] == PIECEWISE_AFFINE) map_line<PIECEWISE_AFFINE>(row, prepared);
        if (run[k] == PERSPECTIVE) map_line<PERSPECTIVE>(row, prepared);
      }
      sample_line(other_.data() + size_t(y) * line_);
    }
    image_.swap(other_);
  }

  // `sample` at the positions of a line. A pixel is read and written as four floats, of which the last is not its own:
  // the next pixel overwrites it, and both images are one float longer.
  void sample_line(float* out) {
    for (int x = 0; x < width_; ++x) {
      const Between in_y = between(y_[x] * static_cast<float>(height_) - 0.5f, height_);
      const Between in_x = between(x_[x] * static_cast<float>(width_) - 0.5f, width_);
      y_[x] = in_y.share;
      x_[x] = in_x.share;
      at_[x] = {in_y.first * line_ + CHANNELS * in_x.first, (in_y.second - in_y.first) * line_,
                CHANNELS * (in_x.second - in_x.first)};
    }
    for (int x = 0; x < width_; ++x) {
      const float* const corner = image_.data() + at_[x].corner;
      const float* const below = corner + at_[x].down;
      const int right = at_[x].right;
      const Pixel pixel = bilinear(read<Pixel>(corner), read<Pixel>(corner + right), read<Pixel>(below),
                                   read<Pixel>(below + right), y_[x], x_[x]);
      std::memcpy(out + CHANNELS * x, &pixel, sizeof pixel);
    }
  }

  void contrast(float factor) {
    for (float& value : image_) value = contrasted(value, factor);
  }

  // out = centre * taps[0] + sum_k taps[k] * (before(k) + after(k)), over one line.
  template <class Before, class After>
  void weigh(const Prepared& p, float* out, const float* centre, const Before& before, const After& after) {
    for (int i = 0; i < line_; ++i) out[i] = p.taps[0] * centre[i];
    for (int k = 1; k <= p.radius; ++k) {
      const float* a = before(k);
      const float* b = after(k);
      const float tap = p.taps[k];
      for (int i = 0; i < line_; ++i) out[i] += tap * (a[i] + b[i]);
    }
  }

  void blur(const Prepared& p) {
    for (int y = 0; y < height_; ++y) {
      float* m = middle();
      weigh(p, m, line(y), [&](int k) { return line(y - k); }, [&](int k) { return line(y + k); });
      extend(p.radius);
      weigh(p, other_.data() + size_t(y) * line_, m, [&](int k) { return m - CHANNELS * k; },
            [&](int k) { return m + CHANNELS * k; });
    }
    image_.swap(other_);
  }

  void sharpen(float alpha, float lightness) {
    for (int y = 0; y < height_; ++y) {
      const float *above = line(y - 1), *here = line(y), *below = line(y + 1);
      float* m = middle();
      for (int i = 0; i < line_; ++i) m[i] = above[i] + here[i] + below[i];
      extend(1);
      float* out = other_.data() + size_t(y) * line_;
      for (int i = 0; i < line_; ++i)
        out[i] = sharpened(here[i], m[i - CHANNELS] + m[i] + m[i + CHANNELS], alpha, lightness);
    }
    image_.swap(other_);
  }

  // Where the four pixels around a position are: the first, and the steps to the others.
  struct Corners {
    int corner, down, right;
  };

  int height_, width_, line_;
  std::vector<float> y_, x_;
  std::vector<Corners> at_;
  std::vector<float> image_, other_, padded_;
};

template <class T>
void apply(const uint8_t* images, const float* rows, T* views, ViewShape shape, Output output, int threads) {
  const int64_t items = shape.views * shape.batch, n = int64_t(shape.height) * shape.width * CHANNELS;
  std::atomic<int64_t> next{0};
  in_threads(threads, items, [&] {
    View view(shape.height, shape.width);
    for (int64_t item; (item = next++) < items;) {
      view.make(images + item % shape.batch * n, rows + item * ROW_SIZE);
      view.write(views + item * n);
      if (output.places == nullptr || item >= shape.batch) continue;
      for (int strip = 0; strip < output.patches; ++strip) {
        const int64_t place = output.places[item * output.patches + strip];
        if (place < 0 || place >= shape.batch * output.patches) continue;
        T* const picture = views + (items + place / output.patches) * n;
        view.write_strip(strip, static_cast<int>(place % output.patches), output.patches, picture);
      }
    }
  });
}

}  // namespace

void draw_parameters(const int64_t* index, float* rows, int64_t views, int64_t batch, uint64_t seed, uint32_t epoch,
                     uint32_t first_stream, Preset preset, int threads) {
  std::atomic<int64_t> next{0};
  in_threads(threads, views * batch, [&] {
    for (int64_t item; (item = next++) < views * batch;) {
      const uint64_t sample_index = static_cast<uint64_t>(index[item % batch]);
      const Stream stream(seed, first_stream + static_cast<uint32_t>(item / batch), epoch, sample_index);
      for (int slot = 0; slot < ROW_SIZE; ++slot) rows[item * ROW_SIZE + slot] = draw_parameter(stream, preset, slot);
    }
  });
}

void apply_parameters(const uint8_t* images, const float* rows, void* views, ViewShape shape, Output output,
                      int threads) {
  if (output.bfloat16)
    apply(images, rows, static_cast<uint16_t*>(views), shape, output, threads);
  else
    apply(images, rows, static_cast<float*>(views), shape, output, threads);
}

}  // namespace rcmstr
