#include "layer.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu_layer.h"
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

// A state that one part of a sequence hands to the next may be wider than the input: on CUDA c is.
void check_state(const char* name, const Tensor& t, const Call& call, const Tensor& like,
                 at::IntArrayRef shape, bool may_be_wide) {
  const bool wide = may_be_wide && t.scalar_type() == call.compute && t.device() == like.device();
  check_tensor(name, t, wide ? t : like, shape);
}

// What zoneout holds on to of a state of so many units.
void check_hold(const char* name, const OptionalTensor& t, const Call& call, long units,
                const Tensor& input) {
  if (!t || (t->dim() == 0 && t->scalar_type() == at::kDouble && t->is_cpu())) return;
  TORCH_CHECK(t->scalar_type() == at::kBool && t->sizes() == call.laid_out(units) &&
                  t->device() == input.device(),
              "rnn_ext: ", name, " must be bool of shape ", at::IntArrayRef(call.laid_out(units)),
              " on ", input.device(), ", or float64 without dimensions on the CPU, got ",
              t->scalar_type(), " of ", t->sizes(), " on ", t->device());
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
  if (in.resets) {
    const at::IntArrayRef rows = in.input.sizes().slice(0, in.input.dim() - 1);
    TORCH_CHECK(in.resets->scalar_type() == at::kBool && in.resets->sizes() == rows &&
                    in.resets->device() == in.input.device(),
                "rnn_ext: resets must be bool of shape ", rows, " on ", in.input.device());
    call.restores = call.batch && in.h0.dim() == 2 && in.h0.size(0) == 2 * call.batch;
  }
  const long states = call.restores ? 2 * call.batch : call.batch;
  check_state("h0", in.h0, call, in.input, {states, s.output}, in.input.is_cpu());
  if (lstm) check_state("c0", *in.c0, call, in.input, {states, hidden}, true);
  check_tensor("w_ih", in.w_ih, in.input, {all, s.input});
  check_tensor("w_hh", in.w_hh, in.input, {all, s.output});
  check_tensor("b_ih", in.b_ih, in.input, {all});
  check_tensor("b_hh", in.b_hh, in.input, {all});
  check_tensor("w_hr", in.w_hr, in.input, {s.output, hidden});
  TORCH_CHECK(in.hold_c.has_value() == (lstm && in.hold_h),
              "rnn_ext: zoneout holds h, and of the LSTM h and c");
  check_hold("hold_h", in.hold_h, call, s.output, in.input);
  check_hold("hold_c", in.hold_c, call, hidden, in.input);
  return call;
}

Call check_call(std::span<const LayerInputs> directions) {
  const Call call = check_call(directions[0]);
  for (const LayerInputs& in : directions.subspan(1)) {
    const Call other = check_call(in);
    TORCH_CHECK(other.kind == call.kind && other.rows == call.rows && other.dtype == call.dtype &&
                    other.batch == call.batch && other.restores == call.restores &&
                    other.sizes.hidden == call.sizes.hidden &&
                    other.sizes.output == call.sizes.output &&
                    in.b_ih.has_value() == directions[0].b_ih.has_value(),
                "rnn_ext: both directions must have the same sizes and dtype");
  }
  return call;
}

Tensor parted_rows(const Call& call, const LayerInputs& in) {
  if (!in.reverse || in.parted) return in.resets->contiguous();
  if (!call.packed) {
    const Tensor last = at::zeros({1, call.batch}, in.resets->options());
    return at::cat({in.resets->narrow(0, 1, call.steps - 1), last});
  }
  const Tensor given = in.resets->reshape({call.rows});
  const Tensor after = at::cat({given, at::zeros({1}, given.options())});
  const Tensor next = at::empty({call.rows}, at::kLong);
  int64_t* to = next.mutable_data_ptr<int64_t>();
  for (long t = 0; t < call.steps; t++) {
    const long rows = call.offsets[t + 1] - call.offsets[t];
    const long following = t + 1 < call.steps ? call.offsets[t + 2] - call.offsets[t + 1] : 0;
    for (long r = 0; r < rows; r++) *to++ = r < following ? call.offsets[t + 1] + r : call.rows;
  }
  return after.index_select(0, next.to(given.device())).view(in.resets->sizes());
}

namespace {

// Each direction meets resets elsewhere.
RowPredicates cuda_predicates(const Call& call, std::span<const LayerInputs> directions) {
  RowPredicates predicates;
  for (size_t i = 0; i < directions.size(); i++)
    if (directions[i].resets) predicates.resets[i] = parted_rows(call, directions[i]);
  return predicates;
}

}  // namespace

void Call::set_groups(long count) {
  if (count == 1) return;
  TORCH_CHECK(count >= 1, "rnn_ext: there must be at least one group, got ", count);
  for (const int64_t offset : offsets)
    TORCH_CHECK(offset % count == 0, "rnn_ext: ", count,
                " groups must share the sequences of every step equally");
  groups = count;
}

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

std::vector<LayerOutputs> layer_forward(std::span<const LayerInputs> directions, bool save,
                                        [[maybe_unused]] cuda::Path path,
                                        const PassOptions& options) {
  const Call call = check_call(directions);
  if constexpr (kHasCudaKernels)
    if (on_cuda(directions[0].input))
      return cuda_layer_forward(call, directions, cuda_predicates(call, directions), save, path,
                                options);
  return cpu_layer_forward(call, directions, save, options);
}

std::vector<InputGradients> layer_backward(std::span<const LayerInputs> directions,
                                           std::span<const Saved> saved,
                                           std::span<const LayerGradients> d,
                                           std::span<const Wanted> wanted,
                                           [[maybe_unused]] cuda::Path path, long groups,
                                           const PassOptions& options) {
  Call call = check_call(directions);
  call.set_groups(groups);
  if constexpr (kHasCudaKernels)
    if (on_cuda(directions[0].input))
      return cuda_layer_backward(call, directions, cuda_predicates(call, directions), saved, d,
                                 wanted, path, options);
  return cpu_layer_backward(call, directions, saved, d, wanted, options);
}

}  // namespace rnn_ext
