// The kernels of layer normalisation and peepholes, one launch a call.
#include "entry.h"
#include "normalized.h"

using namespace rnn_ext;

extern "C" {
int run_normalized_forward(int cell, int storage, int phase, const cuda::NormalizedForward* p) {
  return cuda_on_cpu::entry([&] {
    cuda::normalized_forward(static_cast<CellKind>(cell), static_cast<cuda::Storage>(storage),
                             phase, *p, {0, nullptr});
  });
}
int run_normalized_backward(int cell, int storage, int phase, const cuda::NormalizedBackward* p) {
  return cuda_on_cpu::entry([&] {
    cuda::normalized_backward(static_cast<CellKind>(cell), static_cast<cuda::Storage>(storage),
                              phase, *p, {0, nullptr});
  });
}
int run_normalize_rows(int storage, const cuda::NormalizeRows* p) {
  return cuda_on_cpu::entry(
      [&] { cuda::normalize_rows(static_cast<cuda::Storage>(storage), *p, {0, nullptr}); });
}
int run_normalize_rows_backward(int storage, const cuda::NormalizeRowsBackward* p) {
  return cuda_on_cpu::entry([&] {
    cuda::normalize_rows_backward(static_cast<cuda::Storage>(storage), *p, {0, nullptr});
  });
}
}
