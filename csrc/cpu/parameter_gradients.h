// The gradients of weights and biases, of the rows that a piece of the backward walk completes.
#pragma once
#include "delta_window.h"
#include "gradients.h"

namespace rnn_ext::RNN_EXT_TARGET {

struct RowRange {
  long begin, end;
  long count() const { return end - begin; }
};

// Of one group of sequences; see BackwardArgs::groups.
template <class Cell, class value>
void parameters_of_group(const BackwardArgs<value>& a, const Member& m, const Segment* segments,
                         int count, const Held<value>& held, const RowRange& range, bool add,
                         const value* const* previous, long group,
                         const typename WeightGradient<value>::Room& room, value* scratch) {
  using real = Real<value>;
  const long hidden = a.sizes.hidden, output = a.sizes.output;
  const long step = a.groups, rows = range.count() / step, first = range.begin + group;
  const long all = Cell::gates * hidden;
  const SumOrder order{!a.steps.reverse, add};
  const value* delta = held.delta_of(first);
  const auto of_group = [&](real* d, long size) { return d ? d + group * size : nullptr; };
  const auto rows_of = [&](const value* matrix, long columns) {
    return Rows<value>{matrix + first * columns, step * columns, nullptr};
  };
  real *dw_ih = of_group(a.dw_ih, all * a.sizes.input), *dw_hh = of_group(a.dw_hh, all * output);
  for (const Segment* s = segments; s < segments + count; s++) {
    const long begin = m.begin(s->count), end = m.end(s->count);
    Target<value> targets[2];
    int wanted = 0;
    if (dw_ih && s->input) targets[wanted++] = {rows_of(a.x, a.sizes.input), a.sizes.input, dw_ih};
    if (dw_hh && s->recurrent == Operand::kPreviousState)
      targets[wanted++] = {{nullptr, step, previous + first}, output, dw_hh};
    if (dw_hh && s->recurrent == Operand::kMiddle)
      targets[wanted++] = {rows_of(a.middle, hidden), hidden, dw_hh};
    if (wanted)
      WeightGradient<value>::run(*s, begin, end, delta, step * held.width, targets, wanted, rows,
                                 order, room, scratch);
    real* db_ih = s->input ? of_group(a.db_ih, all) : nullptr;
    real* db_hh = s->recurrent != Operand::kNone ? of_group(a.db_hh, all) : nullptr;
    if (db_ih || db_hh)
      bias_gradient(*s, begin, end, delta, step * held.width, rows, order, db_ih, db_hh);
  }
  if (a.dw_hr) {
    const Target<value> target{rows_of(a.middle, hidden), hidden,
                               of_group(a.dw_hr, output * hidden)};
    WeightGradient<value>::run({0, 0, output, false, Operand::kNone}, m.begin(output),
                               m.end(output), held.dh_of(first), step * output, &target, 1, rows,
                               order, room, scratch);
  }
}

// The members share the rows of the weights, or the groups where there are several. `scratch` has
// room.size() for each.
template <class Cell, class value>
void parameters_of(const BackwardArgs<value>& a, const Member& m, const Segment* segments,
                   int count, const Held<value>& held, const RowRange& range, bool add,
                   const value* const* previous, const typename WeightGradient<value>::Room& room,
                   value* scratch) {
  scratch += m.id * room.size();
  const auto of = [&](const Member& sharing, long group) {
    parameters_of_group<Cell>(a, sharing, segments, count, held, range, add, previous, group, room,
                              scratch);
  };
  if (a.groups == 1) return of(m, 0);
  const Member alone{0, 1, nullptr};
  for (long group = m.begin(a.groups); group < m.end(a.groups); group++) of(alone, group);
}

}  // namespace rnn_ext::RNN_EXT_TARGET
