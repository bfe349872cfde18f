// The backward walk in pieces, so that the deltas of some rows at a time are held, not of all.
//
// The sums over rows come in blocks counted from row 0 (SumOrder in gradients.h). The rows of a
// piece are summed as far as they fill blocks. The others wait for the next piece, and so do the
// rows of its last step, which the next step's product reads. So a piece ends with a block where a
// step does; else anywhere.
#pragma once
#include <cstring>

#include "isa.h"
#include "problem.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Deltas of rows [base, base + capacity), and with a projection their dL/dh.
template <class value>
struct Held {
  value *delta, *dh;
  long width, dh_width, base;
  RNN_EXT_INLINE value* delta_of(long row) const { return delta + (row - base) * width; }
  RNN_EXT_INLINE value* dh_of(long row) const {
    return dh ? dh + (row - base) * dh_width : nullptr;
  }
};

class DeltaWindow {
 public:
  // `least`: rows that one piece is to have
  DeltaWindow(const Steps& steps, long block, long least)
      : steps_(steps), block_(block), next_(steps.count - 1) {
    const long batch = steps.batch, longest = batch > block ? batch : block;
    const bool in_step = steps.total() == steps.count * batch && batch && block % batch == 0;
    capacity_ = (in_step ? batch : longest) + (least > longest ? least : longest) + batch;
    if (capacity_ > steps.total()) capacity_ = steps.total();
    begin = end = open_ = steps.reverse ? 0 : steps.total();
    base = steps.reverse ? 0 : steps.total() - capacity_;
    plan();
  }

  long capacity() const { return capacity_; }
  long base;             // the row that the first place belongs to
  long first, end_step;  // this piece: the steps at(first), at(first - 1), ..., at(end_step + 1)
  long begin, end;       // the rows that it completes
  bool last() const { return next_ < 0; }

  // To the next piece, before which rows [keep_begin, keep_end) move to where its base puts them.
  long keep_begin, keep_end;
  void advance() {
    base = next_base();
    plan();
  }
  long next_base() const { return steps_.reverse ? keep_begin : keep_end - capacity_; }

 private:
  void plan() {
    first = next_;
    while (next_ >= 0 && fits(steps_.at(next_))) next_--;
    if (!last())
      for (long i = next_ + 1; i <= first; i++)
        if (ends_block(steps_.at(i))) {
          next_ = i - 1;
          break;
        }
    end_step = next_;
    const long t = steps_.at(next_ + 1);
    const long of_step = steps_.begin(t), after = of_step + steps_.rows(t);
    if (steps_.reverse) {
      begin = open_;
      open_ = end = last() ? steps_.total() : after / block_ * block_;
      keep_begin = end < of_step ? end : of_step;
      keep_end = after;
    } else {
      end = open_;
      open_ = begin = last() ? 0 : (of_step + block_ - 1) / block_ * block_;
      keep_begin = of_step;
      keep_end = begin > after ? begin : after;
    }
  }
  bool ends_block(long t) const {
    return (steps_.begin(t) + (steps_.reverse ? steps_.rows(t) : 0)) % block_ == 0;
  }
  bool fits(long t) const {
    return steps_.reverse ? steps_.begin(t) + steps_.rows(t) <= base + capacity_
                          : steps_.begin(t) >= base;
  }

  const Steps& steps_;
  long block_, capacity_, next_, open_;
};

// Moves the rows that are kept to where the next base puts them: this member's columns of them.
template <class value>
void move_kept(value* rows, long width, const DeltaWindow& window, long begin, long end) {
  const long from = window.keep_begin - window.base, to = window.keep_begin - window.next_base();
  const long count = window.keep_end - window.keep_begin;
  for (long i = 0; i < count; i++) {
    const long row = to > from ? count - 1 - i : i;
    std::memcpy(rows + (to + row) * width + begin, rows + (from + row) * width + begin,
                (end - begin) * sizeof(value));
  }
}

}  // namespace rnn_ext::RNN_EXT_TARGET
