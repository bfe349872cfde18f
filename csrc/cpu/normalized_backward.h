// Backpropagation through time for the cells of normalized_forward.h.
//   per step, last to first: dL/dh_t is clipped or looked at where that is asked for, then comes the
//   cell's vjp row by row, then back through the normalisation of U h', then one product brings
//   dL/dh'. dL/da is kept for every row;
//   then for all rows at once: back through the normalisation of W x, with the gradients of gains,
//   biases and peepholes as sums over blocks of rows; and each weight's gradient and dx are one
//   product.
// In the loop threads have their shares of rows or columns (RowShare); after it they share blocks of
// rows, then rows of the weights.
#pragma once
#include "gradient_control.h"
#include "normalized_forward.h"
#include "normalized_sums.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value, class Cell>
class NormalizedBackward {
  using real = Real<value>;
  using Columns = ColumnPanels<value>;
  static constexpr int panel_width = Columns::width;
  static constexpr long kPadding = 16;  // rows of deltas are read a little beyond their end

 public:
  explicit NormalizedBackward(const NormalizedBackwardArgs<value>& args)
      : all_(args),
        a_(args.layer),
        hidden_(a_.sizes.hidden),
        before_{a_.steps, a_.resets, a_.out, a_.h0, a_.c, a_.c0, a_.sizes.output, hidden_},
        room_(WeightGradient<value>::room_for(Cell::gates * hidden_ / a_.plan.threads + 1,
                                              a_.steps.total())) {
    w_.hidden = hidden_;
    w_.columns = gate_columns<value>(Cell::gates, hidden_);
    w_.normalized = args.extras.gain_ih;
    record_ = {w_.columns.width, w_.normalized};
    width_ = w_.columns.width + kPadding;
    delta_width_ = w_.columns.width + (Cell::has_extra ? hidden_ : 0);
    state_width_ = panels_of<value, PlainPanel>(hidden_) * panel_width;
  }

  void run() {
    const GateColumns& c = w_.columns;
    input_ = {Cell::gates * hidden_, a_.sizes.input, nullptr};
    for (int k = 0; k < c.groups; k++) state_[k] = {c.count[k], hidden_, nullptr};
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    fill_weights<value, Cell>(a_.weights, all_.extras, w_);
    for (long r = 0; r < a_.steps.batch; r++)
      for (long u = 0; u < state_width_; u++)
        carry_[r * state_width_ + u] = a_.d_hn && u < hidden_ ? a_.d_hn[r * hidden_ + u] : 0;
    sums_.clear();
    if (a_.add) for_sums([](real* gradient, real* sum, long n) { copy(sum, gradient, n); });
    run_team(a_.plan.threads, [this](const Member& m) { work(m); });
  }

 private:
  void lay_out(Arena& arena) {
    const long rows = a_.steps.total(), batch = a_.steps.batch;
    take_weights(arena, w_);
    for (int k = 0; k < w_.columns.groups; k++)
      state_[k].packed = arena.take<value>(Columns::size(state_[k].depth, state_[k].columns));
    if (a_.dx) {
      input_.packed = arena.take<value>(Columns::size(input_.depth, input_.columns));
      wide_dx_ = arena.take<real>(a_.plan.threads * input_sums<value>(a_.sizes.input));
    }
    delta_ = arena.take<real>(rows * delta_width_);
    of_state_ = arena.take<value>(rows * width_);
    of_input_ = arena.take<value>(rows * width_);
    carry_ = arena.take<real>(batch * state_width_);
    if (Cell::phases == 2) {
      reset_ = arena.take<real>(batch * state_width_);
      middle_ = arena.take<value>(rows * hidden_);
    }
    if (a_.dw_hh) previous_ = arena.take<const value*>(rows);
    if (Cell::has_cell_state) cells_ = arena.take<const real*>(rows);
    if (a_.zoneout.on) zoned_ = arena.take<real>(a_.plan.threads * zoned_size());
    sums_.lay_out(arena, rows, w_.columns.width, hidden_, Cell::has_cell_state);
    scratch_ = arena.take<value>(a_.plan.threads * room_.size());
  }

