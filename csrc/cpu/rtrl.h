// Real-time recurrent learning (Williams and Zipser 1989): a step of M = D M' + I for every sample.
// Reads D (made here from the slopes) and M', writes M in place. Samples and panels of columns are
// independent, and are what threads share. I has one row for a column (but for reset-before GRU's
// r) and is added to the product while that is in the cache.
#pragma once
#include "rtrl_cells.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class real>
RNN_EXT_INLINE real dot(const real* a, const real* b, long n) {
  constexpr int lanes = kLanes<real>;
  Vec<real> even{}, odd{};
  long k = 0;
  for (; k + 2 * lanes <= n; k += 2 * lanes) {
    even += load(a + k) * load(b + k);
    odd += load(a + k + lanes) * load(b + k + lanes);
  }
  if (k + lanes <= n) {
    even += load(a + k) * load(b + k);
    k += lanes;
  }
  even += odd;
  real sum = 0;
  for (int l = 0; l < lanes; l++) sum += even[l];
  for (; k < n; k++) sum += a[k] * b[k];
  return sum;
}

template <class real, class Cell>
class RtrlStep {
 public:
  explicit RtrlStep(const RtrlArgs<real>& args)
      : a_(args),
        hidden_(args.hidden),
        panels_(influence_panels<real>(args.columns)),
        made_here_(!args.input_gates) {}

  bool run() {
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    finite_ = true;
    run_team(a_.threads, [this](const Member& m) {
      if (made_here_) {
        for (long row = m.begin(rows()); row < m.end(rows()); row++) net_inputs(row);
        for (long b = m.begin(a_.batch); b < m.end(a_.batch); b++) operand(b);
        m.wait();
      }
      for (long b = m.begin(a_.batch); b < m.end(a_.batch); b++) linearize(b);
      m.wait();
      if (!__atomic_load_n(&finite_, __ATOMIC_RELAXED)) return;
      if (a_.diagonal) {
        const long units = a_.batch * hidden_;
        for (long i = m.begin(units); i < m.end(units); i++) diagonal(i / hidden_, i % hidden_);
        return;
      }
      const long rows = a_.batch * hidden_;
      for (long i = m.begin(rows); i < m.end(rows); i++) jacobian_row(i / hidden_, i % hidden_);
      m.wait();
      const long panels = a_.batch * panels_;
      for (long i = m.begin(panels); i < m.end(panels); i++) panel(i / panels_, i % panels_, m.id);
    });
    return finite_;
  }

 private:
  static constexpr int lanes = kLanes<real>, vectors = 2, strip = vectors * lanes;
  static constexpr long width = kInfluencePanelBytes / sizeof(real);
  static constexpr bool lstm = Cell::states == 2;
  static_assert(width % strip == 0);

  void lay_out(Arena& arena) {
    if (made_here_) {
      a_.input_gates = input_gates_ = arena.take<real>(a_.batch * rows());
      a_.hidden_gates = hidden_gates_ = arena.take<real>(a_.batch * rows());
      a_.operands = operands_ = arena.take<real>(a_.batch * a_.operand_width);
    }
    slopes_ = arena.take<real>(a_.batch * Slopes<real>::count * hidden_);
    if (a_.diagonal) return;
    jacobian_ = arena.take<real>(a_.batch * Cell::states * hidden_ * hidden_);
    before_ = arena.take<real>(a_.threads * hidden_ * width);
    sums_ = arena.take<real>(a_.threads * kTileRows<vectors> * strip);
  }

  long rows() const { return Cell::gates * hidden_; }

  // One row of W x + b and of U h' + b', for every sample.
  RNN_EXT_NOINLINE void net_inputs(long row) {
    for (long b = 0; b < a_.batch; b++) {
      const long at = b * rows() + row;
      input_gates_[at] = dot(a_.w_ih + row * a_.input, a_.x + b * a_.input, a_.input);
      hidden_gates_[at] = dot(a_.w_hh + row * hidden_, a_.h_prev + b * hidden_, hidden_);
      if (a_.b_ih) {
        input_gates_[at] += a_.b_ih[row];
        hidden_gates_[at] += a_.b_hh[row];
      }
    }
  }

  // [x, 1, h'], and 1 again for the GRU; 1 where there is a bias.
  void operand(long b) {
    real* to = operands_ + b * a_.operand_width;
    const long before_h = a_.input + (a_.b_ih ? 1 : 0);
    scaled_row(to, real(1), a_.x + b * a_.input, a_.input, false);
    if (a_.b_ih) to[a_.input] = 1;
    scaled_row(to + before_h, real(1), a_.h_prev + b * hidden_, hidden_, false);
    if (before_h + hidden_ < a_.operand_width) to[before_h + hidden_] = 1;
  }

  Slopes<real> slopes(long b) const {
    return {slopes_ + b * Slopes<real>::count * hidden_, hidden_};
  }
  // Row i of D; LSTM: state 0 is the way to h past c, state 1 the way to c.
  real* jacobian(long b, int state) const {
    return jacobian_ + (b * Cell::states + state) * hidden_ * hidden_;
  }

