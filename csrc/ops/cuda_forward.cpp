#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <limits>

#include "cuda_persistent.h"
#include "cuda_step.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// One direction: what it allocates, then either the tensors of a persistent kernel or the loop.
class ForwardPass {
 public:
  // Saving, everything that backward reads, or the states alone.
  ForwardPass(const Call& call, const LayerInputs& in, const OptionalTensor& lengths,
              const OptionalTensor& resets, bool keep_states, bool save, bool persistent)
      : call_(call),
        in_(in),
        l_(call, in, lengths, resets),
        keep_states_(keep_states),
        save_(save),
        restored_(l_.restored()),
        restored_product_(l_.restored_product(restored_)) {
    const long width = call.gates * l_.hidden, batch = call.batch;
    const long row_bytes = std::max<long>(1, width * c10::elementSize(call.dtype));
    most_rows_ = persistent || save || l_.elman ? std::numeric_limits<long>::max()
                                                : std::max(batch, kProjectionBytes / row_bytes);
    out_.output = at::empty(call.laid_out(l_.output), l_.stored);
    states_ = l_.as_rows(out_.output);
    // An Elman cell's net input lies where its output will.
    gates_ = l_.elman ? states_ : at::empty({std::min(call.rows, most_rows_), width}, l_.stored);
    if (l_.lstm) c_state_ = fresh(first_rows(*in.c0, batch), l_.wide);
    if (l_.lstm && keep_states) out_.saved.cells = at::empty(call.laid_out(l_.hidden), l_.wide);
    const bool made = l_.elman && in.hold_h && in.hold_h->dim() == 0;
    if (l_.projected || (l_.reset_before && !persistent) ||
        ((l_.gru || l_.reset_before || made) && save))
      middle_ = at::empty({save ? call.rows : batch, l_.hidden}, l_.stored);
    const Tensor h0 = first_rows(in.h0, batch);
    h_state_ = persistent ? at::empty(h0.sizes(), l_.stored) : fresh(h0, l_.stored);
  }

  // Projects the input; the kernel does the rest.
  ForwardLoop persistent_loop() {
    multiply(gates_, l_.as_rows(in_.input), in_.w_ih.t());
    const OptionalTensor c0 = c_state_;
    if (l_.lstm) c_state_ = at::empty_like(*c0);
    return {&in_,      gates_,    states_,           h_state_,         c0,      c_state_,
            l_.resets, restored_, restored_product_, out_.saved.cells, middle_, save_};
  }

