// The exact influence of RTRL and the steps that it has not taken yet (rtrl_problem.h).
#pragma once
#include "rtrl_cells.h"
#include "tile.h"

namespace rnn_ext::RNN_EXT_TARGET {

// What advancing and the gradient share.
template <class real>
struct InfluenceTiles {
  static constexpr long width = kInfluenceWidth<real>;
  static constexpr int lanes = kLanes<real>, vectors = int(width) / lanes;
  static constexpr int most_rows = kTileRows<vectors>;
  static_assert(width % lanes == 0);

  // c[rows, width] (+)= a[rows, depth] b[depth, width]
  RNN_EXT_INLINE static void multiply(int rows, long depth, const real* a, long a_row, long a_step,
                                      const real* b, real* c, long c_row, bool accumulate) {
    tile_long<real, vectors>(rows, depth, a, a_row, a_step, b, c, c_row, accumulate);
  }

  // Calls body(net, block of units, first, count, panel) for at most most_rows operand values of
  // panels [begin, end).
  template <class Body>
  static void for_panels(const InfluenceLayout<real>& l, long begin, long end, const Body& body) {
    for (int k = 0; k < l.nets; k++)
      for (long block = 0; block < l.blocks; block++) {
        const long panel = l.panel(k, block), length = l.net[k].length;
        const long from = begin > panel ? begin - panel : 0;
        const long to = end - panel < length ? end - panel : length;
        for_row_blocks(from, to, most_rows,
                       [&](long first, int count) { body(k, block, first, count, panel + first); });
      }
  }
};

// Takes the pending steps of every sample. With A_j the derivative of the last state in state j, a
// panel M becomes A_0 M + sum_j v_j (A_j s_j), v_j the panel's operand value in step j and s_j the
// slopes of its units: products with A_0, and for many operand values at once one of [values, steps]
// with [steps, H * width].
template <class real>
class Advance : InfluenceTiles<real> {
  using Tiles = InfluenceTiles<real>;
  using Tiles::lanes, Tiles::most_rows, Tiles::vectors, Tiles::width;

 public:
  explicit Advance(const RtrlAdvanceArgs<real>& args)
      : pending_(args.pending),
        l_(args.pending.layout),
        influence_(args.influence),
        threads_(args.threads),
        hidden_(l_.hidden),
        rows_(l_.states * l_.hidden),
        row_size_(l_.states * l_.padded),
        lstm_(l_.states == 2),
        spreads_(!lstm_ && l_.matrices() == 2) {}

  void run() {
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    run_team(threads_, [this](const Member& m) {
      for (long b = 0; b < l_.batch; b++) {
        if (pending_.start[b] == pending_.count) continue;
        for_row_blocks(m.begin(rows_), m.end(rows_), most_rows,
                       [&](long first, int count) { chain(b, first, count, m.id); });
        m.wait();
        int net = -1;
        long block = -1;
        Tiles::for_panels(l_, m.begin(l_.panels), m.end(l_.panels),
                          [&](int k, long unit_block, long first, int count, long panel) {
                            if (k != net || unit_block != block)
                              immediate(b, net = k, block = unit_block, m.id);
                            panels(b, k, first, count, panel, m.id);
                          });
        m.wait();
      }
    });
  }

 private:
  void lay_out(Arena& arena) {
    after_ = arena.take<real>((pending_.count + 1) * rows_ * row_size_);
    spread_ = arena.take<real>(spreads_ ? pending_.count * rows_ * row_size_ : 0);
    immediate_ = arena.take<real>(threads_ * rows_ * pending_.count * width);
    before_ = arena.take<real>(threads_ * rows_ * width);
    past_h_ = arena.take<real>(lstm_ ? threads_ * most_rows * l_.padded : 0);
  }

  // The derivative of the last state in the state before step j: [states * H][states][padded].
  real* after(long j) const { return after_ + j * rows_ * row_size_; }

  // Rows of it for every step, from the last backward.
  RNN_EXT_NOINLINE void chain(long b, long first, int count, int member) {
    real* last = after(pending_.count) + first * row_size_;
    for (long i = 0; i < count * row_size_; i++) last[i] = 0;
    for (long i = 0; i < count; i++)
      last[i * row_size_ + (first + i) / hidden_ * l_.padded + (first + i) % hidden_] = 1;
    for (long j = pending_.count - 1; j >= pending_.start[b]; j--) {
      const real* from = after(j + 1) + first * row_size_;
      real* to = after(j) + first * row_size_;
      const real* past_h = lstm_ ? to_c(b, j, from, to, count, member) : nullptr;
      for (long block = 0; block < l_.blocks; block++) {
        const long columns = block * hidden_ * width;
        const real* matrix = pending_.matrix(j, b, 0) + columns;
        real* out = to + block * width;
        Tiles::multiply(count, hidden_, from, row_size_, 1, matrix, out, row_size_, false);
        if (!lstm_ && !spreads_) continue;
        const real* second = pending_.matrix(j, b, 1) + columns;
        if (lstm_)
          Tiles::multiply(count, hidden_, past_h, l_.padded, 1, second, out, row_size_, true);
        else
          Tiles::multiply(count, hidden_, from, row_size_, 1, second,
                          spread_ + (j * rows_ + first) * row_size_ + block * width, row_size_,
                          false);
      }
    }
  }

