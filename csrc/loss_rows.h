// Rows of similarities to their losses: what lies between the matrix products of the queue losses on a CPU.
#pragma once
#include <cstdint>

namespace rcmstr {

// Rows of a chunk: `a` [rows, keys] similarities of the queries over tau_kl (overwritten), `b` those of the keys and `p`
// their softmax, row place[i] for row i (null: row i).
//
// kl [rows]: symmetric KL between softmax(a) and p. With `positive` [rows] (similarity of each pair over tau_info) also
// info [rows], the InfoNCE over ratio * a and the positive, and rest [rows], one minus the positive's probability.
// weight [rows, keys] (null: none): scale_info * probability in the InfoNCE + scale_kl * gradient of the KL in `a`.
struct LossRows {
  float* a;
  const float *b, *p;
  const int64_t* place;
  const float* positive;
  float *weight, *info, *rest, *kl;
  int64_t rows, keys;
  float ratio, scale_info, scale_kl;
};
void loss_rows(const LossRows& chunk, int threads);

}  // namespace rcmstr
