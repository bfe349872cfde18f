// The register tile every matrix product here is made of, and products of rows with packed panels
// of weights.
#pragma once
#include "products.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Accumulators that fit beside one row of B in the register file.
#if RNN_EXT_VECTOR_REGISTERS == 32
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif
template <int vectors>
constexpr int kTileRows = vectors == 1 ? 12 : kAccumulators / vectors;

// Longer sums are cut into pieces of this many products, added up separately: it bounds the
// rounding error.
template <class value>
constexpr long kSumLength = 256 * kTogether<value>;

// C[rows, vectors] (+)= A[rows, depth] B[depth, vectors]. Group k of A's row i (products.h) is at
// a[i * a_row + k * a_step], so that rows as they lie have a_step = kTogether; groups of B's rows
// follow each other. Small tiles run several sums side by side to cover the latency of the
// multiply-add; not `chained` they do not, and a row's result does not depend on how many rows its
// tile has.
template <class value, int rows, int vectors, bool chained>
RNN_EXT_NOINLINE void tile(long depth, const value* a, long a_row, long a_step, const value* b,
                           Real<value>* c, long c_row, bool accumulate) {
  using real = Real<value>;
  using F = Factors<value>;
  constexpr int lanes = kLanes<value>, together = kTogether<value>;
  const long groups = depth / together;
  constexpr int chains =
      !chained || rows * vectors >= 8 ? 1 : (7 + rows * vectors) / (rows * vectors);
  Vec<real> acc[chains][rows][vectors];
  RNN_EXT_UNROLL
  for (int s = 0; s < chains; s++) RNN_EXT_UNROLL
  for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
  for (int j = 0; j < vectors; j++) acc[s][i][j] = Vec<real>{};

  long k = 0;
  for (; k + chains <= groups; k += chains) {
    RNN_EXT_UNROLL
    for (int s = 0; s < chains; s++) {
      Vec<real> bk[vectors];
      RNN_EXT_UNROLL
      for (int j = 0; j < vectors; j++)
        bk[j] = F::load_groups(b + (s * vectors + j) * lanes * together);
      RNN_EXT_UNROLL
      for (int i = 0; i < rows; i++) {
        const auto ak = F::one(a + i * a_row + s * a_step);
        RNN_EXT_UNROLL
        for (int j = 0; j < vectors; j++) acc[s][i][j] = F::multiply_add(acc[s][i][j], ak, bk[j]);
      }
    }
    a += chains * a_step;
    b += chains * vectors * lanes * together;
  }
  if constexpr (chains > 1) {
    for (; k < groups; k++, a += a_step, b += vectors * lanes * together) RNN_EXT_UNROLL
    for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
    for (int j = 0; j < vectors; j++)
      acc[0][i][j] = F::multiply_add(acc[0][i][j], F::one(a + i * a_row),
                                     F::load_groups(b + j * lanes * together));
    RNN_EXT_UNROLL
    for (int s = 1; s < chains; s++) RNN_EXT_UNROLL
    for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
    for (int j = 0; j < vectors; j++) acc[0][i][j] += acc[s][i][j];
  }
  if (together > 1 && depth % together) {
    RNN_EXT_UNROLL
    for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
    for (int j = 0; j < vectors; j++)
      acc[0][i][j] = F::multiply_add(acc[0][i][j], F::last(a + i * a_row),
                                     F::load_groups(b + j * lanes * together));
  }

  RNN_EXT_UNROLL
  for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
  for (int j = 0; j < vectors; j++) {
    real* out = c + i * c_row + j * lanes;
    store(out, accumulate ? load(out) + acc[0][i][j] : acc[0][i][j]);
  }
}

template <class value>
using TileFunction = void (*)(long, const value*, long, long, const value*, Real<value>*, long,
                              bool);

template <class value, int vectors, bool chained, class Rows>
struct TileTable;
template <class value, int vectors, bool chained, size_t... i>
struct TileTable<value, vectors, chained, std::index_sequence<i...>> {
  static constexpr TileFunction<value> by_rows[] = {tile < value, int(i) + 1, vectors,
                                                    chained || (i + 1) * vectors >= 8 > ...};
};

// The tile for 1 <= rows <= kTileRows<vectors>.
template <class value, int vectors, bool chained = true>
RNN_EXT_INLINE TileFunction<value> tile_for(int rows) {
  return TileTable<value, vectors, chained,
                   std::make_index_sequence<kTileRows<vectors>>>::by_rows[rows - 1];
}

// As tile, for sums of any length.
template <class value, int vectors, bool chained = true>
RNN_EXT_INLINE void tile_long(int rows, long depth, const value* a, long a_row, long a_step,
                              const value* b, Real<value>* c, long c_row, bool accumulate) {
  constexpr long piece = kSumLength<value>;
  const TileFunction<value> run = tile_for<value, vectors, chained>(rows);
  for (long k = 0; k < depth || k == 0; k += piece) {
    const long part = depth - k < piece ? depth - k : piece;
    run(part, a + k / kTogether<value> * a_step, a_row, a_step, b + k * vectors * kLanes<value>, c,
        c_row, accumulate || k > 0);
  }
}

// Rows of a tile whose factors lie in rows `a_row` values apart. At multiples of 4096 bytes they all
// fall into one set of a first-level cache of 8 ways, so there are no more of them.
template <class value, int vectors>
RNN_EXT_INLINE int tile_rows(long a_row) {
  constexpr int most = kTileRows<vectors>, ways = 8;
  return most > ways && a_row * long(sizeof(value)) % 4096 == 0 ? ways : most;
}

// Calls body(first, count) for blocks of at most `most` rows, as even as possible.
template <class Body>
RNN_EXT_INLINE void for_row_blocks(long begin, long end, int most, const Body& body) {
  const long rows = end - begin;
  if (rows <= 0) return;
  const long blocks = (rows + most - 1) / most, base = rows / blocks, extra = rows % blocks;
  for (long i = 0, first = begin; i < blocks; i++) {
    const int count = static_cast<int>(base + (i < extra));
    body(first, count);
    first += count;
  }
}

}  // namespace rnn_ext::RNN_EXT_TARGET
