// Backpropagation through time, once for all cells.
//   per step, last to first, and phase: product of later deltas with the recurrent weights, the
//   cell's vjp on the registers that hold it, delta = dL/d(net input) stored for every step;
//   then each parameter gradient and dx is one product over these steps.
// The loop and the products after it take turns, some steps at a time (delta_window.h). Threads
// split the loop as in forward.h, and the products by rows of their result.
#pragma once
#include "forward.h"
#include "gradient_control.h"
#include "parameter_gradients.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value, class Cell, int phase>
RNN_EXT_NOINLINE void finish_backward(const BackwardView<value>& view, long first, int rows,
                                      long panel, long units, const Real<value>* products) {
  for (int i = 0; i < rows; i++)
    for_units<value, PlainPanel>(
        panel, units, [&](int b, long block, int lanes) __attribute__((always_inline)) {
          const Vec<value> product =
              products ? load(products + (i * 2 + b) * kLanes<value>) : Vec<value>{};
          Cell::template backward<phase>(view, first + i, block, lanes, product);
        });
}

template <class value, class Cell>
class Backward {
  using real = Real<value>;
  static constexpr int lanes = kLanes<value>, width = ColumnPanels<value>::width;
  static constexpr bool projected = Cell::phases == 2 && Cell::has_cell_state;

 public:
  explicit Backward(const BackwardArgs<value>& args)
      : a_(args),
        hidden_(args.sizes.hidden),
        output_(args.sizes.output),
        carries_(Cell::carries || args.zoneout.on),
        gates_width_(panels_of<value, typename Cell::Gates>(hidden_) * Cell::Gates::vectors *
                     lanes),
        delta_width_(Cell::deltas * hidden_ + kPadding),
        window_(a_.steps, kSumLength<value> * a_.groups, a_.plan.piece_rows),
        room_(WeightGradient<value>::room_for(
            Cell::gates * hidden_ / (a_.groups > 1 ? 1 : a_.plan.threads) + 1,
            a_.steps.total() / a_.groups)) {}

  void run() {
    input_ = {Cell::gates * hidden_, a_.sizes.input, nullptr};
    first_ = {Cell::recurrent_gates * hidden_, output_, nullptr};
    second_ = {projected ? output_ : hidden_, hidden_, nullptr};
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    const long states = a_.steps.batch * output_;
    for (long i = 0; i < states; i++) carry_[i] = a_.d_hn ? a_.d_hn[i] : real(0);
    run_team(a_.plan.threads, [this](const Member& m) { work(m); });
  }

 private:
  // Rows of delta are this much longer than they need be: rows a power of two apart share cache
  // sets.
  static constexpr long kPadding = 16;
  static constexpr long kLongDepth = 1024 * kTogether<value>;  // of a product of the time loop

  void lay_out(Arena& arena) {
    const long rows = a_.steps.total();
    const size_t of_input = a_.dx ? ColumnPanels<value>::size(input_.depth, input_.columns) : 0;
    const size_t of_first = ColumnPanels<value>::size(first_.depth, first_.columns);
    const bool follows = input_follows() && of_input > of_first;
    first_.packed = arena.take<value>(follows ? of_input : of_first);
    if constexpr (Cell::phases == 2)
      second_.packed = arena.take<value>(ColumnPanels<value>::size(second_.depth, second_.columns));
    input_.packed = input_follows() ? first_.packed : arena.take<value>(of_input);
    delta_ = arena.take<value>(window_.capacity() * delta_width_);
    if constexpr (projected) dh_ = arena.take<value>(window_.capacity() * output_ + kPadding);
    carry_ = arena.take<real>(a_.steps.batch * output_);
    if (a_.dw_hh) previous_ = arena.take<const value*>(rows);
    if (first_.depth >= kLongDepth || second_.depth >= kLongDepth)
      sums_ = arena.take<real>((first_.count() + second_.count()) * a_.steps.batch * width);
    if (controls_gradients(a_)) total_ = arena.take<real>(a_.steps.batch * total_width());
    scratch_ = arena.take<value>(a_.plan.threads * room_.size());
    if (a_.dx) wide_dx_ = arena.take<real>(a_.plan.threads * input_sums<value>(a_.sizes.input));
  }

  // In a walk of one piece W takes the place of the recurrent weights.
  bool input_follows() const { return window_.capacity() == a_.steps.total(); }

