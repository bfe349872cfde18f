// What isa_*.cpp share, and every library header the kernels use: those must come before the target
// is set, or the linker might keep a copy of an inline function that this CPU cannot run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "generate_problem.h"
#include "normalized_problem.h"
#include "problem.h"
#include "rtrl_problem.h"
#include "scratch.h"
#include "team.h"

#define RNN_EXT_DEFINE_KERNELS(isa, condition)                       \
  namespace rnn_ext {                                                \
  extern const Kernels kernels_##isa;                                \
  const Kernels kernels_##isa = {#isa,                               \
                                 []() -> bool { return condition; }, \
                                 isa::gates_width_of,                \
                                 isa::run_forward<float>,            \
                                 isa::run_forward<double>,           \
                                 isa::run_backward<float>,           \
                                 isa::run_backward<double>,          \
                                 isa::run_quantized,                 \
                                 &isa::rtrl_kernels<float>,          \
                                 &isa::rtrl_kernels<double>,         \
                                 isa::run_generate<float>,           \
                                 isa::run_generate<double>,          \
                                 &isa::normalized_kernels<float>,    \
                                 &isa::normalized_kernels<double>,   \
                                 isa::record_width_of};              \
  }
