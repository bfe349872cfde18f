// Layers with layer normalisation or peepholes as operators of torch's dispatcher, as operators.cpp
// has the plain ones. rnn_ext/normalized.py gives them shapes without data and gradients.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "../cpu/dispatch.h"
#include "cuda_layer.h"
#include "normalized.h"

// The emulated build of the tests lies in the same process as this one.
#ifndef RNN_EXT_EMULATED

namespace rnn_ext {
namespace {

using at::Tensor;
using OptionalTensors = c10::List<OptionalTensor>;

struct Given {
  LayerInputs in;
  ExtraTensors extras;
};

// h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, then the extras.
Given given(const std::string& cell, const Tensor& input, const OptionalTensors& tensors,
            const OptionalTensor& batch_sizes, bool reverse, const OptionalTensor& resets,
            const OptionalTensor& hold_h, const OptionalTensor& hold_c) {
  TORCH_CHECK(tensors.size() == kNormalizedInputs - 1, "rnn_ext: takes ", kNormalizedInputs - 1,
              " tensors, got ", tensors.size());
  const auto t = [&](size_t k) -> OptionalTensor { return tensors[k]; };
  TORCH_CHECK(t(0) && t(2) && t(3), "rnn_ext: h0, w_ih and w_hh must be given");
  Given g{{cell, input, *t(0), t(1), *t(2), *t(3), t(4), t(5), t(6), batch_sizes, reverse, resets},
          {t(7), t(8), t(9), t(10), t(11)}};
  g.in.hold_h = hold_h;
  g.in.hold_c = hold_c;
  return g;
}

// An operator's results must not be its inputs, nor each other.
Tensor or_empty(const OptionalTensor& t, const Tensor& like) {
  return t ? *t : at::empty({0}, like.options());
}

OptionalTensor present(const Tensor& t) {
  return t.dim() == 1 && t.numel() == 0 ? OptionalTensor() : OptionalTensor(t);
}

// output, h_n and, of the LSTM, c_n and, if asked for, cells.
std::vector<Tensor> layer(const std::string& cell, const Tensor& input,
                          const OptionalTensors& tensors, const OptionalTensor& batch_sizes,
                          bool reverse, bool return_cells, const OptionalTensor& resets,
                          const OptionalTensor& hold_h, const OptionalTensor& hold_c) {
  const Given g = given(cell, input, tensors, batch_sizes, reverse, resets, hold_h, hold_c);
  const bool lstm = cell == "lstm";
  LayerOutputs out = normalized_forward(g.in, g.extras, lstm && return_cells);
  std::vector<Tensor> results{std::move(out.output), std::move(out.h_n)};
  if (lstm) results.push_back(std::move(*out.c_n));
  if (lstm && return_cells) results.push_back(out.saved.cells->to(input.scalar_type()));
  return results;
}

// output, h_n, c_n, cells, states, wide_cells and records; what is absent is empty, and so are
// `states` and `wide_cells` where they would repeat `output` and `cells`.
std::vector<Tensor> forward(const std::string& cell, const Tensor& input,
                            const OptionalTensors& tensors, const OptionalTensor& batch_sizes,
                            bool reverse, const OptionalTensor& resets,
                            const OptionalTensor& hold_h, const OptionalTensor& hold_c) {
  const Given g = given(cell, input, tensors, batch_sizes, reverse, resets, hold_h, hold_c);
  LayerOutputs out = normalized_forward(g.in, g.extras, true);
  OptionalTensor states, cells = out.saved.cells, wide_cells;
  if (!out.saved.states.is_same(out.output)) states = out.saved.states;
  if (cells && cells->scalar_type() != input.scalar_type()) {
    wide_cells = cells;
    cells = cells->to(input.scalar_type());
  }
  return {out.output,
          out.h_n,
          or_empty(out.c_n, input),
          or_empty(cells, input),
          or_empty(states, input),
          or_empty(wide_cells, input),
          *out.saved.gates};
}

// The gradients that are wanted, of input and tensors. `kept`: output, cells, states, wide_cells and
// records.
std::vector<Tensor> backward(const std::string& cell, const Tensor& input,
                             const OptionalTensors& tensors, const OptionalTensor& batch_sizes,
                             bool reverse, const std::vector<Tensor>& kept,
                             const OptionalTensors& upstream, const c10::List<bool>& wanted,
                             const OptionalTensor& resets, const OptionalTensor& hold_h,
                             const OptionalTensor& hold_c) {
  const Given g = given(cell, input, tensors, batch_sizes, reverse, resets, hold_h, hold_c);
  TORCH_CHECK(kept.size() == 5 && upstream.size() == 4 && wanted.size() == kNormalizedInputs,
              "rnn_ext: what was saved, or the gradients, do not fit the layer");
  const OptionalTensor wide_cells = present(kept[3]);
  const Saved saved{present(kept[2]).value_or(kept[0]),
                    wide_cells ? wide_cells : present(kept[1]),
                    kept[4],
                    {},
                    on_cuda(input) ? kCuda : active_kernels().name};
  const auto up = [&](size_t k) -> OptionalTensor { return upstream[k]; };
  NormalizedWanted needed;
  for (int i = 0; i < kNormalizedInputs; i++) needed[i] = wanted[i];
  std::vector<Tensor> results;
  for (OptionalTensor& gradient :
       normalized_backward(g.in, g.extras, saved, {up(0), up(1), up(2), up(3)}, needed))
    if (gradient) results.push_back(std::move(*gradient));
  return results;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_ext, m) {
  m.set_python_module("rnn_ext.normalized");
  m.def(
      "normalized_layer(str cell, Tensor input, Tensor?[] tensors, Tensor? batch_sizes, "
      "bool reverse, bool return_cells, Tensor? resets=None, Tensor? hold_h=None, "
      "Tensor? hold_c=None) -> Tensor[]");
  m.def(
      "normalized_forward(str cell, Tensor input, Tensor?[] tensors, Tensor? batch_sizes, "
      "bool reverse, Tensor? resets=None, Tensor? hold_h=None, Tensor? hold_c=None) -> Tensor[]");
  m.def(
      "normalized_backward(str cell, Tensor input, Tensor?[] tensors, Tensor? batch_sizes, "
      "bool reverse, Tensor[] kept, Tensor?[] upstream, bool[] wanted, Tensor? resets=None, "
      "Tensor? hold_h=None, Tensor? hold_c=None) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("normalized_layer", &layer);
  m.impl("normalized_forward", &forward);
  m.impl("normalized_backward", &backward);
}

#ifdef RNN_EXT_WITH_CUDA
TORCH_LIBRARY_IMPL(rnn_ext, CUDA, m) {
  m.impl("normalized_layer", &layer);
  m.impl("normalized_forward", &forward);
  m.impl("normalized_backward", &backward);
}
#endif

// rnn_ext/normalized.py makes `normalized_layer` differentiable; these say that they are not.
TORCH_LIBRARY_IMPL(rnn_ext, Autograd, m) {
  for (const char* name : {"normalized_forward", "normalized_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace rnn_ext
#endif