  void work(const Member& member) const {
    const GateColumns& c = w_.columns;
    for (int k = 0; k < c.groups; k++)
      state_[k].pack(member.begin(state_[k].count()), member.end(state_[k].count()),
                     a_.weights.hh + c.row[k] * hidden_);
    if (a_.dx) input_.pack(member.begin(input_.count()), member.end(input_.count()), a_.weights.ih);
    member.wait();
    for (long i = a_.steps.count - 1; i >= 0; i--) step(member, a_.steps.at(i));
    finish_states(member);
    member.wait();
    sums_.for_blocks(member, a_.steps.total(),
                     [&](const auto& sums, long row) { add_row(member, sums, row); });
    member.wait();
    sums_.reduce(member, order());
    member.wait();
    if (member.id == 0) for_sums([](real* gradient, real* sum, long n) { copy(gradient, sum, n); });
    products(member);
  }

  SumOrder order() const { return {!a_.steps.reverse, a_.add}; }

  void step(const Member& member, long t) const {
    const RowShare share(member, a_.plan, a_.steps.batch, a_.steps.rows(t));
    const long r0 = share.first, r1 = share.last;
    for (long r = r0; r < r1; r++) {
      backward<0>(member, t, r);
      for (int k = Cell::phases - 1; k < w_.columns.groups; k++) to_products(t, r, k);
    }
    share.wait();
    if constexpr (Cell::phases == 2) {
      multiply(share, 1, t, reset_, false);
      share.wait();
      for (long r = r0; r < r1; r++) {
        backward<1>(member, t, r);
        to_products(t, r, 0);
      }
      share.wait();
    }
    for (int k = 0; k < (Cell::phases == 2 ? 1 : w_.columns.groups); k++)
      multiply(share, k, t, carry_, true);
    share.wait();
    if (a_.resets.among(a_.steps.begin(t), a_.steps.rows(t)))
      for (long r = r0; r < r1; r++)
        if (before_.afresh(t, r)) cut(r);
    for (long r = r0; r < r1; r++) keep_previous(t, r);
  }

  template <int phase>
  void backward(const Member& member, long t, long r) const {
    const long at = a_.steps.begin(t) + r;
    BackwardRow<value> row = row_of(t, r);
    if (phase == 0 && controls_gradients(a_)) {
      for_registers<real>(hidden_,
                          [&](long u, int n) { store(row.carry + u, upstream(row, u, n), n); });
      control_gradient(a_, at, row.carry);
      row.d_out = nullptr;
    }
    if (!a_.zoneout.on) return Cell::template backward<phase>(w_, row);
    if (Cell::has_cell_state) row.c = made_cell(member, at, row.c_prev);
    using Zoned = ZonedRow<value, Cell>;
    Zoned::template backward<phase>(w_, row, a_.zoneout.from(at * hidden_),
                                    zoned_of(member) + hidden_);
  }

  // Of each thread: c~ of a row, then what its states hold on to.
  long zoned_size() const { return (1 + ZonedRow<value, Cell>::held_states) * hidden_; }
  real* zoned_of(const Member& member) const { return zoned_ + member.id * zoned_size(); }

  // What the cell of a row was before zoneout; what it is, without.
  const real* made_cell(const Member& member, long row, const real* previous) const {
    if (!a_.zoneout.on) return a_.c + row * hidden_;
    make_cell_again(w_, a_.gates + row * record_.size(), previous, zoned_of(member));
    return zoned_of(member);
  }

  BackwardRow<value> row_of(long t, long r) const {
    const long row = a_.steps.begin(t) + r;
    const real* record = a_.gates + row * record_.size();
    BackwardRow<value> b{};
    b.gates = record;
    b.u = record + record_.state();
    b.h_prev = before_.state(t, r);
    if (Cell::has_cell_state) {
      b.c_prev = before_.cell(t, r);
      b.c = a_.c + row * hidden_;
      b.cell = cell_moments(record);
      b.dc = a_.dc + r * hidden_;
    }
    b.d_out = a_.d_out ? a_.d_out + row * hidden_ : nullptr;
    b.d_c = a_.d_c ? a_.d_c + row * hidden_ : nullptr;
    b.carry = carry_ + r * state_width_;
    b.delta = delta_ + row * delta_width_;
    b.extra = b.delta + w_.columns.width;
    if (Cell::phases == 2) b.d_reset = reset_ + r * state_width_;
    return b;
  }

  Moments<real> cell_moments(const real* record) const {
    if (!w_.normalized) return {0, 1};
    return {record[record_.cell()], record[record_.cell() + 1]};
  }

