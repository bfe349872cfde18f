// Weight matrices cut into panels, so that one register tile holds every gate of the units it
// computes.
#pragma once
#include "tile.h"

namespace rnn_ext::RNN_EXT_TARGET {

// A panel covers `blocks` neighbouring blocks of kLanes units, and for each of them `gates`
// vectors.
template <int gates_, int blocks_>
struct PanelShape {
  static constexpr int gates = gates_, blocks = blocks_, vectors = gates_ * blocks_;
};
using PlainPanel = PanelShape<1, 2>;

template <class real>
RNN_EXT_INLINE long blocks_of(long units) {
  return (units + kLanes<real> - 1) / kLanes<real>;
}

template <class real, class Shape>
RNN_EXT_INLINE long panels_of(long units) {
  return (blocks_of<real>(units) + Shape::blocks - 1) / Shape::blocks;
}

// The right-hand side of y = W x, for W of `gates` matrices [units, depth] stored one under the
// other. Packed: panel p is [depth][blocks][gates][kLanes], zero beyond the last unit. Not packed:
// read where it is.
template <class real, class Shape>
struct Panels {
  const real* rows;  // W
  long units, depth;
  real* packed;  // null: not packed

  static size_t size(long units, long depth) {
    return size_t(panels_of<real, Shape>(units)) * depth * Shape::vectors * kLanes<real>;
  }
  long count() const { return panels_of<real, Shape>(units); }

  // Row of W that stands first in vector `v` of panel p, and how many rows of it exist.
  RNN_EXT_INLINE const real* first_row(long p, int v, int& lanes) const {
    const long unit = (p * Shape::blocks + v / Shape::gates) * kLanes<real>;
    const long left = units - unit;
    lanes = left <= 0 ? 0 : left < kLanes<real> ? int(left) : kLanes<real>;
    return rows + (v % Shape::gates * units + unit) * depth;
  }

  // Writes panels [begin, end).
  RNN_EXT_NOINLINE void pack(long begin, long end) const {
    constexpr int lanes = kLanes<real>;
    constexpr long stride = Shape::vectors * lanes;
    for (long p = begin; p < end; p++)
      for (int v = 0; v < Shape::vectors; v++) {
        int valid;
        const real* from = first_row(p, v, valid);
        real* to = packed + p * depth * stride + v * lanes;
        long k = 0;
        if (valid == lanes)
          for (; k + lanes <= depth; k += lanes) {
            Vec<real> square[lanes];
            RNN_EXT_UNROLL
            for (int l = 0; l < lanes; l++) square[l] = load(from + l * depth + k);
            transpose<real>(square);
            RNN_EXT_UNROLL
            for (int l = 0; l < lanes; l++) store(to + (k + l) * stride, square[l]);
          }
        for (; k < depth; k++)
          for (int l = 0; l < lanes; l++)
            to[k * stride + l] = l < valid ? from[l * depth + k] : real(0);
      }
  }

  // c[row_count][vectors * kLanes] (+)= rows a times panel p
  RNN_EXT_INLINE void multiply(long p, int row_count, const real* a, long a_row, real* c,
                               long c_row, bool accumulate) const {
    if (packed)
      tile_long<real, Shape::vectors>(row_count, depth, a, a_row, 1,
                                      packed + p * depth * Shape::vectors * kLanes<real>, c, c_row,
                                      accumulate);
    else
      multiply_in_place(p, row_count, a, a_row, c, c_row, accumulate);
  }

 private:
  // Dot products with rows of W as they lie: kLanes of them side by side, summed across by a
  // transposition.
  RNN_EXT_NOINLINE void multiply_in_place(long p, int row_count, const real* a, long a_row, real* c,
                                          long c_row, bool accumulate) const {
    constexpr int lanes = kLanes<real>;
    for (int v = 0; v < Shape::vectors; v++) {
      int valid;
      const real* w = first_row(p, v, valid);
      for (int i = 0; i < row_count; i++) {
        real* out = c + i * c_row + v * lanes;
        Vec<real> sum = dots(w, valid, a + i * a_row);
        store(out, accumulate ? load(out) + sum : sum);
      }
    }
  }

  RNN_EXT_INLINE Vec<real> dots(const real* w, int valid, const real* a) const {
    constexpr int lanes = kLanes<real>;
    Vec<real> acc[lanes];
    RNN_EXT_UNROLL
    for (int l = 0; l < lanes; l++) acc[l] = Vec<real>{};
    long k = 0;
    if (valid == lanes) {
      for (; k + lanes <= depth; k += lanes) {
        const Vec<real> ak = load(a + k);
        RNN_EXT_UNROLL
        for (int l = 0; l < lanes; l++) acc[l] += ak * load(w + l * depth + k);
      }
    } else {
      for (; k + lanes <= depth; k += lanes) {
        const Vec<real> ak = load(a + k);
        for (int l = 0; l < valid; l++) acc[l] += ak * load(w + l * depth + k);
      }
    }
    if (k < depth) {
      const int rest = int(depth - k);
      const Vec<real> ak = load(a + k, rest);
      for (int l = 0; l < valid; l++) acc[l] += ak * load(w + l * depth + k, rest);
    }
    transpose<real>(acc);
    RNN_EXT_UNROLL
    for (int half = lanes / 2; half >= 1; half /= 2) RNN_EXT_UNROLL
    for (int l = 0; l < half; l++) acc[l] += acc[l + half];
    return acc[0];
  }
};

// The right-hand side of y = x M for M [depth, columns] as stored (the backward products): panel p
// is [depth][2 * kLanes] columns of M. Rows of M may come from several places: pack() takes them
// piece by piece.
template <class real>
struct ColumnPanels {
  long depth, columns;
  real* packed;
  static constexpr int width = 2 * kLanes<real>;

  static size_t size(long depth, long columns) {
    return size_t(panels_of<real, PlainPanel>(columns)) * depth * width;
  }
  long count() const { return panels_of<real, PlainPanel>(columns); }
  const real* panel(long p) const { return packed + p * depth * width; }

  // Copies rows [0, n) of m to rows [at, at + n) of panels [begin, end).
  RNN_EXT_NOINLINE void pack(long begin, long end, const real* m, long n, long at) const {
    for (long p = begin; p < end; p++) {
      const long left = columns - p * width;
      real* to = packed + (p * depth + at) * width;
      const real* from = m + p * width;
      if (left >= width) {
        for (long k = 0; k < n; k++, to += width, from += columns) {
          store(to, load(from));
          store(to + kLanes<real>, load(from + kLanes<real>));
        }
      } else {
        for (long k = 0; k < n; k++, to += width, from += columns)
          for (long l = 0; l < width; l++) to[l] = l < left ? from[l] : real(0);
      }
    }
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
