// What bindings.cpp adds to the module for layer normalisation and peepholes.
#pragma once
#include <pybind11/pybind11.h>

namespace rnn_ext {

void define_normalized(pybind11::module_& m);

}  // namespace rnn_ext
