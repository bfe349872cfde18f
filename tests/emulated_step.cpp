// With csrc/ops and the emulator of tests/cuda_on_cpu: an rnn_ext._C whose layers run the CUDA
// kernels on CPU tensors, step-wise or persistent. The CPU's own kernels are left out.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/dispatch.h"
#include "cuda/column_sums.cu"
#include "cuda/persistent.cu"
#include "cuda/random.cu"
#include "cuda/step_backward.cu"
#include "cuda/step_forward.cu"
#include "ops/cuda_layer.h"

namespace rnn_ext {
namespace {
[[noreturn]] void left_out() { throw std::runtime_error("this build has no CPU kernels"); }
const Kernels kNone = [] {
  Kernels kernels{};
  kernels.name = "none";
  return kernels;
}();
}  // namespace

std::vector<std::string> available_isas() { return {}; }
const Kernels& active_kernels() { return kNone; }
const Kernels& kernels_named(const std::string&) { left_out(); }
void set_isa(const std::string&) { left_out(); }

}  // namespace rnn_ext

using namespace rnn_ext;
using at::Tensor;

extern "C" void cuda_on_cpu_device(int sm_count, int shared_per_block, int cluster_size);
extern "C" void cuda_on_cpu_schedule(uint64_t seed, unsigned preempt);

using Inputs = std::tuple<std::string, Tensor, Tensor, OptionalTensor, Tensor, Tensor,
                          OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, bool>;
using Kept = std::array<OptionalTensor, 4>;      // states, cells, gates, middle
using Upstream = std::array<OptionalTensor, 4>;  // of output, h_n, c_n, cells

std::vector<LayerInputs> layer_inputs(const std::vector<Inputs>& given) {
  std::vector<LayerInputs> in;
  for (const Inputs& one : given)
    in.push_back(std::apply([](auto... values) { return LayerInputs{values...}; }, one));
  return in;
}

// One direction of a layer or both, with predicates of their rows: of each (output, h_n, c_n,
// kept), and the gradients. device() must come first: the drivers ask for its limits once.
PYBIND11_MODULE(_predicates, m) {
  pybind11::enum_<cuda::Path>(m, "Path")
      .value("auto", cuda::Path::kAuto)
      .value("cuda-step", cuda::Path::kStep)
      .value("cuda-persistent", cuda::Path::kPersistent);
  m.def("device", &cuda_on_cpu_device);
  m.def("schedule", &cuda_on_cpu_schedule);
  m.def("forward", [](const std::vector<Inputs>& given, OptionalTensor lengths,
                      OptionalTensor resets, bool save, cuda::Path path) {
    const std::vector<LayerInputs> in = layer_inputs(given);
    std::vector<std::tuple<Tensor, Tensor, OptionalTensor, Kept>> results;
    for (const LayerOutputs& out :
         cuda_layer_forward(check_call(in[0]), in, {lengths, {resets, resets}}, save, path)) {
      const Saved& kept = out.saved;
      const OptionalTensor states = save ? OptionalTensor(kept.states) : std::nullopt;
      results.emplace_back(out.output, out.h_n, out.c_n,
                           Kept{states, kept.cells, kept.gates, kept.middle});
    }
    return results;
  });
  m.def("backward",
        [](const std::vector<Inputs>& given, OptionalTensor lengths, OptionalTensor resets,
           const std::vector<Kept>& kept, const std::vector<Upstream>& upstream, cuda::Path path) {
          const std::vector<LayerInputs> in = layer_inputs(given);
          std::vector<Saved> saved;
          for (const Kept& k : kept) saved.push_back({*k[0], k[1], k[2], k[3], kCuda});
          std::vector<LayerGradients> d;
          for (const Upstream& u : upstream) d.push_back({u[0], u[1], u[2], u[3]});
          Wanted all;
          all.fill(true);
          return cuda_layer_backward(check_call(in[0]), in, {lengths, {resets, resets}}, saved, d,
                                     std::vector<Wanted>(in.size(), all), path);
        });
}
