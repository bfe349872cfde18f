// The products that follow the backward time loop: weight gradients, bias gradients, input gradient.
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

// out[rows, columns] = sum over k of delta[k, rows]^T x[k, columns]
template <class real>
class WeightGradient {
  static constexpr int lanes = kLanes<real>, width = 2 * lanes, strip = kTileRows<2>;
  static constexpr long kDepth = 128, kStrips = 20;

 public:
  static size_t scratch() { return size_t(kStrips) * strip * kDepth + strip + kDepth * width; }

  // Rows [begin, end) of a segment. One thread; `scratch` is its own.
  RNN_EXT_NOINLINE static void run(const Segment& segment, long begin, long end, const real* delta,
                                   long delta_width, const Rows<real>& x, long depth, long columns,
                                   real* out, real* scratch) {
    real *strips = scratch, *panel = scratch + kStrips * strip * kDepth + strip;
    for (long m = begin; m < end; m += kStrips * strip) {
      const long rows = end - m < kStrips * strip ? end - m : kStrips * strip;
      for (long k = 0; k < depth; k += kDepth) {
        const long part = depth - k < kDepth ? depth - k : kDepth;
        pack_strips(delta + k * delta_width + segment.delta_column + m, delta_width, rows, part,
                    strips);
        for (long n = 0; n < columns; n += width) {
          const long wide = columns - n < width ? columns - n : width;
          pack_panel(x, k, part, n, wide, panel);
          real* to = out + (segment.weight_row + m) * columns + n;
          for (long s = 0; s * strip < rows; s++) {
            const int count = rows - s * strip < strip ? int(rows - s * strip) : strip;
            accumulate(count, part, strips + s * strip * kDepth, panel, to + s * strip * columns,
                       columns, wide, k > 0);
          }
        }
      }
    }
  }

 private:
  static void pack_strips(const real* delta, long delta_width, long rows, long depth,
                          real* strips) {
    for (long s = 0; s * strip < rows; s++) {
      const real* from = delta + s * strip;
      real* to = strips + s * strip * kDepth;
      if (rows - s * strip >= strip) {
        for (long k = 0; k < depth; k++) RNN_EXT_UNROLL
        for (int i = 0; i < strip; i++) to[k * strip + i] = from[k * delta_width + i];
      } else {
        for (long k = 0; k < depth; k++)
          for (int i = 0; i < rows - s * strip; i++) to[k * strip + i] = from[k * delta_width + i];
      }
    }
  }

  static void pack_panel(const Rows<real>& x, long first, long depth, long column, long wide, real* panel) {
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

  static void accumulate(int rows, long depth, const real* strip_of_delta, const real* panel, real* to, long to_row,
                         long wide, bool add) {
    if (wide == width) {
      tile_for<real, 2>(rows)(depth, strip_of_delta, 1, strip, panel, to, to_row, add);
      return;
    }
    alignas(64) real part[strip * width];
    tile_for<real, 2>(rows)(depth, strip_of_delta, 1, strip, panel, part, width, false);
    for (int i = 0; i < rows; i++)
      for (long l = 0; l < wide; l++) to[i * to_row + l] = add ? to[i * to_row + l] + part[i * width + l] : part[i * width + l];
  }
};

// Sum of one register's columns over rows, halved again and again: the rounding error grows with log(rows).
template <class real>
RNN_EXT_NOINLINE void sum_rows(const real* first, long stride, long rows, int lanes, Vec<real>& sum) {
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

// out[weight_row + u] = sum over rows of delta[row, delta_column + u], for u in [begin, end)
template <class real>
RNN_EXT_NOINLINE void bias_gradient(const Segment& segment, long begin, long end, const real* delta, long delta_width,
                                    long rows, real* out) {
  constexpr int w = kLanes<real>;
  for (long u = begin; u < end; u += w) {
    const int lanes = end - u < w ? int(end - u) : w;
    Vec<real> sum;
    sum_rows(delta + segment.delta_column + u, delta_width, rows, lanes, sum);
    store(out + segment.weight_row + u, sum, lanes);
  }
}

// dx rows [begin, end) = sum over segments of delta W; panels hold the rows of W segment after segment.
template <class real>
RNN_EXT_NOINLINE void input_gradient(const Segment* segments, int count, const ColumnPanels<real>& panels, long begin,
                                     long end, const real* delta, long delta_width, real* dx) {
  constexpr int width = ColumnPanels<real>::width, strip = kTileRows<2>;
  constexpr long kBlock = 96;
  const long columns = panels.columns;
  alignas(64) real part[strip * width];
  for (long m = begin; m < end; m += kBlock) {
    const long stop = m + kBlock < end ? m + kBlock : end;
    for (long p = 0; p < panels.count(); p++) {
      const long left = columns - p * width, wide = left < width ? left : width;
      for_row_blocks(m, stop, strip, [&](long first, int rows) {
        real* to = dx + first * columns + p * width;
        real* target = wide == width ? to : part;
        const long target_row = wide == width ? columns : width;
        for (int s = 0; s < count; s++)
          tile_long<real, 2>(rows, segments[s].count, delta + first * delta_width + segments[s].delta_column,
                             delta_width, 1, panels.panel(p) + segments[s].weight_row * width, target, target_row,
                             s > 0);
        if (target == part)
          for (int i = 0; i < rows; i++)
            for (long l = 0; l < wide; l++) to[i * columns + l] = part[i * width + l];
      });
    }
  }
}

}  // namespace rnn_ext::RNN_EXT_TARGET
