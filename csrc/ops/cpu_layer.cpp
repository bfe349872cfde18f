#include "cpu_layer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <exception>

#include "../cpu/dispatch.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// Contiguous tensors of the compute dtype; keeps them alive while the kernel reads them.
template <class real>
class Operands {
 public:
  const real* read(const Tensor& t) {
    held_.push_back(t.to(c10::CppTypeToScalarType<real>::value).contiguous());
    return held_.back().template const_data_ptr<real>();
  }
  const real* read(const OptionalTensor& t) { return t && t->defined() ? read(*t) : nullptr; }
  Weights<real> weights(const LayerInputs& in) {
    return {read(in.w_ih), read(in.w_hh), read(in.b_ih), read(in.b_hh), read(in.w_hr)};
  }

 private:
  std::vector<Tensor> held_;
};

// at::empty, on large pages where it is large.
Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor t = at::empty(sizes, options);
  advise_huge_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

template <class real>
real* writable(const OptionalTensor& t) {
  return t ? t->mutable_data_ptr<real>() : nullptr;
}

// The state of every sequence after its last step.
template <class real>
Tensor last_states(const Tensor& all, const Steps& time, long features) {
  Tensor last = at::empty({time.batch, features}, all.options());
  const real* from = all.const_data_ptr<real>();
  real* to = last.mutable_data_ptr<real>();
  for (long t = 0; t < time.count; t++) {
    const long first = time.continuing(t), ending = time.rows(t) - first;
    if (ending > 0)
      std::memcpy(to + first * features, from + (time.begin(t) + first) * features,
                  ending * features * sizeof(real));
  }
  return last;
}

// A forward pass from the tensors it reads to those it returns; run() is the kernel alone.
template <class real>
class ForwardPass {
 public:
  ForwardPass(const Call& call, const LayerInputs& in, bool save, const Plan& plan)
      : call_(call), save_(save), kernels_(active_kernels()) {
    const Sizes& s = call.sizes;
    out_.saved.isa = kernels_.name;
    states_ = fresh(call.laid_out(s.output), call.options());
    if (lstm_ && save) out_.saved.cells = fresh(call.laid_out(s.hidden), call.options());
    if (lstm_ && !save) out_.c_n = in.c0->to(call.compute, false, /*copy=*/true).contiguous();
    if (save) {
      const long width = kernels_.gates_width(call.kind, s.hidden, sizeof(real));
      if (width) out_.saved.gates = fresh({call.rows, width}, call.options());
      if (call.gates == 3 || in.w_hr)
        out_.saved.middle = fresh({call.rows, s.hidden}, call.options());
    }
    args_.steps = call.time(in.reverse);
    args_.sizes = s;
    args_.weights = operands_.weights(in);
    args_.x = operands_.read(in.input);
    args_.h0 = operands_.read(in.h0);
    args_.c0 = operands_.read(in.c0);
    args_.out = states_.template mutable_data_ptr<real>();
    args_.c = writable<real>(save ? out_.saved.cells : out_.c_n);
    args_.gates = writable<real>(out_.saved.gates);
    args_.middle = writable<real>(out_.saved.middle);
    args_.save = save;
    args_.plan = plan;
  }

  void run() const {
    if constexpr (sizeof(real) == sizeof(float))
      kernels_.forward_float(call_.kind, args_);
    else
      kernels_.forward_double(call_.kind, args_);
  }

  LayerOutputs outputs() {
    const Sizes& s = call_.sizes;
    out_.h_n = last_states<real>(states_, args_.steps, s.output).to(call_.dtype);
    if (lstm_)
      out_.c_n = (save_ ? last_states<real>(*out_.saved.cells, args_.steps, s.hidden) : *out_.c_n)
                     .to(call_.dtype);
    out_.output = states_.to(call_.dtype);
    if (save_) out_.saved.states = states_;
    return std::move(out_);
  }

 private:
  const Call& call_;
  const bool save_, lstm_ = call_.kind == CellKind::kLstm;
  const Kernels& kernels_;
  Operands<real> operands_;
  Tensor states_;
  LayerOutputs out_;
  ForwardArgs<real> args_{};
};

