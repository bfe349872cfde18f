// The forward time loop of cells that look at whole rows: layer normalisation (Ba et al. 2016), and
// peepholes.
//   per chunk of steps: W x of the chunk, normalised, for all its rows at once;
//   per step: U h' of whole rows, normalised, then the cell row by row.
// Threads share the rows of a chunk's projection. In the loop they own sequences and do not wait; or,
// where those are few, they share the columns of U h' and then finish the rows that they own, with a
// barrier before and after.
#pragma once
#include "forward.h"
#include "normalized_layout.h"
#include "normalized_zoneout.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value, class Cell>
class NormalizedForward {
  using real = Real<value>;
  using Product = Panels<value, PlainPanel>;

 public:
  explicit NormalizedForward(const NormalizedForwardArgs<value>& args)
      : a_(args.layer),
        extras_(args.extras),
        save_(args.layer.save),
        keep_(args.layer.gates),
        before_{a_.steps, a_.resets, a_.out, a_.h0, a_.c, a_.c0, a_.sizes.output, a_.sizes.hidden} {
    w_.hidden = a_.sizes.hidden;
    w_.columns = gate_columns<value>(Cell::gates, w_.hidden);
    w_.normalized = extras_.gain_ih;
    record_ = {w_.columns.width, w_.normalized};
  }

  void run() {
    const GateColumns& c = w_.columns;
    for (int k = 0; k < c.groups; k++) {
      input_[k] = {a_.weights.ih + c.row[k] * a_.sizes.input, c.count[k], a_.sizes.input, nullptr};
      state_[k] = {a_.weights.hh + c.row[k] * w_.hidden, c.count[k], w_.hidden, nullptr};
    }
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    fill_weights<value, Cell>(a_.weights, extras_, w_);
    run_team(a_.plan.threads, [this](const Member& m) { work(m); });
  }

 private:
  void lay_out(Arena& arena) {
    const long batch = a_.steps.batch;
    take_weights(arena, w_);
    if (a_.plan.pack)
      for (int k = 0; k < w_.columns.groups; k++) {
        input_[k].packed = arena.take<value>(Product::size(input_[k].units, input_[k].depth));
        state_[k].packed = arena.take<value>(Product::size(state_[k].units, state_[k].depth));
      }
    if (!keep_) gates_ = arena.take<real>(chunk_steps() * batch * w_.columns.width);
    if (!keep_ || !w_.normalized) products_ = arena.take<real>(batch * w_.columns.width);
    if (Cell::phases == 2) middle_ = arena.take<value>(batch * w_.hidden);
    if (a_.resets.rows) previous_ = arena.take<value>(batch * w_.hidden);
    if (a_.zoneout.on && Cell::has_cell_state)
      made_ = arena.take<real>(a_.plan.threads * w_.hidden);
  }

  long chunk_steps() const {
    const long steps = kProjectionRows / (a_.steps.batch ? a_.steps.batch : 1);
    return steps < 1 ? 1 : steps > a_.steps.count ? a_.steps.count : steps;
  }

  void work(const Member& member) const {
    if (a_.plan.pack) {
      for (int k = 0; k < w_.columns.groups; k++)
        for (const Product* p : {&input_[k], &state_[k]})
          p->pack(member.begin(p->count()), member.end(p->count()));
      member.wait();
    }
    const long steps = chunk_steps();
    for (long i = 0; i < a_.steps.count; i += steps) {
      const long end = i + steps < a_.steps.count ? i + steps : a_.steps.count;
      const long first = a_.steps.reverse ? a_.steps.at(end - 1) : i;
      const long low = a_.steps.begin(first), high = a_.steps.begin(first + end - i);
      project(low + member.begin(high - low), low + member.end(high - low), low);
      member.wait();
      for (long j = i; j < end; j++) step(member, a_.steps.at(j), low);
      if (!keep_) member.wait();
    }
  }

  real* gates_of(long row, long low) const {
    return keep_ ? a_.gates + row * record_.size() : gates_ + (row - low) * w_.columns.width;
  }
  long gates_stride() const { return keep_ ? record_.size() : w_.columns.width; }

  // The input's part of the net inputs of rows [first, end).
  void project(long first, long end, long low) const {
    const GateColumns& c = w_.columns;
    const bool keep = keep_ && w_.normalized;
    const long stride = gates_stride(), to = keep ? record_.input() : 0;
    const int most = tile_rows<value, 2>(a_.sizes.input);
    for (int k = 0; k < c.groups; k++)
      for (long p = 0; p < input_[k].count(); p++)
        for_row_blocks(first, end, most, [&](long row, int count) {
          input_[k].multiply(p, count, a_.x + row * a_.sizes.input, a_.sizes.input,
                             gates_of(row, low) + to + c.at[k] + p * 2 * kLanes<value>, stride,
                             false);
        });
    for (long row = first; row < end; row++) {
      real* gates = gates_of(row, low);
      for (int k = 0; k < c.groups; k++) {
        real* hat = gates + to + c.at[k];
        if (w_.normalized) {
          const real scale = normalize(hat, c.count[k]);
          if (keep) gates[record_.input_scales() + k] = scale;
        }
        for_registers<real>(c.count[k], [&](long i, int n) {
          const long at = c.at[k] + i;
          store(gates + at, load(hat + i, n) * load(w_.gain_ih + at, n) + load(w_.bias + at, n), n);
        });
      }
    }
  }

