// The kernels in use: the best this CPU runs, or what RNN_EXT_ISA names.
#pragma once
#include <string>
#include <vector>

#include "problem.h"

namespace rnn_ext {

// Instruction sets this CPU runs, best first.
std::vector<std::string> available_isas();
// The one in use. Throws std::invalid_argument where RNN_EXT_ISA names one that is not available.
const Kernels& active_kernels();
const Kernels& kernels_named(const std::string& name);
void set_isa(const std::string& name);

}  // namespace rnn_ext
