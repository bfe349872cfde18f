// The shape of a call, checked: what the drivers of every device start from.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "layer.h"

namespace rnn_ext {

struct Call {
  CellKind kind;
  bool packed;
  at::ScalarType dtype, compute;  // as given, and float or double
  Sizes sizes;
  long gates, steps, batch, rows;
  std::vector<int64_t> offsets;
  bool restores = false;  // resets put a state that was given in the place of the carried one
  long groups = 1;        // of sequences, for which weights get a gradient each

  void set_groups(long count);
  Steps time(bool reverse) const { return {steps, batch, offsets.data(), reverse}; }
  at::TensorOptions options() const { return at::TensorOptions().dtype(compute); }
  std::vector<int64_t> laid_out(long features) const {
    return packed ? std::vector<int64_t>{rows, features}
                  : std::vector<int64_t>{steps, batch, features};
  }
};

Call check_call(const LayerInputs& in);
// The same for both directions of a layer.
Call check_call(std::span<const LayerInputs> directions);

// The rows into whose step no state is carried, bool [N]: those of in.resets or, as a reset at step t
// parts t from t - 1, walking back in time those of the step before.
at::Tensor parted_rows(const Call& call, const LayerInputs& in);

}  // namespace rnn_ext
