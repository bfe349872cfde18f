// The products that follow the backward time loop: weight gradients, bias gradients, input
// gradient.
#pragma once
#include "cell_steps.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Rows of a matrix, either evenly spaced or each somewhere of its own.
template <class real>
struct Rows {
  const real* base;
  long stride;
  const real* const* each;  // or null
  RNN_EXT_INLINE const real* operator[](long k) const { return each ? each[k] : base + k * stride; }
};

// A register tile of two vectors, of which only the first `wide` columns of the result exist.
template <class real>
RNN_EXT_INLINE void add_tile(int rows, long depth, const real* a, long a_row, long a_step,
                             const real* b, real* c, long c_row, long wide, bool add) {
  constexpr int width = 2 * kLanes<real>;
  // The result comes from afar and is needed last: it arrives while the tile multiplies.
  for (int i = 0; i < rows; i++) {
    __builtin_prefetch(c + i * c_row, 1);
    __builtin_prefetch(c + i * c_row + kLanes<real>, 1);
  }
  if (wide == width) {
    tile_for<real, 2>(rows)(depth, a, a_row, a_step, b, c, c_row, add);
    return;
  }
  alignas(64) real part[kTileRows<2> * width];
  tile_for<real, 2>(rows)(depth, a, a_row, a_step, b, part, width, false);
  for (int i = 0; i < rows; i++)
    for (long l = 0; l < wide; l++) {
      real* to = c + i * c_row + l;
      *to = add ? *to + part[i * width + l] : part[i * width + l];
    }
}

// One product of the deltas: out[weight_row + m, n] = sum over k of delta[k, delta_column + m] x[k,
// n].
template <class real>
struct Target {
  Rows<real> x;
  long columns;
  real* out;
};

// Products of the same deltas with one or two matrices. One thread; packs strips of deltas and
// panels of x so that the register tile reads both in order.
template <class real>
class WeightGradient {
  static constexpr int lanes = kLanes<real>, width = 2 * lanes, strip = kTileRows<2>;
  static constexpr long kDepth = 256, kStrips = 44;

 public:
  static size_t scratch() { return size_t(kStrips) * strip * kDepth + width + kDepth * width; }

  // Rows [begin, end) of a segment; `scratch` is this thread's own.
  RNN_EXT_NOINLINE static void run(const Segment& segment, long begin, long end, const real* delta,
                                   long delta_width, const Target<real>* targets, int count,
                                   long depth, real* scratch) {
    real *strips = scratch, *panel = scratch + kStrips * strip * kDepth + width;
    const long strips_in_all = (end - begin + strip - 1) / strip;
    const long blocks = (strips_in_all + kStrips - 1) / kStrips;
    const long block = blocks ? (strips_in_all + blocks - 1) / blocks * strip : 1;
    for (long m = begin; m < end; m += block) {
      const long rows = end - m < block ? end - m : block;
      for (long k = 0; k < depth; k += kDepth) {
        const long part = depth - k < kDepth ? depth - k : kDepth;
        pack_strips(delta + k * delta_width + segment.delta_column + m, delta_width, rows, part,
                    strips);
        for (const Target<real>* target = targets; target < targets + count; target++)
          multiply(*target, segment.weight_row + m, rows, k, part, strips, panel);
      }
    }
  }

 private:
  static void multiply(const Target<real>& target, long row, long rows, long k, long depth,
                       const real* strips, real* panel) {
    for (long n = 0; n < target.columns; n += width) {
      const long wide = target.columns - n < width ? target.columns - n : width;
      pack_panel(target.x, k, depth, n, wide, panel);
      real* to = target.out + row * target.columns + n;
      for (long s = 0; s * strip < rows; s++) {
        const int count = rows - s * strip < strip ? int(rows - s * strip) : strip;
        add_tile<real>(count, depth, strips + s * strip * kDepth, 1, strip, panel,
                       to + s * strip * target.columns, target.columns, wide, k > 0);
      }
    }
  }

