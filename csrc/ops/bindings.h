// The parts of the module rnn_ext._C, each in a file of its own, and what they share.
#pragma once
#include <pybind11/pybind11.h>

namespace rnn_ext {

void define_normalized(pybind11::module_& m);
void define_generation(pybind11::module_& m);
void define_online(pybind11::module_& m);

// Leaves the interpreter lock to other threads while f computes.
template <class Function>
auto without_gil(const Function& f) {
  pybind11::gil_scoped_release release;
  return f();
}

}  // namespace rnn_ext
