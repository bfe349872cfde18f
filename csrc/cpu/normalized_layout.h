// Where the columns of gates and the parts of a record lie, and the weights of a row in these
// columns.
#pragma once
#include "normalized_cells.h"
#include "panels.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Gates that are normalised together: of the GRU r and z, whose product the reset-before form has
// first, and n alone.
template <class value>
GateColumns gate_columns(int gates, long hidden) {
  GateColumns c{};
  c.groups = gates == 3 ? 2 : 1;
  c.count[0] = (gates == 3 ? 2 : gates) * hidden;
  c.count[1] = hidden;
  for (int k = 0; k < c.groups; k++) {
    c.at[k] = c.width;
    c.row[k] = k ? c.count[0] : 0;
    c.width += panels_of<value, PlainPanel>(c.count[k]) * 2 * kLanes<value>;
  }
  return c;
}

// What the forward pass keeps of a row.
template <class value>
struct Record {
  using real = Real<value>;
  static constexpr long kScales = 16;
  long width;  // of the gates
  bool normalized;

  long size() const { return normalized ? 3 * width + kScales : width; }
  long input() const { return width; }      // W x, normalised
  long state() const { return 2 * width; }  // U h', normalised
  // Of each group of the input's and of the state's part; moments of the cell.
  long input_scales() const { return 3 * width; }
  long state_scales() const { return 3 * width + 2; }
  long cell() const { return 3 * width + 4; }
};

template <class value>
void take_weights(Arena& arena, GateWeights<value>& w) {
  using real = Real<value>;
  const long width = w.columns.width;
  w.gain_ih = arena.take<real>(width);
  w.gain_hh = arena.take<real>(width);
  w.bias = arena.take<real>(width);
  w.hidden_bias = arena.take<real>(w.hidden);
  w.gain_cell = arena.take<real>(w.hidden);
  w.bias_cell = arena.take<real>(w.hidden);
  w.peephole = arena.take<real>(3 * w.hidden);
}

template <class value, class Cell>
void fill_weights(const Weights<value>& weights, const Extras<value>& extras,
                  GateWeights<value>& w) {
  using real = Real<value>;
  const long hidden = w.hidden;
  const auto copy = [](real* to, const real* from, long count, real otherwise) {
    for (long i = 0; i < count; i++) to[i] = from ? from[i] : otherwise;
  };
  for (long i = 0; i < w.columns.width; i++) w.bias[i] = 0;
  for (int gate = 0; gate < Cell::gates; gate++) {
    const long at = w.column(gate), row = gate * hidden;
    const bool apart = Cell::split_bias && gate == Cell::gates - 1;
    copy(w.gain_ih + at, extras.gain_ih ? extras.gain_ih + row : nullptr, hidden, 1);
    copy(w.gain_hh + at, extras.gain_hh ? extras.gain_hh + row : nullptr, hidden, 1);
    if (!weights.b_ih) continue;
    for (long u = 0; u < hidden; u++)
      w.bias[at + u] = weights.b_ih[row + u] + (apart ? real(0) : weights.b_hh[row + u]);
  }
  copy(w.hidden_bias, Cell::split_bias && weights.b_hh ? weights.b_hh + 2 * hidden : nullptr,
       hidden, 0);
  copy(w.gain_cell, extras.gain_cell, hidden, 1);
  copy(w.bias_cell, extras.bias_cell, hidden, 0);
  copy(w.peephole, extras.peephole, 3 * hidden, 0);
}

// What a member does of a step: rows of the batch that are its own, all columns of their product or,
// where columns are split, its columns of all rows' product.
struct RowShare {
  const Member& member;
  const bool columns;
  long first, last, product_first, product_last;

  RowShare(const Member& m, const Plan& plan, long batch, long rows)
      : member(m), columns(plan.split == Split::kColumns) {
    last = m.end(batch) < rows ? m.end(batch) : rows;
    first = m.begin(batch) < last ? m.begin(batch) : last;
    product_first = columns ? 0 : first;
    product_last = columns ? rows : last;
  }
  long begin(long panels) const { return columns ? member.begin(panels) : 0; }
  long end(long panels) const { return columns ? member.end(panels) : panels; }
  void wait() const {
    if (columns) member.wait();
  }
};

// The previous states of the rows of a step. Rows of a step up to `carried` follow in order.
template <class value>
struct Before {
  using real = Real<value>;
  const Steps& steps;
  const Resets<value>& resets;
  const value *out, *h0;
  const real *cells, *c0;
  long output, hidden;

  RNN_EXT_INLINE bool afresh(long t, long row) const {
    return resets.rows && resets.rows[steps.begin(t) + row];
  }
  RNN_EXT_INLINE const value* state(long t, long row) const {
    if (afresh(t, row)) return resets.h + row * output;
    return row < steps.carried(t) ? out + (steps.begin(steps.previous(t)) + row) * output
                                  : h0 + row * output;
  }
  RNN_EXT_INLINE const real* cell(long t, long row) const {
    if (afresh(t, row)) return resets.c + row * hidden;
    return row < steps.carried(t) ? cells + (steps.begin(steps.previous(t)) + row) * hidden
                                  : c0 + row * hidden;
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