  // Whole registers are copied: what a row has too much, the next row overwrites. Rows of delta are
  // padded.
  static void pack_strips(const real* delta, long delta_width, long rows, long depth,
                          real* strips) {
    for (long s = 0; s * strip < rows; s++) {
      const real* from = delta + s * strip;
      real* to = strips + s * strip * kDepth;
      for (long k = 0; k < depth; k++, from += delta_width, to += strip) RNN_EXT_UNROLL
      for (int i = 0; i < strip; i += lanes) store(to + i, load(from + i));
    }
  }

  static void pack_panel(const Rows<real>& x, long first, long depth, long column, long wide,
                         real* panel) {
    for (long k = 0; k < depth; k++, panel += width) {
      const real* from = x[first + k] + column;
      if (wide == width) {
        store(panel, load(from));
        store(panel + lanes, load(from + lanes));
      } else {
        for (long l = 0; l < width; l++) panel[l] = l < wide ? from[l] : real(0);
      }
    }
  }
};

// Sum of one register's columns over rows, halved again and again: the rounding error grows with
// log(rows).
template <class real>
RNN_EXT_NOINLINE void sum_rows(const real* first, long stride, long rows, int lanes,
                               Vec<real>& sum) {
  constexpr long kFew = 16;
  sum = Vec<real>{};
  if (rows <= kFew) {
    for (long k = 0; k < rows; k++) sum += load(first + k * stride, lanes);
    return;
  }
  Vec<real> low, high;
  sum_rows(first, stride, rows / 2, lanes, low);
  sum_rows(first + rows / 2 * stride, stride, rows - rows / 2, lanes, high);
  sum = low + high;
}

// out[weight_row + u] = sum over rows of delta[row, delta_column + u] for u in [begin, end), to one
// or two places.
template <class real>
RNN_EXT_NOINLINE void bias_gradient(const Segment& segment, long begin, long end, const real* delta,
                                    long delta_width, long rows, real* out, real* also_out) {
  constexpr int w = kLanes<real>;
  for (long u = begin; u < end; u += w) {
    const int lanes = end - u < w ? int(end - u) : w;
    Vec<real> sum;
    sum_rows(delta + segment.delta_column + u, delta_width, rows, lanes, sum);
    if (out) store(out + segment.weight_row + u, sum, lanes);
    if (also_out) store(also_out + segment.weight_row + u, sum, lanes);
  }
}

// dx rows [begin, end) = sum over the segments of W x of delta times W.
template <class real>
RNN_EXT_NOINLINE void input_gradient(const Segment* segments, int count,
                                     const ColumnPanels<real>& panels, long begin, long end,
                                     const real* delta, long delta_width, real* dx) {
  constexpr int width = ColumnPanels<real>::width, strip = kTileRows<2>;
  constexpr long kBlock = 96;  // rows of delta and dx that stay in the cache while W passes by
  const long columns = panels.columns;
  for (long m = begin; m < end; m += kBlock) {
    const long stop = m + kBlock < end ? m + kBlock : end;
    bool first_sum = true;
    for (int s = 0; s < count; s++) {
      if (!segments[s].input) continue;
      for (long k = 0; k < segments[s].count; k += kSumLength, first_sum = false) {
        const long depth = segments[s].count - k < kSumLength ? segments[s].count - k : kSumLength;
        for (long p = 0; p < panels.count(); p++)
          for_row_blocks(m, stop, strip, [&](long first, int rows) {
            const long left = columns - p * width;
            add_tile<real>(rows, depth, delta + first * delta_width + segments[s].delta_column + k,
                           delta_width, 1, panels.panel(p) + (segments[s].weight_row + k) * width,
                           dx + first * columns + p * width, columns, left < width ? left : width,
                           !first_sum);
          });
      }
    }
  }
}

}  // namespace rnn_ext::RNN_EXT_TARGET
