// Layers over a part of a sequence, or with gradients held within limits: what rnn_ext/recompute.py
// calls. Of a layer with layer normalisation or peepholes, `tensors` have the extras after those of
// every layer.
#include "bindings.h"
#include "call.h"
#include "normalized.h"

namespace rnn_ext {
namespace {

namespace py = pybind11;
using at::Tensor;
using Tensors = std::vector<OptionalTensor>;

std::optional<ExtraTensors> extras_of(const Tensors& tensors) {
  TORCH_CHECK(tensors.size() == kLayerInputs || tensors.size() == kNormalizedInputs,
              "rnn_ext: takes ", kLayerInputs, " tensors or ", kNormalizedInputs, ", got ",
              tensors.size());
  if (tensors.size() == kLayerInputs) return {};
  ExtraTensors extras;
  std::copy(tensors.begin() + kLayerInputs, tensors.end(), extras.begin());
  return extras;
}

Tensor parted(const std::string& cell, const Tensors& tensors, const OptionalTensor& batch_sizes,
              bool reverse, const Tensor& resets) {
  const LayerInputs in = layer_inputs(cell, tensors, batch_sizes, reverse, resets, {});
  return parted_rows(check_call(in), in);
}

// `parted` are the rows into whose step no state is carried.
LayerInputs part_inputs(const std::string& cell, const Tensors& tensors,
                        const OptionalTensor& batch_sizes, bool reverse,
                        const OptionalTensor& parted, const Holds& zoneout) {
  LayerInputs in = layer_inputs(cell, tensors, batch_sizes, reverse, parted, zoneout);
  in.parted = true;
  return in;
}

// What is saved, without gates and middle where they are not to be kept, by the plan of a call of
// (steps, batch).
py::tuple forward(const std::string& cell, const Tensors& tensors,
                  const OptionalTensor& batch_sizes, bool reverse, const OptionalTensor& parted,
                  const Holds& zoneout, bool keep_gates, std::array<long, 2> planned,
                  const std::string& backend) {
  const auto extras = extras_of(tensors);
  const LayerInputs in = part_inputs(cell, tensors, batch_sizes, reverse, parted, zoneout);
  PassOptions options;
  options.keep_gates = keep_gates;
  options.planned_steps = planned[0], options.planned_batch = planned[1];
  LayerOutputs out = without_gil([&] {
    return extras ? normalized_forward(in, *extras, true, options)
                  : layer_forward({&in, 1}, true, path_of(backend), options)[0];
  });
  return results(out, true);
}

void check_sums(const Tensors& sums, const Tensors& tensors, const std::vector<bool>& wanted,
                at::ScalarType compute) {
  TORCH_CHECK(sums.size() == tensors.size() - kFirstWeight,
              "rnn_ext: sums are of all tensors from w_ih on");
  for (size_t i = 0; i < sums.size(); i++) {
    const OptionalTensor& of = tensors[i + kFirstWeight];
    TORCH_CHECK(!wanted[i + kFirstWeight] || !of ||
                    (sums[i] && sums[i]->is_contiguous() && sums[i]->scalar_type() == compute &&
                     sums[i]->sizes() == of->sizes()),
                "rnn_ext: each wanted gradient of a weight needs a sum of its shape, contiguous ",
                compute);
  }
}

// The gradients of `tensors`; `sums` and `dh_norms` as in PassOptions; `clip` is "value", "norm" or
// "".
Tensors backward(const std::string& cell, const Tensors& tensors, const OptionalTensor& batch_sizes,
                 bool reverse, const OptionalTensor& parted, const Holds& zoneout,
                 const std::array<OptionalTensor, 4>& kept, const std::string& isa,
                 const std::array<OptionalTensor, 4>& upstream, const std::vector<bool>& wanted,
                 std::array<long, 2> planned, const Tensors& sums, const std::string& clip,
                 double limit, const OptionalTensor& dh_norms, const std::string& backend) {
  const auto extras = extras_of(tensors);
  const LayerInputs in = part_inputs(cell, tensors, batch_sizes, reverse, parted, zoneout);
  const Saved saved{kept[0].value(), kept[1], kept[2], kept[3], isa};
  const LayerGradients d{upstream[0], upstream[1], upstream[2], upstream[3]};
  const Call call = check_call(in);
  TORCH_CHECK(wanted.size() == tensors.size(), "rnn_ext: say of each tensor whether it is wanted");
  PassOptions options;
  options.planned_steps = planned[0], options.planned_batch = planned[1];
  options.clip = clip == "value" ? Clip::kValue : clip == "norm" ? Clip::kNorm : Clip::kNone;
  options.limit = limit;
  options.sums = sums;
  if (!sums.empty()) check_sums(sums, tensors, wanted, call.compute);
  if (dh_norms) {
    TORCH_CHECK(dh_norms->is_contiguous() && dh_norms->scalar_type() == call.compute &&
                    dh_norms->numel() == call.rows,
                "rnn_ext: dh_norms must be contiguous ", call.compute, " for ", call.rows, " rows");
    options.dh_norms = *dh_norms;
  }
  const auto run = [&](auto needed, const auto& pass) {
    std::copy(wanted.begin(), wanted.end(), needed.begin());
    const auto gradients = without_gil([&] { return pass(needed); });
    return Tensors(gradients.begin(), gradients.end());
  };
  if (extras)
    return run(NormalizedWanted{}, [&](const NormalizedWanted& needed) {
      return normalized_backward(in, *extras, saved, d, needed, options);
    });
  return run(Wanted{}, [&](const Wanted& needed) {
    return layer_backward({&in, 1}, {&saved, 1}, {&d, 1}, {&needed, 1}, path_of(backend), 1,
                          options)[0];
  });
}

}  // namespace

void define_partial(py::module_& m) {
  m.def("parted_rows", &parted);
  m.def("partial_forward", &forward);
  m.def("partial_backward", &backward);
}

}  // namespace rnn_ext
