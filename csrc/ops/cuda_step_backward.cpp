#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>

#include "cuda_step.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// The matrix gradients, once delta of every step is there.
class ParameterGradients {
 public:
  ParameterGradients(const StepLayer& layer, const Tensor& delta, const cuda::Stream& stream)
      : l_(layer), delta_(delta), stream_(stream) {}

  // Of the gates in delta's order: what belongs to W, and to U (of reset-before GRU, to U_rz).
  Tensor input_side() const { return l_.gru ? delta_.narrow(1, l_.hidden, 3 * l_.hidden) : delta_; }
  Tensor hidden_side() const {
    if (l_.gru) return delta_.narrow(1, 0, 3 * l_.hidden);
    return l_.reset_before ? delta_.narrow(1, 0, 2 * l_.hidden) : delta_;
  }

  Tensor input() const {
    Tensor dx = at::empty(l_.call.laid_out(l_.input), l_.stored);
    multiply(l_.as_rows(dx), input_side(), l_.in.w_ih);
    return dx;
  }
  Tensor w_ih() const { return at::mm(input_side().t(), l_.as_rows(l_.in.input)); }
  Tensor w_hh(const Tensor& previous, const OptionalTensor& middle) const {
    const long h = l_.hidden;
    const Tensor first = at::mm(hidden_side().t(), previous);
    if (l_.gru) return at::cat({first.narrow(0, h, 2 * h), first.narrow(0, 0, h)});
    if (l_.reset_before) return at::cat({first, at::mm(delta_.narrow(1, 2 * h, h).t(), *middle)});
    return first;
  }
  Tensor bias_sums() const {
    const long rows = delta_.size(0), columns = delta_.size(1);
    const Tensor sums = at::empty({columns}, l_.stored);
    const Tensor scratch = at::empty({cuda::column_sums_scratch(rows), columns}, l_.wide);
    cuda::column_sums(l_.storage,
                      {rows, columns, columns, delta_.const_data_ptr(), scratch.mutable_data_ptr(),
                       sums.mutable_data_ptr()},
                      stream_);
    return sums;
  }
  Tensor b_ih(const Tensor& sums) const {
    return l_.gru ? sums.narrow(0, l_.hidden, 3 * l_.hidden).clone() : sums;
  }
  Tensor b_hh(const Tensor& sums) const {
    const long h = l_.hidden;
    return l_.gru ? at::cat({sums.narrow(0, h, 2 * h), sums.narrow(0, 0, h)}) : sums.clone();
  }

 private:
  const StepLayer& l_;
  const Tensor delta_;
  const cuda::Stream& stream_;
};

Tensor state_gradient(const OptionalTensor& d, at::IntArrayRef shape,
                      const at::TensorOptions& options) {
  return d && d->defined() ? fresh(*d, options) : at::zeros(shape, options);
}

OptionalTensor contiguous(const OptionalTensor& t) {
  return t && t->defined() ? OptionalTensor(t->contiguous()) : std::nullopt;
}

}  // namespace

