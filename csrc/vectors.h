// Loops that are compiled for two widths of vectors: a source includes them by two_widths.h, and calls the form that
// this processor can run by RCMSTR_LOOP.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RCMSTR_BROAD 1
#define RCMSTR_LOOP(function, ...) \
  (rcmstr::has_broad() ? broad::function(__VA_ARGS__) : narrow::function(__VA_ARGS__))
#else
#define RCMSTR_BROAD 0
#define RCMSTR_LOOP(function, ...) narrow::function(__VA_ARGS__)
#endif

namespace rcmstr {
#if RCMSTR_BROAD
inline bool has_broad() {
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
}
#endif
}  // namespace rcmstr