template <class real>
class BackwardPass {
 public:
  BackwardPass(const Call& call, const LayerInputs& in, const Saved& saved, const LayerGradients& d,
               const Wanted& wanted, const Plan& plan)
      : call_(call), kernels_(kernels_named(saved.isa)), wanted_(wanted) {
    const Sizes& s = call.sizes;
    allocate(0, in.input);
    allocate(1, in.h0);
    allocate(3, in.w_ih);
    allocate(4, in.w_hh);
    if (in.b_ih) allocate(5, *in.b_ih);
    if (in.b_hh) allocate(6, *in.b_hh);
    if (in.w_hr) allocate(7, *in.w_hr);
    if (in.c0)
      out_[2] = d.d_c_n && d.d_c_n->defined()
                    ? d.d_c_n->to(call.compute, false, /*copy=*/true).contiguous()
                    : at::zeros({call.batch, s.hidden}, call.options());
    args_.steps = call.time(in.reverse);
    args_.sizes = s;
    args_.weights = operands_.weights(in);
    args_.x = operands_.read(in.input);
    args_.h0 = operands_.read(in.h0);
    args_.c0 = operands_.read(in.c0);
    args_.out = operands_.read(saved.states);
    args_.c = operands_.read(saved.cells);
    args_.gates = operands_.read(saved.gates);
    args_.middle = operands_.read(saved.middle);
    args_.d_out = operands_.read(d.d_output);
    args_.d_hn = operands_.read(d.d_h_n);
    args_.d_c = operands_.read(d.d_cells);
    args_.dx = writable<real>(out_[0]);
    args_.dh0 = writable<real>(out_[1]);
    args_.dc = writable<real>(out_[2]);
    args_.dw_ih = writable<real>(out_[3]);
    args_.dw_hh = writable<real>(out_[4]);
    args_.db_ih = writable<real>(out_[5]);
    args_.db_hh = writable<real>(out_[6]);
    args_.dw_hr = writable<real>(out_[7]);
    args_.plan = plan;
  }

  void run() const {
    if constexpr (sizeof(real) == sizeof(float))
      kernels_.backward_float(call_.kind, args_);
    else
      kernels_.backward_double(call_.kind, args_);
  }

  InputGradients gradients() {
    for (int i = 0; i < kLayerInputs; i++) {
      if (!wanted_[i]) out_[i].reset();
      if (out_[i]) out_[i] = out_[i]->to(call_.dtype);
    }
    return std::move(out_);
  }

 private:
  void allocate(int i, const Tensor& like) {
    if (wanted_[i])
      out_[i] = call_.rows ? fresh(like.sizes(), call_.options())
                           : at::zeros(like.sizes(), call_.options());
  }

  const Call& call_;
  const Kernels& kernels_;
  const Wanted wanted_;
  Operands<real> operands_;
  InputGradients out_;
  BackwardArgs<real> args_{};
};

PlanShape plan_shape(const Call& call) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return {call.steps,
          call.batch,
          call.sizes.input,
          call.sizes.hidden,
          call.sizes.output,
          call.gates,
          long(c10::elementSize(call.compute)),
          threads};
}

template <class Pass>
void run_all(const std::vector<Pass>& passes, bool side_by_side) {
  if (!side_by_side) {
    for (const Pass& pass : passes) pass.run();
    return;
  }
  std::exception_ptr failure[2];  // must not leave the parallel region
  run_team(2, [&](const Member& m) {
    for (long i = m.begin(2); i < m.end(2); i++) try {
        passes[i].run();
      } catch (...) {
        failure[i] = std::current_exception();
      }
  });
  for (const std::exception_ptr& error : failure)
    if (error) std::rethrow_exception(error);
}

template <class real>
std::vector<LayerOutputs> forward(const Call& call, std::span<const LayerInputs> directions,
                                  bool save) {
  const auto [plan, side_by_side] = choose_plan(plan_shape(call), directions.size());
  std::vector<ForwardPass<real>> passes;
  passes.reserve(directions.size());
  for (const LayerInputs& in : directions) passes.emplace_back(call, in, save, plan);
  if (call.rows) run_all(passes, side_by_side);
  std::vector<LayerOutputs> out;
  for (ForwardPass<real>& pass : passes) out.push_back(pass.outputs());
  return out;
}

template <class real>
std::vector<InputGradients> backward(const Call& call, std::span<const LayerInputs> directions,
                                     std::span<const Saved> saved,
                                     std::span<const LayerGradients> d,
                                     std::span<const Wanted> wanted) {
  const auto [plan, side_by_side] = choose_plan(plan_shape(call), directions.size());
  std::vector<BackwardPass<real>> passes;
  passes.reserve(directions.size());
  for (size_t i = 0; i < directions.size(); i++)
    passes.emplace_back(call, directions[i], saved[i], d[i], wanted[i], plan);
  if (call.rows) run_all(passes, side_by_side);
  std::vector<InputGradients> out;
  for (BackwardPass<real>& pass : passes) out.push_back(pass.gradients());
  return out;
}

}  // namespace

std::vector<LayerOutputs> cpu_layer_forward(const Call& call,
                                            std::span<const LayerInputs> directions, bool save) {
  return call.compute == at::kDouble ? forward<double>(call, directions, save)
                                     : forward<float>(call, directions, save);
}

std::vector<InputGradients> cpu_layer_backward(const Call& call,
                                               std::span<const LayerInputs> directions,
                                               std::span<const Saved> saved,
                                               std::span<const LayerGradients> d,
                                               std::span<const Wanted> wanted) {
  return call.compute == at::kDouble ? backward<double>(call, directions, saved, d, wanted)
                                     : backward<float>(call, directions, saved, d, wanted);
}

}  // namespace rnn_ext
