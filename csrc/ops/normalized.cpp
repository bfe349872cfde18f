#include "normalized.h"

#include <ATen/Parallel.h>

#include "../cpu/dispatch.h"
#include "../cpu/normalized_problem.h"
#include "cuda_normalized.h"
#include "operands.h"

namespace rnn_ext {
namespace {

Call check(const LayerInputs& in, const ExtraTensors& extras) {
  Call call = check_call(in);
  const bool lstm = call.kind == CellKind::kLstm, normalized = extras[0].has_value();
  TORCH_CHECK(!in.w_hr, in.cell, ": layer normalisation and peepholes take no projection");
  TORCH_CHECK(normalized == extras[1].has_value() &&
                  (normalized && lstm) == extras[2].has_value() && (extras[2] || !extras[3]),
              in.cell,
              ": layer normalisation needs gains for input and state and, of the LSTM, for "
              "the cell");
  TORCH_CHECK(lstm || !extras[4], in.cell, ": peepholes belong to the LSTM");
  TORCH_CHECK(normalized || extras[4], in.cell, ": give gains, or peepholes");
  const int64_t hidden = call.sizes.hidden, all = call.gates * hidden;
  const char* const names[] = {"gain_ih", "gain_hh", "gain_cell", "bias_cell", "peephole"};
  const int64_t sizes[] = {all, all, hidden, hidden, 3 * hidden};
  for (int i = 0; i < kExtras; i++) {
    if (!extras[i]) continue;
    TORCH_CHECK(extras[i]->device() == in.input.device() &&
                    extras[i]->scalar_type() == call.dtype &&
                    extras[i]->sizes() == at::IntArrayRef{sizes[i]},
                "rnn_ext: expected ", names[i], " of shape [", sizes[i], "] and dtype ", call.dtype,
                ", got ", extras[i]->sizes(), " and ", extras[i]->scalar_type());
  }
  return call;
}

template <class value>
Plan plan_of(const Call& call, const PassOptions& options) {
  const Sizes& s = call.sizes;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool part = options.planned_steps > 0;
  return choose_row_plan({part ? options.planned_steps : call.steps,
                          part ? options.planned_batch : call.batch, s.input, s.hidden, s.output,
                          call.gates, long(sizeof(value)), threads});
}

template <class value>
Extras<value> read(Operands& operands, const ExtraTensors& e) {
  using real = Real<value>;
  return {operands.template read<real>(e[0]), operands.template read<real>(e[1]),
          operands.template read<real>(e[2]), operands.template read<real>(e[3]),
          operands.template read<real>(e[4])};
}

const NormalizedKernels<float>& table(const Kernels& k, float) { return *k.normalized_float; }
const NormalizedKernels<double>& table(const Kernels& k, double) { return *k.normalized_double; }
const NormalizedKernels<BFloat16>& table(const Kernels& k, BFloat16) {
  return *k.bfloat16->normalized;
}

template <class value>
LayerOutputs forward(const Call& call, const Kernels& kernels, const LayerInputs& in,
                     const ExtraTensors& extras, bool save, const PassOptions& options) {
  using real = Real<value>;
  const Sizes& s = call.sizes;
  const bool lstm = in.c0.has_value();
  LayerOutputs out;
  const Tensor states = uninitialized(call.laid_out(s.output), kDtype<value>);
  if (save) {
    out.saved.isa = kernels.name;
    if (lstm) out.saved.cells = uninitialized(call.laid_out(s.hidden), kDtype<real>);
    const long width =
        kernels.record_width(call.kind, s.hidden, extras[0].has_value(), sizeof(real));
    if (options.keep_gates) out.saved.gates = uninitialized({call.rows, width}, kDtype<real>);
  } else if (lstm) {
    out.c_n = running_cells<real>(call, in);
  }
  Operands operands;
  NormalizedForwardArgs<value> args{};
  operands.inputs<value>(call, in, args.layer);
  args.layer.plan = plan_of<value>(call, options);
  args.extras = read<value>(operands, extras);
  args.layer.out = writable<value>(states);
  args.layer.c = writable<real>(save ? out.saved.cells : out.c_n);
  args.layer.gates = writable<real>(out.saved.gates);
  args.layer.save = save;
  if (call.rows) table(kernels, value{}).forward(call.kind, args);
  complete<value>(call, args.layer.steps, states, save, out);
  return out;
}

template <class value>
NormalizedGradients backward(const Call& call, const Kernels& kernels, const LayerInputs& in,
                             const ExtraTensors& extras, const Saved& saved,
                             const LayerGradients& d, const NormalizedWanted& wanted,
                             const PassOptions& options) {
  using real = Real<value>;
  const bool add = !options.sums.empty();
  NormalizedGradients out;
  const std::array<OptionalTensor, kLayerInputs> given{in.input, in.h0,   in.c0,   in.w_ih,
                                                       in.w_hh,  in.b_ih, in.b_hh, {}};
  const auto allocate = [&](int i, const OptionalTensor& like) {
    if (!wanted[i] || !like) return;
    if (add && i >= kFirstWeight) {
      out[i] = options.sums[i - kFirstWeight];
      return;
    }
    const at::ScalarType dtype = i == 0 ? kDtype<value> : kDtype<real>;
    const bool all_written = call.rows && i != 1 && i != 2;
    out[i] = all_written ? uninitialized(like->sizes(), dtype) : at::zeros(like->sizes(), dtype);
  };
  for (int i = 0; i < kLayerInputs; i++) allocate(i, given[i]);
  for (int i = 0; i < kExtras; i++) allocate(kLayerInputs + i, extras[i]);
  if (in.c0) {
    if (!out[2]) out[2] = at::zeros(in.c0->sizes(), kDtype<real>);
    if (d.d_c_n && d.d_c_n->defined()) out[2]->narrow(0, 0, call.batch).copy_(*d.d_c_n);
  }
  Operands operands;
  NormalizedBackwardArgs<value> args{};
  operands.inputs<value>(call, in, args.layer);
  args.layer.plan = plan_of<value>(call, options);
  args.extras = read<value>(operands, extras);
  operands.upstream<value>(saved, d, args.layer);
  write_gradients<value>(call, out, args.layer);
  args.layer.add = add;
  args.layer.clip = options.clip;
  args.layer.limit = options.limit;
  args.layer.dh_norms = options.dh_norms.defined() ? writable<real>(options.dh_norms) : nullptr;
  args.d_gain_ih = writable<real>(out[8]);
  args.d_gain_hh = writable<real>(out[9]);
  args.d_gain_cell = writable<real>(out[10]);
  args.d_bias_cell = writable<real>(out[11]);
  args.d_peephole = writable<real>(out[12]);
  if (call.rows) table(kernels, value{}).backward(call.kind, args);
  for (int i = 0; i < kNormalizedInputs; i++) {
    if (!wanted[i]) out[i].reset();
    if (out[i] && !add) out[i] = converted(*out[i], call.dtype);
  }
  return out;
}

}  // namespace

LayerOutputs normalized_forward(const LayerInputs& in, const ExtraTensors& extras, bool save,
                                const PassOptions& options) {
  const Call call = check(in, extras);
  if constexpr (kHasCudaKernels)
    if (on_cuda(in.input)) return cuda_normalized_forward(call, in, extras, save, options);
  const Kernels& kernels = active_kernels();
  return with_value(call, kernels, [&](auto value) {
    return forward<decltype(value)>(call, kernels, in, extras, save, options);
  });
}

NormalizedGradients normalized_backward(const LayerInputs& in, const ExtraTensors& extras,
                                        const Saved& saved, const LayerGradients& d,
                                        const NormalizedWanted& wanted,
                                        const PassOptions& options) {
  const Call call = check(in, extras);
  if constexpr (kHasCudaKernels)
    if (on_cuda(in.input))
      return cuda_normalized_backward(call, in, extras, saved, d, wanted, options);
  const Kernels& kernels = kernels_named(saved.isa);
  return with_value(call, kernels, [&](auto value) {
    return backward<decltype(value)>(call, kernels, in, extras, saved, d, wanted, options);
  });
}

}  // namespace rnn_ext
