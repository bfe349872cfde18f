// The products that follow the backward time loop: weight gradients, bias gradients, input
// gradient.
#pragma once
#include "cell_steps.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Rows of a matrix, either evenly spaced or each somewhere of its own.
template <class value>
struct Rows {
  const value* base;
  long stride;               // of base, or of each
  const value* const* each;  // or null
  RNN_EXT_INLINE const value* operator[](long k) const {
    return each ? each[k * stride] : base + k * stride;
  }
};

// A register tile of two vectors, of which only the first `wide` columns of the result exist.
template <class value>
RNN_EXT_INLINE void add_tile(int rows, long depth, const value* a, long a_row, long a_step,
                             const value* b, Real<value>* c, long c_row, long wide, bool add,
                             bool chained = true) {
  using real = Real<value>;
  constexpr int width = 2 * kLanes<value>;
  const auto multiply = chained ? tile_for<value, 2>(rows) : tile_for<value, 2, false>(rows);
  // The result comes from afar and is needed last: it arrives while the tile multiplies.
  for (int i = 0; i < rows; i++) {
    __builtin_prefetch(c + i * c_row, 1);
    __builtin_prefetch(c + i * c_row + kLanes<value>, 1);
  }
  if (wide == width) {
    multiply(depth, a, a_row, a_step, b, c, c_row, add);
    return;
  }
  alignas(64) real part[kTileRows<2> * width];
  multiply(depth, a, a_row, a_step, b, part, width, false);
  for (int i = 0; i < rows; i++)
    for (long l = 0; l < wide; l++) {
      real* to = c + i * c_row + l;
      *to = add ? *to + part[i * width + l] : part[i * width + l];
    }
}

// One product of the deltas: out[weight_row + m, n] = sum over k of delta[k, delta_column + m] x[k,
// n].
template <class value>
struct Target {
  Rows<value> x;
  long columns;
  Real<value>* out;
};

// Sums over the rows of delta are cut into blocks of kSumLength rows, counted from row 0, and added
// up in the order in which the backward time loop comes to them, onto what is there already with
// `add`: a sequence that is cut where blocks end (delta_window.h, rnn_ext/recompute.py) gives the same numbers.
struct SumOrder {
  bool descending, add;

  // Calls body(first row, rows, whether the result starts from what is there).
  template <class Body>
  RNN_EXT_INLINE void for_blocks(long rows, long length, const Body& body) const {
    const long blocks = (rows + length - 1) / length;
    for (long i = 0; i < blocks; i++) {
      const long k = (descending ? blocks - 1 - i : i) * length;
      body(k, rows - k < length ? rows - k : length, add || i > 0);
    }
  }
};

// Products of the same deltas with one or two matrices. One thread; packs strips of deltas and
// panels of x so that the register tile reads both in order.
template <class value>
class WeightGradient {
  using real = Real<value>;
  using F = Factors<value>;
  static constexpr int lanes = kLanes<value>, width = 2 * lanes, strip = kTileRows<2>;
  static constexpr int together = kTogether<value>;
  static constexpr long kDepth = kSumLength<value>, kStrips = 44;

 public:
  // How much is packed at a time: strips of deltas, and rows of them and of x.
  struct Room {
    long strips, depth;
    size_t size() const {
      return size_t(strips) * strip * depth + width * together + depth * width;
    }
  };
  // For a result with so many rows, summed over so many.
  static Room room_for(long rows, long depth) {
    const long all = (rows + strip - 1) / strip,
               whole = (depth + together - 1) / together * together;
    return {all < kStrips ? all : kStrips, whole < kDepth ? whole : kDepth};
  }

  // Rows [begin, end) of a segment; `scratch` is this thread's own, of room.size().
  RNN_EXT_NOINLINE static void run(const Segment& segment, long begin, long end, const value* delta,
                                   long delta_width, const Target<value>* targets, int count,
                                   long depth, SumOrder order, const Room& room, value* scratch) {
    value* strips = scratch;
    value* panel = scratch + room.strips * strip * room.depth + width * together;
    const long strips_in_all = (end - begin + strip - 1) / strip;
    const long blocks = (strips_in_all + room.strips - 1) / room.strips;
    const long block = blocks ? (strips_in_all + blocks - 1) / blocks * strip : 1;
    for (long m = begin; m < end; m += block) {
      const long rows = end - m < block ? end - m : block;
      order.for_blocks(depth, kDepth, [&](long k, long part, bool add) {
        pack_strips(delta + k * delta_width + segment.delta_column + m, delta_width, rows, part,
                    room.depth, strips);
        for (const Target<value>* target = targets; target < targets + count; target++)
          multiply(*target, segment.weight_row + m, rows, k, part, add, room.depth, strips, panel);
      });
    }
  }

 private:
  static void multiply(const Target<value>& target, long row, long rows, long k, long depth,
                       bool add, long strip_depth, const value* strips, value* panel) {
    for (long n = 0; n < target.columns; n += width) {
      const long wide = target.columns - n < width ? target.columns - n : width;
      pack_panel(target.x, k, depth, n, wide, panel);
      real* to = target.out + row * target.columns + n;
      for (long s = 0; s * strip < rows; s++) {
        const int count = rows - s * strip < strip ? int(rows - s * strip) : strip;
        add_tile<value>(count, depth, strips + s * strip * strip_depth, together, strip * together,
                        panel, to + s * strip * target.columns, target.columns, wide, add);
      }
    }
  }

