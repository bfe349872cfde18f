#include "plan.h"

#include <algorithm>
#include <atomic>

namespace rnn_ext {
namespace {
// Starting a team costs about a microsecond and a barrier 50 to 300 ns; a core does 50-250 flop a
// nanosecond.
constexpr double kMinFlopsForTeam = 400e3;
constexpr double kMinFlopsPerBarrier = 20e3;
// Two directions with less work in a step than this go faster side by side than one after the other
// in a team.
constexpr double kMinFlopsPerMember = 1e6;
// A thread with fewer rows than this cannot fill its register tiles.
constexpr long kMinRowsPerThread = 16;
// Row split makes every thread read all weights each step: fine while they stay in its own
// second-level cache.
constexpr long kMaxSharedWeightBytes = 1 << 20;
// Below this many rows in all, copying the weights costs more than reading them where they are.
constexpr long kMinRowsToPack = 8;
constexpr long kUnitsPerColumn = 16;
// A product without gates side by side has two registers of them.
constexpr long kUnitsPerPanel = 32;
// A piece of the backward walk is so long that what each needs afresh (weights in the cache,
// barriers) is little beside its products, and so short that working memory is little beside what
// a layer saves, which grows with the gates: LSTM layers can afford twice the rows where their
// weights' gradients, which each piece reads and writes, are more than a cache holds.
constexpr long kPieceRowsPerGate = 256, kMinPieceRows = 512, kMinPieceBytes = 1 << 20;
constexpr long kCachedGradientBytes = 16 << 20;
std::atomic<bool> short_pieces{false};

long piece_rows(const PlanShape& s) {
  if (short_pieces) return 1;
  const bool large = s.gates * s.hidden * (s.input + s.output) * 4 > kCachedGradientBytes;
  return std::max({kPieceRowsPerGate * s.gates * (s.gates == 4 && large ? 2 : 1), kMinPieceRows,
                   kMinPieceBytes / (s.gates * s.hidden * s.value_bytes)});
}

Plan choose_threads(const PlanShape& s) {
  const double per_row = 2.0 * s.gates * s.hidden * (s.input + s.output);
  const double flops = per_row * s.steps * s.batch;
  const double flops_per_step = 2.0 * s.gates * s.hidden * s.output * s.batch;
  const bool pack = s.steps * s.batch > kMinRowsToPack;
  const long columns = (s.hidden + kUnitsPerColumn - 1) / kUnitsPerColumn;

  if (s.max_threads <= 1) return {1, Split::kNone, pack, "one thread is all there is", 0};
  if (flops < kMinFlopsForTeam)
    return {1, Split::kNone, pack, "too little work for a team of threads", 0};

  const long row_threads = s.batch / kMinRowsPerThread;
  const long weight_bytes = s.gates * s.hidden * s.output * s.value_bytes;
  if (row_threads >= s.max_threads && weight_bytes <= kMaxSharedWeightBytes)
    return {s.max_threads, Split::kRows, pack, "enough rows for every thread", 0};
  if (columns >= s.max_threads && flops_per_step >= kMinFlopsPerBarrier)
    return {s.max_threads, Split::kColumns, pack, "hidden units split, a barrier each step", 0};
  if (s.batch >= 2 * s.max_threads)
    return {s.max_threads, Split::kRows, pack, "too few hidden units to split, so rows are", 0};
  return {1, Split::kNone, pack, "too little work in a step for a barrier", 0};
}
}  // namespace

void shorten_pieces(bool on) { short_pieces = on; }

Plan choose_plan(const PlanShape& shape) {
  Plan plan = choose_threads(shape);
  plan.piece_rows = piece_rows(shape);
  return plan;
}

Plan choose_row_plan(const PlanShape& s) {
  const double flops = 2.0 * s.gates * s.hidden * (s.input + s.output) * s.steps * s.batch;
  const bool pack = s.steps * s.batch > kMinRowsToPack;
  if (s.max_threads <= 1) return {1, Split::kNone, pack, "one thread is all there is", 0};
  if (flops < kMinFlopsForTeam)
    return {1, Split::kNone, pack, "too little work for a team of threads", 0};
  const double flops_per_step = 2.0 * s.gates * s.hidden * s.output * s.batch;
  if (s.batch < 2 * s.max_threads && s.hidden >= kUnitsPerPanel * s.max_threads &&
      flops_per_step >= 2 * kMinFlopsPerBarrier)
    return {s.max_threads, Split::kColumns, pack,
            "columns of the product split, two barriers a step", 0};
  if (s.batch == 1)
    return {1, Split::kNone, pack, "one sequence, and too little work in a step for barriers", 0};
  return {s.max_threads, Split::kRows, pack, "each thread has its own sequences", 0};
}

DirectionsPlan choose_plan(const PlanShape& s, int directions) {
  const Plan alone = choose_plan(s);
  const double flops_per_step = 2.0 * s.gates * s.hidden * s.output * s.batch;
  const double flops = 2.0 * s.gates * s.hidden * (s.input + s.output) * s.steps * s.batch;
  const bool idle = alone.threads == 1 || (alone.split == Split::kColumns && s.max_threads == 2 &&
                                           flops_per_step < kMinFlopsPerMember);
  if (directions != 2 || s.max_threads < 2 || !idle || 2 * flops < kMinFlopsForTeam)
    return {alone, false};
  return {{1, Split::kNone, alone.pack, "both directions side by side", alone.piece_rows}, true};
}

}  // namespace rnn_ext
