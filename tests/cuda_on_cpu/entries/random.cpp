// Random masks, one launch a call.
#include "random.h"

#include "entry.h"

using namespace rnn_ext;

extern "C" {
int run_random_mask(int storage, const cuda::RandomMask* p) {
  return cuda_on_cpu::entry(
      [&] { cuda::random_mask(static_cast<cuda::Storage>(storage), *p, {0, nullptr}); });
}
int run_random_flags(const cuda::RandomMask* p) {
  return cuda_on_cpu::entry([&] { cuda::random_flags(*p, {0, nullptr}); });
}
}