  void work(const Member& member) const {
    const Share share{member, member.count == 1 ? Split::kNone : a_.plan.split, a_.steps.batch};
    pack(first_, member, a_.weights.hh);
    if constexpr (Cell::phases == 2)
      pack(second_, member,
           projected ? a_.weights.hr : a_.weights.hh + Cell::recurrent_gates * hidden_ * output_);
    if (a_.dx && !input_follows()) pack(input_, member, a_.weights.ih);
    if (a_.dw_hh) find_previous(member);
    member.wait();
    Segment segments[kMaxSegments];
    const int count = Cell::segments(hidden_, segments);
    DeltaWindow window = window_;
    for (bool add = a_.add;; add = true) {
      const Held<value> held{delta_, dh_, delta_width_, output_, window.base};
      for (long i = window.first; i > window.end_step; i--) step(share, held, a_.steps.at(i));
      if (window.last()) starts(share, held, a_.steps.at(0), 0);
      member.wait();
      if (a_.dx && input_follows()) pack(input_, member, a_.weights.ih);
      const RowRange rows{window.begin, window.end};
      parameters_of<Cell>(a_, member, segments, count, held, rows, add, previous_, room_, scratch_);
      if (a_.dx && input_follows()) member.wait();
      if (a_.dx) dx(member, segments, count, held, rows);
      if (window.last()) return;
      member.wait();
      move_kept(delta_, delta_width_, window, member.begin(delta_width_), member.end(delta_width_));
      if constexpr (projected)
        move_kept(dh_, output_, window, member.begin(output_), member.end(output_));
      window.advance();
      member.wait();
    }
  }

  void dx(const Member& m, const Segment* segments, int count, const Held<value>& held,
          const RowRange& rows) const {
    const long begin = rows.begin + m.begin(rows.count()), end = rows.begin + m.end(rows.count());
    input_gradient(segments, count, input_, begin, end, held.delta_of(0), delta_width_, a_.dx,
                   wide_dx_ + m.id * input_sums<value>(a_.sizes.input), !a_.plan.pack);
  }

  static void pack(const ColumnPanels<value>& panels, const Member& m, const value* matrix) {
    panels.pack(m.begin(panels.count()), m.end(panels.count()), matrix);
  }

  // previous_[row]: the hidden state that this row's step started from
  void find_previous(const Member& m) const {
    for (long t = m.begin(a_.steps.count); t < m.end(a_.steps.count); t++) {
      const long carried = a_.steps.carried(t);
      for (long r = 0; r < a_.steps.rows(t); r++)
        previous_[a_.steps.begin(t) + r] =
            r < carried ? a_.out + (a_.steps.begin(a_.steps.previous(t)) + r) * output_
                        : a_.h0 + r * output_;
      const bool* resets = a_.resets.among(a_.steps.begin(t), a_.steps.rows(t));
      for (long r = 0; resets && r < a_.steps.rows(t); r++)
        if (resets[r]) previous_[a_.steps.begin(t) + r] = a_.resets.h + r * output_;
    }
  }

