// Normalisation of a row (Ba, Kiros and Hinton 2016): hat = (x - mean) scale with
// scale = 1 / sqrt(variance + eps), then hat * gain.
#pragma once
#include "normalized_problem.h"
#include "products.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class real>
struct Moments {
  real mean, scale;
};

template <class real>
RNN_EXT_INLINE real sum_lanes(Vec<real> v) {
  real sum = 0;
  for (int l = 0; l < kLanes<real>; l++) sum += v[l];
  return sum;
}

// Sum over i < count of body(i, lanes that exist) of a register at a time; body's other lanes are
// left out.
template <class real, class Body>
RNN_EXT_INLINE real sum_of(long count, const Body& body) {
  constexpr int w = kLanes<real>;
  Vec<real> even{}, odd{};
  long i = 0;
  for (; i + 2 * w <= count; i += 2 * w) even += body(i, w), odd += body(i + w, w);
  if (i + w <= count) even += body(i, w), i += w;
  if (i < count) {
    const Vec<real> rest = body(i, int(count - i));
    for (int l = 0; l < count - i; l++) odd[l] += rest[l];
  }
  return sum_lanes<real>(even + odd);
}

// body(first, lanes) for registers of `count` values
template <class real, class Body>
RNN_EXT_INLINE void for_registers(long count, const Body& body) {
  constexpr int w = kLanes<real>;
  for (long i = 0; i < count; i += w) body(i, count - i < w ? int(count - i) : w);
}

template <class real>
RNN_EXT_NOINLINE Moments<real> moments(const real* x, long count) {
  const real mean = sum_of<real>(count, [&](long i, int n) { return load(x + i, n); }) / count;
  const real squares = sum_of<real>(count, [&](long i, int n) {
    const Vec<real> centred = load(x + i, n) - mean;
    return centred * centred;
  });
  return {mean, real(1 / __builtin_sqrt(double(squares) / count + kNormEpsilon))};
}

// x becomes hat; returns the scale.
template <class real>
RNN_EXT_NOINLINE real normalize(real* x, long count) {
  const Moments<real> m = moments(x, count);
  for_registers<real>(count,
                      [&](long i, int n) { store(x + i, (load(x + i, n) - m.mean) * m.scale, n); });
  return m.scale;
}

// out = dL/dx from d = dL/d(hat * gain), written as the type that is multiplied
template <class value>
RNN_EXT_NOINLINE void normalize_vjp(const Real<value>* d, const Real<value>* gain,
                                    const Real<value>* hat, Real<value> scale, long count,
                                    value* out) {
  using real = Real<value>;
  const auto d_hat = [&](long i, int n) { return load(d + i, n) * load(gain + i, n); };
  const real mean = sum_of<real>(count, d_hat) / count;
  const real along =
      sum_of<real>(count, [&](long i, int n) { return d_hat(i, n) * load(hat + i, n); }) / count;
  for_registers<real>(count, [&](long i, int n) {
    store(out + i, (d_hat(i, n) - mean - load(hat + i, n) * along) * scale, n);
  });
}

}  // namespace rnn_ext::RNN_EXT_TARGET
