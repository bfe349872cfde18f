// choose() of csrc/cuda/plan.h as a C function, for tests/test_cuda_plan.py.
#include <cstdio>

#include "../csrc/cuda/plan.h"

using namespace rnn_ext;
using namespace rnn_ext::cuda;

struct PlainPlan {
  int persistent, groups, blocks, cluster, units, rows, tiles, register_bytes, weight_bytes,
      shared_bytes;
  int64_t workspace_bytes;
  char kernel[32], reason[256];
};

extern "C" void choose_plan(int cell, int numbers, int64_t steps, int64_t batch, int64_t hidden,
                            int directions, int projected, int backward, const DeviceLimits* limits,
                            PlainPlan* out) {
  const LayerShape shape{static_cast<CellKind>(cell),
                         static_cast<Numbers>(numbers),
                         steps,
                         batch,
                         hidden,
                         directions,
                         projected != 0};
  const CudaPlan plan = choose(shape, backward ? Pass::kBackward : Pass::kForward, *limits);
  *out = {plan.persistent,
          plan.groups,
          plan.blocks,
          plan.cluster,
          plan.units,
          plan.rows,
          plan.tiles,
          plan.register_bytes,
          plan.weight_bytes,
          plan.shared_bytes,
          plan.workspace_bytes,
          {},
          {}};
  std::snprintf(out->kernel, sizeof out->kernel, "%s", plan.kernel());
  std::snprintf(out->reason, sizeof out->reason, "%s", plan.reason.c_str());
}