  void step(const Share& share, const Held<value>& held, long t) const {
    const long rows = a_.steps.rows(t), continuing = a_.steps.continuing(t), at = a_.steps.begin(t);
    const long carried = a_.steps.carried(t);
    const long before = carried ? a_.steps.begin(a_.steps.previous(t)) : 0;
    BackwardView<value> v{};
    v.hidden = hidden_;
    v.output = output_;
    v.gates_width = gates_width_;
    v.delta_width = delta_width_;
    v.gates = a_.gates + (Cell::keeps_gates ? at * gates_width_ : 0);
    v.h = a_.out + at * output_;
    v.c = a_.c + (Cell::has_cell_state ? at * hidden_ : 0);
    v.middle = a_.middle ? a_.middle + at * hidden_ : nullptr;
    v.d_out = a_.d_out ? a_.d_out + at * output_ : nullptr;
    v.d_c = a_.d_c ? a_.d_c + at * hidden_ : nullptr;
    v.delta = held.delta_of(at);
    v.dh = held.dh_of(at);
    v.carry = carry_;
    v.dc = a_.dc;
    v.hold_h = a_.zoneout.h.from(at * output_);
    v.hold_c = a_.zoneout.c.from(at * hidden_);

    const long later = continuing ? a_.steps.begin(a_.steps.next(t)) : 0;
    const Afresh resets{a_.resets.among(at, rows), a_.resets.among(later, continuing), continuing};
    const long r0 = share.row_begin(), r1 = share.row_end(rows);
    // A sequence has a previous step or not, and a next step or not: at most three ranges of rows.
    const long low = continuing < carried ? continuing : carried,
               high = continuing < carried ? carried : continuing;
    const long cuts[] = {0, low, high, rows};
    // body(begin, end, deltas of the next step or null) with the view that fits these rows
    const auto for_ranges = [&](const auto& body) {
      for (int i = 0; i < 3; i++) {
        const long begin = cuts[i] > r0 ? cuts[i] : r0, end = cuts[i + 1] < r1 ? cuts[i + 1] : r1;
        if (begin >= end) continue;
        v.h_prev = begin < carried ? a_.out + before * output_ : a_.h0;
        v.c_prev = begin < carried ? a_.c + before * hidden_ : a_.c0;
        const bool has_next = begin < continuing;
        v.add_carry = carries_ || !has_next;
        body(begin, end, has_next ? held.delta_of(later) : nullptr);
      }
    };
    if (total_) {
      for_ranges([&](long begin, long end, const value* operand) {
        collect(share, v, operand, begin, end, resets);
      });
      share.wait();
      control(share, at, rows);
      share.wait();
      v.d_out = nullptr;
    }
    for (int phase = 0; phase < Cell::phases; phase++) {
      for_ranges([&](long begin, long end, const value* operand) {
        if (phase == 0 && total_)
          finish_collected(share, v, begin, end, resets);
        else if (phase == 0)
          run_phase<0>(first_, share, v, operand, delta_width_, begin, end, resets);
        else if constexpr (projected)
          run_phase<1>(second_, share, v, v.dh, output_, begin, end, resets);
        else if constexpr (Cell::phases == 2)
          run_phase<1>(second_, share, v, v.delta + 2 * hidden_, delta_width_, begin, end, resets);
      });
      if (phase == 0 && a_.steps.exists(a_.steps.next(t)))
        starts(share, held, a_.steps.next(t), continuing);
      share.wait();
    }
  }

  // Of the rows of a step: which start afresh there, and which at the next step; null for none.
  struct Afresh {
    const bool *here, *next;
    long continuing;  // rows that the next step has
    bool at_here(long row) const { return here && here[row]; }
    bool at_next(long row) const { return next && row < continuing && next[row]; }
  };

  // total_ = dL/dh_t of rows [r0, r1), this member's units
  void collect(const Share& share, const BackwardView<value>& view, const value* operand, long r0,
               long r1, const Afresh& resets) const {
    BackwardView<value> cut = view;
    cut.add_carry = false;
    const long p1 = share.panel_end(first_.count());
    const int most = tile_rows<value, 2>(delta_width_);
    for (long p = share.panel_begin(first_.count()); p < p1; p++)
      for_row_blocks(r0, r1, most, [&](long first, int count) {
        real* to = total_ + first * total_width() + p * width;
        if (operand)
          tile_long<value, 2>(count, first_.depth, operand + first * delta_width_, delta_width_,
                              kTogether<value>, first_.panel(p), to, total_width(), false);
        for (int i = 0; i < count; i++) {
          const bool ends = resets.at_next(first + i);
          if (ends) cut_states(first + i, p, to + i * total_width());
          if constexpr (Cell::has_cell_state && Cell::phases == 1)
            if (ends) cut_cells(first + i, p);
          for_units<value, PlainPanel>(p, output_, [&](int b, long block, int n) {
            real* units = to + i * total_width() + b * lanes;
            const Vec<value> product = operand && !ends ? load(units) : Vec<value>{};
            store(units, upstream(ends ? cut : view, first + i, block * lanes, n, product));
          });
        }
      });
  }

  // Notes the norms of the rows of total_, which start at row `at` of all, and clips them.
  void control(const Share& share, long at, long rows) const {
    const bool shared = share.split == Split::kColumns;
    const long r0 = shared ? share.member.begin(rows) : share.row_begin(),
               r1 = shared ? share.member.end(rows) : share.row_end(rows);
    for (long r = r0; r < r1; r++) control_gradient(a_, at + r, total_ + r * total_width());
  }

