// How a persistent block divides its registers and its shared memory: arithmetic that the planner
// and the kernels share.
//
// A block multiplies its rows of U with an operand (h forward, delta backward), once a step or, for
// the reset-before GRU, twice. A row of the operand is read in chunks of 64 bytes. A chunk of 16
// weight rows, 1 KB, is a tile: what a warp keeps in 8 registers a thread.
#pragma once

#ifdef __CUDACC__
#define RNN_EXT_SHARED_WITH_HOST __host__ __device__ __forceinline__
#define RNN_EXT_UNROLL _Pragma("unroll")
#else
#define RNN_EXT_SHARED_WITH_HOST inline
#define RNN_EXT_UNROLL  // arrays need no registers on the host
#endif

namespace rnn_ext::cuda {

constexpr int kWarps = 8;
constexpr int kBlockThreads = 32 * kWarps;
constexpr int kChunkBytes = 64;
constexpr int kTileBytes = 1024;
constexpr int kHeldTiles = 16;    // tiles that a warp keeps in registers
constexpr int kUnitTile = 16;     // a block has one or two tiles of units
constexpr int kColumnTile = 8;    // rows of the batch in one mma
constexpr int kForwardRing = 4;   // chunks on their way from global memory, of each warp
constexpr int kBackwardRing = 8;  // its operand is longer

RNN_EXT_SHARED_WITH_HOST constexpr int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Rows of the batch in one pass over the weights: every thread then finishes one unit of one row.
RNN_EXT_SHARED_WITH_HOST constexpr int pass_rows(int units) { return kBlockThreads / units; }

// What a step multiplies, for each tile of units.
struct StepProducts {
  int row_tiles;  // tiles of weight rows
  int sum_tiles;  // of the sums of a product: fewer where rows meet in one sum or multiply apart
  int produced;   // numbers of an operand row, for each unit
  int planes;     // rows of the operand for each row of the batch
  int ring;       // kForwardRing or kBackwardRing
};

// One product: U h' forward, U^T delta backward. Reset-before GRU: U_rz h' and U_n (r h') forward,
// U_n^T delta_n and U_r^T delta_r + U_z^T delta_z backward, whose two operands are planes.
RNN_EXT_SHARED_WITH_HOST constexpr StepProducts step_products(int gates, bool reset_before,
                                                              bool forward) {
  if (reset_before) {
    return forward ? StepProducts{3, 2, 1, 1, kForwardRing}
                   : StepProducts{3, 1, 1, 2, kBackwardRing};
  }
  return forward ? StepProducts{gates, gates, 1, 1, kForwardRing}
                 : StepProducts{1, 1, gates, 1, kBackwardRing};
}

struct BlockLayout {
  int row_tiles, sum_tiles;  // of all units of the block
  int produced_bytes;        // of an operand row that this block makes
  int planes;
  int blocks;     // in the group
  int producers;  // of them, with units of their own: a cluster may be larger than its layer
  int rows;       // of the batch in a tile of it: a multiple of 8
  int units;
  int ring;
  bool cluster;

  // Chunks of an operand row, in all and of each warp.
  RNN_EXT_SHARED_WITH_HOST int chunks() const {
    return (producers * produced_bytes + kChunkBytes - 1) / kChunkBytes;
  }
  RNN_EXT_SHARED_WITH_HOST int warp_chunks() const { return (chunks() + kWarps - 1) / kWarps; }
  RNN_EXT_SHARED_WITH_HOST int held_chunks() const { return kHeldTiles / row_tiles; }
  RNN_EXT_SHARED_WITH_HOST int shared_chunks() const {
    return warp_chunks() > held_chunks() ? warp_chunks() - held_chunks() : 0;
  }
  RNN_EXT_SHARED_WITH_HOST int columns() const {
    return rows < pass_rows(units) ? rows : pass_rows(units);
  }
  // Rows of the operand in shared memory are an odd number of chunks apart, those in global memory
  // just chunks:
  // four lanes read a chunk, and eight a different half of the banks.
  RNN_EXT_SHARED_WITH_HOST int shared_row_bytes() const { return kChunkBytes * (chunks() | 1); }
  RNN_EXT_SHARED_WITH_HOST int global_row_bytes() const { return kChunkBytes * chunks(); }
  // Partial sums [warp][column][row]: the padding keeps the four columns of a fragment in different
  // banks.
  RNN_EXT_SHARED_WITH_HOST int partial_stride() const { return 16 * sum_tiles + 4; }

  // Bytes and, below, places of each part of shared memory.
  RNN_EXT_SHARED_WITH_HOST int weight_bytes() const {
    return kWarps * shared_chunks() * row_tiles * kTileBytes;
  }
  RNN_EXT_SHARED_WITH_HOST int partial_bytes() const {
    return kWarps * columns() * partial_stride() * 4;
  }
  RNN_EXT_SHARED_WITH_HOST int operand_bytes() const {
    return cluster ? 2 * planes * rows * shared_row_bytes()
                   : kWarps * ring * columns() * kChunkBytes;
  }
  RNN_EXT_SHARED_WITH_HOST int outgoing_bytes() const {
    return cluster ? planes * columns() * produced_bytes : 0;
  }
  RNN_EXT_SHARED_WITH_HOST int state_bytes() const { return rows * units * 4; }  // one of two

  RNN_EXT_SHARED_WITH_HOST int partial_at() const { return weight_bytes(); }
  RNN_EXT_SHARED_WITH_HOST int operand_at() const { return partial_at() + partial_bytes(); }
  RNN_EXT_SHARED_WITH_HOST int outgoing_at() const { return operand_at() + operand_bytes(); }
  RNN_EXT_SHARED_WITH_HOST int state_at() const { return outgoing_at() + outgoing_bytes(); }
  RNN_EXT_SHARED_WITH_HOST int lengths_at() const { return state_at() + 2 * state_bytes(); }
  RNN_EXT_SHARED_WITH_HOST int shared_bytes() const {
    return round_up(lengths_at() + rows * 4, 16);
  }

  // Bytes of a group's part of the workspace: its operand twice, and a flag for each block.
  RNN_EXT_SHARED_WITH_HOST long exchange_bytes() const {
    return cluster ? 0 : 2L * planes * rows * global_row_bytes();
  }
  RNN_EXT_SHARED_WITH_HOST int flag_bytes() const {
    return cluster ? 0 : round_up(blocks * 4, 128);
  }
};

RNN_EXT_SHARED_WITH_HOST constexpr BlockLayout block_layout(StepProducts products, int unit_tiles,
                                                            int element_bytes, int hidden,
                                                            int blocks, int rows, bool cluster) {
  const int units = kUnitTile * unit_tiles;
  return {products.row_tiles * unit_tiles,
          products.sum_tiles * unit_tiles,
          products.produced * units * element_bytes,
          products.planes,
          blocks,
          (hidden + units - 1) / units,
          rows,
          units,
          products.ring,
          cluster};
}

}  // namespace rnn_ext::cuda
