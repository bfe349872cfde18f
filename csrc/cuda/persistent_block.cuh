// What the forward and the backward kernel share: the rows of a tile of the batch, and which of
// them a thread finishes.
#pragma once
#include "persistent_exchange.cuh"
#include "persistent_params.h"

#ifndef __grid_constant__  // a host compiler: parameters of kernels are where they are
#define __grid_constant__
#endif

namespace rnn_ext::cuda {

// How a launch is laid out, from the plan.
struct Tiling {
  int groups, blocks,
      rows;  // groups of each direction, blocks of a group, rows of the batch in a tile
};

template <class T>
RNN_EXT_DEVICE T read_at(const void* base, int64_t at) {
  return static_cast<const T*>(base)[at];
}
template <class T>
RNN_EXT_DEVICE void write_at(void* base, int64_t at, float x) {
  const T value = from_float<T>(x);
  static_cast<T*>(base)[at] = value;
}

// A thread finishes the same unit in every pass, of the row_in_pass-th row.
template <int units>
struct OwnUnit {
  const int in_block, in_layer, row_in_pass;
  const bool exists;

  RNN_EXT_DEVICE OwnUnit(int block, int hidden)
      : in_block(threadIdx.x % units),
        in_layer(block * units + in_block),
        row_in_pass(threadIdx.x / units),
        exists(in_layer < hidden) {}
  // Where this unit of a row of the tile has its state in shared memory.
  RNN_EXT_DEVICE int state_at(int row) const { return row * units + in_block; }
};

// Rows of the current tile on the time axis.
class TileRows {
 public:
  RNN_EXT_DEVICE TileRows(const Sequences& sequences, int* lengths, bool reverse)
      : sequences_(sequences), lengths_(lengths), reverse_(reverse) {}

  // All threads of the block, none of which reads the lengths of the tile before any more; all can
  // read the new ones afterwards.
  RNN_EXT_DEVICE void enter(int first, int rows) const {
    for (int r = threadIdx.x; r < rows; r += kBlockThreads) {
      const bool exists = first + r < sequences_.batch;
      lengths_[r] = !exists              ? 0
                    : sequences_.lengths ? static_cast<int>(sequences_.lengths[first + r])
                                         : sequences_.steps;
    }
    __syncthreads();
  }

  RNN_EXT_DEVICE int time(int step) const { return reverse_ ? sequences_.steps - 1 - step : step; }
  RNN_EXT_DEVICE int before(int t) const { return reverse_ ? t + 1 : t - 1; }
  RNN_EXT_DEVICE bool takes_part(int t, int row) const { return t >= 0 && t < lengths_[row]; }
  RNN_EXT_DEVICE bool padded() const { return sequences_.offsets == nullptr; }
  RNN_EXT_DEVICE int begin(int t) const {
    return sequences_.offsets ? static_cast<int>(sequences_.offsets[t]) : t * sequences_.batch;
  }

 private:
  const Sequences& sequences_;
  int* const lengths_;
  const bool reverse_;
};

// The product of the block's weights, row_tiles from `first_tile` on for each plane, with the rows
// of a pass of the last publication, into the partial sums.
template <int row_tiles, int pass_rows, int first_tile = 0, int planes = 1, class Weights,
          class Exchange>
RNN_EXT_DEVICE void multiply_pass(Weights& weights, Exchange& exchange, const PartialSums& sums,
                                  int pass, int rows) {
  constexpr int column_tiles = pass_rows / kColumnTile;
  const int tiles = min(rows - pass, pass_rows) / kColumnTile;
  float sum[row_tiles][column_tiles][4] = {};
  __syncwarp();  // what one lane has waited for is there for all
  exchange.template start<planes>(pass, tiles);
  weights.template multiply<first_tile, planes>(exchange, tiles, sum);
  sums.write(sum, tiles);
}

}  // namespace rnn_ext::cuda
