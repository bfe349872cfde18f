// What the step-wise kernels share: a thread owns one unit of one row of a step.
#pragma once
#include <type_traits>

#include "launch.h"
#include "math.h"
#include "params.h"
// The cells, in this target's namespace.
#include "../cells/elman.h"
#include "../cells/gru.h"
#include "../cells/lstm.h"

namespace rnn_ext::cuda {

// What a storage type is computed in.
template <class S>
using Real = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
RNN_EXT_DEVICE Real<S> load(const void* base, int64_t at) {
  const S value = static_cast<const S*>(base)[at];
  if constexpr (std::is_same_v<S, Real<S>>)
    return value;
  else
    return to_float(value);
}

template <class S>
RNN_EXT_DEVICE void store(void* base, int64_t at, Real<S> value) {
  if constexpr (std::is_same_v<S, Real<S>>)
    static_cast<S*>(base)[at] = value;
  else
    static_cast<S*>(base)[at] = from_float<S>(value);
}

template <class R>
RNN_EXT_DEVICE void add(void* base, int64_t at, R value) {
  static_cast<R*>(base)[at] += value;
}

// A block covers kTileUnits units of kTileRows rows; lanes of a warp are neighbouring units.
constexpr int kTileUnits = 32, kTileRows = 4, kTileThreads = kTileUnits * kTileRows;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t tiles(int64_t rows, int64_t units) {
  return divided_up(rows, kTileRows) * divided_up(units, kTileUnits);
}

template <class Params>
void launch_blocks(const char* name, void (*kernel)(const Params), int64_t blocks, int threads,
                   size_t shared_bytes, const Stream& stream, const Params& p) {
  if (blocks > INT32_MAX) launch_failed(name, "the step has too many rows for one launch");
  const DeviceScope scope(stream.device);
  LaunchConfig config{};
  config.blocks.x = static_cast<unsigned>(blocks);
  config.threads = threads;
  config.shared_bytes = shared_bytes;
  config.stream = stream.handle;
  launch(name, kernel, config, p);
}

struct Place {
  int64_t row, unit;
};

RNN_EXT_DEVICE Place own_place(int64_t units) {
  const unsigned across = static_cast<unsigned>((units + kTileUnits - 1) / kTileUnits);
  const int64_t row_tile = blockIdx.x / across, unit_tile = blockIdx.x % across;
  return {row_tile * kTileRows + threadIdx.x / kTileUnits,
          unit_tile * kTileUnits + threadIdx.x % kTileUnits};
}

// Of a row that exists in the step.
RNN_EXT_DEVICE bool takes_part(const int64_t* lengths, int64_t row, int64_t step) {
  return lengths == nullptr || step < lengths[row];
}
RNN_EXT_DEVICE bool takes_part(const Rows& rows, int64_t row) {
  return takes_part(rows.lengths, row, rows.step);
}
RNN_EXT_DEVICE bool is_reset(const Rows& rows, int64_t row) {
  return rows.resets != nullptr && rows.resets[row];
}

// What is held of a unit, z.
template <class R>
RNN_EXT_DEVICE R held(const Hold& hold, int64_t at) {
  return hold.units ? static_cast<R>(hold.units[at]) : static_cast<R>(hold.share);
}

// What a step leaves of a state that was `before`.
template <class R>
RNN_EXT_DEVICE R mixed(const Hold& hold, int64_t at, R before, R made) {
  const R z = held<R>(hold, at);
  return z * before + (1 - z) * made;
}

// Calls f(S{}) for the type that `storage` names.
template <class Function>
void with_storage(Storage storage, const Function& f) {
  switch (storage) {
    case Storage::kFloat:
      return f(float{});
    case Storage::kDouble:
      return f(double{});
    case Storage::kHalf:
      return f(fp16{});
    default:
      return f(bf16{});
  }
}

}  // namespace rnn_ext::cuda
