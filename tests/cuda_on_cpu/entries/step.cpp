// The step-wise kernels, one launch a call.
#include "entry.h"
#include "params.h"

using namespace rnn_ext;

extern "C" {
int run_step_forward(int cell, int storage, int phase, const cuda::StepForward* p) {
  return cuda_on_cpu::entry([&] {
    cuda::step_forward(static_cast<CellKind>(cell), static_cast<cuda::Storage>(storage), phase, *p,
                       {0, nullptr});
  });
}
int run_step_project(int storage, const cuda::StepProject* p) {
  return cuda_on_cpu::entry(
      [&] { cuda::step_project(static_cast<cuda::Storage>(storage), *p, {0, nullptr}); });
}
int run_step_backward(int cell, int storage, int phase, const cuda::StepBackward* p) {
  return cuda_on_cpu::entry([&] {
    cuda::step_backward(static_cast<CellKind>(cell), static_cast<cuda::Storage>(storage), phase, *p,
                        {0, nullptr});
  });
}
int run_step_norms(int cell, int storage, const cuda::StepBackward* p) {
  return cuda_on_cpu::entry([&] {
    cuda::step_norms(static_cast<CellKind>(cell), static_cast<cuda::Storage>(storage), *p,
                     {0, nullptr});
  });
}
int run_column_sums(int storage, const cuda::ColumnSums* p) {
  return cuda_on_cpu::entry(
      [&] { cuda::column_sums(static_cast<cuda::Storage>(storage), *p, {0, nullptr}); });
}
}