std::array<OptionalTensor, kLayerInputs> cuda_layer_backward(
    const Call& call, const LayerInputs& in, const RowPredicates& predicates, const Saved& saved,
    const LayerGradients& d, const std::array<bool, kLayerInputs>& wanted) {
  TORCH_CHECK(saved.isa == kCudaStep, "rnn_ext: what '", saved.isa,
              "' saved is not for the CUDA kernels");
  const DeviceScope scope(in.input);
  const StepLayer l(call, in, predicates);
  const long batch = call.batch, deltas = l.gru ? 4 : call.gates;
  const Tensor delta = at::empty({call.rows, deltas * l.hidden}, l.stored);
  const Tensor carry = state_gradient(d.d_h_n, {batch, l.output}, l.wide);
  const Tensor product = at::empty({batch, l.output}, l.wide),
               second_product = at::empty({batch, l.hidden}, l.wide);
  const Tensor h0 = in.h0.contiguous();
  const OptionalTensor d_output = contiguous(d.d_output), d_cells = contiguous(d.d_cells);
  OptionalTensor c0, dc, dh, previous;
  if (l.lstm) {
    c0 = in.c0->to(call.compute).contiguous();
    dc = state_gradient(d.d_c_n, {batch, l.hidden}, l.wide);
  }
  if (l.projected) dh = at::empty({call.rows, l.output}, l.stored);
  if (wanted[4]) previous = at::empty({call.rows, l.output}, l.stored);

  const ParameterGradients gradients(l, delta, scope.stream());
  const Tensor hidden_side = gradients.hidden_side();
  Tensor w_hh = in.w_hh, second_operand, second_weights;
  if (l.gru)
    w_hh = at::cat({w_hh.narrow(0, 2 * l.hidden, l.hidden), w_hh.narrow(0, 0, 2 * l.hidden)});
  if (l.reset_before) {
    w_hh = in.w_hh.narrow(0, 0, 2 * l.hidden);
    second_weights = in.w_hh.narrow(0, 2 * l.hidden, l.hidden);
    second_operand = delta.narrow(1, 2 * l.hidden, l.hidden);
  } else if (l.projected) {
    second_weights = *in.w_hr;
    second_operand = *dh;
  }

  cuda::StepBackward p{};
  p.hidden = l.hidden;
  p.output = l.output;
  p.product = product.const_data_ptr();
  p.second_product = second_product.const_data_ptr();
  p.h0 = h0.const_data_ptr();
  p.c0 = RowPointer(c0)[0];
  p.carry = carry.mutable_data_ptr();
  p.dc = RowPointer(dc)[0];
  const RowPointer gate_rows(saved.gates), middle_rows(saved.middle), state_rows(saved.states),
      cell_rows(saved.cells);
  const RowPointer d_output_rows(d_output), d_cells_rows(d_cells), delta_rows(delta), dh_rows(dh);
  const RowPointer previous_rows(previous);
  for (long i = l.time.count - 1; call.rows && i >= 0; i--) {
    const long t = l.time.at(i), at = l.time.begin(t), rows = l.time.rows(t),
               before = l.time.previous(t);
    const long before_at = l.time.exists(before) ? l.time.begin(before) : 0;
    p.next = p.rows;  // none at first
    p.rows = l.rows(t, rows);
    p.previous_step = before;
    p.previous_count = l.time.carried(t);
    p.gates = gate_rows[at];
    p.middle = middle_rows[at];
    p.h = state_rows[at];
    p.cells = cell_rows[at];
    p.h_before = state_rows[before_at];
    p.cells_before = cell_rows[before_at];
    p.d_h = d_output_rows[at];
    p.d_cells = d_cells_rows[at];
    p.delta = delta_rows[at];
    p.dh = dh_rows[at];
    p.previous = previous_rows[at];
    cuda::step_backward(call.kind, l.storage, 0, p, scope.stream());
    if (second_weights.defined()) {
      multiply(first_rows(second_product, rows), second_operand.narrow(0, at, rows),
               second_weights);
      cuda::step_backward(call.kind, l.storage, 1, p, scope.stream());
    }
    multiply(first_rows(product, rows), hidden_side.narrow(0, at, rows), w_hh);
  }
  p.next = p.rows;
  p.rows.count = 0;
  if (call.rows) cuda::step_backward(call.kind, l.storage, 0, p, scope.stream());

  std::array<OptionalTensor, kLayerInputs> out;
  if (wanted[0]) out[0] = gradients.input();
  if (wanted[1]) out[1] = carry.to(call.dtype);
  if (wanted[2] && l.lstm) out[2] = dc->to(call.dtype);
  if (wanted[3]) out[3] = gradients.w_ih();
  if (wanted[4]) out[4] = gradients.w_hh(*previous, saved.middle);
  if ((wanted[5] || wanted[6]) && in.b_ih) {
    const Tensor sums = gradients.bias_sums();
    if (wanted[5]) out[5] = gradients.b_ih(sums);
    if (wanted[6]) out[6] = gradients.b_hh(sums);
  }
  if (wanted[7] && l.projected) out[7] = at::mm(dh->t(), *saved.middle);
  return out;
}

}  // namespace rnn_ext
