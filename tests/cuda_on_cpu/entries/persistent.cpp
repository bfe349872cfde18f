// The persistent kernels of one cell (-DCELL) and one number format (-DNUMBERS), in any arrangement
// that a test asks for. To compile less: -DONLY_CLUSTER, -DONLY_FLAGS, -DONE_UNIT_TILE.
#include "entry.h"
#include "persistent_launch.h"

using namespace rnn_ext::cuda;

#ifdef SIXTEEN_BIT
using Format = SixteenBit<NUMBERS>;
#else
using Format = NUMBERS;
#endif

struct Arrangement {
  int groups, blocks, cluster, units, rows;
};

namespace {

CudaPlan plan_of(const Arrangement& a, bool forward, const Sequences& sequences) {
  const BlockLayout layout =
      block_layout(step_products(CELL::kGates, kResetBefore<CELL>, forward), a.units / kUnitTile,
                   sizeof(Format::Storage), sequences.hidden, a.blocks, a.rows, a.cluster != 0);
  CudaPlan plan{};
  plan.groups = a.groups;
  plan.blocks = a.blocks;
  plan.cluster = a.cluster != 0;
  plan.units = a.units;
  plan.rows = a.rows;
  plan.shared_bytes = layout.shared_bytes();
  plan.workspace_bytes =
      int64_t{a.groups} * sequences.directions * (layout.flag_bytes() + layout.exchange_bytes());
  return plan;
}

// start(unit tiles, Exchange) for the arrangement.
template <int ring, class Start>
void with_kernel(const Arrangement& a, const Start& start) {
  const auto with_exchange = [&](auto tiles) {
#ifndef ONLY_FLAGS
    if (a.cluster) return start(tiles, Type<ClusterExchange<Format>>());
#endif
#ifndef ONLY_CLUSTER
    if (!a.cluster) return start(tiles, Type<FlagExchange<Format, ring>>());
#endif
    launch_failed("test", "this arrangement was not compiled");
  };
#ifndef ONE_UNIT_TILE
  if (a.units == 2 * kUnitTile) return with_exchange(Constant<2>());
#endif
  with_exchange(Constant<1>());
}

}  // namespace

extern "C" {

int64_t workspace_bytes(const Arrangement* a, int forward, const Sequences* sequences) {
  return plan_of(*a, forward != 0, *sequences).workspace_bytes;
}

int forward(const Arrangement* a, const PersistentForward* p) {
  return cuda_on_cpu::entry([&] {
    with_kernel<kForwardRing>(*a, [&](auto tiles, auto exchange) {
      const auto kernel =
          forward_kernel<CELL, Format, decltype(tiles)::value, typename decltype(exchange)::type>();
      start_persistent("forward", kernel, plan_of(*a, true, p->sequences), *p, Stream{0, nullptr});
    });
  });
}

int backward(const Arrangement* a, const PersistentBackward* p) {
  return cuda_on_cpu::entry([&] {
    with_kernel<kBackwardRing>(*a, [&](auto tiles, auto exchange) {
      const auto kernel = backward_kernel<CELL, Format, decltype(tiles)::value,
                                          typename decltype(exchange)::type>();
      start_persistent("backward", kernel, plan_of(*a, false, p->sequences), *p,
                       Stream{0, nullptr});
    });
  });
}
}
