// The forward time loop, once for all cells.
//   per chunk of steps: gates = x W of the chunk (one product, kept in cache);
//   per step and phase: product with the recurrent weights, gate maths on the registers that
//   hold it.
// Threads own rows (no waiting) or hidden units (a barrier after each phase).
#pragma once
#include "zoneout.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Rows of gates that one chunk of the input projection covers: they are used while they are in the
// cache.
constexpr long kProjectionRows = 240;

// What part of a step's rows and of a product's panels belongs to a member of the team.
struct Share {
  const Member& member;
  Split split;
  long batch;

  RNN_EXT_INLINE long row_begin() const { return split == Split::kRows ? member.begin(batch) : 0; }
  RNN_EXT_INLINE long row_end(long rows) const {
    const long end = split == Split::kRows ? member.end(batch) : rows;
    return end < rows ? end : rows;
  }
  RNN_EXT_INLINE long panel_begin(long panels) const {
    return split == Split::kColumns ? member.begin(panels) : 0;
  }
  RNN_EXT_INLINE long panel_end(long panels) const {
    return split == Split::kColumns ? member.end(panels) : panels;
  }
  RNN_EXT_INLINE void wait() const {
    if (split == Split::kColumns) member.wait();
  }
};

template <class value, class Shape, class Body>
RNN_EXT_INLINE void for_units(long panel, long units, const Body& body) {
  for (int b = 0; b < Shape::blocks; b++) {
    const long block = panel * Shape::blocks + b, left = units - block * kLanes<value>;
    if (left <= 0) return;
    body(b, block, left < kLanes<value> ? int(left) : kLanes<value>);
  }
}

// Calls body(first, count) for neighbours among the rows [0, count) that `same` does not tell apart.
template <class Same, class Body>
RNN_EXT_INLINE void for_runs(int count, const Same& same, const Body& body) {
  for (int i = 0, end; i < count; i = end) {
    for (end = i + 1; end < count && same(i, end);) end++;
    body(i, end - i);
  }
}

// Reads: products [rows][Shape::vectors * kLanes]. Writes: what Cell::forward<phase> writes. One
// thread.
template <class value, class Cell, class Shape, int phase, bool save>
RNN_EXT_NOINLINE void finish_forward(const ForwardView<value>& view, long first, int rows,
                                     long panel, long units, const Real<value>* products) {
  constexpr int stride = Shape::vectors * kLanes<value>;
  for (int i = 0; i < rows; i++)
    for_units<value, Shape>(
        panel, units, [&](int b, long block, int lanes) __attribute__((always_inline)) {
          Vec<value> product[Shape::gates];
          RNN_EXT_UNROLL
          for (int g = 0; g < Shape::gates; g++)
            product[g] = load(products + i * stride + (b * Shape::gates + g) * kLanes<value>);
          Cell::template forward<phase, save>(view, first + i, block, lanes, product);
        });
}

template <class value, class Cell, bool save>
class Forward {
  using real = Real<value>;
  using First = typename Cell::First;
  using Gates = typename Cell::Gates;
  static constexpr int lanes = kLanes<value>;

 public:
  // stepwise: driven by a loop outside (generate.h) over calls of one step, with the functions that
  // follow run().
  explicit Forward(const ForwardArgs<value>& args, bool stepwise = false)
      : a_(args),
        stepwise_(stepwise),
        hidden_(args.sizes.hidden),
        output_(args.sizes.output),
        width_(panels_of<value, Gates>(hidden_) * Gates::vectors * lanes) {
    input_ = {a_.weights.ih, hidden_, a_.sizes.input, nullptr};
    first_ = {a_.weights.hh, hidden_, output_, nullptr};
    if constexpr (Cell::has_cell_state)
      second_ = {a_.weights.hr, output_, hidden_, nullptr};
    else
      second_ = {a_.weights.hh + Cell::recurrent_gates * hidden_ * output_, hidden_, hidden_,
                 nullptr};
    keep_all_gates_ = save && Cell::keeps_gates && a_.gates;
    keep_all_middle_ = save && a_.middle;
  }

  void run() {
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    pack_bias();
    run_team(a_.plan.threads, [this](const Member& m) { work(m); });
  }

  // lay_out and pack_bias come once, and pack_weights on all members; then project and step on all,
  // in turn with what the loop puts in the arguments (x, h0 and out of a step).
  void lay_out(Arena& arena) {
    bias_ = arena.take<real>(width_);
    hidden_bias_ = arena.take<real>(blocks_of<value>(hidden_) * lanes);
    if (a_.plan.pack) {
      const size_t of_input = Panels<value, Gates>::size(hidden_, a_.sizes.input);
      const size_t of_first = Panels<value, First>::size(hidden_, output_);
      const bool leads = input_leads() && of_input > of_first;
      first_.packed = arena.take<value>(leads ? of_input : of_first);
      input_.packed = input_leads() ? first_.packed : arena.take<value>(of_input);
      if constexpr (Cell::phases == 2)
        second_.packed = arena.take<value>(Panels<value, PlainPanel>::size(second_.units, hidden_));
    }
    gates_ = keep_all_gates_ ? a_.gates : arena.take<real>(chunk_rows() * width_);
    middle_ = keep_all_middle_ || !Cell::keeps_middle ? a_.middle
                                                      : arena.take<value>(a_.steps.batch * hidden_);
  }

