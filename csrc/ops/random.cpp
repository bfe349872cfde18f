#include "random.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/randint.h>

#include <cmath>
#include <string_view>
#include <type_traits>
#include <utility>

#include "../cpu/dispatch.h"
#include "cuda_layer.h"
#include "cuda_random.h"
#include "kept_memory.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(RNN_EXT_EMULATED)
#define RNN_EXT_AVX512 __attribute__((target("avx512f")))
#include <immintrin.h>
#endif

namespace rnn_ext {
namespace {

constexpr int kLanes = 16, kWords = 4, kBlock = kLanes * kWords;
constexpr uint64_t kWord = 0xFFFFFFFF;
// As rnn_ext/reference/random.py and rnn_ext/random.py have them.
constexpr int64_t kStreamsOfLayer = 8, kSeeds = int64_t{1} << 62;

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for the
// counters (first, first + 1, ...; row; step; stream): four words of each, one after the other.
RNN_EXT_VARIANTS void philox(uint64_t seed, uint32_t first, uint32_t row, uint32_t step,
                             uint32_t stream, uint32_t* words) {
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
    words[i * kWords] = static_cast<uint32_t>(c0[i]);
    words[i * kWords + 1] = static_cast<uint32_t>(c1[i]);
    words[i * kWords + 2] = static_cast<uint32_t>(c2[i]);
    words[i * kWords + 3] = static_cast<uint32_t>(c3[i]);
  }
}

#ifdef RNN_EXT_AVX512
RNN_EXT_AVX512 inline __m512i lanes_of(uint64_t value) {
  return _mm512_set1_epi64(static_cast<long long>(value));
}

// The same in one product of 32-bit words where compilers find none and take three of 64-bit lanes.
RNN_EXT_AVX512 void philox_avx512(uint64_t seed, uint32_t first, uint32_t row, uint32_t step,
                                  uint32_t stream, uint32_t* words) {
  const __m512i factor0 = lanes_of(0xD2511F53), factor1 = lanes_of(0xCD9E8D57),
                low = lanes_of(kWord);
  __m512i c0[2], c1[2], c2[2], c3[2];
  for (int i = 0; i < 2; i++) {
    c0[i] = _mm512_add_epi64(lanes_of(first + 8 * i), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    c1[i] = lanes_of(row), c2[i] = lanes_of(step), c3[i] = lanes_of(stream);
  }
  uint64_t k0 = seed & kWord, k1 = seed >> 32;
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < 2; i++) {
      // What stands above 32 bits has no effect. g++ 12 warns of the product without a mask.
      const __m512i p0 = _mm512_maskz_mul_epu32(0xFF, c0[i], factor0),
                    p1 = _mm512_maskz_mul_epu32(0xFF, c2[i], factor1);
      c0[i] = (p1 >> 32) ^ c1[i] ^ lanes_of(k0);
      c1[i] = p1;
      c2[i] = (p0 >> 32) ^ c3[i] ^ lanes_of(k1);
      c3[i] = p0;
    }
    k0 = (k0 + 0x9E3779B9) & kWord, k1 = (k1 + 0xBB67AE85) & kWord;
  }
  for (int i = 0; i < 2; i++) {
    const __m512i a = (c0[i] & low) | (c1[i] << 32), b = (c2[i] & low) | (c3[i] << 32);
    const __m512i first_half = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
                  second_half = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    _mm512_storeu_si512(words + i * 32, _mm512_permutex2var_epi64(a, first_half, b));
    _mm512_storeu_si512(words + i * 32 + 16, _mm512_permutex2var_epi64(a, second_half, b));
  }
}
#endif

RNN_EXT_VARIANTS void choose(const uint32_t* words, uint32_t threshold, float dropped, float kept,
                             float* out) {
  for (int i = 0; i < kBlock; i++) out[i] = words[i] >= threshold ? kept : dropped;
}
RNN_EXT_VARIANTS void choose(const uint32_t* words, uint32_t threshold, double dropped, double kept,
                             double* out) {
  for (int i = 0; i < kBlock; i++) out[i] = words[i] >= threshold ? kept : dropped;
}
RNN_EXT_VARIANTS void choose(const uint32_t* words, uint32_t threshold, bool dropped, bool kept,
                             bool* out) {
  for (int i = 0; i < kBlock; i++) out[i] = (words[i] >= threshold ? kept : dropped);
}

