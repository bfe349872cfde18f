// What the tensor cores multiply for a dtype.
#pragma once
#include <ATen/Context.h>

#include "../cuda/plan.h"

namespace rnn_ext {

// float takes TF32 products where torch may, and three of them for one of float where it may not.
inline cuda::Numbers numbers_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return cuda::Numbers::kBfloat16;
    case at::kHalf:
      return cuda::Numbers::kHalf;
    case at::kDouble:
      return cuda::Numbers::kDouble;
    default:
      break;
  }
  const auto precision =
      at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 ? cuda::Numbers::kTf32 : cuda::Numbers::kTf32x3;
}

}  // namespace rnn_ext
