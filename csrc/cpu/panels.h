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

template <class value>
RNN_EXT_INLINE long blocks_of(long units) {
  return (units + kLanes<value> - 1) / kLanes<value>;
}

template <class value, class Shape>
RNN_EXT_INLINE long panels_of(long units) {
  return (blocks_of<value>(units) + Shape::blocks - 1) / Shape::blocks;
}

// The right-hand side of y = W x, for W of `gates` matrices [units, depth] stored one under the
// other. Packed: panel p is [groups of depth][blocks][gates][kLanes][kTogether], zero beyond the
// last unit and the last value of a sum. Not packed: read where it is.
template <class value, class Shape>
struct Panels {
  using real = Real<value>;
  using F = Factors<value>;
  static constexpr int together = kTogether<value>;

  const value* rows;  // W
  long units, depth;
  value* packed;  // null: not packed

  static size_t panel_size(long depth) {
    return size_t(groups_of<value>(depth)) * together * Shape::vectors * kLanes<value>;
  }
  static size_t size(long units, long depth) {
    return panels_of<value, Shape>(units) * panel_size(depth);
  }
  long count() const { return panels_of<value, Shape>(units); }

  // Row of W that stands first in vector `v` of panel p, and how many rows of it exist.
  RNN_EXT_INLINE const value* first_row(long p, int v, int& lanes) const {
    const long unit = (p * Shape::blocks + v / Shape::gates) * kLanes<value>;
    const long left = units - unit;
    lanes = left <= 0 ? 0 : left < kLanes<value> ? int(left) : kLanes<value>;
    return rows + (v % Shape::gates * units + unit) * depth;
  }

  // Writes panels [begin, end).
  RNN_EXT_NOINLINE void pack(long begin, long end) const {
    constexpr int lanes = kLanes<value>;
    constexpr long stride = Shape::vectors * lanes * together;
    for (long p = begin; p < end; p++)
      for (int v = 0; v < Shape::vectors; v++) {
        int valid;
        const value* from = first_row(p, v, valid);
        value* to = packed + p * panel_size(depth) + v * lanes * together;
        long k = 0;
        if (valid == lanes)
          for (; k + lanes * together <= depth; k += lanes * together, to += lanes * stride) {
            Vec<value> square[lanes];
            RNN_EXT_UNROLL
            for (int l = 0; l < lanes; l++) square[l] = F::load_groups(from + l * depth + k);
            transpose<real>(square);
            RNN_EXT_UNROLL
            for (int l = 0; l < lanes; l++) F::store_groups(to + l * stride, square[l]);
          }
        for (; k < depth; k += together, to += stride)
          for (int l = 0; l < lanes; l++)
            for (int j = 0; j < together; j++)
              to[l * together + j] = l < valid && k + j < depth ? from[l * depth + k + j] : value{};
      }
  }

  // c[row_count][vectors * kLanes] (+)= rows a times panel p
  template <bool chained = true>
  RNN_EXT_INLINE void multiply(long p, int row_count, const value* a, long a_row, real* c,
                               long c_row, bool accumulate) const {
    if (packed)
      tile_long<value, Shape::vectors, chained>(row_count, depth, a, a_row, together,
                                                packed + p * panel_size(depth), c, c_row,
                                                accumulate);
    else
      multiply_in_place(p, row_count, a, a_row, c, c_row, accumulate);
  }

 private:
  // Dot products with rows of W as they lie: kLanes of them side by side, summed across by a
  // transposition.
  RNN_EXT_NOINLINE void multiply_in_place(long p, int row_count, const value* a, long a_row,
                                          real* c, long c_row, bool accumulate) const {
    constexpr int lanes = kLanes<value>;
    for (int v = 0; v < Shape::vectors; v++) {
      int valid;
      const value* w = first_row(p, v, valid);
      const value* next = following_rows(p, v);
      for (int i = 0; i < row_count; i++) {
        real* out = c + i * c_row + v * lanes;
        Vec<value> sum = dots(w, valid, a + i * a_row, next);
        store(out, accumulate ? load(out) + sum : sum);
      }
    }
  }

  // The kLanes rows of W that are read after those of vector v of panel p, or null.
  RNN_EXT_INLINE const value* following_rows(long p, int v) const {
    int valid;
    const bool last = v + 1 == Shape::vectors;
    const value* next = first_row(last ? p + 1 : p, last ? 0 : v + 1, valid);
    return valid == kLanes<value> ? next : nullptr;
  }

