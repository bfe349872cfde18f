// The part of rnn_ext._C that learns while a sequence runs.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "../cpu/rtrl_problem.h"
#include "bindings.h"
#include "rtrl.h"

namespace rnn_ext {
namespace {

namespace py = pybind11;
using at::Tensor;

// w_ih, w_hh, b_ih, b_hh.
RtrlLayer online_layer(const std::string& cell, const std::array<OptionalTensor, 4>& weights) {
  return {cell, weights[0].value(), weights[1].value(), weights[2], weights[3]};
}

auto influence_of(const std::string& cell, const std::array<OptionalTensor, 4>& weights, long batch,
                  bool diagonal) {
  return rtrl_influence(online_layer(cell, weights), batch, diagonal);
}

using Pending = std::optional<std::tuple<Tensor, Tensor, long>>;  // steps, start, count

std::optional<RtrlPending> pending_steps(const Pending& pending) {
  if (!pending) return {};
  const auto& [steps, start, count] = *pending;
  return RtrlPending{steps, start, count};
}

auto step_online(const std::string& cell, const std::array<OptionalTensor, 4>& weights,
                 const Tensor& x, const OptionalTensor& reset, const Tensor& h,
                 const OptionalTensor& c, const Tensor& influence, const Pending& pending) {
  const RtrlLayer layer = online_layer(cell, weights);
  const auto [status, h_new] = without_gil(
      [&] { return rtrl_step(layer, x, reset, h, c, influence, pending_steps(pending)); });
  return std::make_tuple(int(status), h_new);
}

void advance_online(const std::string& cell, const std::array<OptionalTensor, 4>& weights,
                    const Tensor& influence, const Pending& pending) {
  const RtrlLayer layer = online_layer(cell, weights);
  without_gil([&] { rtrl_advance(layer, influence, pending_steps(pending).value()); });
}

int accumulate_online(const std::string& cell, const std::array<OptionalTensor, 4>& weights,
                      const Tensor& d_h, const Tensor& influence, const Pending& pending) {
  const RtrlLayer layer = online_layer(cell, weights);
  return int(
      without_gil([&] { return rtrl_accumulate(layer, d_h, influence, pending_steps(pending)); }));
}

}  // namespace

void define_online(py::module_& m) {
  m.def("rtrl_influence", &influence_of);
  m.def("rtrl_step", &step_online);
  m.def("rtrl_advance", &advance_online);
  m.def("rtrl_accumulate", &accumulate_online);
  m.attr("rtrl_pending_steps") = kPendingSteps;
}

}  // namespace rnn_ext