  // dL/d(u gain) of a group: dL/da, but of the reset-after GRU's n.
  const real* of_group(long row, int k) const {
    const real* delta = delta_ + row * delta_width_;
    return Cell::split_bias && k == 1 ? delta + w_.columns.width : delta + w_.columns.at[k];
  }

  void to_products(long t, long r, int k) const {
    const GateColumns& c = w_.columns;
    const long row = a_.steps.begin(t) + r;
    const real *record = a_.gates + row * record_.size(), *d = of_group(row, k);
    back(d, w_.gain_hh + c.at[k], record + record_.state() + c.at[k],
         record + record_.state_scales() + k, c.count[k], of_state_ + row * width_ + c.at[k]);
  }

  void back(const real* d, const real* gain, const real* hat, const real* scale, long count,
            value* out) const {
    if (w_.normalized)
      normalize_vjp<value>(d, gain, hat, *scale, count, out);
    else
      for_registers<real>(count, [&](long i, int n) { store(out + i, load(d + i, n), n); });
  }

  // sum (+)= dL/d(U h') of a group times U, for a share of step t
  void multiply(const RowShare& share, int k, long t, real* sum, bool add) const {
    const value* d = of_state_ + a_.steps.begin(t) * width_ + w_.columns.at[k];
    const int most = tile_rows<value, 2>(width_);
    const long panels = state_[k].count(), r0 = share.product_first, r1 = share.product_last;
    for (long p = share.begin(panels); p < share.end(panels); p++)
      for_row_blocks(r0, r1, most, [&](long row, int count) {
        tile_long<value, 2>(count, state_[k].depth, d + row * width_, width_, kTogether<value>,
                            state_[k].panel(p), sum + row * state_width_ + p * panel_width,
                            state_width_, add);
      });
  }

  // A reset: what reaches the state before the step belongs to what was put in its place.
  void cut(long r) const {
    const auto move = [&](real* from, real* to) {
      for (long u = 0; u < hidden_; u++) {
        if (to) to[r * hidden_ + u] += from[u];
        from[u] = 0;
      }
    };
    move(carry_ + r * state_width_, a_.d_reset_h);
    if (Cell::has_cell_state) move(a_.dc + r * hidden_, a_.d_reset_c);
  }

  // What the state's part of a row was made of.
  void keep_previous(long t, long r) const {
    const long row = a_.steps.begin(t) + r;
    if (Cell::has_cell_state) cells_[row] = before_.cell(t, r);
    if (!a_.dw_hh) return;
    previous_[row] = before_.state(t, r);
    if constexpr (Cell::phases == 2) {
      const real* reset_gate = a_.gates + row * record_.size();
      for_registers<real>(hidden_, [&](long u, int n) {
        store(middle_ + row * hidden_ + u, load(reset_gate + u, n) * load(previous_[row] + u, n),
              n);
      });
    }
  }

  void finish_states(const Member& m) const {
    if (!a_.dh0) return;
    for (long r = m.begin(a_.steps.batch); r < m.end(a_.steps.batch); r++)
      std::memcpy(a_.dh0 + r * hidden_, carry_ + r * state_width_, hidden_ * sizeof(real));
  }

  void add_row(const Member& member, const typename NormalizedSums<value>::Block& sums,
               long row) const {
    const GateColumns& c = w_.columns;
    const real *record = a_.gates + row * record_.size(), *delta = delta_ + row * delta_width_;
    for (int k = 0; k < c.groups; k++) {
      const real *of_state = of_group(row, k), *of_input = delta + c.at[k];
      const real *input = record + record_.input() + c.at[k],
                 *state = record + record_.state() + c.at[k];
      for_registers<real>(c.count[k], [&](long i, int n) {
        const Vec<real> d = load(of_input + i, n), s = load(of_state + i, n);
        sums.add(sums.b_ih, c.at[k] + i, d, n);
        sums.add(sums.b_hh, c.at[k] + i, s, n);
        if (!w_.normalized) return;
        sums.add(sums.gain_ih, c.at[k] + i, d * load(input + i, n), n);
        sums.add(sums.gain_hh, c.at[k] + i, s * load(state + i, n), n);
      });
      back(of_input, w_.gain_ih + c.at[k], input, record + record_.input_scales() + k, c.count[k],
           of_input_ + row * width_ + c.at[k]);
    }
    if constexpr (Cell::has_cell_state) {
      const real *previous = cells_[row], *cell = made_cell(member, row, previous);
      const Moments<real> m = cell_moments(record);
      for_registers<real>(hidden_, [&](long u, int n) {
        const Vec<real> c_prev = load(previous + u, n), now = load(cell + u, n);
        sums.add(sums.peephole, u, load(delta + u, n) * c_prev, n);
        sums.add(sums.peephole, hidden_ + u, load(delta + hidden_ + u, n) * c_prev, n);
        sums.add(sums.peephole, 2 * hidden_ + u, load(delta + 3 * hidden_ + u, n) * now, n);
        if (!w_.normalized) return;
        const Vec<real> ds = load(delta + c.width + u, n);
        sums.add(sums.bias_cell, u, ds, n);
        sums.add(sums.gain_cell, u, ds * (now - m.mean) * m.scale, n);
      });
    }
  }

