// The parts of the module rnn_ext._C, each in a file of its own, and what they share.
#pragma once
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "layer.h"

namespace rnn_ext {

void define_normalized(pybind11::module_& m);
void define_partial(pybind11::module_& m);
void define_generation(pybind11::module_& m);
void define_online(pybind11::module_& m);

inline const char* split_name(Split split) {
  static const char* const names[] = {"none", "rows", "columns"};
  return names[static_cast<int>(split)];
}

// Leaves the interpreter lock to other threads while f computes.
template <class Function>
auto without_gil(const Function& f) {
  pybind11::gil_scoped_release release;
  return f();
}

// What rnn_ext.use_backend says of CUDA tensors.
inline cuda::Path path_of(const std::string& backend) {
  if (backend == "cuda-step") return cuda::Path::kStep;
  return backend == "cuda-persistent" ? cuda::Path::kPersistent : cuda::Path::kAuto;
}

inline pybind11::tuple results(LayerOutputs& out, bool save) {
  if (!save) return pybind11::make_tuple(out.output, out.h_n, out.c_n);
  return pybind11::make_tuple(out.output, out.h_n, out.c_n, out.saved.states, out.saved.cells,
                              out.saved.gates, out.saved.middle, out.saved.isa);
}

// Of zoneout: what is held of h and c (LayerInputs), or None.
using Holds = std::optional<std::array<OptionalTensor, 2>>;

inline void hold(const Holds& zoneout, LayerInputs& in) {
  if (zoneout) in.hold_h = (*zoneout)[0], in.hold_c = (*zoneout)[1];
}

// input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr
using InputTensors = std::array<OptionalTensor, kLayerInputs>;

template <class Tensors>
LayerInputs layer_inputs(const std::string& cell, const Tensors& t,
                         const OptionalTensor& batch_sizes, bool reverse,
                         const OptionalTensor& resets, const Holds& zoneout) {
  LayerInputs in{cell, t[0].value(), t[1].value(), t[2],        t[3].value(), t[4].value(),
                 t[5], t[6],         t[7],         batch_sizes, reverse,      resets};
  hold(zoneout, in);
  return in;
}

}  // namespace rnn_ext
