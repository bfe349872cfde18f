// The part of rnn_ext._C for layer normalisation and peepholes.
#include <ATen/Parallel.h>

#include "../cpu/dispatch.h"
#include "bindings.h"
#include "normalized.h"

namespace rnn_ext {
namespace {

namespace py = pybind11;

// output, h_n, c_n and, with `save`, states, cells, records and isa.
py::tuple forward(const std::string& cell, const InputTensors& tensors, const ExtraTensors& extras,
                  const OptionalTensor& batch_sizes, bool reverse, const OptionalTensor& resets,
                  const Holds& zoneout, bool save) {
  const LayerInputs in = layer_inputs(cell, tensors, batch_sizes, reverse, resets, zoneout);
  LayerOutputs out = without_gil([&] { return normalized_forward(in, extras, save); });
  if (!save) return py::make_tuple(out.output, out.h_n, out.c_n);
  return py::make_tuple(out.output, out.h_n, out.c_n, out.saved.states, out.saved.cells,
                        out.saved.gates, out.saved.isa);
}

// `kept`: states, cells and records; the gradients of input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
// and the extras.
NormalizedGradients backward(const std::string& cell, const InputTensors& tensors,
                             const ExtraTensors& extras, const OptionalTensor& batch_sizes,
                             bool reverse, const OptionalTensor& resets, const Holds& zoneout,
                             const std::array<OptionalTensor, 3>& kept, const std::string& isa,
                             const std::array<OptionalTensor, 4>& upstream,
                             const NormalizedWanted& wanted) {
  const LayerInputs in = layer_inputs(cell, tensors, batch_sizes, reverse, resets, zoneout);
  const Saved saved{kept[0].value(), kept[1], kept[2], {}, isa};
  const LayerGradients d{upstream[0], upstream[1], upstream[2], upstream[3]};
  return without_gil([&] { return normalized_backward(in, extras, saved, d, wanted); });
}

// As `plan_cpu` has it of plain layers.
py::dict plan_rows(const std::string& cell, const std::string& dtype, long steps, long batch,
                   long input, long hidden) {
  const bool narrow = dtype == "bfloat16" && active_kernels().bfloat16;
  const long value_bytes = dtype == "float64" ? 8 : narrow ? 2 : 4;
  const Plan plan =
      choose_row_plan({steps, batch, input, hidden, hidden, cell_gates(cell_kind(cell)),
                       value_bytes, at::get_num_threads()});
  py::dict d;
  d["kernel"] = "cpu";
  d["isa"] = active_kernels().name;
  d["threads"] = plan.threads;
  d["split"] = split_name(plan.split);
  d["packed"] = plan.pack;
  d["reason"] = plan.reason;
  return d;
}

long record_width(const std::string& cell, long hidden, bool normalized, size_t real_bytes) {
  return active_kernels().record_width(cell_kind(cell), hidden, normalized, real_bytes);
}

}  // namespace

void define_normalized(py::module_& m) {
  m.def("normalized_forward", &forward);
  m.def("normalized_backward", &backward);
  m.def("plan_rows", &plan_rows);
  m.def("record_width", &record_width);
}

}  // namespace rnn_ext
