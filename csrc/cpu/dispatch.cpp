#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace rnn_ext {

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2, kernels_sse2;
extern const Bfloat16Kernels bfloat16_avx512;
#else
extern const Kernels kernels_neon;
#endif

namespace {

#if defined(__x86_64__)
// avx512, but for bfloat16.
const Kernels& kernels_avx512_bf16() {
  static const Kernels kernels = [] {
    Kernels k = kernels_avx512;
    k.name = "avx512_bf16";
    k.supported = [] { return kernels_avx512.supported() && bfloat16_avx512.supported(); };
    k.bfloat16 = &bfloat16_avx512;
    return k;
  }();
  return kernels;
}
#endif

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  for (const Kernels* k : {&kernels_avx512_bf16(), &kernels_avx512, &kernels_avx2, &kernels_sse2})
#else
  for (const Kernels* k : {&kernels_neon})
#endif
    if (k->supported()) found.push_back(k);
  return found;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : available()) names.push_back(k->name);
  return names;
}

const Kernels& kernels_named(const std::string& name) {
  std::string names;
  for (const Kernels* k : available()) {
    if (name == k->name) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("rnn_ext: the instruction set '" + name +
                              "' is not available on this CPU; choose one of: " + names);
}

void set_isa(const std::string& name) { active = &kernels_named(name); }

const Kernels& active_kernels() {
  const Kernels* k = active;
  if (!k) {
    const char* forced = std::getenv("RNN_EXT_ISA");
    k = forced && *forced ? &kernels_named(forced) : available().front();
    active = k;
  }
  return *k;
}

}  // namespace rnn_ext