  // LSTM: what acts by way of c, which h passes on too; and the columns of c'.
  const real* to_c(long b, long j, const real* from, real* to, int count, int member) const {
    const Slopes<real> s(pending_.slopes(j, b), l_.padded);
    real* past_h = past_h_ + member * most_rows * l_.padded;
    for (int i = 0; i < count; i++, from += row_size_, to += row_size_)
      for (long u = 0; u < l_.padded; u++) {
        const real c = from[l_.padded + u] + from[u] * s.pass[u];
        past_h[i * l_.padded + u] = c;
        to[l_.padded + u] = c * s.keep[u];
      }
    return past_h_ + member * most_rows * l_.padded;
  }

  // A_j s_j of a block of units: [states * H][steps][width].
  RNN_EXT_NOINLINE void immediate(long b, int k, long block, int member) {
    const long start = pending_.start[b], steps = pending_.count - start;
    real* to = immediate_ + member * rows_ * pending_.count * width;
    for (long j = start; j < pending_.count; j++) {
      const Slopes<real> s(pending_.slopes(j, b), l_.padded);
      const bool spread = spreads_ && k == 0;
      const real* from = (spread ? spread_ + j * rows_ * row_size_ : after(j + 1)) + block * width;
      for (long i = 0; i < rows_; i++, from += row_size_) RNN_EXT_UNROLL
      for (int v = 0; v < vectors; v++) {
        const long unit = block * width + v * lanes;
        Vec<real> sum = load(from + v * lanes);
        if (!spread) sum *= load(s.h[k] + unit);
        if (lstm_) sum += load(from + l_.padded + v * lanes) * load(s.c[k] + unit);
        store(to + (i * steps + j - start) * width + v * lanes, sum);
      }
    }
  }

  RNN_EXT_NOINLINE void panels(long b, int k, long first, int count, long panel, int member) {
    const long start = pending_.start[b], steps = pending_.count - start;
    real* m = influence_ + (b * l_.panels + panel) * l_.panel_size;
    if (start == 0)
      for (int i = 0; i < count; i++) carry(m + i * l_.panel_size, member);
    const real* values = pending_.operands(start, b) + l_.net[k].operand + first;
    const real* of_row = immediate_ + member * rows_ * pending_.count * width;
    for (long i = 0; i < rows_; i++, m += width, of_row += steps * width)
      Tiles::multiply(count, steps, values, 1, l_.batch * l_.operand_width, of_row, m,
                      l_.panel_size, true);
  }

  void carry(real* m, int member) const {
    real* before = before_ + member * rows_ * width;
    for (long i = 0; i < rows_ * width; i += lanes) store(before + i, load(m + i));
    for_row_blocks(0, rows_, most_rows, [&](long first, int count) {
      const real* a = after(0) + first * row_size_;
      for (int state = 0; state < l_.states; state++)
        Tiles::multiply(count, hidden_, a + state * l_.padded, row_size_, 1,
                        before + state * hidden_ * width, m + first * width, width, state > 0);
    });
  }

  const PendingSteps<real> pending_;
  const InfluenceLayout<real>& l_;
  real* influence_;
  const int threads_;
  const long hidden_, rows_, row_size_;
  const bool lstm_, spreads_;
  real *after_ = nullptr, *spread_ = nullptr, *immediate_ = nullptr, *before_ = nullptr,
       *past_h_ = nullptr;
};

// d_h goes back through the pending steps, as in backpropagation; what they leave of it meets the
// influence. Threads share the samples, then the panels.
template <class real>
class InfluenceGradient : InfluenceTiles<real> {
  using Tiles = InfluenceTiles<real>;
  using Tiles::lanes, Tiles::vectors, Tiles::width;

 public:
  explicit InfluenceGradient(const RtrlGradientArgs<real>& args)
      : a_(args),
        pending_(args.pending),
        l_(args.pending.layout),
        hidden_(l_.hidden),
        row_size_(l_.states * l_.padded),
        lstm_(l_.states == 2),
        spreads_(!lstm_ && l_.matrices() == 2) {}

  void run() {
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    run_team(a_.threads, [this](const Member& m) {
      for (long b = m.begin(l_.batch); b < m.end(l_.batch); b++) back(b);
      m.wait();
      const long begin = m.begin(l_.panels), end = m.end(l_.panels);
      Tiles::for_panels(l_, begin, end, [&](int k, long block, long first, int count, long panel) {
        pending_part(k, block, first, count, panel);
      });
      for (long b = 0; b < l_.batch; b++)
        if (pending_.start[b] == 0)
          for (long p = begin; p < end; p++) influence_part(b, p);
    });
  }

 private:
  void lay_out(Arena& arena) {
    deltas_ = arena.take<real>(l_.nets * pending_.count * l_.batch * l_.padded);
    at_start_ = arena.take<real>(l_.batch * row_size_);
    before_ = arena.take<real>(l_.batch * row_size_);
  }

