// Zoneout (zoneout.h) around a cell of normalized_cells.h, a row at a time. What the LSTM shows, and
// looks at, is c~; a cell is given it in the place of c.
#pragma once
#include "normalized_cells.h"
#include "zoneout.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value, class Cell>
struct ZonedRow {
  using real = Real<value>;
  using V = Vec<value>;
  static constexpr long held_states = Cell::has_cell_state ? 2 : 1;

  // `made`: [H] that receive c~.
  template <int phase>
  static void forward(const GateWeights<value>& w, ForwardRow<value> row, const Zoneout& zones,
                      real* made) {
    real* c = row.c;
    if constexpr (Cell::has_cell_state) row.c = made;
    Cell::template forward<phase>(w, row);
    if constexpr (phase + 1 < Cell::phases) return;
    for_registers<real>(w.hidden, [&](long u, int n) {
      if constexpr (Cell::has_cell_state)
        store(c + u,
              mixed<value>(held<value>(zones.c, u, n), load(row.c_prev + u, n), load(made + u, n)),
              n);
      store(row.h + u,
            mixed<value>(held<value>(zones.h, u, n), load(row.h_prev + u, n), load(row.h + u, n)),
            n);
    });
  }

  // `kept`: [held_states * H] of working memory.
  template <int phase>
  static void backward(const GateWeights<value>& w, BackwardRow<value> row, const Zoneout& zones,
                       real* kept) {
    [[maybe_unused]] real* kept_c = kept + w.hidden;
    if constexpr (phase == 0) {
      for_registers<real>(w.hidden, [&](long u, int n) {
        part(kept + u, row.carry + u, zones.h, u, n, upstream(row, u, n));
        if constexpr (Cell::has_cell_state) {
          V dc = load(row.dc + u, n);
          if (row.d_c) dc += load(row.d_c + u, n);
          part(kept_c + u, row.dc + u, zones.c, u, n, dc);
        }
      });
      row.d_out = nullptr;
      row.d_c = nullptr;
    }
    Cell::template backward<phase>(w, row);
    if constexpr (phase == 0)
      for_registers<real>(w.hidden, [&](long u, int n) {
        store(row.carry + u, load(row.carry + u, n) + load(kept + u, n), n);
        if constexpr (Cell::has_cell_state)
          store(row.dc + u, load(row.dc + u, n) + load(kept_c + u, n), n);
      });
  }

 private:
  // What a gradient leaves with the state before, and what reaches the cell.
  RNN_EXT_INLINE static void part(real* kept, real* passed, const Hold& hold, long u, int n,
                                  V gradient) {
    const V z = held<value>(hold, u, n) * gradient;
    store(kept, z, n);
    store(passed, gradient - z, n);
  }
};

// to = c~ of a row, from the activations that it came from.
template <class value>
void make_cell_again(const GateWeights<value>& w, const Real<value>* gates,
                     const Real<value>* c_prev, Real<value>* to) {
  using real = Real<value>;
  const long hidden = w.hidden;
  for_registers<real>(hidden, [&](long u, int n) {
    const real* g = gates + u;
    store(to + u, load(g + hidden, n) * load(c_prev + u, n) + load(g, n) * load(g + 2 * hidden, n),
          n);
  });
}

}  // namespace rnn_ext::RNN_EXT_TARGET