  void run_steps(const cuda::Stream& stream) {
    const long width = call_.gates * l_.hidden, batch = call_.batch;
    OptionalTensor h_wide;
    if (call_.gates == 3 && call_.dtype != call_.compute)
      h_wide = fresh(first_rows(in_.h0, batch), l_.wide);
    const Tensor x = l_.as_rows(in_.input);
    const Tensor product = at::empty({batch, l_.reset_before ? 2 * l_.hidden : width}, l_.wide);
    const Tensor second_product = at::empty({batch, l_.projected ? l_.output : l_.hidden}, l_.wide);
    const Tensor w_ih = in_.w_ih.t();
    const Tensor w_hh = l_.recurrent().t();
    const Tensor second_weights = l_.projected ? in_.w_hr->t()
                                  : l_.reset_before
                                      ? in_.w_hh.narrow(0, 2 * l_.hidden, l_.hidden).t()
                                      : Tensor();

    cuda::StepForward p{};
    p.hidden = l_.hidden;
    const Tensor b_ih = in_.b_ih ? in_.b_ih->contiguous() : Tensor(),
                 b_hh = in_.b_hh ? in_.b_hh->contiguous() : Tensor();
    if (in_.b_ih) p.b_ih = b_ih.const_data_ptr();
    if (in_.b_hh) p.b_hh = b_hh.const_data_ptr();
    p.product = product.const_data_ptr();
    p.restored = {RowPointer(restored_.h)[0], RowPointer(restored_.c)[0]};
    p.restored_product = RowPointer(restored_product_)[0];
    p.second_product = second_product.const_data_ptr();
    p.h_state = h_state_.mutable_data_ptr();
    p.h_wide = RowPointer(h_wide)[0];
    p.c_state = RowPointer(c_state_)[0];
    p.save = save_;
    const RowPointer gate_rows(gates_), state_rows(states_), cell_rows(out_.saved.cells),
        middle_rows(middle_);

    Span span{0, 0, 0};
    for (long i = 0, left = 0; call_.rows && i < l_.time.count; i++, left--) {
      if (left == 0) {
        span = span_from(l_.time, i, most_rows_);
        left = span.steps;
        multiply(first_rows(gates_, span.rows), x.narrow(0, span.first, span.rows), w_ih);
      }
      const long t = l_.time.at(i), at = l_.time.begin(t), rows = l_.time.rows(t);
      p.rows = l_.rows(t, rows);
      p.zoneout = l_.zoneout(at);
      p.gates = gate_rows[at - span.first];
      p.middle = middle_rows[save_ ? at : 0];
      p.h = l_.projected ? nullptr : state_rows[at];
      p.cells = cell_rows[at];
      multiply(first_rows(product, rows), first_rows(h_state_, rows), w_hh);
      cuda::step_forward(call_.kind, l_.storage, 0, p, stream);
      if (!second_weights.defined()) continue;
      multiply(first_rows(second_product, rows), middle_->narrow(0, save_ ? at : 0, rows),
               second_weights);
      if (l_.reset_before)
        cuda::step_forward(call_.kind, l_.storage, 1, p, stream);
      else
        cuda::step_project(l_.storage,
                           {p.rows, l_.output, p.second_product, state_rows[at], p.h_state,
                            p.restored.h, p.zoneout},
                           stream);
    }
  }

  LayerOutputs outputs() {
    out_.h_n = h_state_;
    if (l_.lstm) out_.c_n = c_state_->to(call_.dtype);
    if (keep_states_) {
      out_.saved.states = out_.output;
      out_.saved.isa = kCuda;
    }
    if (save_) {
      if (!l_.elman) out_.saved.gates = gates_;
      out_.saved.middle = middle_;
    }
    return std::move(out_);
  }

 private:
  const Call& call_;
  const LayerInputs& in_;
  const StepLayer l_;
  const bool keep_states_, save_;
  const Restored restored_;
  const OptionalTensor restored_product_;
  long most_rows_;
  LayerOutputs out_;
  Tensor states_, gates_, h_state_;
  OptionalTensor c_state_, middle_;
};

}  // namespace

std::vector<LayerOutputs> cuda_layer_forward(const Call& call,
                                             std::span<const LayerInputs> directions,
                                             const RowPredicates& predicates, bool save,
                                             cuda::Path path, const PassOptions& options) {
  const DeviceScope scope(directions[0].input);
  const cuda::CudaPlan plan = cuda_plan(call, directions, cuda::Pass::kForward, path);
  const bool persistent = plan.persistent && call.rows;
  std::vector<ForwardPass> passes;
  passes.reserve(directions.size());
  for (size_t i = 0; i < directions.size(); i++)
    passes.emplace_back(call, directions[i], predicates.lengths, predicates.resets[i], save,
                        save && options.keep_gates, persistent);
  if (persistent) {
    std::vector<ForwardLoop> loops;
    for (ForwardPass& pass : passes) loops.push_back(pass.persistent_loop());
    run_persistent(plan, call, predicates.lengths, loops, scope.stream());
  } else {
    for (ForwardPass& pass : passes) pass.run_steps(scope.stream());
  }
  std::vector<LayerOutputs> out;
  for (ForwardPass& pass : passes) out.push_back(pass.outputs());
  return out;
}

}  // namespace rnn_ext
