// Augmented views: per-pixel mathematics, the same on the host and on the GPU.
//
// rcmstr_fast/ops/augment_views/reference.py fixes the meaning and explains it.
// An image is [H, W, 3] grey levels as float, channels innermost. Positions are fractions of height and width.
#pragma once
#include <cstdint>
#include <cstring>

#include "augment_colour.h"
#include "augment_draw.h"

namespace rcmstr {

constexpr int CHANNELS = 3;
constexpr int MAX_RADIUS = 6;  // of the blur: floor(3 * 2 + 0.5)

struct ViewShape {
  int64_t views, batch;
  int height, width;
};

// How views are written. With `places` [B, patches] there is one more picture for each image, behind the views, which
// holds the strips of the first views in another order: strip s of view 0 of image b is also written to place
// places[b, s] = image * patches + strip. A null pointer: there is no such picture.
struct Output {
  bool bfloat16;
  const int64_t* places;
  int patches;
};

RCMSTR_HD inline bool is_geometric(int operation) {
  return operation == CROP_ROWS || operation == CROP_COLUMNS || (operation >= PIECEWISE_AFFINE && operation <= ROTATE) ||
         operation == RESIZED_CROP;
}

// Geometric operations that move whole rows and columns.
RCMSTR_HD inline bool is_separable(int operation) {
  return operation == CROP_ROWS || operation == CROP_COLUMNS || operation == FLIP || operation == RESIZED_CROP;
}

// What the pixels of a view share: half of the symmetric blur kernel (0 beyond the radius), the homography's
// coefficients a..h, and the rotation.
struct Prepared {
  int radius;
  float taps[MAX_RADIUS + 1];
  float homography[8];
  float cosine, sine;
};

RCMSTR_HD inline void prepare(const float* row, Prepared& p) {
  const float sigma = row[ROW_SIGMA];
  // In double the product is exact: host, GPU and reference cannot disagree about the radius.
  p.radius = static_cast<int>(3.0 * static_cast<double>(sigma) + 0.5);
  if (p.radius > static_cast<int>(row[ROW_RADIUS])) p.radius = static_cast<int>(row[ROW_RADIUS]);
  float sum = 0.0f;
  for (int i = 0; i <= p.radius; ++i) {
    const float z = static_cast<float>(i) / sigma;
    p.taps[i] = expf(-0.5f * z * z);
    sum += i == 0 ? p.taps[i] : 2.0f * p.taps[i];
  }
  for (int i = 0; i <= p.radius; ++i) p.taps[i] /= sum;
  for (int i = p.radius + 1; i <= MAX_RADIUS; ++i) p.taps[i] = 0.0f;

  const float* c = row + ROW_CORNERS;  // clockwise from the top left, y then x
  const float y0 = c[0], x0 = c[1], y1 = c[2], x1 = 1.0f + c[3], y2 = 1.0f + c[4], x2 = 1.0f + c[5], y3 = 1.0f + c[6],
              x3 = c[7];
  const float sum_x = x0 - x1 + x2 - x3, sum_y = y0 - y1 + y2 - y3;
  const float right_x = x1 - x2, right_y = y1 - y2, left_x = x3 - x2, left_y = y3 - y2;
  const float determinant = right_x * left_y - left_x * right_y;
  const float g = (sum_x * left_y - left_x * sum_y) / determinant;
  const float h = (right_x * sum_y - sum_x * right_y) / determinant;
  const float coefficients[8] = {x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1,
                                 y3 - y0 + h * y3, y0,               g,  h};
  for (int i = 0; i < 8; ++i) p.homography[i] = coefficients[i];

  const float angle = row[ROW_ANGLE] * 0.017453292519943295f;
  p.cosine = cosf(angle);
  p.sine = sinf(angle);
}

struct Position {
  float y, x;
};

// A place between two entries of a line of `length`: the first of them and the share of the second.
struct Between {
  int first, second;
  float share;
};

RCMSTR_HD inline Between between(float at, int length) {
  const float inside = clamped(at, 0.0f, static_cast<float>(length - 1));
  const int first = static_cast<int>(inside);
  return {first, first + (first < length - 1), inside - static_cast<float>(first)};
}

template <class T>  // float, or a vector of floats
RCMSTR_HD inline T bilinear(T a, T b, T c, T d, float share_y, float share_x) {
  const T top = a + share_x * (b - a), bottom = c + share_x * (d - c);
  return top + share_y * (bottom - top);
}

// A position, cut to the rectangle of the pixel centres.
RCMSTR_HD inline Position inside(Position at, float half_y, float half_x) {
  return {clamped(at.y, half_y, 1.0f - half_y), clamped(at.x, half_x, 1.0f - half_x)};
}

// Where the output position of one geometric operation reads, cut to the rectangle of the pixel centres.
RCMSTR_HD inline Position source_position(int operation, const float* row, const Prepared& p, Position at, float half_y,
                                          float half_x) {
  if (operation == CROP_ROWS) {
    at.y = row[ROW_ROWS] + at.y * (1.0f - row[ROW_ROWS] - row[ROW_ROWS + 1]);
  } else if (operation == CROP_COLUMNS) {
    at.x = row[ROW_COLUMNS] + at.x * (1.0f - row[ROW_COLUMNS] - row[ROW_COLUMNS + 1]);
  } else if (operation == RESIZED_CROP) {
    at.y = row[ROW_BOX] + at.y * row[ROW_BOX + 2];
    at.x = row[ROW_BOX + 1] + at.x * row[ROW_BOX + 3];
  } else if (operation == FLIP) {
    at.x = 1.0f - at.x;
  } else if (operation == ROTATE) {  // about the middle, in pixels: half_y / half_x is the width over the height
    const float y = at.y - 0.5f, x = at.x - 0.5f;
    at.y = 0.5f + p.cosine * y - p.sine * (half_y / half_x) * x;
    at.x = 0.5f + p.cosine * x + p.sine * (half_x / half_y) * y;
  } else if (operation == PIECEWISE_AFFINE) {
    const Between y = between(3.0f * at.y, 4), x = between(3.0f * at.x, 4);
    const float* top = row + ROW_GRID + 8 * y.first;
    const float* bottom = row + ROW_GRID + 8 * y.second;
    const int l = 2 * x.first, r = 2 * x.second;
    at.y += bilinear(top[l], top[r], bottom[l], bottom[r], y.share, x.share);
    at.x += bilinear(top[l + 1], top[r + 1], bottom[l + 1], bottom[r + 1], y.share, x.share);
  } else {
    const float* k = p.homography;
    const float scale = 1.0f / (k[6] * at.x + k[7] * at.y + 1.0f);
    const float x = (k[0] * at.x + k[1] * at.y + k[2]) * scale;
    at.y = (k[3] * at.x + k[4] * at.y + k[5]) * scale;
    at.x = x;
  }
  return inside(at, half_y, half_x);
}

// The three channels of `image` at a position, bilinearly between pixel centres.
RCMSTR_HD inline void sample(const float* image, int height, int width, Position at, float* out) {
  const Between y = between(at.y * static_cast<float>(height) - 0.5f, height);
  const Between x = between(at.x * static_cast<float>(width) - 0.5f, width);
  const float* top = image + CHANNELS * width * y.first;
  const float* bottom = image + CHANNELS * width * y.second;
  const int l = CHANNELS * x.first, r = CHANNELS * x.second;
  for (int c = 0; c < CHANNELS; ++c)
    out[c] = bilinear(top[l + c], top[r + c], bottom[l + c], bottom[r + c], y.share, x.share);
}

// Grey levels are scale * stored + offset. Contrast changes these two numbers only: blur and warps take weighted means,
// which leave them as they are, and the operations that are not linear and writing apply them on the way.
struct Levels {
  float scale = 1.0f, offset = 0.0f;
};

RCMSTR_HD inline Levels contrasted(Levels levels, float factor) {
  return {factor * levels.scale, 127.0f + factor * (levels.offset - 127.0f)};
}

// Sharpening of a stored value with the sum of its 3x3 neighbourhood, itself included; gives a grey level.
struct Sharpening {
  float centre, neighbour, offset;
  RCMSTR_HD Sharpening(Levels levels, float alpha, float lightness) {
    const float weight = 1.0f - alpha + alpha * (9.0f + lightness);
    centre = weight * levels.scale;
    neighbour = alpha * levels.scale;
    offset = (weight - 9.0f * alpha) * levels.offset;
  }
  RCMSTR_HD float operator()(float value, float neighbourhood) const {
    return clamped(centre * value - neighbour * neighbourhood + offset, 0.0f, 255.0f);
  }
};

// What turns stored values into (grey / 255 - 0.5) / 0.5.
RCMSTR_HD inline Levels normalising(Levels levels) {
  return {levels.scale * (2.0f / 255.0f), levels.offset * (2.0f / 255.0f) - 1.0f};
}

RCMSTR_HD inline float at_levels(float stored, Levels levels) { return levels.scale * stored + levels.offset; }

RCMSTR_HD inline void store(float value, float* out) { *out = value; }

// As bfloat16, rounded to nearest even; the value is finite.
RCMSTR_HD inline void store(float value, uint16_t* out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  *out = static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Rows [V, B, ROW_SIZE] of the images `index` [B]; view v takes the stream first_stream + v.
void draw_parameters(const int64_t* index, float* rows, int64_t views, int64_t batch, uint64_t seed, uint32_t epoch,
                     uint32_t first_stream, const Preset& preset, int threads);

// Views [V, B, H, W, 3] (V + 1 with places), normalised, of images [B, H, W, 3] with the given rows.
void apply_parameters(const uint8_t* images, const float* rows, void* views, ViewShape shape, Output output,
                      int threads);

// The same two on the GPU, in the order of `stream` (a cudaStream_t); throw std::runtime_error where CUDA refuses.
void draw_parameters_cuda(const int64_t* index, float* rows, int64_t views, int64_t batch, uint64_t seed,
                          uint32_t epoch, uint32_t first_stream, const Preset& preset, void* stream);
void apply_parameters_cuda(const uint8_t* images, const float* rows, void* views, ViewShape shape, Output output,
                           void* stream);

}  // namespace rcmstr