  // The first phase of the cell's vjp, from total_
  void finish_collected(const Share& share, BackwardView<value> view, long r0, long r1,
                        const Afresh& resets) const {
    const Afresh here{resets.here, nullptr, 0};
    view.add_carry = false;
    alignas(64) real products[kTileRows<2> * width];
    const long p1 = share.panel_end(first_.count());
    for (long p = share.panel_begin(first_.count()); p < p1; p++)
      for_row_blocks(r0, r1, kTileRows<2>, [&](long first, int count) {
        for (int i = 0; i < count; i++)
          for (int b = 0; b < 2; b++)
            store(products + (i * 2 + b) * lanes,
                  load(total_ + (first + i) * total_width() + p * width + b * lanes));
        finish<0>(view, first, count, p, output_, products, here);
      });
  }

  long total_width() const { return first_.count() * width; }

  // dh0 of the sequences from row `first` on, which start at step t; where that is a reset, nothing
  // reaches h0 and c0.
  void starts(const Share& share, const Held<value>& held, long t, long first) const {
    const long r0 = share.row_begin() > first ? share.row_begin() : first,
               r1 = share.row_end(a_.steps.rows(t));
    if (r0 >= r1) return;
    const bool* resets = a_.resets.among(a_.steps.begin(t), a_.steps.rows(t));
    if constexpr (Cell::has_cell_state)
      if (resets)
        for (long p = share.panel_begin(hidden_panels()); p < share.panel_end(hidden_panels()); p++)
          for (long row = r0; row < r1; row++)
            if (resets[row]) cut_cells(row, p);
    if (!a_.dh0) return;
    const value* operand = held.delta_of(a_.steps.begin(t));
    alignas(64) real products[kTileRows<2> * width];
    const long p1 = share.panel_end(first_.count());
    for (long p = share.panel_begin(first_.count()); p < p1; p++)
      for_row_blocks(r0, r1, kTileRows<2>, [&](long row, int count) {
        tile_long<value, 2>(count, first_.depth, operand + row * delta_width_, delta_width_,
                            kTogether<value>, first_.panel(p), products, width, false);
        for (int i = 0; i < count; i++)
          for_units<value, PlainPanel>(p, output_, [&](int b, long block, int n) {
            const long at = (row + i) * output_ + block * lanes;
            Vec<value> dh0 = load(products + (i * 2 + b) * lanes);
            if (carries_) dh0 += load(carry_ + at, n);
            if (resets && resets[row + i]) {
              if (a_.d_reset_h) add(a_.d_reset_h + at, dh0, n);
              dh0 = Vec<value>{};
            }
            store(a_.dh0 + at, dh0, n);
          });
      });
  }

  RNN_EXT_INLINE static void add(real* sum, Vec<value> term, int n) {
    store(sum, load(sum, n) + term, n);
  }
  long hidden_panels() const { return panels_of<value, PlainPanel>(hidden_); }

  // What later steps ask of the cell state that a reset replaced goes to its replacement.
  void cut_cells(long row, long panel) const {
    for_units<value, PlainPanel>(panel, hidden_, [&](int, long block, int n) {
      real* dc = a_.dc + row * hidden_ + block * lanes;
      if (a_.d_reset_c) add(a_.d_reset_c + row * hidden_ + block * lanes, load(dc, n), n);
      store(dc, Vec<value>{}, n);
    });
  }

  // The same for the hidden state, of which `products` is one row of what reaches it.
  void cut_states(long row, long panel, const real* products) const {
    if (!a_.d_reset_h) return;
    for_units<value, PlainPanel>(panel, output_, [&](int b, long block, int n) {
      const long at = row * output_ + block * lanes;
      Vec<value> dh = load(products + b * lanes);
      if (carries_) dh += load(carry_ + at, n);
      add(a_.d_reset_h + at, dh, n);
    });
  }

  template <int phase>
  RNN_EXT_INLINE void finish(const BackwardView<value>& view, long first, int count, long panel,
                             long units, const real* products, const Afresh& resets) const {
    if (resets.here || resets.next)
      finish_some_reset<phase>(view, first, count, panel, units, products, resets);
    else
      finish_rows<phase>(view, first, count, panel, units, products);
  }

