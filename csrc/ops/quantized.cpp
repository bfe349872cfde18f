#include "quantized.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "../cpu/dispatch.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// As choose_plan: what pays for a team, and for a barrier in every step.
constexpr double kMinFlopsForTeam = 400e3;
constexpr double kMinFlopsPerBarrier = 20e3;

int threads_for(long gates, const Sizes& s, const Steps& steps) {
  const double per_step = 2.0 * gates * s.hidden * s.output * steps.batch;
  const double all = 2.0 * gates * s.hidden * (s.input + s.output) * steps.total();
  const long strips = (s.hidden + kStrip - 1) / kStrip;
  if (all < kMinFlopsForTeam || per_step < kMinFlopsPerBarrier) return 1;
  return static_cast<int>(std::min<long>(at::get_num_threads(), strips));
}

Tensor plain(const char* name, const Tensor& t) {
  TORCH_CHECK(t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat,
              "quantized layers take float32 tensors on the CPU, but ", name, " is ",
              t.scalar_type(), " on ", t.device());
  return t.resolve_neg().contiguous();
}

void check_shape(const char* name, const Tensor& t, at::IntArrayRef expected) {
  TORCH_CHECK(t.sizes() == expected, "quantized layer: ", name, " must have shape ", expected,
              ", got ", t.sizes());
}

// Panels of `blocks` strips for each of `gates` gates.
QuantizedMatrix matrix(const char* name, const OptionalTensor& data, const OptionalTensor& scales,
                       long gates, long units, long depth) {
  TORCH_CHECK(data, "quantized layer: ", name, " is missing");
  const long blocks = gates == 1 ? 2 : 1, per = scales ? 4 : 2, panel = blocks * kStrip;
  const long panels = (units + panel - 1) / panel, groups = (depth + per - 1) / per;
  TORCH_CHECK(data->is_cpu() && data->is_contiguous() &&
                  data->scalar_type() == (scales ? at::kByte : at::kBFloat16),
              "quantized layer: ", name, " must be contiguous ", scales ? "uint8" : "bfloat16",
              " on the CPU");
  check_shape(name, *data, {panels, groups, blocks, gates, kStrip, per});
  if (!scales) return {data->const_data_ptr(), nullptr};
  check_shape(name, *scales, {panels, blocks, gates, kStrip});
  TORCH_CHECK(scales->is_cpu() && scales->is_contiguous(), "quantized layer: scales of ", name,
              " must be contiguous on the CPU");
  return {data->const_data_ptr(), scales->const_data_ptr<float>()};
}

Tensor last_states(const Tensor& all, const Steps& steps, long features) {
  Tensor last = at::empty({steps.batch, features}, all.options());
  const float* from = all.const_data_ptr<float>();
  float* to = last.mutable_data_ptr<float>();
  for (long t = 0; t < steps.count; t++) {
    const long first = steps.continuing(t), ending = steps.rows(t) - first;
    if (ending > 0)
      std::memcpy(to + first * features, from + (steps.begin(t) + first) * features,
                  ending * features * sizeof(float));
  }
  return last;
}

bool is_plain(const Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat &&
         !(at::GradMode::is_enabled() && t.requires_grad());
}

Tensor joined(const std::vector<Tensor>& states) {
  return states.size() == 1 ? states[0].unsqueeze(0) : at::stack(states);
}

std::vector<int64_t> offsets_of(const Tensor& input, const OptionalTensor& batch_sizes) {
  std::vector<int64_t> offsets{0};
  if (batch_sizes) {
    const Tensor sizes = batch_sizes->contiguous();
    const int64_t* rows = sizes.const_data_ptr<int64_t>();
    for (int64_t t = 0; t < sizes.numel(); t++) offsets.push_back(offsets.back() + rows[t]);
  } else {
    for (int64_t t = 0; t < input.size(0); t++) offsets.push_back(offsets.back() + input.size(1));
  }
  return offsets;
}

}  // namespace

bool cpu_has_vnni() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

QuantizedArgs quantized_args(CellKind kind, const Sizes& sizes, const QuantizedWeights& weights,
                             std::vector<Tensor>& held) {
  const long gates = cell_gates(kind);
  const bool before = kind == CellKind::kGruResetBefore;
  QuantizedArgs args{};
  args.sizes = sizes;
  args.projected = kind == CellKind::kLstm && weights.second.has_value();
  TORCH_CHECK(args.projected || sizes.hidden == sizes.output,
              "quantized layer: sizes of hx differ");
  args.ih = matrix("weight_ih", weights.ih, weights.ih_scales, gates, sizes.hidden, sizes.input);
  args.hh = matrix("weight_hh", weights.hh, weights.hh_scales, before ? 2 : gates, sizes.hidden,
                   sizes.output);
  if (before || args.projected)
    args.second = matrix("the second recurrent matrix", weights.second, weights.second_scales, 1,
                         args.projected ? sizes.output : sizes.hidden, sizes.hidden);
  if (weights.b_ih && weights.b_hh) {
    const auto bias = [&](const char* name, const Tensor& t) {
      held.push_back(plain(name, t));
      check_shape(name, held.back(), {gates * sizes.hidden});
      return held.back().const_data_ptr<float>();
    };
    args.b_ih = bias("bias_ih", *weights.b_ih);
    args.b_hh = bias("bias_hh", *weights.b_hh);
  }
  return args;
}

