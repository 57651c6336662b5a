// Host driver of augmentation: threads over (view, image).
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "augment.h"
#include "augment_view.h"

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

// The first words of a stream, made at once.
struct Words {
  static constexpr int BLOCKS = (WORDS + 3) / 4;
  uint32_t made[4][BLOCKS];

  RCMSTR_CLONES void make(const Stream& s) {
    for (int i = 0; i < BLOCKS; ++i) {
      const Words4 block = philox(s.seed, static_cast<uint32_t>(i), s.index_low, s.index_high_and_stream, s.epoch);
      for (int w = 0; w < 4; ++w) made[w][i] = block.w[w];
    }
  }
  uint32_t word(uint32_t i) const { return made[i % 4][i / 4]; }
};

}  // namespace

void draw_parameters(const int64_t* index, float* rows, int64_t views, int64_t batch, uint64_t seed, uint32_t epoch,
                     uint32_t first_stream, const Preset& preset, int threads) {
  std::atomic<int64_t> next{0};
  in_threads(threads, views * batch, [&] {
    Words words;
    for (int64_t item; (item = next++) < views * batch;) {
      const uint64_t sample_index = static_cast<uint64_t>(index[item % batch]);
      words.make(Stream(seed, first_stream + static_cast<uint32_t>(item / batch), epoch, sample_index));
      float* const row = rows + item * ROW_SIZE;
      draw_order(words, preset, row);
      draw_box(words, preset, row);
      draw_jitter_order(words, row);
      for (int slot = ROW_CONTRAST; slot < ROW_JITTER_ORDER; ++slot) row[slot] = draw_number(words, preset, slot);
      row[ROW_RADIUS] = preset.radius;
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
