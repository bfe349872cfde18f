#include "layer.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <vector>

#include "../cpu/dispatch.h"
#include "cuda_layer.h"

namespace rnn_ext {
namespace {

using at::Tensor;

void check_tensor(const char* name, const Tensor& t, const Tensor& like, at::IntArrayRef shape) {
  TORCH_CHECK(t.device() == like.device(), "rnn_ext: ", name, " is on ", t.device(),
              ", but input is on ", like.device(), "; move one of them");
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), "rnn_ext: ", name, " has dtype ",
              t.scalar_type(), ", but input has ", like.scalar_type(), "; convert one of them");
  TORCH_CHECK(t.sizes() == shape, "rnn_ext: expected ", name, " of shape ", shape, ", got ",
              t.sizes());
}

void check_tensor(const char* name, const OptionalTensor& t, const Tensor& like,
                  at::IntArrayRef shape) {
  if (t) check_tensor(name, *t, like, shape);
}

void read_batch_sizes(const Tensor& batch_sizes, Call& call) {
  TORCH_CHECK(batch_sizes.device().is_cpu() && batch_sizes.scalar_type() == at::kLong &&
                  batch_sizes.dim() == 1 && batch_sizes.size(0) > 0,
              "rnn_ext: batch_sizes must be a non-empty 1-D int64 tensor on the CPU");
  const Tensor contiguous = batch_sizes.contiguous();
  const int64_t* sizes = contiguous.const_data_ptr<int64_t>();
  call.steps = batch_sizes.size(0);
  call.batch = sizes[0];
  call.offsets.assign(1, 0);
  for (long t = 0; t < call.steps; t++) {
    TORCH_CHECK(sizes[t] > 0 && sizes[t] <= (t ? sizes[t - 1] : sizes[0]),
                "rnn_ext: batch_sizes must be positive and never grow");
    call.offsets.push_back(call.offsets.back() + sizes[t]);
  }
  TORCH_CHECK(call.offsets.back() == call.rows, "rnn_ext: batch_sizes add up to ",
              call.offsets.back(), ", but input has ", call.rows, " rows");
}

void check_device(const LayerInputs& in) {
  const at::ScalarType dtype = in.input.scalar_type();
  const bool common = dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16;
  if (on_cuda(in.input)) {
    TORCH_CHECK(common || dtype == at::kHalf, in.cell, ": ", dtype,
                " is not supported on CUDA; use float32, float64, float16 or bfloat16");
    return;
  }
  TORCH_CHECK(in.input.is_cpu(), "rnn_ext: this build has no kernels for device ",
              in.input.device());
  TORCH_CHECK(common, in.cell, ": ", dtype,
              " is not supported on the CPU; use float32, float64 or bfloat16");
}

}  // namespace

Plan Call::plan() const {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return choose_plan({steps, batch, sizes.input, sizes.hidden, sizes.output, gates,
                      long(c10::elementSize(compute)), threads});
}