StackOutputs quantized_layer(const std::string& cell, const Tensor& input, const Tensor& h0,
                             const OptionalTensor& c0, const QuantizedWeights& weights,
                             const OptionalTensor& batch_sizes, bool reverse) {
  const CellKind kind = cell_kind(cell);
  const bool lstm = kind == CellKind::kLstm;
  const long gates = cell_gates(kind);
  TORCH_CHECK(input.dim() == (batch_sizes ? 2 : 3), "quantized layer: input of rank ", input.dim());
  TORCH_CHECK(h0.dim() == 2 && lstm == c0.has_value(), "quantized layer: states do not fit ", cell);
  const Tensor x = plain("input", input), h = plain("hx", h0);
  const Sizes sizes{x.size(-1), lstm ? c0->size(-1) : h.size(1), h.size(1)};
  const std::vector<int64_t> offsets = offsets_of(x, batch_sizes);
  const Steps steps{static_cast<long>(offsets.size()) - 1, offsets.size() > 1 ? offsets[1] : 0,
                    offsets.data(), reverse};
  check_shape("hx", h, {steps.batch, sizes.output});
  TORCH_CHECK(!batch_sizes || steps.total() == x.size(0),
              "quantized layer: batch_sizes do not fit");

  std::vector<Tensor> held;
  QuantizedArgs args = quantized_args(kind, sizes, weights, held);
  args.steps = steps;

  StackOutputs out;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = sizes.output;
  out.output = at::empty(shape, x.options());
  if (lstm) {
    out.c_n = plain("hx", *c0).clone();
    check_shape("hx", *out.c_n, {steps.batch, sizes.hidden});
    args.c = out.c_n->mutable_data_ptr<float>();
  }
  args.x = x.const_data_ptr<float>();
  args.h0 = h.const_data_ptr<float>();
  args.out = out.output.mutable_data_ptr<float>();
  args.threads = threads_for(gates, sizes, steps);
  args.vnni = cpu_has_vnni();
  if (steps.total()) active_kernels().quantized(kind, args);
  out.h_n = last_states(out.output, steps, sizes.output);
  return out;
}

std::optional<StackOutputs> quantized_stack(const std::string& cell, const Tensor& input,
                                            const std::vector<Tensor>& hx,
                                            const std::vector<QuantizedWeights>& weights,
                                            int directions, long hidden, long output,
                                            bool batch_first) {
  const bool lstm = cell_kind(cell) == CellKind::kLstm;
  if (!is_plain(input) || input.dim() != 3) return std::nullopt;
  Tensor x = batch_first ? input.transpose(0, 1) : input;
  if (x.size(0) == 0) return std::nullopt;
  const int64_t batch = x.size(1), all = weights.size(), widths[] = {output, hidden};
  if (!hx.empty() && hx.size() != (lstm ? 2 : 1)) return std::nullopt;
  for (size_t i = 0; i < hx.size(); i++)
    if (!is_plain(hx[i]) || hx[i].sizes() != at::IntArrayRef{all, batch, widths[i]})
      return std::nullopt;
  Tensor h_zero, c_zero;
  if (hx.empty()) {
    h_zero = at::zeros({batch, output}, input.options());
    if (lstm) c_zero = at::zeros({batch, hidden}, input.options());
  }
  std::vector<Tensor> h_n, c_n;
  for (int64_t first = 0; first < all; first += directions) {
    std::vector<Tensor> outputs;
    for (int64_t k = first; k < first + directions; k++) {
      OptionalTensor c0;
      if (lstm) c0 = hx.empty() ? c_zero : hx[1].select(0, k);
      StackOutputs out = quantized_layer(cell, x, hx.empty() ? h_zero : hx[0].select(0, k), c0,
                                         weights[k], std::nullopt, k > first);
      outputs.push_back(std::move(out.output));
      h_n.push_back(std::move(out.h_n));
      if (lstm) c_n.push_back(std::move(*out.c_n));
    }
    x = directions == 1 ? outputs[0] : at::cat(outputs, -1);
  }
  StackOutputs result{batch_first ? x.transpose(0, 1) : x, joined(h_n), {}};
  if (lstm) result.c_n = joined(c_n);
  return result;
}

}  // namespace rnn_ext
