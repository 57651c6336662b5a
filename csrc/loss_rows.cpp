// Host version of loss_rows.h: three passes over a row that stays in the cache.
#include "loss_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace rcmstr {
namespace {

constexpr int64_t kBlock = 1024;    // keys whose sums are taken in float
constexpr int64_t kWorth = 1 << 14;  // similarities from which other threads pay for their start

#define RCMSTR_LOOPS "loss_blocks.h"
#include "two_widths.h"

}  // namespace

void loss_rows(const LossRows& chunk, int threads) {
  const bool few = chunk.rows * chunk.keys < kWorth;
  for_blocks(chunk.rows, few ? 1 : threads, [&](int64_t i) {
    thread_local std::vector<float> room;
    room.resize(2 * chunk.keys);
    RCMSTR_LOOP(loss_rows_between, chunk, i, i + 1, room.data(), room.data() + chunk.keys);
  });
}

}  // namespace rcmstr
