// The loops of loss_rows.cpp over the keys of a row, which includes this file once for each width of vectors
// (RCMSTR_VECTOR bytes).

typedef float Lanes __attribute__((vector_size(RCMSTR_VECTOR)));
typedef int32_t Bits __attribute__((vector_size(RCMSTR_VECTOR)));
constexpr int64_t kLanes = RCMSTR_VECTOR / sizeof(float);

inline int32_t bits_of(float) { return 0; }
inline Bits bits_of(Lanes) { return Bits{}; }
inline float total_of(float v) { return v; }
inline float total_of(Lanes v) {
  float total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += v[l];
  return total;
}
inline float largest_of(Lanes v) {
  float largest = v[0];
  for (int64_t l = 1; l < kLanes; ++l) largest = v[l] > largest ? v[l] : largest;
  return largest;
}

// exp(x) for x up to 0: 2^n e^r with r = x - n ln 2, e^r by a polynomial (relative error 2e-7); below -87 as at -87.
template <class V>
inline V exponential(V x) {
  const V lowest = x - x - 87.0f;
  x = x < lowest ? lowest : x;
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number, in the low bits
  auto n = bits_of(x);
  std::memcpy(&n, &shifted, sizeof n);
  const V whole = shifted - 12582912.0f;
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  n = (n - 0x4b400000 + 127) << 23;
  V power = x;
  std::memcpy(&power, &n, sizeof power);
  return y * power;
}

// work(first key, a zero of its type) for every vector of keys in begin..end and for every key behind the last one.
template <class Work>
inline void along(int64_t begin, int64_t end, const Work& work) {
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) work(j, Lanes{});
  for (; j < end; ++j) work(j, 0.0f);
}

template <class V>
inline V at(const float* from, V zero) {
  std::memcpy(&zero, from, sizeof zero);
  return zero;
}

// Sums over a block of keys, so short that float keeps their digits.
struct Sums {
  double mass = 0, own = 0, key = 0, info = 0;
};

template <bool kInfo>
inline void add_block(float* a, const float* b, const float* p, float* e, float* f, float largest, float ratio,
                      float offset, int64_t begin, int64_t end, Sums& sums) {
  Lanes mass{}, own{}, key{}, info{};
  float mass_tail = 0, own_tail = 0, key_tail = 0, info_tail = 0;
  const auto one = [&](int64_t j, auto zero, auto& m, auto& o, auto& k, auto& i) {
    const auto x = at(a + j, zero), d = at(b + j, zero) - x;
    const auto q = exponential(x - largest);
    m += q;
    o += q * d;
    k += at(p + j, zero) * d;
    std::memcpy(a + j, &d, sizeof d);
    std::memcpy(e + j, &q, sizeof q);
    if (!kInfo) return;
    const auto logit = exponential((x - largest) * ratio + offset);
    i += logit;
    std::memcpy(f + j, &logit, sizeof logit);
  };
  int64_t j = begin;
  for (; j + kLanes <= end; j += kLanes) one(j, Lanes{}, mass, own, key, info);
  for (; j < end; ++j) one(j, 0.0f, mass_tail, own_tail, key_tail, info_tail);
  sums.mass += total_of(mass) + mass_tail;
  sums.own += total_of(own) + own_tail;
  sums.key += total_of(key) + key_tail;
  sums.info += total_of(info) + info_tail;
}

inline float largest_in(const float* a, int64_t keys) {
  Lanes best = Lanes{} + a[0];
  float tail = a[0];
  int64_t j = 0;
  for (; j + kLanes <= keys; j += kLanes) {
    const Lanes x = at(a + j, Lanes{});
    best = x > best ? x : best;
  }
  for (; j < keys; ++j) tail = a[j] > tail ? a[j] : tail;
  const float found = largest_of(best);
  return found > tail ? found : tail;
}

// One row; e and f are room for `keys` values.
template <bool kInfo>
inline void loss_row(const LossRows& chunk, int64_t i, float* e, float* f) {
  const int64_t keys = chunk.keys, other = (chunk.place ? chunk.place[i] : i) * keys;
  float* a = chunk.a + i * keys;
  const float *b = chunk.b + other, *p = chunk.p + other;
  const float largest = largest_in(a, keys);
  const float positive = kInfo ? chunk.positive[i] : 0.0f;
  const float top = kInfo && positive > largest * chunk.ratio ? positive : largest * chunk.ratio;
  Sums sums;
  for (int64_t begin = 0; begin < keys; begin += kBlock)
    add_block<kInfo>(a, b, p, e, f, largest, chunk.ratio, largest * chunk.ratio - top, begin,
                     std::min(keys, begin + kBlock), sums);
  const double mean = sums.own / sums.mass;
  chunk.kl[i] = static_cast<float>((sums.key - mean) / 2);
  double total = 1;
  if (kInfo) {
    const double pair = std::exp(static_cast<double>(positive) - top);
    total = sums.info + pair;
    // Exact where the positive dominates: then pair is 1.
    chunk.info[i] = static_cast<float>(std::log1p(sums.info + (pair - 1)) - (static_cast<double>(positive) - top));
    chunk.rest[i] = static_cast<float>(sums.info / total);
  }
  if (!chunk.weight) return;
  float* weight = chunk.weight + i * keys;
  const float of_info = static_cast<float>(chunk.scale_info / total), of_key = 0.5f * chunk.scale_kl;
  const float of_own = static_cast<float>(of_key / sums.mass), shift = static_cast<float>(1 + mean);
  along(0, keys, [&](int64_t j, auto zero) {
    auto w = at(e + j, zero) * (shift - at(a + j, zero)) * of_own - at(p + j, zero) * of_key;
    if (kInfo) w += at(f + j, zero) * of_info;
    std::memcpy(weight + j, &w, sizeof w);
  });
}

inline void loss_rows_between(const LossRows& chunk, int64_t begin, int64_t end, float* e, float* f) {
  for (int64_t i = begin; i < end; ++i) {
    if (chunk.positive)
      loss_row<true>(chunk, i, e, f);
    else
      loss_row<false>(chunk, i, e, f);
  }
}
