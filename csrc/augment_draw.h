// Drawing of a view's row of parameters, the same on the host and on the GPU.
//
// rcmstr_fast/ops/augment_views/parameters.py fixes the meaning: names, places of a row and words are the same.
#pragma once
#include <cstdint>

#include "philox.h"

namespace rcmstr {

enum Operation : int {
  CONTRAST, BLUR, CROP_ROWS, CROP_COLUMNS, SHARPEN, PIECEWISE_AFFINE, PERSPECTIVE,
  FLIP, ROTATE, COLOUR_JITTER, GREY, SOLARISE, RESIZED_CROP, OPERATIONS
};

constexpr int ROW_COUNT = 0, ROW_ORDER = 1, ROW_CONTRAST = 27, ROW_SIGMA = 28, ROW_ROWS = 29, ROW_COLUMNS = 31,
              ROW_SHARPEN = 33, ROW_ANGLE = 35, ROW_THRESHOLD = 36, ROW_JITTER = 37, ROW_GRID = 41, ROW_CORNERS = 73,
              ROW_JITTER_ORDER = 81, ROW_BOX = 85, ROW_RADIUS = 89, ROW_SIZE = 90;
constexpr int WORD_ORDER = 1, WORD_UNIFORM = 8, WORD_GRID = 20, WORD_CORNERS = 84, WORD_ORDER_REST = 100,
              WORD_CHANCES = 106, WORD_THEN = 119, WORD_JITTER = 132, WORD_JITTER_ORDER = 136, WORD_BOX = 140,
              WORD_PLACE = 158, WORDS = 160;
// There are 9 attempts at a box because then a view takes a whole number of Philox blocks of 4 words, and their number
// (40) fills the vectors of the host.
constexpr int MAX_CHAIN = 2 * OPERATIONS, JITTER_STEPS = 4, ATTEMPTS = 9;
static_assert(ROW_CONTRAST == ROW_ORDER + MAX_CHAIN);

constexpr float MAX_CORNER = 0.3f;

// Places in Preset::low and ::span.
constexpr int RANGE_GRID = 8, RANGE_CORNERS = 9, RANGE_ANGLE = 10, RANGE_JITTER = 12,
              RANGE_AREA = 16, RANGE_ASPECT = 17, RANGES = 18;

// A preset as `table` of parameters.py writes it. All are float, whole numbers too.
struct Preset {
  float operations, smallest, largest, random, then, radius;
  float codes[OPERATIONS], chances[OPERATIONS], then_codes[OPERATIONS], then_chances[OPERATIONS];
  float low[RANGES], span[RANGES];
};

// How many of the `count` keys come before the i-th in ascending order; equal ones keep their order.
RCMSTR_HD inline int rank_of(const uint32_t* keys, int count, int i) {
  int before = 0;
  for (int j = 0; j < count; ++j) before += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
  return before;
}

// ROW_COUNT and the codes from ROW_ORDER on. `Source`: a Stream, or its first WORDS words.
template <class Source>
RCMSTR_HD inline void draw_order(const Source& source, const Preset& preset, float* row) {
  const int operations = static_cast<int>(preset.operations), smallest = static_cast<int>(preset.smallest);
  const uint32_t sizes = static_cast<uint32_t>(preset.largest) - smallest + 1;
  const int chosen = smallest + static_cast<int>(uint64_t(source.word(0)) * sizes >> 32);
  uint32_t keys[OPERATIONS];
  int rank[OPERATIONS], at[OPERATIONS], count = 0;
  constexpr int first_keys = WORD_UNIFORM - WORD_ORDER;
  for (int i = 0; i < operations; ++i)
    keys[i] = source.word(i < first_keys ? WORD_ORDER + i : WORD_ORDER_REST + i - first_keys);
  for (int i = 0; i < operations; ++i) {
    rank[i] = rank_of(keys, operations, i);
    at[rank[i]] = i;
  }
  for (int place = 0; place < operations; ++place) {
    const int i = preset.random != 0.0f ? at[place] : place;
    if (rank[i] < chosen && uniform_of(source.word(WORD_CHANCES + i)) < preset.chances[i])
      row[ROW_ORDER + count++] = preset.codes[i];
  }
  for (int i = 0; i < static_cast<int>(preset.then); ++i)
    if (uniform_of(source.word(WORD_THEN + i)) < preset.then_chances[i]) row[ROW_ORDER + count++] = preset.then_codes[i];
  row[ROW_COUNT] = static_cast<float>(count);
  for (int place = count; place < MAX_CHAIN; ++place) row[ROW_ORDER + place] = -1.0f;
}

template <class Source>
RCMSTR_HD inline float draw_range(const Source& source, const Preset& preset, int range, int word) {
  return preset.low[range] + preset.span[range] * uniform_of(source.word(word));
}

// The jitter's steps from ROW_JITTER_ORDER on, by ascending words.
template <class Source>
RCMSTR_HD inline void draw_jitter_order(const Source& source, float* row) {
  uint32_t keys[JITTER_STEPS];
  for (int i = 0; i < JITTER_STEPS; ++i) keys[i] = source.word(WORD_JITTER_ORDER + i);
  for (int i = 0; i < JITTER_STEPS; ++i)
    row[ROW_JITTER_ORDER + rank_of(keys, JITTER_STEPS, i)] = static_cast<float>(i);
}

// The four places from ROW_BOX on: of ATTEMPTS crops the first that fits into the picture, the first one cut otherwise.
// In double, so that host, GPU and reference agree which one fits.
template <class Source>
RCMSTR_HD inline void draw_box(const Source& source, const Preset& preset, float* row) {
  double height = 2.0, width = 2.0, first_height = 1.0, first_width = 1.0;
  for (int attempt = 0; attempt < ATTEMPTS && (height > 1.0 || width > 1.0); ++attempt) {
    const auto drawn = [&](int range, int word) {
      return double(preset.low[range]) + double(preset.span[range]) * double(uniform_of(source.word(word)));
    };
    const double area = drawn(RANGE_AREA, WORD_BOX + 2 * attempt);
    const double aspect = exp(drawn(RANGE_ASPECT, WORD_BOX + 2 * attempt + 1));
    height = sqrt(area / aspect);
    width = sqrt(area * aspect);
    if (attempt == 0) {
      first_height = height < 1.0 ? height : 1.0;
      first_width = width < 1.0 ? width : 1.0;
    }
  }
  if (height > 1.0 || width > 1.0) {
    height = first_height;
    width = first_width;
  }
  row[ROW_BOX] = static_cast<float>((1.0 - height) * uniform_of(source.word(WORD_PLACE)));
  row[ROW_BOX + 1] = static_cast<float>((1.0 - width) * uniform_of(source.word(WORD_PLACE + 1)));
  row[ROW_BOX + 2] = static_cast<float>(height);
  row[ROW_BOX + 3] = static_cast<float>(width);
}

// The `slot`-th number of a row, from ROW_CONTRAST to ROW_JITTER_ORDER: a function of the stream alone, so that GPU
// threads can share the row.
template <class Source>
RCMSTR_HD inline float draw_number(const Source& source, const Preset& preset, int slot) {
  if (slot < ROW_ANGLE) return draw_range(source, preset, slot - ROW_CONTRAST, slot - ROW_CONTRAST + WORD_UNIFORM);
  if (slot < ROW_JITTER)
    return draw_range(source, preset, RANGE_ANGLE + slot - ROW_ANGLE, WORD_UNIFORM + RANGE_ANGLE + slot - ROW_ANGLE);
  if (slot < ROW_GRID)
    return draw_range(source, preset, RANGE_JITTER + slot - ROW_JITTER, WORD_JITTER + slot - ROW_JITTER);
  if (slot < ROW_CORNERS) {  // a node of the grid stays in the picture
    const int i = slot - ROW_GRID, word = WORD_GRID + 2 * i;
    const float node = static_cast<float>(i % 2 == 0 ? i / 8 : i / 2 % 4) / 3.0f;
    const float deviation = draw_range(source, preset, RANGE_GRID, WORD_UNIFORM + RANGE_GRID);
    const float shift = deviation * normal_of(source.word(word), source.word(word + 1));
    return shift < -node ? -node : (shift > 1.0f - node ? 1.0f - node : shift);
  }
  // A corner moves inwards, so little that the four stay convex.
  const int i = slot - ROW_CORNERS, word = WORD_CORNERS + 2 * i;
  const float deviation = draw_range(source, preset, RANGE_CORNERS, WORD_UNIFORM + RANGE_CORNERS);
  const float size = fabsf(deviation * normal_of(source.word(word), source.word(word + 1)));
  const bool forward = i < 3 || i == 7;  // clockwise from the top left, y then x
  return (forward ? 1.0f : -1.0f) * (size < MAX_CORNER ? size : MAX_CORNER);
}

}  // namespace rcmstr
