// The Python module rnn_ext._C: a list of operations.
#include "bindings.h"

#include <ATen/Parallel.h>

#include "../cpu/dispatch.h"
#include "../cpu/scratch.h"
#include "../cpu/team.h"
#include "../cuda/device_limits.h"
#include "cuda_layer.h"
#include "cuda_numbers.h"
#include "quantized.h"
#include "random.h"
#include "stack.h"
#include "training.h"

#ifndef RNN_EXT_CUDA_ARCHS
#define RNN_EXT_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using namespace rnn_ext;
using at::Tensor;

namespace {

py::tuple forward(std::string cell, Tensor input, Tensor h0, OptionalTensor c0, Tensor w_ih,
                  Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                  OptionalTensor batch_sizes, bool reverse, OptionalTensor resets,
                  const Holds& zoneout, bool save, const std::string& backend) {
  LayerInputs in{std::move(cell), std::move(input),       std::move(h0),   std::move(c0),
                 std::move(w_ih), std::move(w_hh),        std::move(b_ih), std::move(b_hh),
                 std::move(w_hr), std::move(batch_sizes), reverse,         std::move(resets)};
  hold(zoneout, in);
  auto out = without_gil([&] { return layer_forward({&in, 1}, save, path_of(backend)); });
  return results(out[0], save);
}

InputGradients backward(std::string cell, Tensor input, Tensor h0, OptionalTensor c0, Tensor w_ih,
                        Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                        OptionalTensor batch_sizes, bool reverse, OptionalTensor resets,
                        const Holds& zoneout, Tensor states, OptionalTensor cells,
                        OptionalTensor gates, OptionalTensor middle, std::string isa,
                        OptionalTensor d_output, OptionalTensor d_h_n, OptionalTensor d_c_n,
                        OptionalTensor d_cells, Wanted wanted, long groups,
                        const std::string& backend) {
  LayerInputs in{std::move(cell), std::move(input),       std::move(h0),   std::move(c0),
                 std::move(w_ih), std::move(w_hh),        std::move(b_ih), std::move(b_hh),
                 std::move(w_hr), std::move(batch_sizes), reverse,         std::move(resets)};
  hold(zoneout, in);
  const Saved saved{std::move(states), std::move(cells), std::move(gates), std::move(middle),
                    std::move(isa)};
  const LayerGradients d{d_output, d_h_n, d_c_n, d_cells};
  return without_gil([&] {
    return layer_backward({&in, 1}, {&saved, 1}, {&d, 1}, {&wanted, 1}, path_of(backend), groups);
  })[0];
}

// h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr of one direction.
using DirectionTensors = std::array<OptionalTensor, kLayerInputs - 1>;

std::array<LayerInputs, 2> both_directions(const std::string& cell, const Tensor& input,
                                           const std::array<DirectionTensors, 2>& tensors,
                                           const OptionalTensor& batch_sizes,
                                           const OptionalTensor& resets,
                                           const std::array<Holds, 2>& zoneout) {
  const auto inputs = [&](int k) {
    const DirectionTensors& t = tensors[k];
    LayerInputs in{cell, input, t[0].value(), t[1],        t[2].value(), t[3].value(),
                   t[4], t[5],  t[6],         batch_sizes, k == 1,       resets};
    hold(zoneout[k], in);
    return in;
  };
  return {inputs(0), inputs(1)};
}

py::tuple forward_both(const std::string& cell, const Tensor& input,
                       const std::array<DirectionTensors, 2>& tensors,
                       const OptionalTensor& batch_sizes, const OptionalTensor& resets,
                       const std::array<Holds, 2>& zoneout, bool save, const std::string& backend) {
  const auto in = both_directions(cell, input, tensors, batch_sizes, resets, zoneout);
  auto out = without_gil([&] { return layer_forward(in, save, path_of(backend)); });
  return py::make_tuple(results(out[0], save), results(out[1], save));
}

std::vector<InputGradients> backward_both(
    const std::string& cell, const Tensor& input, const std::array<DirectionTensors, 2>& tensors,
    const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const std::array<Holds, 2>& zoneout, const std::array<std::array<OptionalTensor, 4>, 2>& kept,
    const std::string& isa, const std::array<std::array<OptionalTensor, 4>, 2>& upstream,
    const std::array<Wanted, 2>& wanted, const std::string& backend) {
  const auto in = both_directions(cell, input, tensors, batch_sizes, resets, zoneout);
  std::vector<Saved> saved;
  std::vector<LayerGradients> d;
  for (int i = 0; i < 2; i++) {
    const auto& k = kept[i];
    saved.push_back({k[0].value(), k[1], k[2], k[3], isa});
    d.push_back({upstream[i][0], upstream[i][1], upstream[i][2], upstream[i][3]});
  }
  return without_gil([&] { return layer_backward(in, saved, d, wanted, path_of(backend)); });
}

// (output, h_n, c_n or None), or None for what only the general path takes.
py::object shown(std::optional<StackOutputs>&& out) {
  if (!out) return py::none();
  return py::make_tuple(std::move(out->output), std::move(out->h_n), std::move(out->c_n));
}

py::object stack(const std::string& cell, const Tensor& input, const std::vector<Tensor>& hx,
                 const std::vector<Tensor>& weights, int directions, bool bias, bool projected,
                 bool batch_first, double dropout, const OptionalTensor& resets,
                 const std::vector<Tensor>& restored,
                 const std::optional<std::tuple<bool, bool, double, double, double>>& options) {
  StackOptions given;
  if (options) {
    const auto& [training, residual, weight_dropout, variational_dropout, zoneout] = *options;
    given = {training, residual, weight_dropout, variational_dropout, zoneout};
  }
  return shown(without_gil([&] {
    return run_stack(cell, input, hx, weights, directions, bias, projected, batch_first, dropout,
                     resets, restored, given);
  }));
}

py::object one_step(const std::string& cell, const Tensor& input, const std::vector<Tensor>& hx,
                    const std::vector<Tensor>& weights, bool bias) {
  return shown(without_gil([&] { return run_cell(cell, input, hx, weights, bias); }));
}

// function(cell, tensors, reverse, resets, holds, saved, isa, upstream, wanted), as rnn_ext/ops.py
// defines it.
void general_backward_in(const py::function& function) {
  // Never destroyed: at exit the interpreter may be gone first.
  const auto* kept = new py::function(function);
  set_general_backward([kept](const LayerInputs& in, const Saved& saved, const LayerGradients& d,
                              const Wanted& wanted) {
    py::gil_scoped_acquire acquire;
    return (*kept)(
               in.cell,
               py::make_tuple(in.input, in.h0, in.c0, in.w_ih, in.w_hh, in.b_ih, in.b_hh, in.w_hr),
               in.reverse, in.resets, py::make_tuple(in.hold_h, in.hold_c),
               py::make_tuple(saved.states, saved.cells, saved.gates, saved.middle), saved.isa,
               py::make_tuple(d.d_output, d.d_h_n, d.d_c_n, d.d_cells), wanted)
        .cast<InputGradients>();
  });
}

// Packed w_ih, w_hh, second matrix, then their scales, b_ih, b_hh.
using QuantizedTensors = std::array<OptionalTensor, 8>;

QuantizedWeights quantized_weights(const QuantizedTensors& t) {
  return {t[0].value(), t[1].value(), t[2], t[3], t[4], t[5], t[6], t[7]};
}

py::object quantized(const std::string& cell, const Tensor& input, const Tensor& h0,
                     const OptionalTensor& c0, const QuantizedTensors& tensors,
                     const OptionalTensor& batch_sizes, bool reverse) {
  const QuantizedWeights weights = quantized_weights(tensors);
  return shown(without_gil([&] {
    return std::optional(quantized_layer(cell, input, h0, c0, weights, batch_sizes, reverse));
  }));
}

py::object quantized_layers(const std::string& cell, const Tensor& input,
                            const std::vector<Tensor>& hx,
                            const std::vector<QuantizedTensors>& tensors, int directions,
                            long hidden, long output, bool batch_first) {
  std::vector<QuantizedWeights> weights;
  for (const QuantizedTensors& t : tensors) weights.push_back(quantized_weights(t));
  return shown(without_gil([&] {
    return quantized_stack(cell, input, hx, weights, directions, hidden, output, batch_first);
  }));
}

py::dict plan_cpu(const std::string& cell, const std::string& dtype, long steps, long batch,
                  long input, long hidden, long output, int directions) {
  const bool narrow = dtype == "bfloat16" && active_kernels().bfloat16;
  const long value_bytes = dtype == "float64" ? 8 : narrow ? 2 : 4;
  const auto [plan, side_by_side] =
      choose_plan({steps, batch, input, hidden, output, cell_gates(cell_kind(cell)), value_bytes,
                   at::get_num_threads()},
                  directions);
  py::dict d;
  d["kernel"] = "cpu";
  d["isa"] = active_kernels().name;
  d["threads"] = plan.threads;
  d["split"] = split_name(plan.split);
  d["packed"] = plan.pack;
  d["piece_rows"] = plan.piece_rows;
  d["reason"] = plan.reason;
  return d;
}

// Which kernel runs each pass on a GPU with these limits, and why: (forward, backward).
py::tuple plan_cuda(const std::string& cell, at::ScalarType dtype, long steps, long batch,
                    long hidden, int directions, bool projected, bool norms, bool zoneout,
                    const std::string& backend, const cuda::DeviceLimits& limits) {
  const cuda::LayerShape shape{cell_kind(cell), numbers_of(dtype), steps, batch,  hidden,
                               directions,      projected,         norms, zoneout};
  const auto pass = [&](cuda::Pass which) {
    const cuda::CudaPlan plan = cuda::choose(shape, which, limits, path_of(backend));
    return py::make_tuple(plan.kernel(), plan.reason);
  };
  return py::make_tuple(pass(cuda::Pass::kForward), pass(cuda::Pass::kBackward));
}

void define_device_limits(py::module_& m) {
  using cuda::DeviceLimits;
  py::class_<DeviceLimits>(m, "CudaDeviceLimits", py::module_local())
      .def(py::init<>())
      .def_readwrite("major", &DeviceLimits::major)
      .def_readwrite("minor", &DeviceLimits::minor)
      .def_readwrite("sm_count", &DeviceLimits::sm_count)
      .def_readwrite("registers_per_sm", &DeviceLimits::registers_per_sm)
      .def_readwrite("shared_per_sm", &DeviceLimits::shared_per_sm)
      .def_readwrite("shared_per_block", &DeviceLimits::shared_per_block)
      .def_readwrite("shared_reserved", &DeviceLimits::shared_reserved)
      .def_readwrite("threads_per_sm", &DeviceLimits::threads_per_sm)
      .def_readwrite("blocks_per_sm", &DeviceLimits::blocks_per_sm)
      .def_readwrite("l2_bytes", &DeviceLimits::l2_bytes)
      .def_readwrite("cluster_size", &DeviceLimits::cluster_size)
      .def_readwrite("cooperative", &DeviceLimits::cooperative);
}

cuda::DeviceLimits cuda_device_limits([[maybe_unused]] int device) {
  if constexpr (kHasCudaKernels)
    return cuda::device_limits(device);
  else
    throw std::runtime_error("rnn_ext: this build has no CUDA kernels");
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
  end_teams_before_fork();
  m.attr("built_for_torch") = RNN_EXT_TORCH_VERSION;
#ifdef __clang__
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.def("layer_forward", &forward);
  m.def("layer_backward", &backward);
  m.def("run_stack", &stack);
  m.def("run_cell", &one_step);
  m.def("set_general_backward", &general_backward_in);
  m.def("quantized_layer", &quantized);
  m.def("quantized_stack", &quantized_layers);
  define_online(m);
  define_generation(m);
  define_normalized(m);
  define_partial(m);
  m.def("both_forward", &forward_both);
  m.def("both_backward", &backward_both);
  m.def("random_mask",
        [](int64_t seed, int64_t stream, const Tensor& steps, const Tensor& rows, int64_t columns,
           int64_t threshold, double dropped, double kept, const Tensor& like) {
          return without_gil([&] {
            return random_mask(seed, stream, steps, rows, columns, threshold, {dropped, kept},
                               like.scalar_type());
          });
        });
  m.def("gates_width", [](const std::string& cell, long hidden, size_t real_bytes) {
    return active_kernels().gates_width(cell_kind(cell), hidden, real_bytes);
  });
  m.def("plan_cpu", &plan_cpu);
  m.def("cpu_isas", &available_isas);
  m.def("cpu_multiplies_bfloat16", [] { return active_kernels().bfloat16 != nullptr; });
  m.def("cpu_isa", [] { return std::string(active_kernels().name); });
  m.def("set_cpu_isa", &set_isa);
  // As in TORCH_CUDA_ARCH_LIST, "" without CUDA kernels.
  m.attr("cuda_architectures") = RNN_EXT_CUDA_ARCHS;
  m.def("cuda_unavailable", &cuda_unavailable);
  define_device_limits(m);
  m.def("cuda_device_limits", &cuda_device_limits);
  m.def("plan_cuda", &plan_cuda);
  m.def("poison_scratch", &Scratch::poison);
  m.def("shorten_pieces", &shorten_pieces);
}
