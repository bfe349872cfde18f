#include "cpu_layer.h"

#include <ATen/Parallel.h>

#include <exception>

#include "../cpu/dispatch.h"
#include "../cpu/team.h"
#include "operands.h"

namespace rnn_ext {
namespace {

using at::Tensor;

void run(const Kernels& k, CellKind cell, const ForwardArgs<float>& args) {
  k.forward_float(cell, args);
}
void run(const Kernels& k, CellKind cell, const ForwardArgs<double>& args) {
  k.forward_double(cell, args);
}
void run(const Kernels& k, CellKind cell, const ForwardArgs<BFloat16>& args) {
  k.bfloat16->forward(cell, args);
}
void run(const Kernels& k, CellKind cell, const BackwardArgs<float>& args) {
  k.backward_float(cell, args);
}
void run(const Kernels& k, CellKind cell, const BackwardArgs<double>& args) {
  k.backward_double(cell, args);
}
void run(const Kernels& k, CellKind cell, const BackwardArgs<BFloat16>& args) {
  k.bfloat16->backward(cell, args);
}

// A forward pass from the tensors it reads to those it returns; run() is the kernel alone.
template <class value>
class ForwardPass {
  using real = Real<value>;

 public:
  ForwardPass(const Call& call, const Kernels& kernels, const LayerInputs& in, bool save,
              const PassOptions& options, const Plan& plan)
      : call_(call), save_(save), kernels_(kernels) {
    const Sizes& s = call.sizes;
    if (save) out_.saved.isa = kernels_.name;
    states_ = uninitialized(call.laid_out(s.output), kDtype<value>);
    const bool lstm = call.kind == CellKind::kLstm;
    if (lstm && save) out_.saved.cells = uninitialized(call.laid_out(s.hidden), kDtype<real>);
    if (lstm && !save) out_.c_n = running_cells<real>(call, in);
    if (save && options.keep_gates) {
      const long width = kernels_.gates_width(call.kind, s.hidden, sizeof(real));
      if (width) out_.saved.gates = uninitialized({call.rows, width}, kDtype<real>);
      // An Elman network's f(a) where its state has but a share of it
      const bool made = call.gates == 1 && in.hold_h && in.hold_h->dim() == 0;
      if (call.gates == 3 || in.w_hr || made)
        out_.saved.middle = uninitialized({call.rows, s.hidden}, kDtype<value>);
    }
    operands_.template inputs<value>(call, in, args_);
    args_.out = writable<value>(states_);
    args_.c = writable<real>(save ? out_.saved.cells : out_.c_n);
    args_.gates = writable<real>(out_.saved.gates);
    args_.middle = writable<value>(out_.saved.middle);
    args_.save = save;
    args_.plan = plan;
  }

  void run() const { rnn_ext::run(kernels_, call_.kind, args_); }

  LayerOutputs outputs() {
    complete<value>(call_, args_.steps, states_, save_, out_);
    return std::move(out_);
  }

 private:
  const Call& call_;
  const bool save_;
  const Kernels& kernels_;
  Operands operands_;
  Tensor states_;
  LayerOutputs out_;
  ForwardArgs<value> args_{};
};

template <class value>
class BackwardPass {
  using real = Real<value>;

 public:
  BackwardPass(const Call& call, const Kernels& kernels, const LayerInputs& in, const Saved& saved,
               const LayerGradients& d, const Wanted& wanted, const PassOptions& options,
               const Plan& plan)
      : call_(call), kernels_(kernels), wanted_(wanted), options_(options) {
    allocate(0, in.input, kDtype<value>);
    allocate(1, in.h0);
    allocate(3, in.w_ih);
    allocate(4, in.w_hh);
    if (in.b_ih) allocate(5, *in.b_ih);
    if (in.b_hh) allocate(6, *in.b_hh);
    if (in.w_hr) allocate(7, *in.w_hr);
    if (call.restores && out_[1]) out_[1]->zero_();
    if (in.c0) out_[2] = cell_gradient(d.d_c_n);
    operands_.template inputs<value>(call, in, args_);
    operands_.template upstream<value>(saved, d, args_);
    write_gradients<value>(call, out_, args_);
    args_.groups = call.groups;
    args_.add = !options.sums.empty();
    args_.clip = options.clip;
    args_.limit = options.limit;
    args_.dh_norms = options.dh_norms.defined() ? writable<real>(options.dh_norms) : nullptr;
    args_.plan = plan;
  }

  void run() const { rnn_ext::run(kernels_, call_.kind, args_); }

