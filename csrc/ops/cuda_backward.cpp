#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <deque>
#include <limits>

#include "cuda_persistent.h"
#include "cuda_step.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// The matrix gradients, once delta of every step is there; `wide`: not rounded to what is stored.
class ParameterGradients {
 public:
  ParameterGradients(const StepLayer& layer, const Tensor& delta, bool wide,
                     const cuda::Stream& stream)
      : l_(layer), delta_(delta), wide_(wide), stream_(stream) {}

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
  Tensor w_ih() const { return over_rows(input_side(), l_.as_rows(l_.in.input)); }
  Tensor w_hh(const Tensor& previous, const OptionalTensor& middle) const {
    const long h = l_.hidden;
    const Tensor first = over_rows(hidden_side(), previous);
    if (l_.gru) return at::cat({first.narrow(-2, h, 2 * h), first.narrow(-2, 0, h)}, -2);
    if (l_.reset_before)
      return at::cat({first, over_rows(delta_.narrow(1, 2 * h, h), *middle)}, -2);
    return first;
  }
  // delta^T x, for each group of sequences where there are several.
  Tensor over_rows(const Tensor& delta, const Tensor& x) const {
    if (l_.call.groups == 1) {
      const Tensor sums = at::empty({delta.size(1), x.size(1)}, wide_ ? l_.wide : l_.stored);
      multiply(sums, delta.t(), x);
      return sums;
    }
    return at::bmm(by_group(delta).transpose(1, 2), by_group(x));
  }
  Tensor bias_sums() const {
    if (l_.call.groups > 1)
      return at::sum(by_group(delta_), 1, false, l_.call.compute).to(l_.call.dtype);
    if (wide_) return at::sum(delta_, 0, false, l_.call.compute);
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
    return l_.gru ? sums.narrow(-1, l_.hidden, 3 * l_.hidden).clone() : sums;
  }
  Tensor b_hh(const Tensor& sums) const {
    const long h = l_.hidden;
    if (!l_.gru) return sums.clone();
    return at::cat({sums.narrow(-1, h, 2 * h), sums.narrow(-1, 0, h)}, -1);
  }

 private:
  // [groups, rows of each, columns]
  Tensor by_group(const Tensor& rows) const {
    const long groups = l_.call.groups;
    return rows.reshape({rows.size(0) / groups, groups, rows.size(1)}).transpose(0, 1);
  }

  const StepLayer& l_;
  const Tensor delta_;
  const bool wide_;
  const cuda::Stream& stream_;
};

// One direction: what it allocates, then either the tensors of a persistent kernel or the loop.
class BackwardPass {
 public:
  BackwardPass(const Call& call, const LayerInputs& in, const OptionalTensor& lengths,
               const OptionalTensor& resets, const Saved& saved, const LayerGradients& d,
               const Wanted& wanted, const PassOptions& options, const cuda::Stream& stream)
      : call_(call),
        in_(in),
        saved_(saved),
        wanted_(wanted),
        options_(options),
        stream_(stream),
        l_(call, in, lengths, resets),
        delta_(at::empty({call.rows, (l_.gru ? 4 : call.gates) * l_.hidden}, l_.stored)),
        carry_(state_gradient(d.d_h_n, {call.batch, l_.output}, l_.wide)),
        h0_(in.h0.contiguous()),
        d_output_(contiguous(d.d_output)),
        d_cells_(contiguous(d.d_cells)),
        restored_(l_.restored()),
        sums_(l_.restored_sums(wanted[1], wanted[2])),
        products_(l_, delta_, !options.sums.empty(), stream) {
    if (l_.lstm) {
      c0_ = in.c0->to(call.compute).contiguous();
      dc_ = state_gradient(d.d_c_n, {call.batch, l_.hidden}, l_.wide);
    }
    if (l_.projected) dh_ = at::empty({call.rows, l_.output}, l_.stored);
    if (options.dh_norms.defined())
      norms_ = options.dh_norms.view({call.rows, 1});
    else if (options.needs_norms())
      norms_ = at::empty({call.batch, 1}, l_.wide);
    if (wanted[4]) previous_ = at::empty({call.rows, l_.output}, l_.stored);
  }

  BackwardLoop persistent_loop() const {
    return {&in_,     saved_.gates, saved_.middle, saved_.cells, l_.as_rows(saved_.states),
            c0_,      l_.resets,    restored_,     sums_,        d_output_,
            d_cells_, carry_,       dc_,           delta_,       previous_};
  }

