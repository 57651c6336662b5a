// Includes the loops of a source, the file RCMSTR_LOOPS, once for each width of vectors (RCMSTR_VECTOR bytes): in the
// namespace `narrow` and, where RCMSTR_BROAD is 1, in `broad` under the pragma that allows AVX2. vectors.h calls them.

namespace narrow {
#define RCMSTR_VECTOR 16
#include RCMSTR_LOOPS
#undef RCMSTR_VECTOR
}  // namespace narrow

#if RCMSTR_BROAD
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace broad {
#define RCMSTR_VECTOR 32
#include RCMSTR_LOOPS
#undef RCMSTR_VECTOR
}  // namespace broad
#pragma GCC pop_options
#endif

#undef RCMSTR_LOOPS
