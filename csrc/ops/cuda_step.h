// What the forward and the backward pass of the CUDA driver share.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "../cuda/params.h"
#include "cuda_layer.h"

namespace rnn_ext {

inline cuda::Storage storage_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return cuda::Storage::kDouble;
    case at::kHalf:
      return cuda::Storage::kHalf;
    case at::kBFloat16:
      return cuda::Storage::kBfloat16;
    default:
      return cuda::Storage::kFloat;
  }
}

// The device of the call is current while this lives, and kernels go to its current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& input) : guard_(input.device()) {
    const c10::Device device = input.device();
    if (device.is_cpu()) return;
    stream_ = {device.index(),
               c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle()};
  }
  const cuda::Stream& stream() const { return stream_; }

 private:
  c10::DeviceGuard guard_;
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  cuda::Stream stream_{0, nullptr};
};

// Where row r of a contiguous matrix lies; null for a matrix that is not there.
class RowPointer {
 public:
  RowPointer() = default;
  explicit RowPointer(const at::Tensor& t)
      : first_(static_cast<char*>(const_cast<void*>(t.const_data_ptr()))),
        bytes_(t.size(-1) * t.element_size()) {}
  explicit RowPointer(const OptionalTensor& t) {
    if (t && t->defined()) *this = RowPointer(*t);
  }
  void* operator[](long row) const { return first_ ? first_ + row * bytes_ : nullptr; }

 private:
  char* first_ = nullptr;
  size_t bytes_ = 0;
};

// out = a b. Products of 16-bit matrices may be asked for in float, as they are accumulated.
inline void multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b) {
  if (out.scalar_type() == a.scalar_type())
    at::mm_out(out, a, b);
  else if (a.is_cpu())
    at::mm_out(out, a.to(out.scalar_type()), b.to(out.scalar_type()));
  else
    at::mm_out(out, a, b, out.scalar_type());
}

inline at::Tensor first_rows(const at::Tensor& t, long rows) {
  return rows == t.size(0) ? t : t.narrow(0, 0, rows);
}

// A contiguous copy that may be written to.
inline at::Tensor fresh(const at::Tensor& t, const at::TensorOptions& options) {
  at::Tensor copy = at::empty(t.sizes(), options);
  copy.copy_(t);
  return copy;
}

// A contiguous gradient of a state, zero where none came.
inline at::Tensor state_gradient(const OptionalTensor& d, at::IntArrayRef shape,
                                 const at::TensorOptions& options) {
  return d && d->defined() ? fresh(*d, options) : at::zeros(shape, options);
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t && t->defined() ? OptionalTensor(t->contiguous()) : std::nullopt;
}

// Without gradients the input is projected for so many bytes of gates at a time; in the tests'
// emulated build for so few that small shapes take several.
#ifdef RNN_EXT_EMULATED
constexpr long kProjectionBytes = 4 << 10;
#else
constexpr long kProjectionBytes = 32 << 20;
#endif

// The steps that one projection of the input covers, and the rows of those: [first, first + rows)
// of the input.
struct Span {
  long steps, first, rows;
};
inline Span span_from(const Steps& time, long i, long most_rows) {
  Span span{0, time.begin(time.at(i)), 0};
  for (; i < time.count; i++, span.steps++) {
    const long t = time.at(i);
    if (span.steps && span.rows + time.rows(t) > most_rows) break;
    span.first = std::min(span.first, time.begin(t));
    span.rows += time.rows(t);
  }
  return span;
}

// What zoneout holds of one state, from a row on.
class HoldRows {
 public:
  explicit HoldRows(const OptionalTensor& t) {
    if (!t) return;
    if (t->dim() == 0) {
      share_ = *t->const_data_ptr<double>();
    } else {
      units_ = t->contiguous();
      rows_ = RowPointer(units_);
    }
  }
  cuda::Hold operator[](long row) const { return {static_cast<const bool*>(rows_[row]), share_}; }

 private:
  at::Tensor units_;
  RowPointer rows_;
  double share_ = 0;
};