  template <int phase>
  RNN_EXT_INLINE void finish_rows(const BackwardView<value>& view, long first, int count,
                                  long panel, long units, const real* products) const {
    if (a_.zoneout.on)
      finish_backward<value, Zoned<value, Cell>, phase>(view, first, count, panel, units, products);
    else
      finish_backward<value, Cell, phase>(view, first, count, panel, units, products);
  }

  template <int phase>
  RNN_EXT_NOINLINE void finish_some_reset(const BackwardView<value>& view, long first, int count,
                                          long panel, long units, const real* products,
                                          const Afresh& resets) const {
    const bool has_next = phase > 0 || products;
    for_runs(
        count,
        [&](long i, long k) {
          return resets.at_here(first + i) == resets.at_here(first + k) &&
                 resets.at_next(first + i) == resets.at_next(first + k);
        },
        [&](int i, int rows) {
          BackwardView<value> run = view;
          const real* run_products = products ? products + i * width : nullptr;
          if (resets.at_here(first + i)) {
            run.h_prev = a_.resets.h;
            run.c_prev = a_.resets.c;
          }
          if (has_next && resets.at_next(first + i)) {
            for (long row = first + i; row < first + i + rows; row++) {
              if constexpr (phase == 0) cut_states(row, panel, products + (row - first) * width);
              if constexpr (Cell::has_cell_state && phase == Cell::phases - 1)
                cut_cells(row, panel);
            }
            if constexpr (phase == 0) {
              run_products = nullptr;
              run.add_carry = false;
            }
          }
          finish_rows<phase>(run, first + i, rows, panel, units, run_products);
        });
  }

  template <int phase>
  void run_phase(const ColumnPanels<value>& panels, const Share& share,
                 const BackwardView<value>& view, const value* operand, long operand_width, long r0,
                 long r1, const Afresh& resets) const {
    if (operand && panels.depth >= kLongDepth && r1 - r0 > kTileRows<2>)
      return run_long_phase<phase>(panels, share, view, operand, operand_width, r0, r1, resets);
    alignas(64) real products[kTileRows<2> * width];
    const long p1 = share.panel_end(panels.count());
    const int most = tile_rows<value, 2>(operand_width);
    for (long p = share.panel_begin(panels.count()); p < p1; p++)
      for_row_blocks(r0, r1, most, [&](long first, int count) {
        if (operand)
          tile_long<value, 2>(count, panels.depth, operand + first * operand_width, operand_width,
                              kTogether<value>, panels.panel(p), products, width, false);
        finish<phase>(view, first, count, p, panels.columns, operand ? products : nullptr, resets);
      });
  }

  // The same, a piece of the depth at a time for all panels: the operand, which may be larger than
  // the second-level cache, is then read once and not for every panel.
  template <int phase>
  void run_long_phase(const ColumnPanels<value>& panels, const Share& share,
                      const BackwardView<value>& view, const value* operand, long operand_width,
                      long r0, long r1, const Afresh& resets) const {
    constexpr long piece = kSumLength<value>;
    const long p0 = share.panel_begin(panels.count()), p1 = share.panel_end(panels.count());
    const int most = tile_rows<value, 2>(operand_width);
    for (long k = 0; k < panels.depth; k += piece) {
      const long left = panels.depth - k, part = left < piece ? left : piece;
      for (long p = p0; p < p1; p++)
        for_row_blocks(r0, r1, most, [&](long first, int count) {
          real* sums = sums_ + (p * a_.steps.batch + first) * width;
          tile_for<value, 2>(count)(part, operand + first * operand_width + k, operand_width,
                                    kTogether<value>, panels.panel(p) + k * width, sums, width,
                                    k > 0);
          if (part == left) finish<phase>(view, first, count, p, panels.columns, sums, resets);
        });
    }
  }

  const BackwardArgs<value>& a_;
  const long hidden_, output_;
  const bool carries_;  // part of dL/dh' does not go through the product
  const long gates_width_, delta_width_;
  const DeltaWindow window_;
  const typename WeightGradient<value>::Room room_;
  ColumnPanels<value> input_{}, first_{}, second_{};
  value *delta_ = nullptr, *dh_ = nullptr, *scratch_ = nullptr;
  real *carry_ = nullptr, *sums_ = nullptr, *wide_dx_ = nullptr;
  real* total_ = nullptr;  // where dL/dh_t is looked at before it goes on: of the rows of a step
  const value** previous_ = nullptr;
};

}  // namespace rnn_ext::RNN_EXT_TARGET