  // bias_: b_ih + b_hh in the order of the gates; a cell with split_bias keeps b_hh of its last
  // gate apart.
  void pack_bias() {
    const Weights<value>& w = a_.weights;
    for (long i = 0; i < width_; i++) bias_[i] = 0;
    for (long i = 0; i < blocks_of<value>(hidden_) * lanes; i++) hidden_bias_[i] = 0;
    if (!w.b_ih) return;
    for (long u = 0; u < hidden_; u++)
      for (int g = 0; g < Cell::gates; g++) {
        const bool apart = Cell::split_bias && g == Cell::gates - 1;
        const long row = g * hidden_ + u;
        bias_[(u / lanes * Cell::gates + g) * lanes + u % lanes] =
            w.b_ih[row] + (apart ? real(0) : w.b_hh[row]);
        if (apart) hidden_bias_[u] = w.b_hh[row];
      }
  }

  real* gates() const { return gates_; }  // x W of the step's rows
  long gates_width() const { return width_; }
  // This member's part of a row of gates.
  long gates_begin(const Member& m) const {
    return m.begin(input_.count()) * Gates::vectors * lanes;
  }
  long gates_end(const Member& m) const { return m.end(input_.count()) * Gates::vectors * lanes; }
  void pack_weights(const Member& member) const {
    if (!a_.plan.pack) return;
    pack(input_, member);
    if (!input_leads()) pack(first_, member);
    if constexpr (Cell::phases == 2) pack(second_, member);
  }
  void project(const Member& member) const { project(share_of(member), 0, 1); }
  void step(const Member& member) const { step(share_of(member), 0, 0); }

 private:
  long chunk_steps() const {
    const long steps = kProjectionRows / (a_.steps.batch ? a_.steps.batch : 1);
    return steps < 1 ? 1 : steps > a_.steps.count ? a_.steps.count : steps;
  }
  // All steps are one chunk: the recurrent weights take the place of W.
  bool input_leads() const { return !stepwise_ && chunk_steps() == a_.steps.count; }
  long chunk_rows() const { return chunk_steps() * a_.steps.batch; }

  template <class Shape>
  static void pack(const Panels<value, Shape>& panels, const Member& m) {
    panels.pack(m.begin(panels.count()), m.end(panels.count()));
  }

  Share share_of(const Member& member) const {
    return {member, member.count == 1 ? Split::kNone : a_.plan.split, a_.steps.batch};
  }

  void work(const Member& member) const {
    const Share share = share_of(member);
    pack_weights(member);
    if (a_.plan.pack) member.wait();
    const long steps = chunk_steps();
    for (long i = 0; i < a_.steps.count; i += steps) {
      const long end = i + steps < a_.steps.count ? i + steps : a_.steps.count;
      const long low = a_.steps.reverse ? a_.steps.at(end - 1) : a_.steps.at(i);
      project(share, low, low + (end - i));
      if (a_.plan.pack && input_leads()) {
        member.wait();
        pack(first_, member);
        member.wait();
      }
      for (long j = i; j < end; j++) step(share, a_.steps.at(j), low);
    }
  }

  // Row of gates_ where step t of a chunk that starts at step `low` begins. Members that own rows
  // run ahead of each other, so there a row must have the same place in every chunk.
  long gates_row(const Share& share, long t, long low) const {
    if (keep_all_gates_) return a_.steps.begin(t);
    return share.split == Split::kRows ? (t - low) * a_.steps.batch
                                       : a_.steps.begin(t) - a_.steps.begin(low);
  }

  // gates = x W for the steps [low, high), this member's part. A row's values are the same in
  // whatever chunk it stands: a part of a sequence gives what the whole gave.
  void project(const Share& share, long low, long high) const {
    const long p0 = share.panel_begin(input_.count()), p1 = share.panel_end(input_.count());
    const int most = tile_rows<value, Gates::vectors>(a_.sizes.input);
    const auto rows = [&](long begin, long end, long base) {
      for (long m = begin; m < end; m += kProjectionRows) {
        const long stop = m + kProjectionRows < end ? m + kProjectionRows : end;
        for (long p = p0; p < p1; p++)
          for_row_blocks(m, stop, most, [&](long first, int count) {
            input_.template multiply<false>(
                p, count, a_.x + first * a_.sizes.input, a_.sizes.input,
                gates_ + (first - base) * width_ + p * Gates::vectors * lanes, width_, false);
          });
      }
    };
    if (share.split != Split::kRows) {
      rows(a_.steps.begin(low), a_.steps.begin(high),
           a_.steps.begin(low) - gates_row(share, low, low));
    } else {
      for (long t = low; t < high; t++)
        rows(a_.steps.begin(t) + share.row_begin(),
             a_.steps.begin(t) + share.row_end(a_.steps.rows(t)),
             a_.steps.begin(t) - gates_row(share, t, low));
    }
  }

