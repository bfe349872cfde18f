// The multiply-add that every product is made of, and the form in which it wants its factors. Along
// a sum it takes kTogether<value> values at once: one, or for BFloat16 a pair of neighbours, whose
// products are added in float. A register of factors has kLanes<value> such groups.
#pragma once
#include "vector_math.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value>
constexpr int kTogether = sizeof(Real<value>) / sizeof(value);

template <class value>
RNN_EXT_INLINE long groups_of(long depth) {
  return (depth + kTogether<value> - 1) / kTogether<value>;
}

template <class real>
struct Factors {
  // One group, for all lanes; last() is a group of which only the first value exists.
  RNN_EXT_INLINE static real one(const real* p) { return *p; }
  RNN_EXT_INLINE static real last(const real* p) { return *p; }
  // Neighbouring groups; load(p, n): only the first n values exist.
  RNN_EXT_INLINE static Vec<real> load_groups(const real* p) { return load(p); }
  RNN_EXT_INLINE static Vec<real> load_groups(const real* p, int n) { return load(p, n); }
  RNN_EXT_INLINE static void store_groups(real* p, Vec<real> v) { store(p, v); }
  // A group from each column of neighbouring rows, of which `lanes` columns exist.
  RNN_EXT_INLINE static Vec<real> columns(const real* row, const real*, int lanes) {
    return load(row, lanes);
  }

  template <class Factor>
  RNN_EXT_INLINE static Vec<real> multiply_add(Vec<real> sum, Factor a, Vec<real> b) {
    return sum + a * b;
  }
};

#ifdef RNN_EXT_BFLOAT16
typedef uint32_t PairBits __attribute__((aligned(2), may_alias));

// Rounds to the nearest, to even where two are as near.
RNN_EXT_INLINE void store(BFloat16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

RNN_EXT_INLINE void store(BFloat16* p, Vec<float> v, int lanes) {
  _mm256_mask_storeu_epi16(p, __mmask16((1u << lanes) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

typedef uint16_t Halves __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 2)));

// BFloat16s as the lower halves of 32 bits.
RNN_EXT_INLINE Simd<float>::Bits widened(const BFloat16* p) {
  const Halves v = (Halves)_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p));
  return __builtin_convertvector(v, Simd<float>::Bits);
}

RNN_EXT_INLINE Simd<float>::Bits widened(const BFloat16* p, int lanes) {
  if (lanes == kLanes<float>) return widened(p);
  const Halves v = (Halves)_mm256_maskz_loadu_epi16(__mmask16((1u << lanes) - 1), p);
  return __builtin_convertvector(v, Simd<float>::Bits);
}

RNN_EXT_INLINE Vec<float> load(const BFloat16* p) { return (Vec<float>)(widened(p) << 16); }

RNN_EXT_INLINE Vec<float> load(const BFloat16* p, int lanes) {
  return (Vec<float>)(widened(p, lanes) << 16);
}

template <>
struct Factors<BFloat16> {
  RNN_EXT_INLINE static uint32_t one(const BFloat16* p) {
    return *reinterpret_cast<const PairBits*>(p);
  }
  RNN_EXT_INLINE static uint32_t last(const BFloat16* p) { return p->bits; }
  RNN_EXT_INLINE static Vec<float> load_groups(const BFloat16* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  RNN_EXT_INLINE static Vec<float> load_groups(const BFloat16* p, int n) {
    return (Vec<float>)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
  }
  RNN_EXT_INLINE static void store_groups(BFloat16* p, Vec<float> v) {
    store(reinterpret_cast<float*>(p), v);
  }
  // Where the second row does not exist (null) it reads as zero.
  RNN_EXT_INLINE static Vec<float> columns(const BFloat16* row, const BFloat16* next, int lanes) {
    const Simd<float>::Bits low = widened(row, lanes);
    return (Vec<float>)(next ? low | widened(next, lanes) << 16 : low);
  }

  RNN_EXT_INLINE static Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  RNN_EXT_INLINE static Vec<float> multiply_add(Vec<float> sum, uint32_t a, Vec<float> b) {
    return multiply_add(sum, (Vec<float>)_mm512_set1_epi32(int(a)), b);
  }
};
#endif

}  // namespace rnn_ext::RNN_EXT_TARGET
