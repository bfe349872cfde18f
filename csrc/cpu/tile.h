// The register tile every matrix product here is made of, and products of rows with packed panels
// of weights.
#pragma once
#include "vector_math.h"

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
constexpr long kSumLength = 256;

// C[rows, vectors] (+)= A[rows, depth] B[depth, vectors]. Element (i, k) of A is at a[i * a_row + k
// * a_step]; rows of B follow each other. Small tiles run several sums side by side to cover the
// latency of the multiply-add.
template <class real, int rows, int vectors>
RNN_EXT_NOINLINE void tile(long depth, const real* a, long a_row, long a_step, const real* b,
                           real* c, long c_row, bool accumulate) {
  constexpr int lanes = kLanes<real>;
  constexpr int chains = rows * vectors >= 8 ? 1 : (7 + rows * vectors) / (rows * vectors);
  Vec<real> acc[chains][rows][vectors];
  RNN_EXT_UNROLL
  for (int s = 0; s < chains; s++) RNN_EXT_UNROLL
  for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
  for (int j = 0; j < vectors; j++) acc[s][i][j] = Vec<real>{};

  long k = 0;
  for (; k + chains <= depth; k += chains) {
    RNN_EXT_UNROLL
    for (int s = 0; s < chains; s++) {
      Vec<real> bk[vectors];
      RNN_EXT_UNROLL
      for (int j = 0; j < vectors; j++) bk[j] = load(b + (s * vectors + j) * lanes);
      RNN_EXT_UNROLL
      for (int i = 0; i < rows; i++) {
        const real ak = a[i * a_row + s * a_step];
        RNN_EXT_UNROLL
        for (int j = 0; j < vectors; j++) acc[s][i][j] += ak * bk[j];
      }
    }
    a += chains * a_step;
    b += chains * vectors * lanes;
  }
  if constexpr (chains > 1) {
    for (; k < depth; k++, a += a_step, b += vectors * lanes) RNN_EXT_UNROLL
    for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
    for (int j = 0; j < vectors; j++) acc[0][i][j] += a[i * a_row] * load(b + j * lanes);
    RNN_EXT_UNROLL
    for (int s = 1; s < chains; s++) RNN_EXT_UNROLL
    for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
    for (int j = 0; j < vectors; j++) acc[0][i][j] += acc[s][i][j];
  }

  RNN_EXT_UNROLL
  for (int i = 0; i < rows; i++) RNN_EXT_UNROLL
  for (int j = 0; j < vectors; j++) {
    real* out = c + i * c_row + j * lanes;
    store(out, accumulate ? load(out) + acc[0][i][j] : acc[0][i][j]);
  }
}

template <class real>
using TileFunction = void (*)(long, const real*, long, long, const real*, real*, long, bool);

template <class real, int vectors, class Rows>
struct TileTable;
template <class real, int vectors, size_t... i>
struct TileTable<real, vectors, std::index_sequence<i...>> {
  static constexpr TileFunction<real> by_rows[] = {tile<real, int(i) + 1, vectors>...};
};

// The tile for 1 <= rows <= kTileRows<vectors>.
template <class real, int vectors>
RNN_EXT_INLINE TileFunction<real> tile_for(int rows) {
  return TileTable<real, vectors, std::make_index_sequence<kTileRows<vectors>>>::by_rows[rows - 1];
}

// As tile, for sums of any length.
template <class real, int vectors>
RNN_EXT_INLINE void tile_long(int rows, long depth, const real* a, long a_row, long a_step,
                              const real* b, real* c, long c_row, bool accumulate) {
  const TileFunction<real> run = tile_for<real, vectors>(rows);
  for (long k = 0; k < depth || k == 0; k += kSumLength) {
    const long part = depth - k < kSumLength ? depth - k : kSumLength;
    run(part, a + k * a_step, a_row, a_step, b + k * vectors * kLanes<real>, c, c_row,
        accumulate || k > 0);
  }
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