  RNN_EXT_NOINLINE void linearize(long b) {
    const Slopes<real> s = slopes(b);
    bool finite = true;
    for (long unit = 0; unit < hidden_; unit += lanes) {
      const long left = hidden_ - unit;
      Cell::linearize({a_, b, unit, Cell::gates, left < lanes ? int(left) : lanes}, s);
    }
    for (long i = b * hidden_; i < (b + 1) * hidden_; i++)
      finite &= __builtin_isfinite(a_.h[i]) && (!lstm || __builtin_isfinite(a_.c[i]));
    if (!finite) __atomic_store_n(&finite_, false, __ATOMIC_RELAXED);
  }

  template <size_t count>
  RNN_EXT_INLINE void row_through(const Through (&through)[count], real* const* slope, long i,
                                  real* out) const {
    for (size_t k = 0; k < count; k++)
      scaled_row(out, slope[through[k].net][i], a_.w_hh + (through[k].gate * hidden_ + i) * hidden_,
                 hidden_, k > 0);
  }

  RNN_EXT_NOINLINE void jacobian_row(long b, long i) {
    const Slopes<real> s = slopes(b);
    real* row = jacobian(b, 0) + i * hidden_;
    row_through(Cell::through, s.h, i, row);
    if constexpr (Cell::spreads)
      scaled_row(row, s.h[2][i], a_.reset_jacobian + (b * hidden_ + i) * hidden_, hidden_, true);
    if constexpr (Cell::keeps) row[i] += s.keep[i];
    if constexpr (lstm) row_through(Cell::through_c, s.c, i, jacobian(b, 1) + i * hidden_);
  }

  RNN_EXT_NOINLINE void panel(long b, long p, int member) {
    real* m_h = a_.influence + (b * panels_ + p) * Cell::states * hidden_ * width;
    real* m_c = m_h + hidden_ * width;
    real* before = before_ + member * hidden_ * width;
    real* sums = sums_ + member * kTileRows<vectors> * strip;
    const Slopes<real> s = slopes(b);
    for (long from = 0; from < width; from += strip) {
      for (long i = 0; i < hidden_; i++) RNN_EXT_UNROLL
      for (int v = 0; v < vectors; v++)
        store(before + i * strip + v * lanes, load(m_h + i * width + from + v * lanes));
      for_row_blocks(0, hidden_, kTileRows<vectors>, [&](long first, int count) {
        if (from == 0) prefetch_next(m_h, first, count);
        real* h = m_h + first * width + from;
        tile_long<real, vectors>(count, hidden_, jacobian(b, 0) + first * hidden_, hidden_, 1,
                                 before, h, width, false);
        if constexpr (lstm) {
          tile_long<real, vectors>(count, hidden_, jacobian(b, 1) + first * hidden_, hidden_, 1,
                                   before, sums, strip, false);
          real* c = m_c + first * width + from;
          for (int i = 0; i < count; i++, h += width, c += width) RNN_EXT_UNROLL
          for (int v = 0; v < vectors; v++) {
            const Vec<real> m =
                s.keep[first + i] * load(c + v * lanes) + load(sums + i * strip + v * lanes);
            store(c + v * lanes, m);
            store(h + v * lanes, load(h + v * lanes) + s.pass[first + i] * m);
          }
        }
      });
    }
    add_immediate(b, p, s, m_h, m_c);
  }

  // Rows of the panel that follows: a panel is too short for the CPU to foresee them.
  RNN_EXT_INLINE static void prefetch(const real* rows, long count) {
    for (long i = 0; i < count * width; i += 64 / sizeof(real)) __builtin_prefetch(rows + i);
  }
  RNN_EXT_INLINE void prefetch_next(const real* m_h, long first, long count) const {
    const real* next = m_h + (Cell::states * hidden_ + first) * width;
    prefetch(next, count);
    if constexpr (lstm) prefetch(next + hidden_ * width, count);
  }

  // Columns of a panel, one unit of one net after the other.
  RNN_EXT_INLINE void add_immediate(long b, long p, const Slopes<real>& s, real* m_h, real* m_c) {
    const long first = p * width;
    const long end = first + width < a_.columns ? first + width : a_.columns;
    int k = 0;
    for (long column = first; column < end;) {
      while (k + 1 < a_.nets && column >= a_.net[k + 1].column) k++;
      const Net& net = a_.net[k];
      const long unit = (column - net.column) / net.length;
      const long within = (column - net.column) % net.length, at = column - first;
      const long count = net.length - within < end - column ? net.length - within : end - column;
      const real* operand = a_.operands + b * a_.operand_width + net.operand + within;
      if (Cell::spreads && k == 0) {
        const real* u_n = a_.w_hh + 2 * hidden_ * hidden_ + unit;
        for (long i = 0; i < hidden_; i++)
          scaled_row(m_h + i * width + at, s.h[2][i] * u_n[i * hidden_] * s.h[0][unit], operand,
                     count, true);
      } else {
        scaled_row(m_h + unit * width + at, s.h[k][unit], operand, count, true);
        if constexpr (lstm) scaled_row(m_c + unit * width + at, s.c[k][unit], operand, count, true);
      }
      column += count;
    }
  }