// What the two passes share.
struct StepLayer {
  const Call& call;
  const LayerInputs& in;
  const Steps time;
  const cuda::Storage storage;
  const at::TensorOptions stored, wide;
  const long input, hidden, output;
  const bool elman, lstm, gru, reset_before, projected;
  const HoldRows hold_h, hold_c;
  OptionalTensor lengths, resets;

  // The direction's own resets, as `RowPredicates` has them.
  StepLayer(const Call& c, const LayerInputs& inputs, const OptionalTensor& all_lengths,
            const OptionalTensor& own_resets)
      : call(c),
        in(inputs),
        time(c.time(inputs.reverse)),
        storage(storage_of(c.dtype)),
        stored(at::TensorOptions().dtype(c.dtype).device(inputs.input.device())),
        wide(stored.dtype(c.compute)),
        input(c.sizes.input),
        hidden(c.sizes.hidden),
        output(c.sizes.output),
        elman(c.gates == 1),
        lstm(c.kind == CellKind::kLstm),
        gru(c.kind == CellKind::kGru),
        reset_before(c.kind == CellKind::kGruResetBefore),
        projected(inputs.w_hr.has_value()),
        hold_h(inputs.hold_h),
        hold_c(inputs.hold_c) {
    if (all_lengths) {
      check(*all_lengths, "lengths", at::kLong, {c.batch});
      lengths = all_lengths->contiguous();
    }
    if (own_resets) {
      const at::IntArrayRef leading = inputs.input.sizes().slice(0, inputs.input.dim() - 1);
      check(*own_resets, "resets", at::kBool, leading);
      resets = own_resets->contiguous().view({c.rows, 1});
    }
  }

  cuda::Rows rows(long t, long count) const {
    return {t, count, lengths ? lengths->const_data_ptr<int64_t>() : nullptr,
            static_cast<const bool*>(RowPointer(resets)[time.begin(t)])};
  }
  // Of a step whose first row is `row`.
  cuda::Zoneout zoneout(long row) const {
    return {in.hold_h.has_value(), hold_h[row], hold_c[row]};
  }
  at::Tensor as_rows(const at::Tensor& t) const { return t.reshape({call.rows, t.size(-1)}); }
  // The part of U that multiplies h' itself.
  at::Tensor recurrent() const { return reset_before ? in.w_hh.narrow(0, 0, 2 * hidden) : in.w_hh; }
  Restored restored() const {
    if (!call.restores) return {};
    const auto second_half = [&](const at::Tensor& t, const at::TensorOptions& options) {
      return fresh(t.narrow(0, call.batch, call.batch), options);
    };
    return {second_half(in.h0, stored),
            lstm ? OptionalTensor(second_half(*in.c0, wide)) : std::nullopt};
  }
  // restored.h U^T
  OptionalTensor restored_product(const Restored& states) const {
    if (!states.h) return {};
    const at::Tensor weights = recurrent();
    at::Tensor product = at::empty({call.batch, weights.size(0)}, wide);
    multiply(product, *states.h, weights.t());
    return product;
  }
  RestoredSums restored_sums(bool of_h, bool of_c) const {
    RestoredSums sums;
    if (call.restores && of_h) {
      sums.delta = at::zeros({call.batch, recurrent().size(0)}, wide);
      sums.h = at::zeros({call.batch, output}, wide);
    }
    if (call.restores && of_c) sums.c = at::zeros({call.batch, hidden}, wide);
    return sums;
  }
  // The gradients of h0 and c0: below that of the initial states there is that of the restored ones.
  at::Tensor d_h0(const at::Tensor& initial, const RestoredSums& sums) const {
    if (!sums.delta) return initial;
    return at::cat({initial, at::addmm(*sums.h, *sums.delta, recurrent().to(call.compute))});
  }
  at::Tensor d_c0(const at::Tensor& initial, const RestoredSums& sums) const {
    return sums.c ? at::cat({initial, *sums.c}) : initial;
  }

 private:
  void check(const at::Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef shape) {
    TORCH_CHECK(t.device() == in.input.device() && t.scalar_type() == dtype && t.sizes() == shape,
                "rnn_ext: ", name, " must be ", dtype, " of shape ", shape, " on ",
                in.input.device());
  }
};

}  // namespace rnn_ext
