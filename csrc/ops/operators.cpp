// The kernels as operators of torch's dispatcher, for torch.compile, torch.export and AOTInductor.
// rnn_ext/library.py gives them shapes without data and gradients.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>

#include "../cpu/dispatch.h"
#include "call.h"
#include "cuda_layer.h"
#include "quantized.h"
#include "random.h"

// The emulated build of the tests lies in the same process as this one.
#ifdef RNN_EXT_EMULATED
#define RNN_EXT_OPERATORS rnn_ext_emulated
#else
#define RNN_EXT_OPERATORS rnn_ext
#endif
#define RNN_EXT_LIBRARY(name, m) TORCH_LIBRARY(name, m)
#define RNN_EXT_LIBRARY_IMPL(name, key, m) TORCH_LIBRARY_IMPL(name, key, m)

namespace rnn_ext {
namespace {

using at::Tensor;
using OptionalTensors = c10::List<OptionalTensor>;

constexpr size_t kDirectionTensors = kLayerInputs - 1, kKept = 6, kUpstream = 4;

// One entry of `tensors` (h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr) for each direction: the one that
// `reverse` says or, where there are two, forward and backward in time. Of zoneout each direction has
// an entry of hold_h and hold_c, or all have a share.
std::vector<LayerInputs> directions_of(const std::string& cell, const Tensor& input,
                                       const OptionalTensors& tensors,
                                       const OptionalTensor& batch_sizes, bool reverse,
                                       const OptionalTensor& resets, const OptionalTensor& hold_h,
                                       const OptionalTensor& hold_c) {
  const size_t count = tensors.size() / kDirectionTensors;
  TORCH_CHECK(tensors.size() == count * kDirectionTensors && (count == 1 || count == 2) &&
                  !(reverse && count == 2),
              "rnn_ext: takes seven tensors of one direction or of both, got ", tensors.size());
  std::vector<LayerInputs> directions;
  for (size_t i = 0; i < count; i++) {
    const auto t = [&](size_t k) -> OptionalTensor { return tensors[i * kDirectionTensors + k]; };
    const auto required = [&](size_t k) {
      const OptionalTensor found = t(k);
      TORCH_CHECK(found, "rnn_ext: h0, w_ih and w_hh must be given");
      return *found;
    };
    directions.push_back({cell, input, required(0), t(1), required(2), required(3), t(4), t(5),
                          t(6), batch_sizes, reverse || i == 1, resets});
    const auto of_direction = [&](const OptionalTensor& hold) {
      return hold && hold->dim() ? OptionalTensor(hold->select(0, i)) : hold;
    };
    directions.back().hold_h = of_direction(hold_h);
    directions.back().hold_c = of_direction(hold_c);
  }
  return directions;
}

// An operator's results must not be its inputs, nor each other.
Tensor or_empty(const OptionalTensor& t, const Tensor& like) {
  return t ? *t : at::empty({0}, like.options());
}

// output, h_n, c_n and cells of each direction; the last two of the LSTM, cells if asked for.
std::vector<Tensor> layer(const std::string& cell, const Tensor& input,
                          const OptionalTensors& tensors, const OptionalTensor& batch_sizes,
                          bool reverse, bool return_cells, const OptionalTensor& resets,
                          const OptionalTensor& hold_h, const OptionalTensor& hold_c) {
  const auto directions =
      directions_of(cell, input, tensors, batch_sizes, reverse, resets, hold_h, hold_c);
  const bool lstm = cell == "lstm";
  std::vector<Tensor> results;
  for (auto& out : layer_forward(directions, lstm && return_cells, cuda::Path::kAuto)) {
    results.insert(results.end(), {std::move(out.output), std::move(out.h_n)});
    if (lstm) results.push_back(std::move(*out.c_n));
    if (lstm && return_cells) results.push_back(out.saved.cells->to(input.scalar_type()));
  }
  return results;
}

// As `layer`, and what the backward pass reads: output, h_n, c_n, cells, states, wide_cells, gates
// and middle of each direction. What is absent is empty, and so are `states` and `wide_cells` where
// they would repeat `output` and `cells`.
std::vector<Tensor> layer_forward_saving(const std::string& cell, const Tensor& input,
                                         const OptionalTensors& tensors,
                                         const OptionalTensor& batch_sizes, bool reverse,
                                         const OptionalTensor& resets, const OptionalTensor& hold_h,
                                         const OptionalTensor& hold_c) {
  const auto directions =
      directions_of(cell, input, tensors, batch_sizes, reverse, resets, hold_h, hold_c);
  std::vector<Tensor> results;
  for (auto& out : layer_forward(directions, true, cuda::Path::kAuto)) {
    Saved& saved = out.saved;
    OptionalTensor states, cells = saved.cells, wide_cells;
    if (!saved.states.is_same(out.output)) states = saved.states;
    if (cells && cells->scalar_type() != input.scalar_type()) {
      wide_cells = cells;
      cells = cells->to(input.scalar_type());
    }
    for (const OptionalTensor& t : {OptionalTensor(out.output), OptionalTensor(out.h_n), out.c_n,
                                    cells, states, wide_cells, saved.gates, saved.middle})
      results.push_back(or_empty(t, input));
  }
  return results;
}

// The gradients that are wanted, of input, h0, c0, w_ih, w_hh, b_ih, b_hh and w_hr, for each
// direction. `kept` are the last six results of `layer_forward_saving` without the states at the
// end: output, cells, states, wide_cells, gates, middle.
std::vector<Tensor> layer_backward_kept(
    const std::string& cell, const Tensor& input, const OptionalTensors& tensors,
    const OptionalTensor& batch_sizes, bool reverse, const std::vector<Tensor>& kept,
    const OptionalTensors& upstream, const c10::List<bool>& wanted, const OptionalTensor& resets,
    const OptionalTensor& hold_h, const OptionalTensor& hold_c) {
  const auto directions =
      directions_of(cell, input, tensors, batch_sizes, reverse, resets, hold_h, hold_c);
  const size_t count = directions.size();
  TORCH_CHECK(kept.size() == count * kKept && upstream.size() == count * kUpstream &&
                  wanted.size() == count * kLayerInputs,
              "rnn_ext: what was saved, or the gradients, do not fit the directions");
  std::vector<Saved> saved;
  std::vector<LayerGradients> d;
  std::vector<Wanted> needed(count);
  const auto present = [](const Tensor& t) {
    return t.dim() == 1 && t.numel() == 0 ? OptionalTensor() : OptionalTensor(t);
  };
  for (size_t i = 0; i < count; i++) {
    const Tensor* k = &kept[i * kKept];
    const OptionalTensor wide_cells = present(k[3]);
    saved.push_back({present(k[2]).value_or(k[0]), wide_cells ? wide_cells : present(k[1]),
                     present(k[4]), present(k[5]), on_cuda(input) ? kCuda : active_kernels().name});
    const auto up = [&](size_t j) -> OptionalTensor { return upstream[i * kUpstream + j]; };
    d.push_back({up(0), up(1), up(2), up(3)});
    for (size_t j = 0; j < kLayerInputs; j++) needed[i][j] = wanted[i * kLayerInputs + j];
  }
  std::vector<Tensor> results;
  for (auto& gradients : layer_backward(directions, saved, d, needed, cuda::Path::kAuto))
    for (OptionalTensor& gradient : gradients)
      if (gradient) results.push_back(std::move(*gradient));
  return results;
}

std::vector<Tensor> quantized(const std::string& cell, const Tensor& input, const Tensor& h0,
                              const OptionalTensor& c0, const OptionalTensors& weights,
                              const OptionalTensor& batch_sizes, bool reverse) {
  TORCH_CHECK(weights.size() == 8 && OptionalTensor(weights[0]) && OptionalTensor(weights[1]),
              "rnn_ext: a quantized layer has eight tensors, of which the first two must be there");
  const auto w = [&](size_t k) -> OptionalTensor { return weights[k]; };
  StackOutputs out =
      quantized_layer(cell, input, h0, c0, {*w(0), *w(1), w(2), w(3), w(4), w(5), w(6), w(7)},
                      batch_sizes, reverse);
  std::vector<Tensor> results{std::move(out.output), std::move(out.h_n)};
  if (out.c_n) results.push_back(std::move(*out.c_n));
  return results;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packing(const Tensor& lengths, int64_t steps) {
  TORCH_CHECK(lengths.dim() == 1 && lengths.scalar_type() == at::kLong,
              "rnn_ext: lengths must be 1-D int64");
  const int64_t batch = lengths.size(0);
  const Tensor contiguous = lengths.contiguous();
  const int64_t* length = contiguous.const_data_ptr<int64_t>();
  const auto [least, most] = std::minmax_element(length, length + batch);
  TORCH_CHECK_VALUE(batch && *least >= 1 && *most <= steps, "lengths must be between 1 and the ",
                    steps, " steps of input", batch ? ", got " : "", batch ? *least : 0, "..",
                    batch ? *most : 0);
  const Tensor order = at::empty({batch}, lengths.options()), restore = at::empty_like(order);
  int64_t* sorted = order.mutable_data_ptr<int64_t>();
  std::iota(sorted, sorted + batch, 0);
  std::stable_sort(sorted, sorted + batch,
                   [&](int64_t a, int64_t b) { return length[a] > length[b]; });
  for (int64_t k = 0; k < batch; k++) restore.mutable_data_ptr<int64_t>()[sorted[k]] = k;
  const int64_t total = std::accumulate(length, length + batch, int64_t{0});
  const Tensor rows = at::empty({total}, lengths.options()),
               batch_sizes = at::empty({*most}, lengths.options());
  int64_t* row = rows.mutable_data_ptr<int64_t>();
  for (int64_t t = 0, alive = batch; t < *most; t++) {
    while (length[sorted[alive - 1]] <= t) alive--;
    batch_sizes.mutable_data_ptr<int64_t>()[t] = alive;
    for (int64_t k = 0; k < alive; k++) *row++ = t * batch + sorted[k];
  }
  return {rows, batch_sizes, order, restore};
}

Tensor mask(const Tensor& seed, int64_t stream, const Tensor& steps, const Tensor& rows,
            int64_t columns, int64_t threshold, double dropped, double kept, at::ScalarType dtype) {
  return random_mask(seed.item<int64_t>(), stream, steps, rows, columns, threshold, {dropped, kept},
                     dtype);
}

}  // namespace

RNN_EXT_LIBRARY(RNN_EXT_OPERATORS, m) {
  m.set_python_module("rnn_ext.library");
  m.def(
      "layer(str cell, Tensor input, Tensor?[] tensors, Tensor? batch_sizes, bool reverse, "
      "bool return_cells, Tensor? resets=None, Tensor? hold_h=None, Tensor? hold_c=None) "
      "-> Tensor[]");
  m.def(
      "layer_forward(str cell, Tensor input, Tensor?[] tensors, Tensor? batch_sizes, "
      "bool reverse, Tensor? resets=None, Tensor? hold_h=None, Tensor? hold_c=None) -> Tensor[]");
  m.def(
      "layer_backward(str cell, Tensor input, Tensor?[] tensors, Tensor? batch_sizes, "
      "bool reverse, Tensor[] kept, Tensor?[] upstream, bool[] wanted, Tensor? resets=None, "
      "Tensor? hold_h=None, Tensor? hold_c=None) -> Tensor[]");
  m.def(
      "quantized_layer(str cell, Tensor input, Tensor h0, Tensor? c0, Tensor?[] weights, "
      "Tensor? batch_sizes, bool reverse) -> Tensor[]");
  m.def(
      "packing(Tensor lengths, SymInt steps) "
      "-> (Tensor rows, Tensor batch_sizes, Tensor order, Tensor restore)");
  m.def(
      "random_mask(Tensor seed, int stream, Tensor steps, Tensor rows, SymInt columns, "
      "int threshold, float dropped, float kept, ScalarType dtype) -> Tensor");
}

RNN_EXT_LIBRARY_IMPL(RNN_EXT_OPERATORS, CPU, m) {
  m.impl("layer", &layer);
  m.impl("layer_forward", &layer_forward_saving);
  m.impl("layer_backward", &layer_backward_kept);
  m.impl("quantized_layer", &quantized);
  m.impl("packing", &packing);
  m.impl("random_mask", &mask);
}

RNN_EXT_LIBRARY_IMPL(RNN_EXT_OPERATORS, CUDA, m) {
  m.impl("layer", &layer);
  m.impl("layer_forward", &layer_forward_saving);
  m.impl("layer_backward", &layer_backward_kept);
  m.impl("random_mask", &mask);
}

// rnn_ext/library.py makes `layer` differentiable; these say that they are not.
RNN_EXT_LIBRARY_IMPL(RNN_EXT_OPERATORS, Autograd, m) {
  for (const char* name :
       {"layer_forward", "layer_backward", "quantized_layer", "packing", "random_mask"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace rnn_ext