  template <size_t count>
  RNN_EXT_INLINE real entry_through(const Through (&through)[count], real* const* slope,
                                    long i) const {
    real sum = 0;
    for (size_t k = 0; k < count; k++)
      sum += slope[through[k].net][i] * a_.w_hh[(through[k].gate * hidden_ + i) * hidden_ + i];
    return sum;
  }

  // SnAp-1 for the parameters of one unit. Gate o of the LSTM touches h in one step, and not c.
  RNN_EXT_NOINLINE void diagonal(long b, long i) {
    const Slopes<real> s = slopes(b);
    real d = entry_through(Cell::through, s.h, i), d_c = 0;
    if constexpr (Cell::keeps) d += s.keep[i];
    if constexpr (lstm) d_c = entry_through(Cell::through_c, s.c, i);
    for (int k = 0; k < a_.nets; k++) {
      const Net& net = a_.net[k];
      const real* __restrict operand = a_.operands + b * a_.operand_width + net.operand;
      real* __restrict h =
          a_.influence + b * Cell::states * a_.columns + net.column + i * net.length;
      const real slope = s.h[k][i];
      if (lstm && k < 3) {
        real* __restrict c = h + a_.columns;
        const real slope_c = s.c[k][i], keep = s.keep[i], pass = s.pass[i];
        for (long l = 0; l < net.length; l++) {
          const real m = keep * c[l] + d_c * h[l];
          h[l] = d * h[l] + pass * m + slope * operand[l];
          c[l] = m + slope_c * operand[l];
        }
      } else {
        const real d_h = lstm ? d + s.pass[i] * d_c : d;
        for (long l = 0; l < net.length; l++) h[l] = d_h * h[l] + slope * operand[l];
      }
    }
  }

  RtrlArgs<real> a_;
  const long hidden_, panels_;
  const bool made_here_;
  real *input_gates_ = nullptr, *hidden_gates_ = nullptr, *operands_ = nullptr;
  real *slopes_, *jacobian_, *before_, *sums_;
  bool finite_;
};

template <class real>
bool rtrl_step(CellKind kind, const RtrlArgs<real>& args) {
  switch (kind) {
    case CellKind::kRnnTanh:
      return RtrlStep<real, LinearElman<real, Tanh>>(args).run();
    case CellKind::kRnnRelu:
      return RtrlStep<real, LinearElman<real, Relu>>(args).run();
    case CellKind::kRnnSigmoid:
      return RtrlStep<real, LinearElman<real, Sigmoid>>(args).run();
    case CellKind::kLstm:
      return RtrlStep<real, LinearLstm<real>>(args).run();
    case CellKind::kGru:
      return RtrlStep<real, LinearGru<real>>(args).run();
    default:
      return RtrlStep<real, LinearGruResetBefore<real>>(args).run();
  }
}

// Threads share the panels of columns, or the units.
template <class real>
void rtrl_gradient(const RtrlGradientArgs<real>& a) {
  constexpr int lanes = kLanes<real>;
  constexpr long width = kInfluencePanelBytes / sizeof(real);
  constexpr int vectors = int(width) / lanes;
  const long panels = influence_panels<real>(a.columns);
  run_team(a.threads, [&](const Member& m) {
    if (a.diagonal) {
      for (long i = m.begin(a.hidden); i < m.end(a.hidden); i++)
        for (int k = 0; k < a.nets; k++)
          for (long b = 0; b < a.batch; b++) {
            const long at = a.net[k].column + i * a.net[k].length;
            scaled_row(a.gradient + at, a.d_h[b * a.hidden + i],
                       a.influence + b * a.states * a.columns + at, a.net[k].length, b > 0);
          }
      return;
    }
    for (long p = m.begin(panels); p < m.end(panels); p++) {
      Vec<real> even[vectors] = {}, odd[vectors] = {};
      for (long b = 0; b < a.batch; b++) {
        const real* row = a.influence + (b * panels + p) * a.states * a.hidden * width;
        const real* d = a.d_h + b * a.hidden;
        long i = 0;
        for (; i + 2 <= a.hidden; i += 2, row += 2 * width) RNN_EXT_UNROLL
        for (int v = 0; v < vectors; v++) {
          even[v] += d[i] * load(row + v * lanes);
          odd[v] += d[i + 1] * load(row + width + v * lanes);
        }
        if (i < a.hidden) RNN_EXT_UNROLL
        for (int v = 0; v < vectors; v++) even[v] += d[i] * load(row + v * lanes);
      }
      RNN_EXT_UNROLL
      for (int v = 0; v < vectors; v++) store(a.gradient + p * width + v * lanes, even[v] + odd[v]);
    }
  });
}

template <class real>
inline constexpr RtrlKernels<real> rtrl_kernels{rtrl_step<real>, rtrl_gradient<real>};

}  // namespace rnn_ext::RNN_EXT_TARGET
