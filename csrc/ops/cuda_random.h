// Random masks on a CUDA device.
#pragma once
#include "random.h"

namespace rnn_ext {

// As random_mask (random.h), on the device of steps and rows.
at::Tensor cuda_random_mask(int64_t seed, int64_t stream, const at::Tensor& steps,
                            const at::Tensor& rows, int64_t columns, int64_t threshold,
                            MaskValues values, at::ScalarType dtype);

}  // namespace rnn_ext
