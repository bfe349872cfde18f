#include "stack.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "random.h"
#include "training.h"
#include "weight_dropout.h"

namespace rnn_ext {
namespace {

using at::Tensor;
using c10::DispatchKey;

bool is_plain(const Tensor& t, at::ScalarType dtype) {
  constexpr c10::DispatchKeySet unusual(
      {DispatchKey::Python, DispatchKey::PythonTLSSnapshot, DispatchKey::FuncTorchBatched,
       DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize, DispatchKey::Conjugate,
       DispatchKey::Negative, DispatchKey::ZeroTensor});
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == dtype &&
         !t.key_set().has_any(unusual);
}

bool all_plain(const Tensor& input, const std::vector<Tensor>& hx,
               const std::vector<Tensor>& weights) {
  const at::ScalarType dtype = input.scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kBFloat16) return false;
  if (!is_plain(input, dtype) || at::autocast::is_autocast_enabled(at::kCPU)) return false;
  for (const auto* list : {&hx, &weights})
    for (const Tensor& t : *list)
      if (!is_plain(t, dtype)) return false;
  return true;
}

bool any_requires_grad(const Tensor& input, const std::vector<Tensor>& hx,
                       const std::vector<Tensor>& weights) {
  if (!at::GradMode::is_enabled()) return false;
  bool any = input.requires_grad();
  for (const auto* list : {&hx, &weights})
    for (const Tensor& t : *list) any = any || t.requires_grad();
  return any;
}

std::vector<LayerOutputs> run_layer(const std::vector<LayerInputs>& directions,
                                    bool differentiable) {
  return differentiable ? differentiable_layer(directions)
                        : layer_forward(directions, false, cuda::Path::kAuto);
}

// The inputs of one layer and direction, whose weights start at w.
LayerInputs layer_inputs(const std::string& cell, const Tensor& x, const Tensor& h0,
                         const OptionalTensor& c0, const Tensor* w, bool bias, bool projected,
                         bool reverse) {
  LayerInputs in{cell, x, h0, c0, w[0], w[1], {}, {}, {}, {}, reverse};
  if (bias) in.b_ih = w[2], in.b_hh = w[3];
  if (projected) in.w_hr = w[bias ? 4 : 2];
  return in;
}

// The masks of one call, which rnn_ext/hooks.py draws for the general path.
class Masks {
 public:
  explicit Masks(const StackOptions& options) : o_(options) {
    if (o_.training && (o_.weight_dropout || o_.variational_dropout || o_.zoneout))
      seed_ = draw_seed();
  }

  bool on_weights() const { return o_.training && o_.weight_dropout; }
  bool on_inputs() const { return o_.training && o_.variational_dropout; }

  Tensor on_weight(const Tensor& weight, int64_t layer) const {
    const Tensor keep = random_mask(seed_, MaskPurpose::kWeightDropout, layer, 1, weight.size(0),
                                    weight.size(1), o_.weight_dropout, {0, 1}, at::kBool);
    return dropped_weight(weight, keep, o_.weight_dropout);
  }
  // The input of a layer: one mask for all steps of a sequence.
  Tensor on_input(const Tensor& x, int64_t layer) const {
    const double p = o_.variational_dropout;
    return at::mul(x, random_mask(seed_, MaskPurpose::kVariationalDropout, layer, 1, x.size(1),
                                  x.size(2), p, {0, 1 / (1 - p)}, x.scalar_type()));
  }
  // What the steps of a layer hold on to.
  void hold(LayerInputs& in, int64_t layer) const {
    if (!o_.zoneout) return;
    in.hold_h = held(MaskPurpose::kZoneoutH, in, layer, in.h0.size(-1));
    if (in.c0) in.hold_c = held(MaskPurpose::kZoneoutC, in, layer, in.c0->size(-1));
  }

 private:
  Tensor held(MaskPurpose purpose, const LayerInputs& in, int64_t layer, int64_t units) const {
    if (!o_.training) return at::scalar_tensor(o_.zoneout, at::kDouble);
    return random_mask(seed_, purpose, layer, in.input.size(0), in.input.size(1), units, o_.zoneout,
                       {1, 0}, at::kBool);
  }

  const StackOptions& o_;
  int64_t seed_ = 0;
};

// The states of all layers and directions, [layers and directions, B, size]. A single one, which
// nobody else holds, gets its new shape in place: that costs a tenth of a view.
Tensor joined(const std::vector<Tensor>& states, bool differentiable) {
  if (states.size() > 1) return at::stack(states);
  if (differentiable) return states[0].unsqueeze(0);
  const int64_t sizes[] = {1, states[0].size(0), states[0].size(1)};
  states[0].unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return states[0];
}

}  // namespace

