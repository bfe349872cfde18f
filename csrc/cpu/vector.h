// Registers of RNN_EXT_VECTOR_BYTES as values, through the vector extensions of GCC and Clang: one
// source for every instruction set. Include only inside a target section (isa_*.cpp).
#pragma once

#include "../cells/target.h"

#define RNN_EXT_NOINLINE __attribute__((noinline))
#ifdef __clang__
#define RNN_EXT_UNROLL _Pragma("unroll")
#else
#define RNN_EXT_UNROLL _Pragma("GCC unroll 64")
#endif

namespace rnn_ext::RNN_EXT_TARGET {

template <class real>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(RNN_EXT_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
  typedef uint8_t Bytes
      __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 4), aligned(1), may_alias));
  typedef uint16_t Pairs __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 2)));
  RNN_EXT_INLINE static Bits widened(Pairs v) { return __builtin_convertvector(v, Bits); }
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
  typedef double Unaligned
      __attribute__((vector_size(RNN_EXT_VECTOR_BYTES), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
  typedef uint8_t Bytes
      __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 8), aligned(1), may_alias));
  typedef uint16_t Pairs __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 4)));
  typedef uint32_t Quads __attribute__((vector_size(RNN_EXT_VECTOR_BYTES / 2)));
  RNN_EXT_INLINE static Bits widened(Pairs v) {
    return __builtin_convertvector(__builtin_convertvector(v, Quads), Bits);
  }
};

// A register of what is computed with; BFloat16 is computed with as float.
template <class value>
using Vec = typename Simd<Real<value>>::Vec;

template <class value>
constexpr int kLanes = RNN_EXT_VECTOR_BYTES / sizeof(Real<value>);

template <class real>
RNN_EXT_INLINE Vec<real> load(const real* p) {
  return *reinterpret_cast<const typename Simd<real>::Unaligned*>(p);
}

template <class real>
RNN_EXT_INLINE void store(real* p, Vec<real> v) {
  *reinterpret_cast<typename Simd<real>::Unaligned*>(p) = v;
}

// The first `lanes` lanes; the others read as zero and are not written.
template <class real>
RNN_EXT_INLINE Vec<real> load(const real* p, int lanes) {
  if (lanes == kLanes<real>) return load(p);
  Vec<real> v{};
  for (int l = 0; l < lanes; l++) v[l] = p[l];
  return v;
}

template <class real>
RNN_EXT_INLINE void store(real* p, Vec<real> v, int lanes) {
  if (lanes == kLanes<real>) return store(p, v);
  for (int l = 0; l < lanes; l++) p[l] = v[l];
}

// One where a flag is set, zero elsewhere. Bytes become lanes by steps of twice the width: g++ takes
// longer ones lane by lane.
template <class value>
RNN_EXT_INLINE Vec<value> load_flags(const bool* p, int lanes) {
  using S = Simd<Real<value>>;
  const Vec<value> zero{};
  if (lanes == kLanes<value>) {
    const auto flags = S::widened(
        __builtin_convertvector(*reinterpret_cast<const typename S::Bytes*>(p), typename S::Pairs));
    return flags != 0 ? 1 - zero : zero;
  }
  Vec<value> v = zero;
  for (int l = 0; l < lanes; l++) v[l] = p[l];
  return v;
}

// low: a0 b0 a1 b1 ...; high: the same of the upper halves.
template <class real, class Lanes>
struct Interleave;
template <class real, size_t... lane>
struct Interleave<real, std::index_sequence<lane...>> {
  static constexpr size_t n = sizeof...(lane);
  using Bits = typename Simd<real>::Bits;
#if defined(__clang__) || __GNUC__ >= 12
  RNN_EXT_INLINE static Vec<real> low(Vec<real> a, Vec<real> b) {
    return __builtin_shufflevector(a, b, (lane % 2 * n + lane / 2)...);
  }
  RNN_EXT_INLINE static Vec<real> high(Vec<real> a, Vec<real> b) {
    return __builtin_shufflevector(a, b, (lane % 2 * n + n / 2 + lane / 2)...);
  }
#else
  RNN_EXT_INLINE static Vec<real> low(Vec<real> a, Vec<real> b) {
    return __builtin_shuffle(a, b, Bits{(lane % 2 * n + lane / 2)...});
  }
  RNN_EXT_INLINE static Vec<real> high(Vec<real> a, Vec<real> b) {
    return __builtin_shuffle(a, b, Bits{(lane % 2 * n + n / 2 + lane / 2)...});
  }
#endif
};

// Transposes a square of registers in log2(n) rounds of perfect shuffles.
template <class real>
RNN_EXT_INLINE void transpose(Vec<real> (&r)[kLanes<real>]) {
  constexpr int n = kLanes<real>;
  using Shuffle = Interleave<real, std::make_index_sequence<n>>;
  RNN_EXT_UNROLL
  for (int round = 1; round < n; round *= 2) {
    Vec<real> t[n];
    RNN_EXT_UNROLL
    for (int i = 0; i < n / 2; i++) {
      t[2 * i] = Shuffle::low(r[i], r[i + n / 2]);
      t[2 * i + 1] = Shuffle::high(r[i], r[i + n / 2]);
    }
    RNN_EXT_UNROLL
    for (int i = 0; i < n; i++) r[i] = t[i];
  }
}

}  // namespace rnn_ext::RNN_EXT_TARGET
