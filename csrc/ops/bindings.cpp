// The Python module rnn_ext._C: a list of operations.
#include <ATen/Parallel.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../cpu/dispatch.h"
#include "../cpu/scratch.h"
#include "../cuda/device_limits.h"
#include "cuda_layer.h"

#ifndef RNN_EXT_CUDA_ARCHS
#define RNN_EXT_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace rnn_ext;
using at::Tensor;

namespace {

// Everything below leaves the interpreter lock to other threads while it computes.
template <class Function>
auto without_gil(const Function& f) {
  py::gil_scoped_release release;
  return f();
}

py::tuple forward(std::string cell, Tensor input, Tensor h0, OptionalTensor c0, Tensor w_ih,
                  Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                  OptionalTensor batch_sizes, bool reverse, bool save) {
  const LayerInputs in{std::move(cell), std::move(input),       std::move(h0),   std::move(c0),
                       std::move(w_ih), std::move(w_hh),        std::move(b_ih), std::move(b_hh),
                       std::move(w_hr), std::move(batch_sizes), reverse};
  const LayerOutputs out = without_gil([&] { return layer_forward(in, save); });
  if (!save) return py::make_tuple(out.output, out.h_n, out.c_n);
  return py::make_tuple(out.output, out.h_n, out.c_n, out.saved.states, out.saved.cells,
                        out.saved.gates, out.saved.middle, out.saved.isa);
}

std::array<OptionalTensor, kLayerInputs> backward(
    std::string cell, Tensor input, Tensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
    OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr, OptionalTensor batch_sizes,
    bool reverse, Tensor states, OptionalTensor cells, OptionalTensor gates, OptionalTensor middle,
    std::string isa, OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n,
    OptionalTensor d_cells, std::array<bool, kLayerInputs> wanted) {
  const LayerInputs in{std::move(cell), std::move(input),       std::move(h0),   std::move(c0),
                       std::move(w_ih), std::move(w_hh),        std::move(b_ih), std::move(b_hh),
                       std::move(w_hr), std::move(batch_sizes), reverse};
  const Saved saved{std::move(states), std::move(cells), std::move(gates), std::move(middle),
                    std::move(isa)};
  return without_gil(
      [&] { return layer_backward(in, saved, {d_output, d_h_n, d_c_n, d_cells}, wanted); });
}

py::dict plan_cpu(const std::string& cell, const std::string& dtype, long steps, long batch,
                  long input, long hidden, long output) {
  const long real_bytes = dtype == "float64" ? 8 : 4;
  const Plan plan = choose_plan({steps, batch, input, hidden, output, cell_gates(cell_kind(cell)),
                                 real_bytes, at::get_num_threads()});
  static const char* const splits[] = {"none", "rows", "columns"};
  py::dict d;
  d["kernel"] = "cpu";
  d["isa"] = active_kernels().name;
  d["threads"] = plan.threads;
  d["split"] = splits[static_cast<int>(plan.split)];
  d["packed"] = plan.pack;
  d["reason"] = plan.reason;
  return d;
}

// Why no CUDA kernel can run here, or "".
std::string cuda_unavailable() {
  if constexpr (kHasCudaKernels)
    return cuda::unavailable_reason();
  else
    return "this build has no CUDA kernels";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  active_kernels();  // a wrong RNN_EXT_ISA is reported at import
  m.attr("built_for_torch") = RNN_EXT_TORCH_VERSION;
#ifdef __clang__
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.def("layer_forward", &forward);
  m.def("layer_backward", &backward);
  m.def("gates_width", [](const std::string& cell, long hidden, size_t real_bytes) {
    return active_kernels().gates_width(cell_kind(cell), hidden, real_bytes);
  });
  m.def("plan_cpu", &plan_cpu);
  m.def("cpu_isas", &available_isas);
  m.def("cpu_isa", [] { return std::string(active_kernels().name); });
  m.def("set_cpu_isa", &set_isa);
  // As in TORCH_CUDA_ARCH_LIST, "" without CUDA kernels.
  m.attr("cuda_architectures") = RNN_EXT_CUDA_ARCHS;
  m.def("cuda_unavailable", &cuda_unavailable);
  m.def("poison_scratch", &Scratch::poison);
}