using Words = void (*)(uint64_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t*);

// RNN_EXT_ISA decides here too.
Words words_of_isa() {
#ifdef RNN_EXT_AVX512
  if (std::string_view(active_kernels().name).starts_with("avx512")) return philox_avx512;
#endif
  return philox;
}

// The masks of one stream.
struct Filling {
  Words words_of;
  uint64_t seed;
  uint32_t stream, threshold;
  MaskValues values;
};

template <class Value>
void fill_row(const Filling& f, uint32_t step, uint32_t row, int64_t columns, Value* out) {
  using Wide = std::conditional_t<std::is_same_v<Value, double>, double, float>;
  using Number = std::conditional_t<std::is_same_v<Value, bool>, bool, Wide>;
  const auto dropped = static_cast<Number>(f.values.dropped);
  const auto kept = static_cast<Number>(f.values.kept);
  uint32_t words[kBlock];
  Number block[kBlock];
  for (int64_t j = 0; j < columns; j += kBlock) {
    f.words_of(f.seed, static_cast<uint32_t>(j / kWords), row, step, f.stream, words);
    choose(words, f.threshold, dropped, kept, block);
    const int64_t count = std::min<int64_t>(columns - j, kBlock);
    for (int64_t i = 0; i < count; i++) out[j + i] = static_cast<Value>(block[i]);
  }
}

// Fills `result`, of so many rows, which place_of(i) gives a step and a sequence.
template <class Place>
void fill(const Filling& filling, const at::Tensor& result, int64_t count, const Place& place_of) {
  const int64_t columns = result.size(-1);
  AT_DISPATCH_FLOATING_TYPES_AND3(
      at::kBFloat16, at::kHalf, at::kBool, result.scalar_type(), "random_mask", [&] {
        scalar_t* out = result.mutable_data_ptr<scalar_t>();
        run_team(threads_for(count * columns), [&](const Member& m) {
          for (long i = m.begin(count); i < m.end(count); i++) {
            const auto [step, row] = place_of(i);
            fill_row(filling, static_cast<uint32_t>(step), static_cast<uint32_t>(row), columns,
                     out + i * columns);
          }
        });
      });
}

}  // namespace

at::Tensor random_mask(int64_t seed, int64_t stream, const at::Tensor& steps,
                       const at::Tensor& rows, int64_t columns, int64_t threshold,
                       MaskValues values, at::ScalarType dtype) {
  TORCH_CHECK(steps.dim() == 1 && rows.sizes() == steps.sizes() && rows.device() == steps.device(),
              "random_mask: steps and rows must be 1-D, equally long and on one device");
  if constexpr (kHasCudaKernels)
    if (on_cuda(steps))
      return cuda_random_mask(seed, stream, steps, rows, columns, threshold, values, dtype);
  TORCH_CHECK(steps.is_cpu(), "random_mask: this build has no kernels for device ", steps.device());
  const int64_t count = steps.size(0);
  const at::Tensor result = uninitialized({count, columns}, dtype);
  const at::Tensor step = steps.to(at::kLong).contiguous(), row = rows.to(at::kLong).contiguous();
  const int64_t *s = step.const_data_ptr<int64_t>(), *r = row.const_data_ptr<int64_t>();
  const Filling filling{words_of_isa(), static_cast<uint64_t>(seed), static_cast<uint32_t>(stream),
                        static_cast<uint32_t>(threshold), values};
  fill(filling, result, count, [&](int64_t i) { return std::pair(s[i], r[i]); });
  return result;
}

at::Tensor random_mask(int64_t seed, MaskPurpose purpose, int64_t layer, int64_t steps,
                       int64_t rows, int64_t columns, double p, MaskValues values,
                       at::ScalarType dtype) {
  const at::Tensor result = uninitialized({steps, rows, columns}, dtype);
  const auto stream = static_cast<uint32_t>(kStreamsOfLayer * layer + static_cast<int>(purpose));
  const double threshold = std::min<double>(std::nearbyint(p * 0x1p32), kWord);
  const Filling filling{words_of_isa(), static_cast<uint64_t>(seed), stream,
                        static_cast<uint32_t>(threshold), values};
  fill(filling, result, steps * rows, [&](int64_t i) { return std::pair(i / rows, i % rows); });
  return result;
}

int64_t draw_seed() { return at::randint(kSeeds, {}, at::kLong).item<int64_t>(); }

}  // namespace rnn_ext
