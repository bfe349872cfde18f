// From a plan to the kernel that it names: the same few lines for every cell and both passes.
#pragma once
#include <type_traits>

#include "launch.h"
#include "persistent_backward.cuh"
#include "persistent_forward.cuh"
#include "persistent_reset_before_backward.cuh"
#include "persistent_reset_before_forward.cuh"

namespace rnn_ext::cuda {

template <class Params>
void start_persistent(const char* name, void (*kernel)(const Params, const Tiling),
                      const CudaPlan& plan, const Params& args, const Stream& stream) {
  const DeviceScope scope(stream.device);
  if (plan.workspace_bytes)
    fill_zero(args.workspace, static_cast<size_t>(plan.workspace_bytes), stream.handle);
  LaunchConfig config{};
  config.blocks.x = static_cast<unsigned>(plan.launched_blocks(args.sequences.directions));
  config.threads = kBlockThreads;
  config.shared_bytes = static_cast<size_t>(plan.shared_bytes);
  config.cluster = plan.cluster ? plan.blocks : 1;
  config.cooperative = !plan.cluster;
  config.stream = stream.handle;
  launch(name, kernel, config, args, Tiling{plan.groups, plan.blocks, plan.rows});
}

// kernel(Numbers, unit tiles, Exchange) names an instantiation; each argument is a value that
// carries its type.
template <int n>
struct Constant {
  static constexpr int value = n;
};
template <class T>
struct Type {
  using type = T;
};

template <class Function>
void with_numbers(Numbers numbers, const Function& f) {
  switch (numbers) {
    case Numbers::kBfloat16:
      return f(Type<SixteenBit<bf16>>());
    case Numbers::kHalf:
      return f(Type<SixteenBit<fp16>>());
    case Numbers::kTf32:
      return f(Type<Tf32>());
    case Numbers::kTf32x3:
      return f(Type<Tf32x3>());
    default:
      launch_failed("persistent kernel", "there is none for float64");
  }
}

template <int ring, class Function>
void with_kernel_of(const CudaPlan& plan, Pass pass, const Function& f) {
  if (!plan.persistent || plan.pass != pass)
    launch_failed("persistent kernel", "the plan is for another kernel");
  with_numbers(plan.numbers, [&](auto numbers) {
    using N = typename decltype(numbers)::type;
    const auto with_units = [&](auto exchange) {
      plan.units == kUnitTile ? f(numbers, Constant<1>(), exchange)
                              : f(numbers, Constant<2>(), exchange);
    };
    plan.cluster ? with_units(Type<ClusterExchange<N>>())
                 : with_units(Type<FlagExchange<N, ring>>());
  });
}

template <class Cell>
inline constexpr bool kResetBefore = std::is_same_v<Cell, PersistentGruResetBefore>;

template <class Cell, class N, int tiles, class Exchange>
auto forward_kernel() {
  if constexpr (kResetBefore<Cell>)
    return persistent_reset_before_forward_kernel<N, tiles, Exchange>;
  else
    return persistent_forward_kernel<Cell, N, tiles, Exchange>;
}
template <class Cell, class N, int tiles, class Exchange>
auto backward_kernel() {
  if constexpr (kResetBefore<Cell>)
    return persistent_reset_before_backward_kernel<N, tiles, Exchange>;
  else
    return persistent_backward_kernel<Cell, N, tiles, Exchange>;
}

template <class Cell>
void start_forward(const char* name, const CudaPlan& plan, const PersistentForward& args,
                   const Stream& stream) {
  with_kernel_of<kForwardRing>(plan, Pass::kForward, [&](auto numbers, auto tiles, auto exchange) {
    using N = typename decltype(numbers)::type;
    using E = typename decltype(exchange)::type;
    start_persistent(name, forward_kernel<Cell, N, decltype(tiles)::value, E>(), plan, args,
                     stream);
  });
}

template <class Cell>
void start_backward(const char* name, const CudaPlan& plan, const PersistentBackward& args,
                    const Stream& stream) {
  with_kernel_of<kBackwardRing>(
      plan, Pass::kBackward, [&](auto numbers, auto tiles, auto exchange) {
        using N = typename decltype(numbers)::type;
        using E = typename decltype(exchange)::type;
        start_persistent(name, backward_kernel<Cell, N, decltype(tiles)::value, E>(), plan, args,
                         stream);
      });
}

// One pair for each cell, in a file of its own.
void persistent_elman_forward(CellKind, const CudaPlan&, const PersistentForward&, const Stream&);
void persistent_elman_backward(CellKind, const CudaPlan&, const PersistentBackward&, const Stream&);
void persistent_lstm_forward(const CudaPlan&, const PersistentForward&, const Stream&);
void persistent_lstm_backward(const CudaPlan&, const PersistentBackward&, const Stream&);
void persistent_gru_forward(const CudaPlan&, const PersistentForward&, const Stream&);
void persistent_gru_backward(const CudaPlan&, const PersistentBackward&, const Stream&);
void persistent_gru_reset_before_forward(const CudaPlan&, const PersistentForward&, const Stream&);
void persistent_gru_reset_before_backward(const CudaPlan&, const PersistentBackward&,
                                          const Stream&);

}  // namespace rnn_ext::cuda
