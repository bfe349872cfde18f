#include "plan.h"

#include <algorithm>
#include <optional>

#include "persistent_layout.h"

namespace rnn_ext::cuda {
namespace {

// A persistent block fills a multiprocessor: 256 threads with up to 255 registers each.
constexpr int kBlockRegisters = kBlockThreads * 256;
constexpr int kMostRows = 64;
constexpr int64_t kMostSize = 1 << 24;  // of T, B and H, so that the kernels may count in 32 bits

// What a step costs, in microseconds, bytes and operations: round figures of a GPU of 132
// multiprocessors, good enough to rank plans and nothing else.
constexpr double kClusterSync = 0.4, kFlagSync = 0.9, kPassOverhead = 0.3;
constexpr double kGatherRate = 80e3, kSharedRate = 200e3,
                 kLoadRate = 50e3;                    // bytes a microsecond, one multiprocessor
constexpr double kMmaTime = 2.4e-3;                   // of 1 KB of weights and 8 rows
constexpr double kLaunches = 5, kMemoryRate = 2.5e6;  // of a step-wise step; the whole GPU

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int gates_of(CellKind cell) {
  switch (cell) {
    case CellKind::kLstm:
      return 4;
    case CellKind::kGru:
    case CellKind::kGruResetBefore:
      return 3;
    default:
      return 1;
  }
}

int element_bytes(Numbers numbers) {
  switch (numbers) {
    case Numbers::kBfloat16:
    case Numbers::kHalf:
      return 2;
    case Numbers::kDouble:
      return 8;
    default:
      return 4;
  }
}

double operations_rate(Numbers numbers) {  // of a matrix product, a microsecond, the whole GPU
  return element_bytes(numbers) == 2 ? 400e6 : numbers == Numbers::kTf32 ? 200e6 : 40e6;
}

// Why no persistent kernel takes this layer, or null.
const char* obstacle(const LayerShape& s, Pass pass, const DeviceLimits& d) {
  if (s.numbers == Numbers::kDouble) return "tensor cores have no float64 fit for it";
  if (s.projected) return "a projected LSTM multiplies twice a step";
  if (s.zoneout) return "zoneout is in the step-wise kernels alone";
  if (s.norms && pass == Pass::kBackward) return "the norm of dL/dh_t is a sum over all blocks";
  if (d.major < 8) return "this GPU is older than compute capability 8.0";
  if (d.registers_per_sm < kBlockRegisters) return "this GPU has too few registers";
  if (std::min({s.steps, s.batch, s.hidden}) < 1) return "there is nothing to compute";
  if (std::max({s.steps, s.batch, s.hidden}) > kMostSize || s.steps * s.batch > INT32_MAX) {
    return "the layer is too large";
  }
  return nullptr;
}

bool reset_before(const LayerShape& s) { return s.cell == CellKind::kGruResetBefore; }

BlockLayout layout_of(const LayerShape& s, Pass pass, int units, int blocks, bool cluster) {
  return block_layout(step_products(gates_of(s.cell), reset_before(s), pass == Pass::kForward),
                      units / kUnitTile, element_bytes(s.numbers), static_cast<int>(s.hidden),
                      blocks, kColumnTile, cluster);
}

// The most rows of the batch that fit, 0 if not even one tile does.
int most_rows(BlockLayout layout, const DeviceLimits& d) {
  for (layout.rows = kMostRows; layout.rows > 0; layout.rows -= kColumnTile) {
    if (layout.shared_bytes() <= d.shared_per_block) break;
  }
  return layout.rows;
}

struct Candidate {
  CudaPlan plan;
  double time;  // of the whole sequence
};

double step_time(const LayerShape& s, const BlockLayout& layout) {
  const int exchanges = reset_before(s) ? 2 : 1;
  const int operands = reset_before(s) ? layout.planes + 1 : 1;
  const int passes = exchanges * static_cast<int>(divided_up(layout.rows, pass_rows(layout.units)));
  const double products = s.numbers == Numbers::kTf32x3 ? 3 : 1;
  const double tiles = static_cast<double>(layout.row_tiles) * layout.chunks();
  const double multiply = products * tiles * (layout.rows / kColumnTile) * kMmaTime;
  const double shared =
      passes * (layout.weight_bytes() / exchanges + 2.0 * layout.partial_bytes()) / kSharedRate;
  const double gather =
      static_cast<double>(operands) * layout.rows * layout.global_row_bytes() / kGatherRate;
  return exchanges * (layout.cluster ? kClusterSync : kFlagSync) + passes * kPassOverhead +
         std::max(multiply, shared) + gather;
}

// The fastest arrangement with so many units a block, if there is one.
std::optional<Candidate> arrange(const LayerShape& s, Pass pass, const DeviceLimits& d, int units,
                                 bool cluster) {
  int64_t blocks = divided_up(s.hidden, units);
  if (cluster) {
    int64_t size = 1;
    while (size < blocks) size *= 2;  // a block without units still takes part in the barriers
    blocks = size;
    if (blocks > std::min(std::max(d.cluster_size, 1), d.sm_count)) return std::nullopt;
  } else if (blocks < 2 || !d.cooperative || blocks * s.directions > d.sm_count) {
    return std::nullopt;
  }
  BlockLayout layout = layout_of(s, pass, units, static_cast<int>(blocks), cluster);
  const int64_t most = most_rows(layout, d);
  if (most == 0) return std::nullopt;

  // As many groups as have rows and room, then as few rows for each as the number of rounds allows.
  int64_t groups = std::max<int64_t>(d.sm_count / (blocks * s.directions), 1);
  groups = std::min(groups, divided_up(s.batch, kColumnTile));
  const int64_t rounds = divided_up(s.batch, groups * most);
  layout.rows = round_up(static_cast<int>(divided_up(s.batch, groups * rounds)), kColumnTile);
  const int64_t tiles = divided_up(s.batch, layout.rows);
  groups = std::min(groups, tiles);

  CudaPlan plan{};
  plan.persistent = true;
  plan.pass = pass;
  plan.numbers = s.numbers;
  plan.groups = static_cast<int>(groups);
  plan.blocks = static_cast<int>(blocks);
  plan.cluster = cluster;
  plan.units = units;
  plan.rows = layout.rows;
  plan.tiles = static_cast<int>(tiles);
  plan.register_bytes =
      kWarps * std::min(layout.warp_chunks(), layout.held_chunks()) * layout.row_tiles * kTileBytes;
  plan.weight_bytes = layout.weight_bytes();
  plan.shared_bytes = layout.shared_bytes();
  plan.workspace_bytes = groups * s.directions * (layout.flag_bytes() + layout.exchange_bytes());
  const double load = (plan.register_bytes + plan.weight_bytes) / kLoadRate;
  const double waves =
      cluster ? divided_up(groups * s.directions * blocks, d.sm_count / blocks * blocks) : 1;
  return Candidate{plan, load + waves * divided_up(tiles, groups) * s.steps * step_time(s, layout)};
}

double step_wise_time(const LayerShape& s, const DeviceLimits& d) {
  const double rows = static_cast<double>(s.batch) * s.directions, gates = gates_of(s.cell),
               hidden = s.hidden;
  const double operations = 2 * rows * gates * hidden * hidden;
  const double bytes =
      (4 * rows + hidden * s.directions) * gates * hidden * element_bytes(s.numbers);
  const double part = d.sm_count / 132.0;
  const double launches = kLaunches * (reset_before(s) ? 2 : 1);
  return s.steps * (launches + operations / (operations_rate(s.numbers) * part) +
                    bytes / (kMemoryRate * part));
}

CudaPlan step_wise(Pass pass, Numbers numbers, const std::string& why) {
  CudaPlan plan{};
  plan.pass = pass;
  plan.numbers = numbers;
  plan.reason = "step-wise: " + why;
  return plan;
}

std::string describe(const CudaPlan& plan, int directions) {
  const int groups = plan.groups * directions;
  std::string text = "persistent: " + std::to_string(groups) +
                     (plan.cluster ? " cluster" : " group") + (groups == 1 ? "" : "s") + " of " +
                     std::to_string(plan.blocks) + (plan.blocks == 1 ? " block, " : " blocks, ") +
                     std::to_string(plan.rows) + " rows at a time, weights in registers";
  if (plan.weight_bytes)
    text += " and " + std::to_string(plan.weight_bytes / 1024) + " KB of shared memory";
  return text;
}

}  // namespace

CudaPlan choose(const LayerShape& shape, Pass pass, const DeviceLimits& limits, Path path) {
  if (path == Path::kStep) return step_wise(pass, shape.numbers, "asked for");
  if (const char* why = obstacle(shape, pass, limits)) return step_wise(pass, shape.numbers, why);
  std::optional<Candidate> best;
  for (const int units : {kUnitTile, 2 * kUnitTile}) {
    for (const bool cluster : {true, false}) {
      const std::optional<Candidate> found = arrange(shape, pass, limits, units, cluster);
      if (found && (!best || found->time < best->time)) best = found;
    }
  }
  if (!best) return step_wise(pass, shape.numbers, "the recurrent weights do not fit on chip");
  if (path == Path::kAuto && best->time > step_wise_time(shape, limits)) {
    return step_wise(pass, shape.numbers, "the batch is large enough for one product a step");
  }
  best->plan.reason = describe(best->plan, shape.directions);
  return best->plan;
}

}  // namespace rnn_ext::cuda
