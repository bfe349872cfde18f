// Plain loops over many numbers, outside the kernels: their threads and instruction sets.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>

#include "../cpu/team.h"

// One source for every instruction set: the compiler makes the variants, the loader takes one.
#if defined(__x86_64__) && defined(__linux__) && !defined(RNN_EXT_EMULATED)
#define RNN_EXT_VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RNN_EXT_VARIANTS
#endif

namespace rnn_ext {

// How many are to share a loop over so many numbers. (at::parallel_for is serial in a library that
// is compiled without OpenMP.)
inline int threads_for(int64_t count) {
  constexpr int64_t kWorthwhile = 16384;
  if (at::in_parallel_region()) return 1;
  return static_cast<int>(std::min<int64_t>(at::get_num_threads(), 1 + count / kWorthwhile));
}

}  // namespace rnn_ext