  // Whole registers are copied: what a row has too much, the next row overwrites. Rows of delta are
  // padded.
  static void pack_strips(const value* delta, long delta_width, long rows, long depth,
                          long strip_depth, value* strips) {
    for (long s = 0; s * strip < rows; s++) {
      const value* from = delta + s * strip;
      value* to = strips + s * strip * strip_depth;
      for (long k = 0; k < depth; k += together, from += together * delta_width) {
        const value* next = k + 1 < depth ? from + delta_width : nullptr;
        RNN_EXT_UNROLL
        for (int i = 0; i < strip; i += lanes)
          F::store_groups(to + i * together, F::columns(from + i, next ? next + i : next, lanes));
        to += strip * together;
      }
    }
  }

  static void pack_panel(const Rows<value>& x, long first, long depth, long column, long wide,
                         value* panel) {
    for (long k = 0; k < depth; k += together, panel += width * together) {
      const bool both = together > 1 && k + 1 < depth;
      ColumnPanels<value>::pack_rows(x[first + k] + column,
                                     both ? x[first + k + 1] + column : nullptr, wide, panel);
    }
  }
};

// Sum of one register's columns over rows, halved again and again: the rounding error grows with
// log(rows).
template <class value>
RNN_EXT_NOINLINE void sum_rows(const value* first, long stride, long rows, int lanes,
                               Vec<value>& sum) {
  constexpr long kFew = 16;
  sum = Vec<value>{};
  if (rows <= kFew) {
    for (long k = 0; k < rows; k++) sum += load(first + k * stride, lanes);
    return;
  }
  Vec<value> low, high;
  sum_rows(first, stride, rows / 2, lanes, low);
  sum_rows(first + rows / 2 * stride, stride, rows - rows / 2, lanes, high);
  sum = low + high;
}

// out[weight_row + u] = sum over rows of delta[row, delta_column + u] for u in [begin, end), to one
// or two places.
template <class value>
RNN_EXT_NOINLINE void bias_gradient(const Segment& segment, long begin, long end,
                                    const value* delta, long delta_width, long rows, SumOrder order,
                                    Real<value>* out, Real<value>* also_out) {
  constexpr int w = kLanes<value>;
  for (long u = begin; u < end; u += w) {
    const int lanes = end - u < w ? int(end - u) : w;
    Vec<value> sum{};
    if (order.add) sum = load((out ? out : also_out) + segment.weight_row + u, lanes);
    order.for_blocks(rows, kSumLength<value>, [&](long k, long part, bool) {
      Vec<value> of_block;
      sum_rows(delta + k * delta_width + segment.delta_column + u, delta_width, part, lanes,
               of_block);
      sum += of_block;
    });
    if (out) store(out + segment.weight_row + u, sum, lanes);
    if (also_out) store(also_out + segment.weight_row + u, sum, lanes);
  }
}

constexpr long kInputRows = 96;  // of delta and dx: they stay in the cache while W passes by

// How much working memory input_gradient needs for each thread.
template <class value>
constexpr size_t input_sums(long columns) {
  return kTogether<value> > 1 ? kInputRows * columns + 16 : 0;
}

// dx rows [begin, end) = sum over the segments of W x of delta times W; `sums` is this thread's
// own, for what dx cannot hold before it is complete.
template <class value>
RNN_EXT_NOINLINE void input_gradient(const Segment* segments, int count,
                                     const ColumnPanels<value>& panels, long begin, long end,
                                     const value* delta, long delta_width, value* dx,
                                     Real<value>* sums, bool chained) {
  constexpr int width = ColumnPanels<value>::width, w = kLanes<value>;
  const int most = tile_rows<value, 2>(delta_width);
  constexpr long piece = kSumLength<value>;
  const long columns = panels.columns;
  for (long m = begin; m < end; m += kInputRows) {
    const long stop = m + kInputRows < end ? m + kInputRows : end;
    Real<value>* to = sums;
    if constexpr (kTogether<value> == 1) to = dx + m * columns;
    bool first_sum = true;
    for (int s = 0; s < count; s++) {
      if (!segments[s].input) continue;
      for (long k = 0; k < segments[s].count; k += piece, first_sum = false) {
        const long depth = segments[s].count - k < piece ? segments[s].count - k : piece;
        for (long p = 0; p < panels.count(); p++)
          for_row_blocks(m, stop, most, [&](long first, int rows) {
            const long left = columns - p * width;
            add_tile<value>(rows, depth, delta + first * delta_width + segments[s].delta_column + k,
                            delta_width, kTogether<value>,
                            panels.panel(p) + (segments[s].weight_row + k) * width,
                            to + (first - m) * columns + p * width, columns,
                            left < width ? left : width, !first_sum, chained);
          });
      }
    }
    if constexpr (kTogether<value> > 1)
      for (long i = 0, all = (stop - m) * columns; i < all; i += w)
        store(dx + m * columns + i, load(sums + i), all - i < w ? int(all - i) : w);
  }
}

}  // namespace rnn_ext::RNN_EXT_TARGET
