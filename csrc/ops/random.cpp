#include "random.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

// One source for every instruction set: the compiler makes the variants, the loader takes one.
#if defined(__x86_64__) && defined(__linux__) && !defined(RNN_EXT_EMULATED)
#define RNN_EXT_VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RNN_EXT_VARIANTS
#endif

namespace rnn_ext {
namespace {

constexpr int kLanes = 16, kWords = 4;
constexpr uint64_t kWord = 0xFFFFFFFF;

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for the
// counters (first, first + 1, ...; row; step; stream). words[lane][w] is word w of lane's counter.
RNN_EXT_VARIANTS void philox(uint64_t seed, uint32_t first, uint32_t row, uint32_t step,
                             uint32_t stream, uint32_t (*words)[kWords]) {
  // Words in 64-bit lanes: that way compilers find the vector instructions for the products.
  uint64_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; i++) c0[i] = first + i, c1[i] = row, c2[i] = step, c3[i] = stream;
  uint64_t k0 = seed & kWord, k1 = seed >> 32;
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < kLanes; i++) {
      const uint64_t p0 = 0xD2511F53 * (c0[i] & kWord), p1 = 0xCD9E8D57 * (c2[i] & kWord);
      c0[i] = (p1 >> 32) ^ (c1[i] & kWord) ^ k0;
      c1[i] = p1;
      c2[i] = (p0 >> 32) ^ (c3[i] & kWord) ^ k1;
      c3[i] = p0;
    }
    k0 = (k0 + 0x9E3779B9) & kWord, k1 = (k1 + 0xBB67AE85) & kWord;
  }
  for (int i = 0; i < kLanes; i++) {
    words[i][0] = static_cast<uint32_t>(c0[i]), words[i][1] = static_cast<uint32_t>(c1[i]);
    words[i][2] = static_cast<uint32_t>(c2[i]), words[i][3] = static_cast<uint32_t>(c3[i]);
  }
}

template <class Value>
void fill_row(Value* out, int64_t columns, uint64_t seed, uint32_t stream, uint32_t step,
              uint32_t row, uint32_t threshold, Value kept) {
  uint32_t words[kLanes][kWords];
  const Value values[] = {Value(0), kept};  // a branch would be mispredicted
  for (int64_t j = 0; j < columns; j += kLanes * kWords) {
    philox(seed, static_cast<uint32_t>(j / kWords), row, step, stream, words);
    const int64_t count = std::min<int64_t>(columns - j, kLanes * kWords);
    for (int64_t i = 0; i < count; i++)
      out[j + i] = values[words[i / kWords][i % kWords] >= threshold];
  }
}

}  // namespace

at::Tensor random_mask(int64_t seed, int64_t stream, const at::Tensor& steps,
                       const at::Tensor& rows, int64_t columns, int64_t threshold, double kept,
                       at::ScalarType dtype) {
  TORCH_CHECK(steps.is_cpu() && rows.is_cpu(), "random_mask: fills on the CPU");
  TORCH_CHECK(steps.dim() == 1 && rows.sizes() == steps.sizes(),
              "random_mask: steps and rows must be 1-D and equally long");
  const int64_t count = steps.size(0);
  const at::Tensor result = at::empty({count, columns}, dtype);
  const at::Tensor step = steps.to(at::kLong).contiguous(), row = rows.to(at::kLong).contiguous();
  const int64_t *s = step.const_data_ptr<int64_t>(), *r = row.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, result.scalar_type(), "random_mask", [&] {
        scalar_t* out = result.mutable_data_ptr<scalar_t>();
        const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
        at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++)
            fill_row(out + i * columns, columns, static_cast<uint64_t>(seed),
                     static_cast<uint32_t>(stream), static_cast<uint32_t>(s[i]),
                     static_cast<uint32_t>(r[i]), static_cast<uint32_t>(threshold),
                     static_cast<scalar_t>(kept));
        });
      });
  return result;
}

}  // namespace rnn_ext