std::optional<StackOutputs> run_stack(const std::string& cell, const Tensor& input,
                                      const std::vector<Tensor>& hx,
                                      const std::vector<Tensor>& weights, int directions, bool bias,
                                      bool projected, bool batch_first, double dropout,
                                      const OptionalTensor& resets,
                                      const std::vector<Tensor>& restored,
                                      const StackOptions& options) {
  const size_t each = 2 + 2 * bias + projected, count = weights.size() / each;
  const bool lstm = cell == "lstm";
  if (!all_plain(input, hx, weights) || input.dim() != 3) return std::nullopt;
  OptionalTensor starts;
  if (resets) {
    if (!is_plain(*resets, at::kBool) || !all_plain(input, restored, {}) ||
        resets->sizes() != input.sizes().slice(0, 2))
      return std::nullopt;
    starts = batch_first ? resets->t().contiguous() : *resets;
  }
  Tensor x = batch_first ? input.transpose(0, 1) : input;
  if (x.size(0) == 0 || x.size(2) != weights[0].size(1)) return std::nullopt;
  const int64_t batch = x.size(1), hidden = weights[0].size(0) / cell_gates(cell_kind(cell)),
                output = projected ? weights[each - 1].size(0) : hidden;
  const int64_t all = static_cast<int64_t>(count), widths[] = {output, hidden};
  if (!hx.empty() && hx.size() != (lstm ? 2 : 1)) return std::nullopt;
  for (size_t i = 0; i < hx.size(); i++)
    if (hx[i].sizes() != at::IntArrayRef{all, batch, widths[i]}) return std::nullopt;
  if (!restored.empty() && (!resets || restored.size() != (lstm ? 2 : 1))) return std::nullopt;
  for (size_t i = 0; i < restored.size(); i++)
    if (restored[i].sizes() != at::IntArrayRef{all, batch, widths[i]} &&
        restored[i].sizes() != at::IntArrayRef{all, 1, widths[i]})
      return std::nullopt;

  const bool differentiable =
      any_requires_grad(input, hx, weights) || any_requires_grad(input, restored, {});
  Tensor h_zero, c_zero;
  if (hx.empty()) {
    h_zero = at::zeros({batch, output}, input.options());
    c_zero = !lstm || output == hidden ? h_zero : at::zeros({batch, hidden}, input.options());
  }
  const auto with_restored = [&](const Tensor& state, size_t i, size_t k) {
    if (restored.empty()) return state;
    return at::cat({state, restored[i].select(0, k).expand({batch, widths[i]})});
  };
  const Masks masks(options);
  std::vector<Tensor> masked, h_n, c_n;
  if (masks.on_weights()) {
    masked = weights;
    for (size_t k = 0; k < count; k++)
      masked[k * each + 1] = masks.on_weight(weights[k * each + 1], static_cast<int64_t>(k));
  }
  const Tensor* own = masked.empty() ? weights.data() : masked.data();
  std::vector<LayerInputs> layer;
  for (size_t first = 0; first < count; first += directions) {
    const Tensor before = x;
    if (first && dropout > 0) x = at::dropout(x, dropout, /*train=*/true);
    if (masks.on_inputs()) x = masks.on_input(x, static_cast<int64_t>(first));
    layer.clear();
    for (size_t k = first; k < first + directions; k++) {
      const Tensor h0 = with_restored(hx.empty() ? h_zero : hx[0].select(0, k), 0, k);
      OptionalTensor c0;
      if (lstm) c0 = with_restored(hx.empty() ? c_zero : hx[1].select(0, k), 1, k);
      layer.push_back(layer_inputs(cell, x, h0, c0, own + k * each, bias, projected, k > first));
      layer.back().resets = starts;
      masks.hold(layer.back(), static_cast<int64_t>(k));
    }
    std::vector<LayerOutputs> out = run_layer(layer, differentiable);
    x = directions == 1 ? out[0].output : at::cat({out[0].output, out[1].output}, -1);
    if (options.residual && first && before.size(-1) == x.size(-1)) x = at::add(x, before);
    for (LayerOutputs& o : out) {
      h_n.push_back(std::move(o.h_n));
      if (lstm) c_n.push_back(std::move(*o.c_n));
    }
  }
  StackOutputs result{batch_first ? x.transpose(0, 1) : x, joined(h_n, differentiable), {}};
  if (lstm) result.c_n = joined(c_n, differentiable);
  return result;
}

std::optional<StackOutputs> run_cell(const std::string& cell, const Tensor& input,
                                     const std::vector<Tensor>& hx,
                                     const std::vector<Tensor>& weights, bool bias) {
  const bool lstm = cell == "lstm";
  if (!all_plain(input, hx, weights) || input.dim() != 2 || input.size(1) != weights[0].size(1))
    return std::nullopt;
  const int64_t hidden = weights[1].size(1);
  if (hidden == 0 || (!hx.empty() && hx.size() != (lstm ? 2 : 1))) return std::nullopt;
  for (const Tensor& state : hx)
    if (state.sizes() != at::IntArrayRef{input.size(0), hidden}) return std::nullopt;
  const Tensor h0 = hx.empty() ? at::zeros({input.size(0), hidden}, input.options()) : hx[0];
  const OptionalTensor c0 = lstm ? OptionalTensor(hx.empty() ? h0 : hx[1]) : std::nullopt;
  const LayerInputs in =
      layer_inputs(cell, input.unsqueeze(0), h0, c0, weights.data(), bias, false, false);
  LayerOutputs out = std::move(run_layer({in}, any_requires_grad(input, hx, weights))[0]);
  return StackOutputs{std::move(out.output), std::move(out.h_n), std::move(out.c_n)};
}

}  // namespace rnn_ext
