// Random masks that depend on a key and a position alone (Philox, counter-based).
#pragma once
#include <ATen/core/Tensor.h>

namespace rnn_ext {

// [N, columns] of `dtype`: `kept` where the random word is at least
// `threshold`, elsewhere 0. Row i has the words of step steps[i] and sequence rows[i] (int64 [N]) in
// `stream`; rnn_ext/random.py says which words those are. The bits do not depend on the threads.
at::Tensor random_mask(int64_t seed, int64_t stream, const at::Tensor& steps,
                       const at::Tensor& rows, int64_t columns, int64_t threshold, double kept,
                       at::ScalarType dtype);

}  // namespace rnn_ext