  void run_steps() {
    const Tensor product = at::empty({call_.batch, l_.output}, l_.wide),
                 second_product = at::empty({call_.batch, l_.hidden}, l_.wide);
    const Tensor hidden_side = products_.hidden_side();
    Tensor w_hh = l_.recurrent(), second_operand, second_weights;
    if (l_.gru)
      w_hh = at::cat({w_hh.narrow(0, 2 * l_.hidden, l_.hidden), w_hh.narrow(0, 0, 2 * l_.hidden)});
    if (l_.reset_before) {
      second_weights = in_.w_hh.narrow(0, 2 * l_.hidden, l_.hidden);
      second_operand = delta_.narrow(1, 2 * l_.hidden, l_.hidden);
    } else if (l_.projected) {
      second_weights = *in_.w_hr;
      second_operand = *dh_;
    }

    cuda::StepBackward p{};
    p.hidden = l_.hidden;
    p.output = l_.output;
    p.product = product.const_data_ptr();
    p.second_product = second_product.const_data_ptr();
    p.h0 = h0_.const_data_ptr();
    p.c0 = RowPointer(c0_)[0];
    p.restored = {RowPointer(restored_.h)[0], RowPointer(restored_.c)[0]};
    p.restored_sums = {RowPointer(sums_.delta)[0], RowPointer(sums_.h)[0], RowPointer(sums_.c)[0]};
    p.clip = options_.clip;
    p.limit = options_.limit;
    p.carry = carry_.mutable_data_ptr();
    p.dc = RowPointer(dc_)[0];
    const RowPointer gate_rows(saved_.gates), middle_rows(saved_.middle), state_rows(saved_.states),
        cell_rows(saved_.cells);
    const RowPointer d_output_rows(d_output_), d_cells_rows(d_cells_), delta_rows(delta_),
        dh_rows(dh_), previous_rows(previous_), norm_rows(norms_);
    const bool all_norms = options_.dh_norms.defined();
    for (long i = l_.time.count - 1; call_.rows && i >= 0; i--) {
      const long t = l_.time.at(i), at = l_.time.begin(t), rows = l_.time.rows(t),
                 before = l_.time.previous(t);
      const long before_at = l_.time.exists(before) ? l_.time.begin(before) : 0;
      p.next = p.rows;  // none at first
      p.rows = l_.rows(t, rows);
      p.zoneout = l_.zoneout(at);
      p.previous_step = before;
      p.previous_count = l_.time.carried(t);
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
      p.norms = norm_rows[all_norms ? at : 0];
      if (p.norms) cuda::step_norms(call_.kind, l_.storage, p, stream_);
      cuda::step_backward(call_.kind, l_.storage, 0, p, stream_);
      if (second_weights.defined()) {
        multiply(first_rows(second_product, rows), second_operand.narrow(0, at, rows),
                 second_weights);
        cuda::step_backward(call_.kind, l_.storage, 1, p, stream_);
      }
      multiply(first_rows(product, rows), hidden_side.narrow(0, at, rows), w_hh);
    }
    p.next = p.rows;
    p.rows.count = 0;
    if (call_.rows) cuda::step_backward(call_.kind, l_.storage, 0, p, stream_);
  }

  InputGradients gradients() const {
    InputGradients out;
    if (wanted_[0]) out[0] = products_.input();
    if (wanted_[1]) out[1] = of_state(l_.d_h0(carry_, sums_));
    if (wanted_[2] && l_.lstm) out[2] = of_state(l_.d_c0(*dc_, sums_));
    if (wanted_[3]) out[3] = products_.w_ih();
    if (wanted_[4]) out[4] = products_.w_hh(*previous_, saved_.middle);
    if ((wanted_[5] || wanted_[6]) && in_.b_ih) {
      const Tensor sums = products_.bias_sums();
      if (wanted_[5]) out[5] = products_.b_ih(sums);
      if (wanted_[6]) out[6] = products_.b_hh(sums);
    }
    if (wanted_[7] && l_.projected) out[7] = products_.over_rows(*dh_, *saved_.middle);
    for (size_t i = 0; i < options_.sums.size(); i++)
      if (OptionalTensor& gradient = out[kFirstWeight + i])
        gradient = options_.sums[i]->add_(*gradient);
    return out;
  }

 private:
  Tensor of_state(const Tensor& gradient) const {
    return options_.sums.empty() ? gradient.to(call_.dtype) : gradient;
  }

  const Call& call_;
  const LayerInputs& in_;
  const Saved& saved_;
  const Wanted& wanted_;
  const PassOptions& options_;
  const cuda::Stream& stream_;
  const StepLayer l_;
  const Tensor delta_, carry_, h0_;
  const OptionalTensor d_output_, d_cells_;
  const Restored restored_;
  const RestoredSums sums_;
  const ParameterGradients products_;
  OptionalTensor c0_, dc_, dh_, previous_, norms_;
};

}  // namespace

std::vector<InputGradients> cuda_layer_backward(
    const Call& call, std::span<const LayerInputs> directions, const RowPredicates& predicates,
    std::span<const Saved> saved, std::span<const LayerGradients> d, std::span<const Wanted> wanted,
    cuda::Path path, const PassOptions& options) {
  for (const Saved& s : saved)
    TORCH_CHECK(s.isa == kCuda, "rnn_ext: what '", s.isa, "' saved is not for the CUDA kernels");
  const DeviceScope scope(directions[0].input);
  const cuda::CudaPlan plan =
      cuda_plan(call, directions, cuda::Pass::kBackward, path, options.needs_norms());
  std::deque<BackwardPass> passes;  // which refer to themselves
  for (size_t i = 0; i < directions.size(); i++)
    passes.emplace_back(call, directions[i], predicates.lengths, predicates.resets[i], saved[i],
                        d[i], wanted[i], options, scope.stream());
  if (plan.persistent && call.rows) {
    std::vector<BackwardLoop> loops;
    for (const BackwardPass& pass : passes) loops.push_back(pass.persistent_loop());
    const float limit = options.clip == Clip::kValue ? static_cast<float>(options.limit)
                                                     : std::numeric_limits<float>::infinity();
    run_persistent(plan, call, predicates.lengths, loops, limit, scope.stream());
  } else {
    for (BackwardPass& pass : passes) pass.run_steps();
  }
  std::vector<InputGradients> out;
  for (const BackwardPass& pass : passes) out.push_back(pass.gradients());
  return out;
}

}  // namespace rnn_ext