  // Calls body(gradient, its sum over the rows, numbers) for those that are wanted.
  template <class Body>
  void for_sums(const Body& body) const {
    const auto sums = sums_.total();
    const auto by_gate = [&](real* gradient, real* sum) {
      for (int gate = 0; gradient && gate < Cell::gates; gate++)
        body(gradient + gate * hidden_, sum + w_.column(gate), hidden_);
    };
    const auto by_unit = [&](real* gradient, real* sum, long count) {
      if (gradient) body(gradient, sum, count);
    };
    by_gate(a_.db_ih, sums.b_ih);
    by_gate(a_.db_hh, sums.b_hh);
    by_gate(all_.d_gain_ih, sums.gain_ih);
    by_gate(all_.d_gain_hh, sums.gain_hh);
    by_unit(all_.d_gain_cell, sums.gain_cell, hidden_);
    by_unit(all_.d_bias_cell, sums.bias_cell, hidden_);
    by_unit(all_.d_peephole, sums.peephole, 3 * hidden_);
  }

  static void copy(real* to, const real* from, long count) {
    std::memcpy(to, from, count * sizeof(real));
  }

  void products(const Member& m) const {
    const GateColumns& c = w_.columns;
    const long rows = a_.steps.total();
    value* scratch = scratch_ + m.id * room_.size();
    Segment segments[2];
    for (int k = 0; k < c.groups; k++) {
      const Segment& s =
          segments[k] = {c.at[k], c.row[k], c.count[k], true, Operand::kPreviousState};
      const auto gradient = [&](real* to, const value* deltas, const Rows<value>& x, long columns) {
        const Target<value> target{x, columns, to};
        if (to)
          WeightGradient<value>::run(s, m.begin(s.count), m.end(s.count), deltas, width_, &target,
                                     1, rows, order(), room_, scratch);
      };
      gradient(a_.dw_ih, of_input_, {a_.x, a_.sizes.input, nullptr}, a_.sizes.input);
      if (Cell::phases == 2 && k == 1)
        gradient(a_.dw_hh, of_state_, {middle_, hidden_, nullptr}, hidden_);
      else
        gradient(a_.dw_hh, of_state_, {nullptr, 1, previous_}, hidden_);
    }
    if (a_.dx)
      input_gradient(segments, c.groups, input_, m.begin(rows), m.end(rows), of_input_, width_,
                     a_.dx, wide_dx_ + m.id * input_sums<value>(a_.sizes.input), !a_.plan.pack);
  }

  const NormalizedBackwardArgs<value>& all_;
  const BackwardArgs<value>& a_;
  const long hidden_;
  const Before<value> before_;
  const typename WeightGradient<value>::Room room_;
  GateWeights<value> w_{};
  Record<value> record_{};
  NormalizedSums<value> sums_{};
  long width_ = 0, delta_width_ = 0, state_width_ = 0;
  Columns input_{}, state_[2]{};
  real *delta_ = nullptr, *carry_ = nullptr, *reset_ = nullptr, *zoned_ = nullptr;
  real* wide_dx_ = nullptr;
  value *of_state_ = nullptr, *of_input_ = nullptr, *middle_ = nullptr, *scratch_ = nullptr;
  const value** previous_ = nullptr;
  const real** cells_ = nullptr;
};

}  // namespace rnn_ext::RNN_EXT_TARGET
