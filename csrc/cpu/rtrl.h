// Real-time recurrent learning (Williams and Zipser 1989): the state's step, and what the influence
// needs of it. SnAp-1 takes its step here; the exact influence follows in rtrl_influence.h.
// Samples, rows of the Jacobians and units are independent, and are what threads share.
#pragma once
#include "rtrl_cells.h"
#include "rtrl_influence.h"

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
      : a_(args), hidden_(args.hidden), made_here_(!args.input_gates) {}

  bool run() {
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    finite_ = true;
    run_team(a_.threads, [this](const Member& m) {
      if (made_here_)
        for (long row = m.begin(rows()); row < m.end(rows()); row++) net_inputs(row);
      for (long b = m.begin(a_.batch); b < m.end(a_.batch); b++) operand(b);
      m.wait();
      for (long b = m.begin(a_.batch); b < m.end(a_.batch); b++) linearize(b);
      m.wait();
      if (!__atomic_load_n(&finite_, __ATOMIC_RELAXED)) return;
      const long units = a_.batch * hidden_;
      for (long i = m.begin(units); i < m.end(units); i++) {
        if (a_.diagonal)
          diagonal(i / hidden_, i % hidden_);
        else
          jacobian_row(i / hidden_, i % hidden_);
      }
    });
    return finite_;
  }

 private:
  static constexpr int lanes = kLanes<real>;
  static constexpr long width = kInfluenceWidth<real>;
  static constexpr bool lstm = Cell::states == 2;

  void lay_out(Arena& arena) {
    if (made_here_) {
      a_.input_gates = input_gates_ = arena.take<real>(a_.batch * rows());
      a_.hidden_gates = hidden_gates_ = arena.take<real>(a_.batch * rows());
    }
    if (!a_.diagonal) return;
    operands_ = arena.take<real>(a_.batch * a_.operand_width);
    slopes_ = arena.take<real>(a_.batch * kSlopes * padded());
  }

  long rows() const { return Cell::gates * hidden_; }
  long padded() const { return a_.pending.layout.padded; }

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

  real* operands(long b) const {
    return a_.diagonal ? operands_ + b * a_.operand_width
                       : a_.pending.operands(a_.pending.count, b);
  }
  Slopes<real> slopes(long b) const {
    real* base =
        a_.diagonal ? slopes_ + b * kSlopes * padded() : a_.pending.slopes(a_.pending.count, b);
    return {base, padded()};
  }

  // [x, 1, h'], and 1 again for the GRU; 1 where there is a bias.
  void operand(long b) {
    real* to = operands(b);
    if (!made_here_)
      return scaled_row(to, real(1), a_.operands + b * a_.operand_width, a_.operand_width, false);
    const long before_h = a_.input + (a_.b_ih ? 1 : 0);
    scaled_row(to, real(1), a_.x + b * a_.input, a_.input, false);
    if (a_.b_ih) to[a_.input] = 1;
    scaled_row(to + before_h, real(1), a_.h_prev + b * hidden_, hidden_, false);
    if (before_h + hidden_ < a_.operand_width) to[before_h + hidden_] = 1;
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

  // Row i of a matrix of the step (+)= factor times a row, unit by unit times `columns`, if given.
  RNN_EXT_INLINE void put_row(real* matrix, long i, real factor, const real* row, bool add,
                              const real* columns = nullptr) const {
    for (long unit = 0; unit < hidden_; unit += width, matrix += hidden_ * width) {
      const long count = hidden_ - unit < width ? hidden_ - unit : width;
      if (count == width)
        scaled_row(matrix + i * width, factor, row + unit, width, add);
      else
        scaled_row(matrix + i * width, factor, row + unit, count, add);
      if (columns)
        for (long u = 0; u < count; u++) matrix[i * width + u] *= columns[unit + u];
    }
  }

  template <size_t count>
  RNN_EXT_INLINE void row_through(const Through (&through)[count], real* const* slope, long i,
                                  real* matrix) const {
    for (size_t k = 0; k < count; k++)
      put_row(matrix, i, slope[through[k].net][i],
              a_.w_hh + (through[k].gate * hidden_ + i) * hidden_, k > 0);
  }

  RNN_EXT_NOINLINE void jacobian_row(long b, long i) {
    const Slopes<real> s = slopes(b);
    real* matrix = a_.pending.matrix(a_.pending.count, b, 0);
    real* second = matrix + hidden_ * padded();
    row_through(Cell::through, s.h, i, matrix);
    if constexpr (Cell::spreads) {
      put_row(matrix, i, s.h[2][i], a_.reset_jacobian + (b * hidden_ + i) * hidden_, true);
      put_row(second, i, s.h[2][i], a_.w_hh + (2 * hidden_ + i) * hidden_, false, s.h[0]);
    }
    if constexpr (Cell::keeps) matrix[(i / width * hidden_ + i) * width + i % width] += s.keep[i];
    if constexpr (lstm) row_through(Cell::through_c, s.c, i, second);
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
      const real* __restrict operand = operands(b) + net.operand;
      real* __restrict h =
          a_.diagonal + b * Cell::states * a_.columns + net.column + i * net.length;
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
  const long hidden_;
  const bool made_here_;
  real *input_gates_ = nullptr, *hidden_gates_ = nullptr, *operands_ = nullptr, *slopes_ = nullptr;
  bool finite_;
};

template <class real>
bool rtrl_step(const RtrlArgs<real>& args) {
  switch (args.kind) {
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

// Threads share the units.
template <class real>
void rtrl_diagonal_gradient(const DiagonalGradientArgs<real>& a) {
  run_team(a.threads, [&](const Member& m) {
    for (long i = m.begin(a.hidden); i < m.end(a.hidden); i++)
      for (int k = 0; k < a.nets; k++)
        for (long b = 0; b < a.batch; b++) {
          const long at = a.net[k].column + i * a.net[k].length;
          scaled_row(a.gradient + at, a.d_h[b * a.hidden + i],
                     a.diagonal + b * a.states * a.columns + at, a.net[k].length, b > 0);
        }
  });
}

template <class real>
inline constexpr RtrlKernels<real> rtrl_kernels{rtrl_step<real>, rtrl_advance<real>,
                                                rtrl_gradient<real>, rtrl_diagonal_gradient<real>};

}  // namespace rnn_ext::RNN_EXT_TARGET
