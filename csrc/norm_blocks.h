// The loops of norm_rows.cpp over a block of rows, which includes this file once for each width of vectors
// (RCMSTR_VECTOR bytes). A block is walked in stripes of one vector of channels, whose sums and constants stay in
// registers.

template <class W>
struct Vector {
  typedef W Lanes __attribute__((vector_size(RCMSTR_VECTOR)));
  static constexpr int64_t lanes = RCMSTR_VECTOR / sizeof(W);
};
typedef uint16_t Halves __attribute__((vector_size(RCMSTR_VECTOR / 2)));
typedef uint32_t Words __attribute__((vector_size(RCMSTR_VECTOR)));
using Floats = Vector<float>::Lanes;

// Values of a stripe, or of one channel, in the type of the arithmetic.
inline void load(float& to, const float* from) { to = *from; }
inline void load(double& to, const double* from) { to = *from; }
inline void load(float& to, const bfloat16* from) { to = wide(*from); }
template <class V, class T>
inline void load(V& to, const T* from) {
  std::memcpy(&to, from, sizeof to);
}
inline void load(Floats& to, const bfloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  const Words words = __builtin_convertvector(bits, Words) << 16;
  std::memcpy(&to, &words, sizeof to);
}

inline void save(float* to, const float& v) { *to = v; }
inline void save(double* to, const double& v) { *to = v; }
inline void save(bfloat16* to, const float& v) { store(*to, v); }
template <class T, class V>
inline void save(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}
inline void save(bfloat16* to, const Floats& v) {
  Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = rounded - rounded + 0x7fc0;
  const Halves halves = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// work(first channel, a zero of its type) for every stripe and for every channel behind the last one.
template <class W, class Work>
inline void stripes(int64_t channels, const Work& work) {
  int64_t c = 0;
  for (; c + Vector<W>::lanes <= channels; c += Vector<W>::lanes) work(c, typename Vector<W>::Lanes{});
  for (; c < channels; ++c) work(c, W{});
}

// Sums of x - shift and of its square over some rows.
template <class T, class W>
void sums_block(const T* x, const T* shift, W* sum, int64_t rows, int64_t channels) {
  stripes<W>(channels, [&](int64_t c, auto zero) {
    auto total = zero, square = zero, origin = zero, v = zero;
    load(origin, shift + c);
    for (const T* row = x + c; row < x + rows * channels; row += channels) {
      load(v, row);
      v -= origin;
      total += v;
      square += v * v;
    }
    save(sum + c, total);
    save(sum + channels + c, square);
  });
}

// out = (x - mean) * scale + bias (+ residual) (ReLU).
template <bool kResidual, class T, class W>
inline void normalise(const T* x, const T* residual, T* out, const W* mean, const W* scale, const W* bias, int64_t rows,
                      int64_t channels, bool relu) {
  stripes<W>(channels, [&](int64_t c, auto zero) {
    auto m = zero, s = zero, b = zero, v = zero, added = zero;
    load(m, mean + c);
    load(s, scale + c);
    load(b, bias + c);
    for (int64_t i = c; i < rows * channels; i += channels) {
      load(v, x + i);
      v = (v - m) * s + b;
      if (kResidual) {
        load(added, residual + i);
        v += added;
      }
      if (relu) v = v < zero ? zero : v;
      save(out + i, v);
    }
  });
}

// Sums of d and of d (x - mean) rstd, where d is the gradient that ReLU lets through (kRelu: where out is above 0).
template <bool kRelu, class T, class W>
inline void gradient_sums(const T* grad_out, const T* x, const T* out, const W* mean, const W* rstd, W* sum,
                          int64_t rows, int64_t channels) {
  stripes<W>(channels, [&](int64_t c, auto zero) {
    auto total = zero, moment = zero, m = zero, r = zero, d = zero, v = zero, passed = zero;
    load(m, mean + c);
    load(r, rstd + c);
    for (int64_t i = c; i < rows * channels; i += channels) {
      load(d, grad_out + i);
      load(v, x + i);
      if (kRelu) {
        load(passed, out + i);
        d = passed > zero ? d : zero;
      }
      total += d;
      moment += d * ((v - m) * r);
    }
    save(sum + c, total);
    save(sum + channels + c, moment);
  });
}

// grad_x = weight rstd (d - average - (x - mean) rstd moment), and d itself for the residual where there is one.
template <bool kRelu, bool kResidual, class T, class W>
inline void gradients(const T* grad_out, const T* x, const T* out, const W* weight, const W* mean, const W* rstd,
                      const W* average, T* grad_x, T* grad_residual, int64_t rows, int64_t channels) {
  stripes<W>(channels, [&](int64_t c, auto zero) {
    auto m = zero, r = zero, s = zero, a = zero, b = zero, d = zero, v = zero, passed = zero;
    load(m, mean + c);
    load(r, rstd + c);
    load(s, weight + c);
    load(a, average + c);
    load(b, average + channels + c);
    s *= r;
    for (int64_t i = c; i < rows * channels; i += channels) {
      load(d, grad_out + i);
      load(v, x + i);
      if (kRelu) {
        load(passed, out + i);
        d = passed > zero ? d : zero;
      }
      save(grad_x + i, s * (d - a - (v - m) * r * b));
      if (kResidual) save(grad_residual + i, d);
    }
  });
}

template <class T, class W>
void normalise_block(const T* x, const T* residual, T* out, const W* mean, const W* scale, const W* bias, int64_t rows,
                     int64_t channels, bool relu) {
  if (residual)
    normalise<true>(x, residual, out, mean, scale, bias, rows, channels, relu);
  else
    normalise<false>(x, residual, out, mean, scale, bias, rows, channels, relu);
}

template <class T, class W>
void gradient_sums_block(const T* grad_out, const T* x, const T* out, const W* mean, const W* rstd, W* sum,
                         int64_t rows, int64_t channels) {
  if (out)
    gradient_sums<true>(grad_out, x, out, mean, rstd, sum, rows, channels);
  else
    gradient_sums<false>(grad_out, x, out, mean, rstd, sum, rows, channels);
}

template <class T, class W>
void gradients_block(const T* grad_out, const T* x, const T* out, const W* weight, const W* mean, const W* rstd,
                     const W* average, T* grad_x, T* grad_residual, int64_t rows, int64_t channels) {
  if (out && grad_residual)
    gradients<true, true>(grad_out, x, out, weight, mean, rstd, average, grad_x, grad_residual, rows, channels);
  else if (out)
    gradients<true, false>(grad_out, x, out, weight, mean, rstd, average, grad_x, grad_residual, rows, channels);
  else if (grad_residual)
    gradients<false, true>(grad_out, x, out, weight, mean, rstd, average, grad_x, grad_residual, rows, channels);
  else
    gradients<false, false>(grad_out, x, out, weight, mean, rstd, average, grad_x, grad_residual, rows, channels);
}