  void step(const Member& member, long t, long low) const {
    const RowShare share(member, a_.plan, a_.steps.batch, a_.steps.rows(t));
    const bool* resets = a_.resets.among(a_.steps.begin(t), a_.steps.rows(t));
    if (resets) {
      for (long r = share.first; r < share.last; r++)
        std::memcpy(previous_ + r * w_.hidden, before_.state(t, r), w_.hidden * sizeof(value));
      share.wait();
    }
    for (int phase = 0; phase < Cell::phases; phase++) {
      for (int k = 0; k < w_.columns.groups; k++)
        if (Cell::phases == 1 || k == phase) multiply(share, k, t, phase == 1, resets);
      share.wait();
      for (long r = share.first; r < share.last; r++) finish(member, phase, t, r, low);
      share.wait();
    }
  }

  void multiply(const RowShare& share, int k, long t, bool of_middle, bool resets) const {
    const long r0 = share.product_first, r1 = share.product_last, carried = a_.steps.carried(t);
    if (of_middle) return multiply(share, k, t, middle_, r0, r1);
    if (resets) return multiply(share, k, t, previous_, r0, r1);
    const long middle = r0 > carried ? r0 : r1 < carried ? r1 : carried;
    if (r0 < middle) multiply(share, k, t, before_.state(t, r0) - r0 * w_.hidden, r0, middle);
    multiply(share, k, t, a_.h0, middle, r1);
  }

  real* products_of(long t, long row) const {
    return keep_ && w_.normalized
               ? a_.gates + (a_.steps.begin(t) + row) * record_.size() + record_.state()
               : products_ + row * w_.columns.width;
  }

  // U h' of group k for rows [r0, r1) of `operand`
  void multiply(const RowShare& share, int k, long t, const value* operand, long r0,
                long r1) const {
    const long stride = keep_ && w_.normalized ? record_.size() : w_.columns.width;
    const int most = tile_rows<value, 2>(w_.hidden);
    for (long p = share.begin(state_[k].count()); p < share.end(state_[k].count()); p++)
      for_row_blocks(r0, r1, most, [&](long row, int count) {
        state_[k].multiply(p, count, operand + row * w_.hidden, w_.hidden,
                           products_of(t, row) + w_.columns.at[k] + p * 2 * kLanes<value>, stride,
                           false);
      });
  }

  void finish(const Member& member, int phase, long t, long r, long low) const {
    const GateColumns& c = w_.columns;
    const long row = a_.steps.begin(t) + r;
    real *gates = gates_of(row, low), *u = products_of(t, r);
    if (w_.normalized)
      for (int k = 0; k < c.groups; k++) {
        if (Cell::phases == 2 && k != phase) continue;
        const real scale = normalize(u + c.at[k], c.count[k]);
        if (keep_) gates[record_.state_scales() + k] = scale;
      }
    Moments<real> cell{};
    ForwardRow<value> f{};
    f.gates = gates;
    f.u = u;
    f.h_prev = before_.state(t, r);
    f.h = a_.out + row * w_.hidden;
    if (Cell::phases == 2) f.middle = middle_ + r * w_.hidden;
    f.cell = &cell;
    if constexpr (Cell::has_cell_state) {
      f.c = a_.c + (save_ ? row : r) * w_.hidden;
      f.c_prev = save_ || before_.afresh(t, r) ? before_.cell(t, r) : f.c;
    }
    if (phase == 0)
      forward<0>(member, f, row);
    else
      forward<Cell::phases - 1>(member, f, row);
    if (Cell::has_cell_state && keep_ && w_.normalized) {
      gates[record_.cell()] = cell.mean;
      gates[record_.cell() + 1] = cell.scale;
    }
  }

  template <int phase>
  void forward(const Member& member, const ForwardRow<value>& f, long row) const {
    if (!a_.zoneout.on) return Cell::template forward<phase>(w_, f);
    real* made = Cell::has_cell_state ? made_ + member.id * w_.hidden : nullptr;
    ZonedRow<value, Cell>::template forward<phase>(w_, f, a_.zoneout.from(row * w_.hidden), made);
  }

  const ForwardArgs<value>& a_;
  const Extras<value>& extras_;
  const bool save_, keep_;  // every state; records, too
  const Before<value> before_;
  GateWeights<value> w_{};
  Record<value> record_{};
  Product input_[2]{}, state_[2]{};
  real *gates_ = nullptr, *products_ = nullptr, *made_ = nullptr;
  value *middle_ = nullptr, *previous_ = nullptr;
};

}  // namespace rnn_ext::RNN_EXT_TARGET
