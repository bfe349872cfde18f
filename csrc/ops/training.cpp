#include "training.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <torch/csrc/autograd/custom_function.h>

namespace rnn_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

GeneralBackward general_backward;

// What a node keeps that is no tensor, and how its tensors lie in lists without gaps.
struct Layout : torch::CustomClassHolder {
  std::string cell, isa;
  bool lstm, bias, projected, resets, holds;
  std::vector<bool> reverse;  // of each direction

  size_t directions() const { return reverse.size(); }
  size_t inputs() const { return 4 + lstm + 2 * bias + projected; }  // of a direction, with x
  size_t all() const { return 1 + directions() * (inputs() - 1 + holds * (1 + lstm)) + resets; }

  // x, then h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr of each direction, resets, and hold_h, hold_c of
  // each direction.
  variable_list flat(const std::vector<LayerInputs>& given) const {
    variable_list list{given[0].input};
    for (const LayerInputs& in : given) {
      list.push_back(in.h0);
      if (lstm) list.push_back(*in.c0);
      list.insert(list.end(), {in.w_ih, in.w_hh});
      if (bias) list.insert(list.end(), {*in.b_ih, *in.b_hh});
      if (projected) list.push_back(*in.w_hr);
    }
    if (resets) list.push_back(*given[0].resets);
    if (holds)
      for (const LayerInputs& in : given) {
        list.push_back(*in.hold_h);
        if (lstm) list.push_back(*in.hold_c);
      }
    return list;
  }

  std::vector<LayerInputs> inputs_of(const Tensor*& next) const {
    std::vector<LayerInputs> all;
    const Tensor& x = *next++;
    for (const bool backwards : reverse) {
      LayerInputs in{cell, x, *next++, {}, {}, {}, {}, {}, {}, {}, backwards};
      if (lstm) in.c0 = *next++;
      in.w_ih = *next++;
      in.w_hh = *next++;
      if (bias) in.b_ih = *next++, in.b_hh = *next++;
      if (projected) in.w_hr = *next++;
      all.push_back(std::move(in));
    }
    if (resets) {
      for (LayerInputs& in : all) in.resets = *next;
      next++;
    }
    if (holds)
      for (LayerInputs& in : all) {
        in.hold_h = *next++;
        if (lstm) in.hold_c = *next++;
      }
    return all;
  }

  // Position in a flat list of input `i` (as in LayerInputs) of a direction, or -1.
  int position(size_t direction, int i) const {
    const bool exists[kLayerInputs] = {true, true, lstm, true, true, bias, bias, projected};
    if (!exists[i]) return -1;
    if (i == 0) return 0;
    int at = 1 + int(direction * (inputs() - 1));
    for (int k = 1; k < i; k++) at += exists[k];
    return at;
  }
};

void save(const Saved& saved, variable_list& list) {
  list.push_back(saved.states);
  for (const OptionalTensor* t : {&saved.cells, &saved.gates, &saved.middle})
    list.push_back(t->value_or(Tensor()));
}

OptionalTensor defined(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

}  // namespace

bool is_watched(const Tensor& t) {
  constexpr c10::DispatchKeySet watched(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Python,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Batched});
  return t.defined() && (t.key_set().has_any(watched) || t._fw_grad(/*level=*/0).defined());
}

namespace {

struct LayerFunction : torch::autograd::Function<LayerFunction> {
  static variable_list forward(AutogradContext* ctx, at::TensorList flat,
                               c10::intrusive_ptr<Layout> layout) {
    const Tensor* next = flat.data();
    const auto out = layer_forward(layout->inputs_of(next), true, cuda::Path::kAuto);
    layout->isa = out[0].saved.isa;
    variable_list kept = flat.vec(), shown;
    for (const LayerOutputs& o : out) {
      save(o.saved, kept);
      shown.insert(shown.end(), {o.output, o.h_n});
      if (layout->lstm) shown.push_back(*o.c_n);
    }
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["layout"] = c10::IValue::make_capsule(layout);
    return shown;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const auto capsule = ctx->saved_data["layout"].toCapsule();
    const auto& layout = static_cast<const Layout&>(*capsule);
    const variable_list kept = ctx->get_saved_variables();
    const Tensor* next = kept.data();
    const std::vector<LayerInputs> inputs = layout.inputs_of(next);
    const size_t count = layout.directions();
    std::vector<Saved> saved(count);
    std::vector<LayerGradients> d(count);
    std::vector<Wanted> wanted(count);
    bool general = at::GradMode::is_enabled();
    for (size_t k = 0; k < count; k++) {
      saved[k] = {next[0], defined(next[1]), defined(next[2]), defined(next[3]), layout.isa};
      next += 4;
      const Tensor* u = &upstream[k * (2 + layout.lstm)];
      d[k] = {defined(u[0]), defined(u[1]), layout.lstm ? defined(u[2]) : std::nullopt, {}};
      for (int i = 0; i < kLayerInputs; i++) {
        const int at = layout.position(k, i);
        wanted[k][i] = at >= 0 && ctx->needs_input_grad(at);
      }
    }
    for (const Tensor& t : upstream) general = general || is_watched(t);

    std::vector<InputGradients> given;
    if (general)
      for (size_t k = 0; k < count; k++)
        given.push_back(general_backward(inputs[k], saved[k], d[k], wanted[k]));
    else
      given = layer_backward(inputs, saved, d, wanted, cuda::Path::kAuto);

    // The last: of the layout.
    variable_list gradients(layout.all() + 1);
    for (size_t k = 0; k < count; k++)
      for (int i = 0; i < kLayerInputs; i++) {
        const int at = layout.position(k, i);
        if (at < 0 || !given[k][i]) continue;
        Tensor& sum = gradients[at];
        sum = sum.defined() ? at::add(sum, *given[k][i]) : *given[k][i];
      }
    return gradients;
  }
};

}  // namespace

std::vector<LayerOutputs> differentiable_layer(const std::vector<LayerInputs>& directions) {
  const LayerInputs& first = directions[0];
  auto layout = c10::make_intrusive<Layout>();
  layout->cell = first.cell;
  layout->lstm = first.c0.has_value();
  layout->bias = first.b_ih.has_value();
  layout->projected = first.w_hr.has_value();
  layout->resets = first.resets.has_value();
  layout->holds = first.hold_h.has_value();
  for (const LayerInputs& in : directions) layout->reverse.push_back(in.reverse);
  const variable_list flat = layout->flat(directions);
  const variable_list shown = LayerFunction::apply(at::TensorList(flat), layout);
  std::vector<LayerOutputs> out(directions.size());
  const Tensor* next = shown.data();
  for (LayerOutputs& o : out) {
    o.output = *next++;
    o.h_n = *next++;
    if (layout->lstm) o.c_n = *next++;
  }
  return out;
}

void set_general_backward(GeneralBackward backward) { general_backward = std::move(backward); }

}  // namespace rnn_ext
