// Host version of sites.h.
#include "sites.h"

#include <algorithm>

#include "threads.h"

namespace rcmstr {

int64_t list_sites(const bool* active, int64_t images, int64_t sites, int32_t* positions, int32_t* index,
                   int32_t* starts) {
  int32_t n = 0;
  for (int64_t image = 0; image < images; ++image) {
    starts[image] = n;
    for (int64_t site = image * sites; site < (image + 1) * sites; ++site) {
      index[site] = active[site] ? n : -1;
      if (active[site]) positions[n++] = static_cast<int32_t>(site);
    }
  }
  starts[images] = n;
  return n;
}

void window_tables(const Window& w, const int32_t* out_positions, int64_t outputs, const int32_t* in_index,
                   int64_t inputs, int32_t* table, int32_t* inverse, int threads) {
  constexpr int64_t kBlock = 4096;
  const int taps = w.taps(), out_sites = w.out_height * w.out_width, in_sites = w.in_height * w.in_width;
  std::fill(inverse, inverse + inputs * taps, -1);
  for_blocks((outputs + kBlock - 1) / kBlock, threads, [&](int64_t block) {
    for (int64_t row = block * kBlock; row < std::min(outputs, (block + 1) * kBlock); ++row) {
      const int image = out_positions[row] / out_sites, site = out_positions[row] % out_sites;
      const int top = site / w.out_width * w.stride_height - w.pad_height;
      const int left = site % w.out_width * w.stride_width - w.pad_width;
      for (int tap = 0; tap < taps; ++tap) {
        const int y = top + tap / w.kernel_width, x = left + tap % w.kernel_width;
        const bool inside = y >= 0 && y < w.in_height && x >= 0 && x < w.in_width;
        const int32_t in = inside ? in_index[int64_t{image} * in_sites + y * w.in_width + x] : -1;
        table[row * taps + tap] = in;
        if (in >= 0) inverse[int64_t{in} * taps + tap] = static_cast<int32_t>(row);
      }
    }
  });
}

int64_t list_pairs(const int32_t* table, int64_t outputs, int64_t inputs, int taps, int32_t* in_row, int32_t* out_row,
                   int64_t* starts, int32_t* of_output, int32_t* of_input) {
  int32_t n = 0;
  std::fill(of_input, of_input + inputs * taps, -1);
  for (int tap = 0; tap < taps; ++tap) {
    starts[tap] = n;
    for (int64_t row = 0; row < outputs; ++row) {
      const int32_t in = table[row * taps + tap];
      of_output[row * taps + tap] = in < 0 ? -1 : n;
      if (in < 0) continue;
      of_input[int64_t{in} * taps + tap] = n;
      in_row[n] = in;
      out_row[n++] = static_cast<int32_t>(row);
    }
  }
  starts[taps] = n;
  return n;
}

void list_jobs(const SiteJob* jobs, int count, int64_t images) {
  for (const SiteJob* job = jobs; job < jobs + count; ++job) {
    const int sites = job->height() * job->width(), classes = job->classes();
    const int64_t all = images * sites;
    // Pass 0 counts the members of each class, pass 1 places them; slots[c] is where the next one of class c goes.
    std::fill(job->slots, job->slots + classes + 1, 0);
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t at = 0; at < all; ++at) {
        if (!job->active[at]) continue;
        const int word = job->word(at / sites, static_cast<int>(at % sites));
        for (int c = job->words ? word : 0; c < (job->words ? word + 1 : classes); ++c) {
          if (!job->words && !(word >> c & 1)) continue;
          const int64_t slot = job->slots[c]++;
          if (!pass) continue;
          job->positions[(job->words ? 0 : c * all) + slot] = static_cast<int32_t>(at);
          if (job->words) {
            job->words[slot] = word;
          } else {
            const int site = static_cast<int>(at % sites);
            job->positions[(classes + c) * all + slot] = job->input_under(at / sites, site, c);
          }
        }
      }
      if (pass) continue;
      int32_t total = 0;
      for (int c = 0; c < classes; ++c) {
        const int32_t members = job->slots[c];
        if (!job->words) job->counts[c] = members;
        job->slots[c] = job->words ? total : 0;
        total += members;
      }
      if (job->words) job->counts[0] = total;
    }
  }
}

}  // namespace rcmstr
