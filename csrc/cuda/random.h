// Random masks as csrc/ops/random.h has them, on a device.
#pragma once
#include "params.h"

namespace rnn_ext::cuda {

// Where the random word of an entry is at least `threshold` it is `kept`, elsewhere `dropped`.
struct RandomMask {
  int64_t rows, columns;
  const int64_t *steps, *sequences;  // [rows], of which the lower 32 bits count
  uint64_t seed;
  uint32_t stream, threshold;
  double dropped, kept;
  void* mask;  // S [rows, columns]; of random_flags bool
};

// Each starts one kernel on the stream and throws std::runtime_error where that fails.
void random_mask(Storage storage, const RandomMask& p, const Stream& stream);
void random_flags(const RandomMask& p, const Stream& stream);

}  // namespace rnn_ext::cuda
