// sigmoid and tanh of a register, within about 2.5 units in the last place, and NaN stays NaN. Both
// rest on expm1(r) = r + r^2 q(r) on |r| <= ln(2)/2 and exp(x) = 2^n exp(r) with x = n ln(2) + r.
#pragma once
#include "vector.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class real>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr uint32_t exponent_bias = 127;
  static constexpr float round_magic =
      12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f,
                         ln2_low = -2.12194440e-4f;  // n * ln2_high is exact
  static constexpr float sigmoid_limit = 88.f, tanh_limit = 10.f;
  // q: minimax, relative error 1.3e-8, highest power first
  static constexpr float q[] = {1.388248380e-03f, 8.366718542e-03f, 4.166720623e-02f,
                                1.666654215e-01f, 4.999999812e-01f};
};

template <>
struct ExpConstants<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr uint64_t exponent_bias = 1023;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double sigmoid_limit = 708., tanh_limit = 20.;
  // q: Taylor, 1/14! ... 1/2!
  static constexpr double q[] = {
      1. / 87178291200., 1. / 6227020800., 1. / 479001600., 1. / 39916800., 1. / 3628800.,
      1. / 362880.,      1. / 40320.,      1. / 5040.,      1. / 720.,      1. / 120.,
      1. / 24.,          1. / 6.,          1. / 2.};
};

// exp(y) = scale * (1 + expm1_r) for |y| within the limits above.
template <class real>
struct SplitExp {
  Vec<real> scale, expm1_r;

  RNN_EXT_INLINE explicit SplitExp(Vec<real> y) {
    using K = ExpConstants<real>;
    using Bits = typename Simd<real>::Bits;
    const Vec<real> rounded = y * K::log2_e + K::round_magic;
    const Vec<real> n = rounded - K::round_magic;
    const Vec<real> r = (y - n * K::ln2_high) - n * K::ln2_low;
    Vec<real> q = K::q[0] - Vec<real>{};
    RNN_EXT_UNROLL
    for (size_t i = 1; i < sizeof(K::q) / sizeof(real); i++) q = q * r + K::q[i];
    expm1_r = r + r * r * q;
    scale =
        (Vec<real>)(((Bits)rounded << K::mantissa_bits) + (K::exponent_bias << K::mantissa_bits));
  }
};

template <class real>
struct VectorMath {
  using V = Vec<real>;

  RNN_EXT_INLINE static V sigmoid(V x) {
    constexpr real limit = ExpConstants<real>::sigmoid_limit;
    const V high = limit - V{}, low = -high;
    x = x > high ? high : x;
    x = x < low ? low : x;
    const SplitExp<real> e(-x);
    return 1 / (1 + (e.expm1_r * e.scale + e.scale));
  }

  RNN_EXT_INLINE static V tanh(V x) {
    using Bits = typename Simd<real>::Bits;
    const Bits sign_mask = (Bits)(-V{});
    const Bits sign = (Bits)x & sign_mask;
    V magnitude = (V)((Bits)x & ~sign_mask);
    const V limit = ExpConstants<real>::tanh_limit - V{};
    magnitude = magnitude > limit ? limit : magnitude;
    const SplitExp<real> e(magnitude * -2);
    const V expm1 = e.expm1_r * e.scale + (e.scale - 1);  // of -2 |x|, in (-1, 0]
    // -expm1 / (expm1 + 2) is exact near 0, 1 - 2 exp / (expm1 + 2) near 1, where rounding expm1
    // would cost a digit.
    const V middle = real(0.55) - V{};
    const V quotient =
        (magnitude > middle ? 2 * (e.expm1_r * e.scale + e.scale) : -expm1) / (expm1 + 2);
    return (V)((Bits)(magnitude > middle ? 1 - quotient : quotient) | sign);
  }
};

template <>
struct Math<Vec<float>> : VectorMath<float> {};
template <>
struct Math<Vec<double>> : VectorMath<double> {};

}  // namespace rnn_ext::RNN_EXT_TARGET
