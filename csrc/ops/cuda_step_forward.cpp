#include <algorithm>
#include <limits>

#include "cuda_step.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// Without gradients the input is projected for so many bytes of gates at a time; in the tests' emulated build for so few
// that small shapes take several.
#ifdef RNN_EXT_EMULATED
constexpr long kProjectionBytes = 4 << 10;
#else
constexpr long kProjectionBytes = 32 << 20;
#endif

// The steps that one projection of the input covers, and the rows of those: [first, first + rows) of the input.
struct Span {
  long steps, first, rows;
};
Span span_from(const Steps& time, long i, long most_rows) {
  Span span{0, time.begin(time.at(i)), 0};
  for (; i < time.count; i++, span.steps++) {
    const long t = time.at(i);
    if (span.steps && span.rows + time.rows(t) > most_rows) break;
    span.first = std::min(span.first, time.begin(t));
    span.rows += time.rows(t);
  }
  return span;
}

}  // namespace

LayerOutputs cuda_layer_forward(const Call& call, const LayerInputs& in,
                                const RowPredicates& predicates, bool save) {
  const DeviceScope scope(in.input);
  const StepLayer l(call, in, predicates);
  const long width = call.gates * l.hidden, batch = call.batch;
  const bool has_middle = l.reset_before || l.projected || (l.gru && save);
  const long row_bytes = std::max<long>(1, width * c10::elementSize(call.dtype));
  const long most_rows = save || l.elman ? std::numeric_limits<long>::max()
                                         : std::max(batch, kProjectionBytes / row_bytes);

  LayerOutputs out;
  out.output = at::empty(call.laid_out(l.output), l.stored);
  const Tensor states = l.as_rows(out.output), x = l.as_rows(in.input);
  // An Elman cell's net input lies where its output will.
  const Tensor gates =
      l.elman ? states : at::empty({std::min(call.rows, most_rows), width}, l.stored);
  const Tensor h_state = fresh(in.h0, l.stored);
  OptionalTensor h_wide, c_state, middle;
  if (l.call.gates == 3 && call.dtype != call.compute) h_wide = fresh(in.h0, l.wide);
  if (l.lstm) c_state = fresh(*in.c0, l.wide);
  if (l.lstm && save) out.saved.cells = at::empty(call.laid_out(l.hidden), l.wide);
  if (has_middle) middle = at::empty({save ? call.rows : batch, l.hidden}, l.stored);
  const Tensor product = at::empty({batch, l.reset_before ? 2 * l.hidden : width}, l.wide);
  const Tensor second_product = at::empty({batch, l.projected ? l.output : l.hidden}, l.wide);
  const Tensor w_ih = in.w_ih.t();
  const Tensor w_hh = (l.reset_before ? in.w_hh.narrow(0, 0, 2 * l.hidden) : in.w_hh).t();
  const Tensor second_weights = l.projected      ? in.w_hr->t()
                                : l.reset_before ? in.w_hh.narrow(0, 2 * l.hidden, l.hidden).t()
                                                 : Tensor();

  cuda::StepForward p{};
  p.hidden = l.hidden;
  const Tensor b_ih = in.b_ih ? in.b_ih->contiguous() : Tensor(),
               b_hh = in.b_hh ? in.b_hh->contiguous() : Tensor();
  if (in.b_ih) p.b_ih = b_ih.const_data_ptr();
  if (in.b_hh) p.b_hh = b_hh.const_data_ptr();
  p.product = product.const_data_ptr();
  p.second_product = second_product.const_data_ptr();
  p.h_state = h_state.mutable_data_ptr();
  p.h_wide = RowPointer(h_wide)[0];
  p.c_state = RowPointer(c_state)[0];
  p.save = save;
  const RowPointer gate_rows(gates), state_rows(states), cell_rows(out.saved.cells),
      middle_rows(middle);

  Span span{0, 0, 0};
  for (long i = 0, left = 0; call.rows && i < l.time.count; i++, left--) {
    if (left == 0) {
      span = span_from(l.time, i, most_rows);
      left = span.steps;
      multiply(first_rows(gates, span.rows), x.narrow(0, span.first, span.rows), w_ih);
    }
    const long t = l.time.at(i), at = l.time.begin(t), rows = l.time.rows(t);
    p.rows = l.rows(t, rows);
    p.gates = gate_rows[at - span.first];
    p.middle = middle_rows[save ? at : 0];
    p.h = l.projected ? nullptr : state_rows[at];
    p.cells = cell_rows[at];
    multiply(first_rows(product, rows), first_rows(h_state, rows), w_hh);
    cuda::step_forward(call.kind, l.storage, 0, p, scope.stream());
    if (!second_weights.defined()) continue;
    multiply(first_rows(second_product, rows), middle->narrow(0, save ? at : 0, rows),
             second_weights);
    if (l.reset_before)
      cuda::step_forward(call.kind, l.storage, 1, p, scope.stream());
    else
      cuda::step_project(l.storage, {p.rows, l.output, p.second_product, state_rows[at], p.h_state},
                         scope.stream());
  }

  out.h_n = h_state;
  if (l.lstm) out.c_n = c_state->to(call.dtype);
  if (!save) return out;
  out.saved.states = out.output;
  if (!l.elman) out.saved.gates = gates;
  out.saved.middle = middle;
  out.saved.isa = kCudaStep;
  return out;
}

}  // namespace rnn_ext