  void step(const Share& share, long t, long low) const {
    const long rows = a_.steps.rows(t), carried = a_.steps.carried(t), at = a_.steps.begin(t);
    const long before = carried ? a_.steps.begin(a_.steps.previous(t)) : 0;
    ForwardView<value> v{};
    v.hidden = hidden_;
    v.output = output_;
    v.gates_width = width_;
    v.gates = gates_ + gates_row(share, t, low) * width_;
    v.bias = bias_;
    v.hidden_bias = hidden_bias_;
    v.h = a_.out + at * output_;
    v.middle = middle_ + (keep_all_middle_ ? at * hidden_ : 0);
    v.c = a_.c + (save && Cell::has_cell_state ? at * hidden_ : 0);
    v.hold_h = a_.zoneout.h.from(at * output_);
    v.hold_c = a_.zoneout.c.from(at * hidden_);
    ForwardView<value> fresh = v, reset = v;
    v.h_prev = a_.out + before * output_;
    v.c_prev = save ? a_.c + before * hidden_ : a_.c;
    fresh.h_prev = a_.h0;
    fresh.c_prev = save ? a_.c0 : a_.c;
    reset.h_prev = a_.resets.h;
    reset.c_prev = a_.resets.c;
    const bool* resets = a_.resets.among(at, rows);

    const long r0 = share.row_begin(), r1 = share.row_end(rows);
    const long middle = r0 > carried ? r0 : r1 < carried ? r1 : carried;
    phase<0>(first_, share, v, v.h_prev, output_, r0, middle, hidden_, resets, reset);
    phase<0>(first_, share, fresh, fresh.h_prev, output_, middle, r1, hidden_, resets, reset);
    share.wait();
    if constexpr (Cell::phases == 2) {
      phase<1>(second_, share, v, v.middle, hidden_, r0, middle, second_.units, resets, reset);
      phase<1>(second_, share, fresh, v.middle, hidden_, middle, r1, second_.units, resets, reset);
      share.wait();
    }
  }

  template <int phase_index, class Shape>
  void phase(const Panels<value, Shape>& panels, const Share& share, const ForwardView<value>& view,
             const value* operand, long operand_width, long r0, long r1, long units,
             const bool* resets, const ForwardView<value>& reset) const {
    if (r0 >= r1) return;
    alignas(64) real products[kTileRows<Shape::vectors> * Shape::vectors * lanes];
    const long p1 = share.panel_end(panels.count());
    const int most = tile_rows<value, Shape::vectors>(operand_width);
    for (long p = share.panel_begin(panels.count()); p < p1; p++)
      for_row_blocks(r0, r1, most, [&](long first, int count) {
        panels.multiply(p, count, operand + first * operand_width, operand_width, products,
                        Shape::vectors * lanes, false);
        if (resets)
          finish_some_reset<phase_index>(panels, view, first, count, p, units, products, resets,
                                         reset);
        else
          finish<phase_index, Shape>(view, first, count, p, units, products);
      });
  }

  template <int phase_index, class Shape>
  RNN_EXT_INLINE void finish(const ForwardView<value>& view, long first, int count, long panel,
                             long units, const real* products) const {
    if (a_.zoneout.on)
      finish_forward<value, Zoned<value, Cell>, Shape, phase_index, save>(view, first, count, panel,
                                                                          units, products);
    else
      finish_forward<value, Cell, Shape, phase_index, save>(view, first, count, panel, units,
                                                            products);
  }

  // `finish` where rows may start afresh: those from `reset` instead of `view`.
  template <int phase_index, class Shape>
  RNN_EXT_NOINLINE void finish_some_reset(const Panels<value, Shape>& panels,
                                          const ForwardView<value>& view, long first, int count,
                                          long panel, long units, real* products,
                                          const bool* resets,
                                          const ForwardView<value>& reset) const {
    constexpr int stride = Shape::vectors * lanes;
    const bool* is_reset = resets + first;
    for_runs(
        count, [&](int i, int k) { return is_reset[i] == is_reset[k]; },
        [&](int i, int rows) {
          real* run = products + i * stride;
          if (phase_index == 0 && is_reset[i]) {
            if (a_.resets.zero)
              std::memset(run, 0, rows * stride * sizeof(real));
            else
              panels.multiply(panel, rows, a_.resets.h + (first + i) * output_, output_, run,
                              stride, false);
          }
          finish<phase_index, Shape>(is_reset[i] ? reset : view, first + i, rows, panel, units,
                                     run);
        });
  }

  const ForwardArgs<value>& a_;
  const bool stepwise_;
  const long hidden_, output_, width_;
  bool keep_all_gates_ = false, keep_all_middle_ = false;
  Panels<value, Gates> input_{};
  Panels<value, First> first_{};
  Panels<value, PlainPanel> second_{};
  real *bias_ = nullptr, *hidden_bias_ = nullptr, *gates_ = nullptr;
  value* middle_ = nullptr;
};

}  // namespace rnn_ext::RNN_EXT_TARGET