  // dL/da of a net and a block of units: [steps, B][width].
  real* deltas(int k, long block) const {
    return deltas_ + (k * l_.blocks + block) * pending_.count * l_.batch * width;
  }

  // Leaves dL/dh and dL/dc before the pending steps in at_start_, [states][padded].
  RNN_EXT_NOINLINE void back(long b) {
    real *d = at_start_ + b * row_size_, *next = before_ + b * row_size_;
    for (long i = 0; i < row_size_; i++) d[i] = i < hidden_ ? a_.d_h[b * hidden_ + i] : 0;
    for (long j = pending_.count - 1; j >= 0; j--) {
      const bool counts = j >= pending_.start[b];
      for (int k = 0; k < l_.nets; k++)
        for (long block = 0; block < l_.blocks; block++) {
          real* to = deltas(k, block) + (j * l_.batch + b) * width;
          if (counts)
            delta(j, b, k, block, d, to);
          else
            for (long u = 0; u < width; u++) to[u] = 0;
        }
      if (!counts) continue;
      through(j, b, d, next);
      for (long i = 0; i < row_size_; i++) d[i] = next[i];
    }
  }

  RNN_EXT_INLINE void delta(long j, long b, int k, long block, const real* d, real* to) const {
    if (spreads_ && k == 0)
      return Tiles::multiply(1, hidden_, d, 0, 1,
                             pending_.matrix(j, b, 1) + block * hidden_ * width, to, 0, false);
    const Slopes<real> s(pending_.slopes(j, b), l_.padded);
    RNN_EXT_UNROLL
    for (int v = 0; v < vectors; v++) {
      const long unit = block * width + v * lanes;
      Vec<real> sum = load(d + unit) * load(s.h[k] + unit);
      if (lstm_) sum += load(d + l_.padded + unit) * load(s.c[k] + unit);
      store(to + v * lanes, sum);
    }
  }

  // d before step j from d after it; d is used up.
  RNN_EXT_INLINE void through(long j, long b, real* d, real* before) const {
    const Slopes<real> s(pending_.slopes(j, b), l_.padded);
    real* d_c = d + l_.padded;
    if (lstm_)
      for (long u = 0; u < l_.padded; u++) {
        d_c[u] += d[u] * s.pass[u];
        before[l_.padded + u] = d_c[u] * s.keep[u];
      }
    for (long block = 0; block < l_.blocks; block++) {
      const long columns = block * hidden_ * width;
      real* to = before + block * width;
      Tiles::multiply(1, hidden_, d, 0, 1, pending_.matrix(j, b, 0) + columns, to, 0, false);
      if (lstm_)
        Tiles::multiply(1, hidden_, d_c, 0, 1, pending_.matrix(j, b, 1) + columns, to, 0, true);
    }
  }

  RNN_EXT_NOINLINE void pending_part(int k, long block, long first, int count, long panel) {
    real* to = a_.gradient + panel * width;
    const real* values = pending_.operands(0, 0) + l_.net[k].operand + first;
    Tiles::multiply(count, pending_.count * l_.batch, values, 1, l_.operand_width, deltas(k, block),
                    to, width, false);
  }

  RNN_EXT_NOINLINE void influence_part(long b, long panel) {
    constexpr int rows = 4 / vectors > 1 ? 4 / vectors : 1;  // side by side, to cover the latency
    const real* m = a_.influence + (b * l_.panels + panel) * l_.panel_size;
    Vec<real> sums[rows][vectors] = {};
    for (int state = 0; state < (pending_.count ? l_.states : 1); state++) {
      const real* d = at_start_ + b * row_size_ + state * l_.padded;
      long i = 0;
      for (; i + rows <= hidden_; i += rows, m += rows * width) RNN_EXT_UNROLL
      for (int r = 0; r < rows; r++) RNN_EXT_UNROLL
      for (int v = 0; v < vectors; v++) sums[r][v] += d[i + r] * load(m + r * width + v * lanes);
      for (; i < hidden_; i++, m += width) RNN_EXT_UNROLL
      for (int v = 0; v < vectors; v++) sums[0][v] += d[i] * load(m + v * lanes);
    }
    real* to = a_.gradient + panel * width;
    RNN_EXT_UNROLL
    for (int v = 0; v < vectors; v++) {
      Vec<real> sum = load(to + v * lanes);
      RNN_EXT_UNROLL
      for (int r = 0; r < rows; r++) sum += sums[r][v];
      store(to + v * lanes, sum);
    }
  }

  const RtrlGradientArgs<real> a_;
  const PendingSteps<real>& pending_;
  const InfluenceLayout<real>& l_;
  const long hidden_, row_size_;
  const bool lstm_, spreads_;
  real *deltas_ = nullptr, *at_start_ = nullptr, *before_ = nullptr;
};

template <class real>
void rtrl_advance(const RtrlAdvanceArgs<real>& args) {
  Advance<real>(args).run();
}

template <class real>
void rtrl_gradient(const RtrlGradientArgs<real>& args) {
  InfluenceGradient<real>(args).run();
}

}  // namespace rnn_ext::RNN_EXT_TARGET