  // The first `valid` of kLanes rows of W times a. Half of the rows at a time, two sums for each:
  // fewer streams of memory than all rows at once.
  RNN_EXT_INLINE Vec<value> dots(const value* w, int valid, const value* a,
                                 const value* next) const {
    constexpr int lanes = kLanes<value>, half = lanes / 2;
    Vec<value> sums[lanes];
    RNN_EXT_UNROLL
    for (int l = 0; l < lanes; l++) sums[l] = Vec<value>{};
    if (valid == lanes) {
      dots_of<half>(w, a, sums);
      dots_of<half>(w + half * depth, a, sums + half);
    } else {
      for (int l = 0; l < valid; l++) dots_of<1>(w + l * depth, a, sums + l);
    }
    // The sums across keep memory idle otherwise.
    if (next) {
      RNN_EXT_UNROLL
      for (int l = 0; l < half; l++) __builtin_prefetch(next + l * depth);
    }
    transpose<real>(sums);
    RNN_EXT_UNROLL
    for (int n = half; n >= 1; n /= 2) RNN_EXT_UNROLL
    for (int l = 0; l < n; l++) sums[l] += sums[l + n];
    return sums[0];
  }

  // sums[l]: partial sums of row l of w times a
  template <int count>
  RNN_EXT_INLINE void dots_of(const value* w, const value* a, Vec<value>* sums) const {
    constexpr int step = kLanes<value> * together;
    Vec<value> even[count], odd[count];
    RNN_EXT_UNROLL
    for (int l = 0; l < count; l++) even[l] = odd[l] = Vec<value>{};
    const auto add = [&](Vec<value>(&to)[count], long k) __attribute__((always_inline)) {
      const Vec<value> ak = F::load_groups(a + k);
      RNN_EXT_UNROLL
      for (int l = 0; l < count; l++)
        to[l] = F::multiply_add(to[l], ak, F::load_groups(w + l * depth + k));
    };
    long k = 0;
    for (; k + 2 * step <= depth; k += 2 * step) {
      add(even, k);
      add(odd, k + step);
    }
    if (k + step <= depth) add(even, k), k += step;
    if (k < depth) {
      const int rest = int(depth - k);
      const Vec<value> ak = F::load_groups(a + k, rest);
      RNN_EXT_UNROLL
      for (int l = 0; l < count; l++)
        odd[l] = F::multiply_add(odd[l], ak, F::load_groups(w + l * depth + k, rest));
    }
    RNN_EXT_UNROLL
    for (int l = 0; l < count; l++) sums[l] = even[l] + odd[l];
  }
};

// The right-hand side of y = x M for M [depth, columns] as stored (the backward products): panel p
// is [groups of depth][2 * kLanes][kTogether] of columns of M.
template <class value>
struct ColumnPanels {
  long depth, columns;
  value* packed;
  static constexpr int lanes = kLanes<value>, width = 2 * lanes, together = kTogether<value>;

  static size_t panel_size(long depth) {
    return size_t(groups_of<value>(depth)) * together * width;
  }
  static size_t size(long depth, long columns) {
    return panels_of<value, PlainPanel>(columns) * panel_size(depth);
  }
  long count() const { return panels_of<value, PlainPanel>(columns); }
  const value* panel(long p) const { return packed + p * panel_size(depth); }

  // Copies m into panels [begin, end).
  RNN_EXT_NOINLINE void pack(long begin, long end, const value* m) const {
    for (long p = begin; p < end; p++) {
      value* to = packed + p * panel_size(depth);
      const value* from = m + p * width;
      for (long k = 0; k < depth; k += together, to += width * together, from += together * columns)
        pack_rows(from, k + 1 < depth ? from + columns : nullptr, columns - p * width, to);
    }
  }

  // A group of each of two registers of columns, of which `wide` exist.
  RNN_EXT_INLINE static void pack_rows(const value* row, const value* next, long wide, value* to) {
    using F = Factors<value>;
    if (wide >= width) {
      F::store_groups(to, F::columns(row, next, lanes));
      F::store_groups(to + lanes * together,
                      F::columns(row + lanes, next ? next + lanes : next, lanes));
      return;
    }
    const int first = wide < lanes ? int(wide) : lanes, second = int(wide) - first;
    F::store_groups(to, F::columns(row, next, first));
    F::store_groups(to + lanes * together,
                    F::columns(row + first, next ? next + first : next, second));
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