Call check_call(const LayerInputs& in) {
  check_device(in);
  Call call;
  call.kind = cell_kind(in.cell);
  call.gates = cell_gates(call.kind);
  call.packed = in.batch_sizes.has_value();
  call.dtype = in.input.scalar_type();
  call.compute = call.dtype == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(in.input.dim() == (call.packed ? 2 : 3), "rnn_ext: input must have ",
              call.packed ? 2 : 3, " dimensions, got ", in.input.dim());
  TORCH_CHECK(in.w_hh.dim() == 2 && in.w_hh.size(0) % call.gates == 0 && in.w_hh.size(0) > 0,
              "rnn_ext: w_hh must be [", call.gates, " * hidden_size, ...], got ", in.w_hh.sizes());
  const long hidden = in.w_hh.size(0) / call.gates;
  call.sizes = {in.input.size(-1), hidden, in.w_hr ? in.w_hr->size(0) : hidden};
  if (call.packed) {
    call.rows = in.input.size(0);
    read_batch_sizes(*in.batch_sizes, call);
  } else {
    call.steps = in.input.size(0);
    call.batch = in.input.size(1);
    call.rows = call.steps * call.batch;
    TORCH_CHECK(call.steps > 0, "rnn_ext: the sequence must have at least one step");
    for (long t = 0; t <= call.steps; t++) call.offsets.push_back(t * call.batch);
  }

  const bool lstm = call.kind == CellKind::kLstm;
  const Sizes& s = call.sizes;
  const long all = call.gates * hidden;
  TORCH_CHECK(lstm == in.c0.has_value(), "rnn_ext: c0 belongs to the LSTM, and only to it");
  TORCH_CHECK(lstm || !in.w_hr, "rnn_ext: a projection (w_hr) belongs to the LSTM");
  TORCH_CHECK(in.b_ih.has_value() == in.b_hh.has_value(), "rnn_ext: give both biases or neither");
  check_tensor("input", in.input, in.input, in.input.sizes());
  check_tensor("h0", in.h0, in.input, {call.batch, s.output});
  check_tensor("c0", in.c0, in.input, {call.batch, hidden});
  check_tensor("w_ih", in.w_ih, in.input, {all, s.input});
  check_tensor("w_hh", in.w_hh, in.input, {all, s.output});
  check_tensor("b_ih", in.b_ih, in.input, {all});
  check_tensor("b_hh", in.b_hh, in.input, {all});
  check_tensor("w_hr", in.w_hr, in.input, {s.output, hidden});
  return call;
}

namespace {

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

template <class real>
LayerOutputs forward(const Call& call, const LayerInputs& in, bool save) {
  const Kernels& kernels = active_kernels();
  const Sizes& s = call.sizes;
  const bool lstm = call.kind == CellKind::kLstm;
  LayerOutputs out;
  out.saved.isa = kernels.name;
  Tensor states = at::empty(call.laid_out(s.output), call.options());
  if (lstm && save) out.saved.cells = at::empty(call.laid_out(s.hidden), call.options());
  if (lstm && !save) out.c_n = in.c0->to(call.compute, false, /*copy=*/true).contiguous();
  if (save) {
    const long width = kernels.gates_width(call.kind, s.hidden, sizeof(real));
    if (width) out.saved.gates = at::empty({call.rows, width}, call.options());
    if (call.kind == CellKind::kGru || call.kind == CellKind::kGruResetBefore || in.w_hr)
      out.saved.middle = at::empty({call.rows, s.hidden}, call.options());
  }

  Operands<real> operands;
  ForwardArgs<real> args{};
  args.steps = call.time(in.reverse);
  args.sizes = s;
  args.weights = operands.weights(in);
  args.x = operands.read(in.input);
  args.h0 = operands.read(in.h0);
  args.c0 = operands.read(in.c0);
  args.out = states.mutable_data_ptr<real>();
  args.c = writable<real>(save ? out.saved.cells : out.c_n);
  args.gates = writable<real>(out.saved.gates);
  args.middle = writable<real>(out.saved.middle);
  args.save = save;
  args.plan = call.plan();
  if (call.rows) {
    if constexpr (sizeof(real) == sizeof(float))
      kernels.forward_float(call.kind, args);
    else
      kernels.forward_double(call.kind, args);
  }
  out.h_n = last_states<real>(states, args.steps, s.output).to(call.dtype);
  if (lstm)
    out.c_n = (save ? last_states<real>(*out.saved.cells, args.steps, s.hidden) : *out.c_n)
                  .to(call.dtype);
  out.output = states.to(call.dtype);
  if (save) out.saved.states = states;
  return out;
}

template <class real>
std::array<OptionalTensor, kLayerInputs> backward(const Call& call, const LayerInputs& in,
                                                  const Saved& saved, const LayerGradients& d,
                                                  const std::array<bool, kLayerInputs>& wanted) {
  const Kernels& kernels = kernels_named(saved.isa);
  const Sizes& s = call.sizes;
  std::array<OptionalTensor, kLayerInputs> out;
  const auto allocate = [&](int i, const Tensor& like) {
    if (wanted[i])
      out[i] = call.rows ? at::empty(like.sizes(), call.options())
                         : at::zeros(like.sizes(), call.options());
  };
  allocate(0, in.input);
  allocate(1, in.h0);
  allocate(3, in.w_ih);
  allocate(4, in.w_hh);
  if (in.b_ih) allocate(5, *in.b_ih);
  if (in.b_hh) allocate(6, *in.b_hh);
  if (in.w_hr) allocate(7, *in.w_hr);
  if (in.c0)
    out[2] = d.d_c_n && d.d_c_n->defined()
                 ? d.d_c_n->to(call.compute, false, /*copy=*/true).contiguous()
                 : at::zeros({call.batch, s.hidden}, call.options());

  Operands<real> operands;
  BackwardArgs<real> args{};
  args.steps = call.time(in.reverse);
  args.sizes = s;
  args.weights = operands.weights(in);
  args.x = operands.read(in.input);
  args.h0 = operands.read(in.h0);
  args.c0 = operands.read(in.c0);
  args.out = operands.read(saved.states);
  args.c = operands.read(saved.cells);
  args.gates = operands.read(saved.gates);
  args.middle = operands.read(saved.middle);
  args.d_out = operands.read(d.d_output);
  args.d_hn = operands.read(d.d_h_n);
  args.d_c = operands.read(d.d_cells);
  args.dx = writable<real>(out[0]);
  args.dh0 = writable<real>(out[1]);
  args.dc = writable<real>(out[2]);
  args.dw_ih = writable<real>(out[3]);
  args.dw_hh = writable<real>(out[4]);
  args.db_ih = writable<real>(out[5]);
  args.db_hh = writable<real>(out[6]);
  args.dw_hr = writable<real>(out[7]);
  args.plan = call.plan();
  if (call.rows) {
    if constexpr (sizeof(real) == sizeof(float))
      kernels.backward_float(call.kind, args);
    else
      kernels.backward_double(call.kind, args);
  }
  for (int i = 0; i < kLayerInputs; i++) {
    if (!wanted[i]) out[i].reset();
    if (out[i]) out[i] = out[i]->to(call.dtype);
  }
  return out;
}

}  // namespace

