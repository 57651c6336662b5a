// Operations on the colour of one pixel, the same on the host and on the GPU.
#pragma once
#include "philox.h"

namespace rcmstr {

constexpr float RED_SHARE = 0.299f, GREEN_SHARE = 0.587f, BLUE_SHARE = 0.114f;

struct Colour {
  float red, green, blue;
};

enum JitterStep : int { JITTER_BRIGHTNESS, JITTER_CONTRAST, JITTER_SATURATION, JITTER_HUE };

RCMSTR_HD inline float clamped(float value, float low, float high) {
  return value < low ? low : (value > high ? high : value);
}

RCMSTR_HD inline float brightness(Colour c) {
  return RED_SHARE * c.red + GREEN_SHARE * c.green + BLUE_SHARE * c.blue;
}

RCMSTR_HD inline float solarised(float value, float threshold) { return value >= threshold ? 255.0f - value : value; }

// The distance from `base`, times `factor`; a grey level again.
RCMSTR_HD inline float stretched(float value, float base, float factor) {
  return clamped(base + factor * (value - base), 0.0f, 255.0f);
}

// A channel of the HSV hexagon: `distance` is its place plus the hue's sector, before reduction to [0, 6).
RCMSTR_HD inline float of_hexagon(float value, float chroma, float distance) {
  const float k = distance - 6.0f * floorf(distance * (1.0f / 6.0f));
  const float nearer = k < 4.0f - k ? k : 4.0f - k;
  return value - chroma * clamped(nearer, 0.0f, 1.0f);
}

// The hue shifted by `shift` of the colour circle; saturation and value of HSV stay.
RCMSTR_HD inline Colour hue_shifted(Colour c, float shift) {
  const float larger = c.green > c.blue ? c.green : c.blue, smaller = c.green > c.blue ? c.blue : c.green;
  const float value = c.red > larger ? c.red : larger, least = c.red < smaller ? c.red : smaller;
  const float chroma = value - least, scale = chroma > 0.0f ? 1.0f / chroma : 0.0f;
  const float from_green = 2.0f + (c.blue - c.red) * scale, from_blue = 4.0f + (c.red - c.green) * scale;
  const float from_red = (c.green - c.blue) * scale;
  const float other = c.green >= c.blue ? from_green : from_blue;
  const float sector = (c.red >= larger ? from_red : other) + 6.0f * shift;
  return {of_hexagon(value, chroma, sector + 5.0f), of_hexagon(value, chroma, sector + 3.0f),
          of_hexagon(value, chroma, sector + 1.0f)};
}

// One step of the colour jitter; `mean` is the picture's mean brightness, which contrast alone looks at.
template <int step>
RCMSTR_HD inline Colour jittered(Colour c, float amount, float mean) {
  if (step == JITTER_HUE) return hue_shifted(c, amount);
  const float base = step == JITTER_BRIGHTNESS ? 0.0f : step == JITTER_CONTRAST ? mean : brightness(c);
  return {stretched(c.red, base, amount), stretched(c.green, base, amount), stretched(c.blue, base, amount)};
}

}  // namespace rcmstr
