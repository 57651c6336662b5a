// Work on packed rows [n, channels]: the parts of a sparse convolution, pooling and batch norm that are no matrix
// product. Every result is a sum in a fixed order, whatever the number of threads.
#pragma once
#include <cstdint>

namespace rcmstr {

// The bits of a bfloat16; arithmetic is in float.
struct bfloat16 {
  uint16_t bits;
};

// Statistics groups: rows of group g are starts[g] .. starts[g + 1].
struct Groups {
  const int64_t* starts;
  int64_t count;
};

// out[i] = source[index[i]], zeros where index[i] < 0; rows of `bytes` bytes.
void gather_rows(const void* source, const int32_t* index, void* out, int64_t n, int64_t bytes, int threads);

// out[i] = sum over t of source[table[i, t]], skipping entries below 0.
template <class T>
void sum_rows(const T* source, const int32_t* table, T* out, int64_t n, int taps, int64_t channels, int threads);

// out[i] = maximum over t of source[table[i, t]] and which[i] the first tap that has it; 0 and -1 where there is none.
template <class T>
void max_rows(const T* source, const int32_t* table, T* out, int8_t* which, int64_t n, int taps, int64_t channels,
              int threads);

// The adjoint: grad[i] = sum over t of grad_out[inverse[i, t]] where which[inverse[i, t]] == t.
template <class T>
void max_rows_backward(const T* grad_out, const int8_t* which, const int32_t* inverse, T* grad, int64_t n, int taps,
                       int64_t channels, int threads);

// Batch norm of each group: out = (x - mean) * rstd * weight + bias (+ residual) (ReLU). mean, rstd and the unbiased
// variance var [groups, channels] are written. residual may be null.
template <class T, class W>
void norm_rows(const T* x, const W* weight, const W* bias, const T* residual, T* out, W* mean, W* rstd, W* var,
               Groups groups, int64_t channels, double eps, bool relu, int threads);

// Gradients of norm_rows. `out` (of the forward) tells where ReLU passed and is null without ReLU; grad_residual may
// be null. grad_weight and grad_bias [channels] are written.
template <class T, class W>
void norm_rows_backward(const T* grad_out, const T* x, const T* out, const W* weight, const W* mean, const W* rstd,
                        T* grad_x, T* grad_residual, W* grad_weight, W* grad_bias, Groups groups, int64_t channels,
                        int threads);

}  // namespace rcmstr
