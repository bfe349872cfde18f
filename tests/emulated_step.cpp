// With csrc/ops and the emulator of tests/cuda_on_cpu: an rnn_ext._C whose layers run the step-wise CUDA kernels on CPU
// tensors. The CPU's own kernels are left out.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/dispatch.h"
#include "cuda/column_sums.cu"
#include "cuda/step_backward.cu"
#include "cuda/step_forward.cu"
#include "ops/cuda_layer.h"

namespace rnn_ext {
namespace {
[[noreturn]] void left_out() { throw std::runtime_error("this build has no CPU kernels"); }
const Kernels kNone{"none", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace

std::vector<std::string> available_isas() { return {}; }
const Kernels& active_kernels() { return kNone; }
const Kernels& kernels_named(const std::string&) { left_out(); }
void set_isa(const std::string&) { left_out(); }

}  // namespace rnn_ext

using namespace rnn_ext;
using at::Tensor;

// The layer with predicates of its rows: (output, h_n, c_n, states, cells, gates, middle, isa), and its gradients.
PYBIND11_MODULE(_predicates, m) {
  using Inputs = std::tuple<std::string, Tensor, Tensor, OptionalTensor, Tensor, Tensor,
                            OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, bool>;
  const auto inputs = [](const Inputs& in) {
    return std::apply([](auto... values) { return LayerInputs{values...}; }, in);
  };
  m.def("forward",
        [inputs](const Inputs& given, OptionalTensor lengths, OptionalTensor resets, bool save) {
          const LayerInputs in = inputs(given);
          const LayerOutputs out = cuda_layer_forward(check_call(in), in, {lengths, resets}, save);
          return std::make_tuple(out.output, out.h_n, out.c_n, out.saved.states, out.saved.cells,
                                 out.saved.gates, out.saved.middle);
        });
  m.def("backward", [inputs](const Inputs& given, OptionalTensor lengths, OptionalTensor resets,
                             Tensor states, OptionalTensor cells, OptionalTensor gates,
                             OptionalTensor middle, OptionalTensor d_output, OptionalTensor d_h_n,
                             OptionalTensor d_c_n, OptionalTensor d_cells) {
    const LayerInputs in = inputs(given);
    std::array<bool, kLayerInputs> wanted;
    wanted.fill(true);
    return cuda_layer_backward(check_call(in), in, {lengths, resets},
                               {states, cells, gates, middle, kCudaStep},
                               {d_output, d_h_n, d_c_n, d_cells}, wanted);
  });
}
