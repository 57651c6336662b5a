// Lists of active sites of a stage and of the pairs (input row, output row) that each tap of a convolution joins.
//
// A stage is a bitmap [images, height, width]. Its active sites, in the order of the map, are rows 0..n: `positions`
// maps a row to its site, `index` a site to its row or -1. A window (kernel, stride, padding) between two stages is
// then a table [outputs, taps] of input rows or -1; every input row meets a tap at most once, so the table has an
// inverse [inputs, taps] of output rows.
//
// The GPU kernels work on maps in place and want, instead, the positions of the active sites sorted by the word of taps
// that each has (SiteJob); the mathematics of a word is written once, for the host and for CUDA.
#pragma once
#include <cstdint>
#include <string>

#ifdef __CUDACC__
#define RCMSTR_HD __host__ __device__
#else
#define RCMSTR_HD
#endif

namespace rcmstr {

struct Window {
  int in_height, in_width, out_height, out_width;
  int kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width;
  RCMSTR_HD int taps() const { return kernel_height * kernel_width; }
};

// Writes positions [n], index [images * sites] and starts [images + 1] (rows before each image); returns n.
int64_t list_sites(const bool* active, int64_t images, int64_t sites, int32_t* positions, int32_t* index,
                   int32_t* starts);

// table [outputs, taps]: input row under each tap or -1; inverse [inputs, taps]: output row or -1.
void window_tables(const Window& window, const int32_t* out_positions, int64_t outputs, const int32_t* in_index,
                   int64_t inputs, int32_t* table, int32_t* inverse, int threads);

// Pairs ordered by tap, then by output row. in_row and out_row need room for outputs * taps entries; starts [taps + 1];
// of_output [outputs, taps] and of_input [inputs, taps] hold a pair's number or -1. Returns the number of pairs.
int64_t list_pairs(const int32_t* table, int64_t outputs, int64_t inputs, int taps, int32_t* in_row, int32_t* out_row,
                   int64_t* starts, int32_t* of_output, int32_t* of_input);

constexpr int kMaxTaps = 9, kMaxClasses = 1 << kMaxTaps, kMaxJobs = 16;

// One list to make. `active` are the sites listed, `partner` those of the map that the window joins them to; both
// [images, sites]. With `inverse` the listed sites are the window's inputs, else its outputs.
//   rows:  positions [images * sites] of the active sites in the order (word, position), words alongside, counts [1].
//   pairs: positions [2, taps, images * sites] of the sites that have each tap, in the order of the map, and of their
//          partners, counts [taps]; words is null, and the listed sites are the window's outputs.
// What lies behind the counts is not written. `slots` is room for (classes() + 1) * images entries.
struct SiteJob {
  const bool *active, *partner;
  Window window;
  bool inverse;
  int32_t *positions, *words, *counts, *slots;

  RCMSTR_HD int classes() const { return words ? 1 << window.taps() : window.taps(); }
  RCMSTR_HD int height() const { return inverse ? window.in_height : window.out_height; }
  RCMSTR_HD int width() const { return inverse ? window.in_width : window.out_width; }

  // The window's input under a tap that this output has.
  RCMSTR_HD int32_t input_under(int64_t image, int site, int tap) const {
    const int v = site / width() * window.stride_height - window.pad_height + tap / window.kernel_width;
    const int u = site % width() * window.stride_width - window.pad_width + tap % window.kernel_width;
    return static_cast<int32_t>((image * window.in_height + v) * window.in_width + u);
  }

  // Bit t: tap t joins this active site to an active partner.
  RCMSTR_HD int word(int64_t image, int site) const {
    const int y = site / width(), x = site % width();
    const int other_height = inverse ? window.out_height : window.in_height;
    const int other_width = inverse ? window.out_width : window.in_width;
    int found = 0;
    for (int tap = 0; tap < window.taps(); ++tap) {
      const int ky = tap / window.kernel_width, kx = tap % window.kernel_width;
      int v, u;
      if (inverse) {  // output (v, u) sees this input under the tap if v * stride - pad + k is its place
        v = y + window.pad_height - ky;
        u = x + window.pad_width - kx;
        if (v % window.stride_height || u % window.stride_width) continue;
        v /= window.stride_height;
        u /= window.stride_width;
      } else {
        v = y * window.stride_height - window.pad_height + ky;
        u = x * window.stride_width - window.pad_width + kx;
      }
      if (v < 0 || v >= other_height || u < 0 || u >= other_width) continue;
      found |= int(partner[(image * other_height + v) * other_width + u]) << tap;
    }
    return found;
  }
};

// Make all lists; the CUDA version in three launches on `stream`, without synchronising.
void list_jobs(const SiteJob* jobs, int count, int64_t images);
void list_jobs_cuda(const SiteJob* jobs, int count, int64_t images, void* stream);

// Why the CUDA functions of this build cannot run on the current device (driver older than the runtime, no code for the
// device), empty: they can. All sources are compiled for the same devices, so one kernel answers for all.
std::string cuda_refusal();

}  // namespace rcmstr