  InputGradients gradients() {
    for (int i = 0; i < kLayerInputs; i++) {
      if (!wanted_[i]) out_[i].reset();
      if (out_[i] && options_.sums.empty()) out_[i] = converted(*out_[i], call_.dtype);
    }
    return std::move(out_);
  }

 private:
  // What dL/dc0 is computed in: dL/dc_n, and zeros for what resets restore.
  Tensor cell_gradient(const OptionalTensor& d_c_n) const {
    const bool given = d_c_n && d_c_n->defined();
    if (given && !call_.restores)
      return d_c_n->to(call_.compute, false, /*copy=*/true).contiguous();
    Tensor dc =
        at::zeros({call_.batch * (1 + call_.restores), call_.sizes.hidden}, call_.options());
    if (given) dc.narrow(0, 0, call_.batch).copy_(*d_c_n);
    return dc;
  }

  void allocate(int i, const Tensor& like, at::ScalarType dtype = kDtype<real>) {
    if (!wanted_[i]) return;
    if (i >= kFirstWeight && !options_.sums.empty()) {
      out_[i] = options_.sums[i - kFirstWeight];
      return;
    }
    at::IntArrayRef shape = like.sizes();
    std::vector<int64_t> of_each;
    if (call_.groups > 1 && i >= kFirstWeight) {
      of_each.assign(1, call_.groups);
      of_each.insert(of_each.end(), shape.begin(), shape.end());
      shape = of_each;
    }
    out_[i] = call_.rows ? uninitialized(shape, dtype) : at::zeros(shape, dtype);
  }

  const Call& call_;
  const Kernels& kernels_;
  const Wanted wanted_;
  const PassOptions& options_;
  Operands operands_;
  InputGradients out_;
  BackwardArgs<value> args_{};
};

template <class value>
PlanShape plan_shape(const Call& call, const PassOptions& options) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool part = options.planned_steps > 0;
  return {part ? options.planned_steps : call.steps,
          part ? options.planned_batch : call.batch,
          call.sizes.input,
          call.sizes.hidden,
          call.sizes.output,
          call.gates,
          long(sizeof(value)),
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

template <class value>
std::vector<LayerOutputs> forward(const Call& call, const Kernels& kernels,
                                  std::span<const LayerInputs> directions, bool save,
                                  const PassOptions& options) {
  const auto [plan, side_by_side] =
      choose_plan(plan_shape<value>(call, options), directions.size());
  std::vector<ForwardPass<value>> passes;
  passes.reserve(directions.size());
  for (const LayerInputs& in : directions)
    passes.emplace_back(call, kernels, in, save, options, plan);
  if (call.rows) run_all(passes, side_by_side);
  std::vector<LayerOutputs> out;
  for (ForwardPass<value>& pass : passes) out.push_back(pass.outputs());
  return out;
}

template <class value>
std::vector<InputGradients> backward(const Call& call, const Kernels& kernels,
                                     std::span<const LayerInputs> directions,
                                     std::span<const Saved> saved,
                                     std::span<const LayerGradients> d,
                                     std::span<const Wanted> wanted, const PassOptions& options) {
  const auto [plan, side_by_side] =
      choose_plan(plan_shape<value>(call, options), directions.size());
  std::vector<BackwardPass<value>> passes;
  passes.reserve(directions.size());
  for (size_t i = 0; i < directions.size(); i++)
    passes.emplace_back(call, kernels, directions[i], saved[i], d[i], wanted[i], options, plan);
  if (call.rows) run_all(passes, side_by_side);
  std::vector<InputGradients> out;
  for (BackwardPass<value>& pass : passes) out.push_back(pass.gradients());
  return out;
}

}  // namespace

std::vector<LayerOutputs> cpu_layer_forward(const Call& call,
                                            std::span<const LayerInputs> directions, bool save,
                                            const PassOptions& options) {
  const Kernels& kernels = active_kernels();
  return with_value(call, kernels, [&](auto value) {
    return forward<decltype(value)>(call, kernels, directions, save, options);
  });
}

std::vector<InputGradients> cpu_layer_backward(
    const Call& call, std::span<const LayerInputs> directions, std::span<const Saved> saved,
    std::span<const LayerGradients> d, std::span<const Wanted> wanted, const PassOptions& options) {
  const Kernels& kernels = kernels_named(saved[0].isa);
  return with_value(call, kernels, [&](auto value) {
    return backward<decltype(value)>(call, kernels, directions, saved, d, wanted, options);
  });
}

}  // namespace rnn_ext
