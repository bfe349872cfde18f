// What the kernels of normalized.h share: a block owns a row, its threads every kRowThreads-th unit.
#pragma once
#include "normalized.h"
#include "step.cuh"
// In this target's namespace.
#include "../cells/lstm_peephole.h"

namespace rnn_ext::cuda {

constexpr int kRowThreads = 256, kWarpThreads = 32;
constexpr double kNormEpsilon = 1e-5;

constexpr size_t kRowShared = kRowThreads / kWarpThreads * sizeof(double);

// The sum over all threads of the block, which all call it and all get it.
template <class R>
RNN_EXT_DEVICE R block_sum(R value) {
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, lanes);
  R* sums = reinterpret_cast<R*>(shared_memory());  // of each warp
  __syncthreads();                                  // the sum before has been read
  if (threadIdx.x % kWarpThreads == 0) sums[threadIdx.x / kWarpThreads] = value;
  __syncthreads();
  R sum = 0;
  for (int warp = 0; warp < kRowThreads / kWarpThreads; warp++) sum += sums[warp];
  return sum;
}

// body(i) for the thread's share of i < count
template <class Body>
RNN_EXT_DEVICE void for_own(int64_t count, const Body& body) {
  for (int64_t i = threadIdx.x; i < count; i += kRowThreads) body(i);
}

template <class R>
struct Moments {
  R mean, scale;
};

// Of value(i), i < count; all threads call it.
template <class R, class Value>
RNN_EXT_DEVICE Moments<R> moments(int64_t count, const Value& value) {
  R sum = 0, squares = 0;
  for_own(count, [&](int64_t i) { sum += value(i); });
  const R mean = block_sum(sum) / static_cast<R>(count);
  for_own(count, [&](int64_t i) { squares += (value(i) - mean) * (value(i) - mean); });
  const R variance = block_sum(squares) / static_cast<R>(count);
  return {mean, R(1) / std::sqrt(variance + static_cast<R>(kNormEpsilon))};
}

// What a gradient d_hat(i) of normalised values hat(i) loses to their mean and to their variance:
// dL/d(value) = (d_hat - mean - hat along) scale. All threads call it.
template <class R>
struct Losses {
  R mean, along;
};
template <class R, class Gradient, class Hat>
RNN_EXT_DEVICE Losses<R> losses(int64_t count, const Gradient& d_hat, const Hat& hat) {
  R sum = 0, along = 0;
  for_own(count, [&](int64_t i) {
    sum += d_hat(i);
    along += d_hat(i) * hat(i);
  });
  const R mean = block_sum(sum) / static_cast<R>(count);
  return {mean, block_sum(along) / static_cast<R>(count)};
}

template <class S>
RNN_EXT_DEVICE Real<S> weight(const void* base, int64_t at, Real<S> otherwise) {
  return base ? load<S>(base, at) : otherwise;
}

template <class S>
RNN_EXT_DEVICE typename PeepholeLstm<Real<S>>::Peepholes peepholes(const NormalizedWeights& w,
                                                                   int64_t hidden, int64_t unit) {
  return {weight<S>(w.peephole, unit, 0), weight<S>(w.peephole, hidden + unit, 0),
          weight<S>(w.peephole, 2 * hidden + unit, 0)};
}

template <class S, class Params>
void launch_rows(const char* name, void (*kernel)(const Params), int64_t rows, const Stream& stream,
                 const Params& p) {
  launch_blocks(name, kernel, rows, kRowThreads, kRowShared, stream, p);
}

}  // namespace rnn_ext::cuda