CellKind cell_kind(const std::string& name) {
  if (name == "rnn_tanh") return CellKind::kRnnTanh;
  if (name == "rnn_relu") return CellKind::kRnnRelu;
  if (name == "rnn_sigmoid") return CellKind::kRnnSigmoid;
  if (name == "lstm") return CellKind::kLstm;
  if (name == "gru") return CellKind::kGru;
  TORCH_CHECK_VALUE(name == "gru_reset_before", "rnn_ext: there is no cell '", name, "'");
  return CellKind::kGruResetBefore;
}

int cell_gates(CellKind kind) {
  switch (kind) {
    case CellKind::kLstm:
      return 4;
    case CellKind::kGru:
    case CellKind::kGruResetBefore:
      return 3;
    default:
      return 1;
  }
}

LayerOutputs layer_forward(const LayerInputs& in, bool save) {
  const Call call = check_call(in);
  if constexpr (kHasCudaKernels)
    if (on_cuda(in.input)) return cuda_layer_forward(call, in, {}, save);
  return call.compute == at::kDouble ? forward<double>(call, in, save)
                                     : forward<float>(call, in, save);
}

std::array<OptionalTensor, kLayerInputs> layer_backward(
    const LayerInputs& in, const Saved& saved, const LayerGradients& d,
    const std::array<bool, kLayerInputs>& wanted) {
  const Call call = check_call(in);
  if constexpr (kHasCudaKernels)
    if (on_cuda(in.input)) return cuda_layer_backward(call, in, {}, saved, d, wanted);
  return call.compute == at::kDouble ? backward<double>(call, in, saved, d, wanted)
                                     : backward<float>(call, in, saved, d, wanted);
}

}  // namespace rnn_ext
