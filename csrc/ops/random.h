// Random masks that depend on a key and a position alone (Philox, counter-based).
#pragma once
#include <ATen/core/Tensor.h>

namespace rnn_ext {

// What a mask has where the random word is below the threshold, and elsewhere.
struct MaskValues {
  double dropped, kept;
};

// [N, columns] of `dtype` on the device of steps and rows. Row i has the words of step steps[i] and
// sequence rows[i] (int64 [N]) in `stream`; rnn_ext/random.py says which words those are. The bits do
// not depend on the threads.
at::Tensor random_mask(int64_t seed, int64_t stream, const at::Tensor& steps,
                       const at::Tensor& rows, int64_t columns, int64_t threshold,
                       MaskValues values, at::ScalarType dtype);

// What masks are for; every layer and direction (counted together) has a stream of each.
enum class MaskPurpose { kZoneoutH, kZoneoutC, kWeightDropout, kVariationalDropout };

// [steps, rows, columns]: the mask of steps 0, 1, ... and sequences 0, 1, ... that drops with
// probability `p`.
at::Tensor random_mask(int64_t seed, MaskPurpose purpose, int64_t layer, int64_t steps,
                       int64_t rows, int64_t columns, double p, MaskValues values,
                       at::ScalarType dtype);

// From torch's generator of the CPU, which torch.manual_seed governs.
int64_t draw_seed();

}  // namespace rnn_ext
