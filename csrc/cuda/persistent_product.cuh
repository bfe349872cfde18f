// The product of the persistent kernels: rows of U that never leave the block, times an operand
// that changes each step.
//
// The rows of U are the M of the tensor cores' product, rows of the batch its N. The warps of a
// block share out the columns of U: each multiplies all rows with its own chunks, so that every
// number of the operand is read by one warp of a block, which needs to wait for nothing else. The
// warps' sums meet in shared memory and are added in order.
//
// A sum does not care in which order its terms come, as long as both factors agree. So lane (g, t)
// takes bytes 16 t to 16 t + 15 of a chunk in row g: one 16-byte load gives what it needs for two
// mma instructions, whatever the type.
#pragma once
#include "persistent_layout.h"
#include "platform.h"

namespace rnn_ext::cuda {

// Number formats of the product. Storage: of weights and operand in memory; encode: a number of the
// operand;
// prepare: a word of weights as it is kept; multiply: d += a b of a fragment.
template <class T>
struct SixteenBit {
  using Storage = T;
  RNN_EXT_DEVICE static T encode(float x) { return from_float<T>(x); }
  RNN_EXT_DEVICE static uint32_t prepare(uint32_t word) { return word; }
  RNN_EXT_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
    mma_m16n8k16<T>(d, a, b);
  }
};

struct Tf32 {
  using Storage = float;
  RNN_EXT_DEVICE static float encode(float x) { return __uint_as_float(to_tf32(x)); }
  RNN_EXT_DEVICE static uint32_t prepare(uint32_t word) { return to_tf32(__uint_as_float(word)); }
  RNN_EXT_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
    mma_m16n8k8_tf32(d, a, b);
  }
};

// x = high + low, two TF32 numbers; of the product only low times low is left out, 2^-22 of it.
struct Tf32x3 {
  using Storage = float;
  RNN_EXT_DEVICE static float encode(float x) { return x; }
  RNN_EXT_DEVICE static uint32_t prepare(uint32_t word) { return word; }
  RNN_EXT_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                      const uint32_t (&b)[2]) {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    RNN_EXT_UNROLL
    for (int i = 0; i < 4; i++) split(a[i], a_high[i], a_low[i]);
    RNN_EXT_UNROLL
    for (int i = 0; i < 2; i++) split(b[i], b_high[i], b_low[i]);
    mma_m16n8k8_tf32(d, a_low, b_high);
    mma_m16n8k8_tf32(d, a_high, b_low);
    mma_m16n8k8_tf32(d, a_high, b_high);
  }

 private:
  RNN_EXT_DEVICE static void split(uint32_t x, uint32_t& high, uint32_t& low) {
#ifdef __CUDA_ARCH__
    // Split the resident weights each time anew: their parts have no registers.
    asm volatile("" : "+r"(x));
#endif
    high = x & ~0x1fffu;  // cutting off is enough: what is lost is in the other part
    low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high)) & ~0x1fffu;
  }
};

// Which chunks of an operand row belong to this warp.
struct WarpShare {
  int first, count;

  RNN_EXT_DEVICE explicit WarpShare(const BlockLayout& layout) {
    const int each = layout.warp_chunks(),
              left = layout.chunks() - static_cast<int>(threadIdx.x) / 32 * each;
    first = static_cast<int>(threadIdx.x) / 32 * each;
    count = left < 0 ? 0 : left < each ? left : each;
  }
};

// The 16 bytes of a row of weights from element k on, zero from `columns` on and where there is no
// row.
template <class T>
RNN_EXT_DEVICE uint4 read_weights(const T* row, int k, int columns) {
  constexpr int count = 16 / sizeof(T);
  if (row && k + count <= columns && reinterpret_cast<uintptr_t>(row + k) % 16 == 0) {
    return *reinterpret_cast<const uint4*>(row + k);
  }
  T element[count];
  RNN_EXT_UNROLL
  for (int i = 0; i < count; i++)
    element[i] = row && k + i < columns ? row[k + i] : from_float<T>(0.0f);
  uint32_t word[4];
  RNN_EXT_UNROLL
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      word[i] = pack(element[2 * i], element[2 * i + 1]);
    } else {
      word[i] = __float_as_uint(element[i]);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <class Numbers, int row_tiles>
class ResidentWeights {
 public:
  using T = typename Numbers::Storage;
  static constexpr int kHeld = kHeldTiles / row_tiles;

  RNN_EXT_DEVICE ResidentWeights(const BlockLayout& layout, unsigned char* shared)
      : share_(layout), lane_(threadIdx.x % 32) {
    shared_ = reinterpret_cast<uint4*>(shared) + static_cast<long>(threadIdx.x / 32) *
                                                     layout.shared_chunks() * row_tiles *
                                                     kTileBytes / 16;
  }

  // Reads U once. row(r): the first element of row r of the block's 16 * row_tiles, or null if
  // there is none.
  template <class Row>
  RNN_EXT_DEVICE void load(int columns, const Row& row) {
    RNN_EXT_UNROLL
    for (int c = 0; c < kHeld; c++) {
      RNN_EXT_UNROLL
      for (int m = 0; m < row_tiles; m++) {
        if (c < share_.count) read_tile(columns, row, c, m, held_[c][m]);
      }
    }
    for (int c = kHeld; c < share_.count; c++) {
      for (int m = 0; m < row_tiles; m++) {
        uint32_t tile[8];
        read_tile(columns, row, c, m, tile);
        uint4* to = tile_at(c, m);
        to[0] = make_uint4(tile[0], tile[1], tile[2], tile[3]);
        to[32] = make_uint4(tile[4], tile[5], tile[6], tile[7]);
      }
    }
  }

  // sum[m][n] += this warp's columns of U times its chunks of the operand, for `tiles` tiles of 8
  // columns. Plane p of the operand meets the row tiles from first_tile + p * count on.
  template <int first_tile, int planes, class Operand, int count, int column_tiles>
  RNN_EXT_DEVICE void multiply(Operand& operand, int tiles, float (&sum)[count][column_tiles][4]) {
    static_assert(first_tile + planes * count <= row_tiles);
    RNN_EXT_UNROLL
    for (int c = 0; c < kHeld; c++) {
      if (c < share_.count) {
        RNN_EXT_UNROLL
        for (int p = 0; p < planes; p++) {
          uint4 b[column_tiles] = {};
          operand.template read<planes>(c * planes + p, tiles, b);
          RNN_EXT_UNROLL
          for (int m = 0; m < count; m++)
            multiply_tile(held_[c][first_tile + p * count + m], b, tiles, sum[m]);
          operand.template advance<planes>(c * planes + p, tiles);
        }
      }
    }
    for (int c = kHeld; c < share_.count; c++) {
      RNN_EXT_UNROLL
      for (int p = 0; p < planes; p++) {
        uint4 b[column_tiles] = {};
        operand.template read<planes>(c * planes + p, tiles, b);
        RNN_EXT_UNROLL
        for (int m = 0; m < count; m++) {
          const uint4* from = tile_at(c, first_tile + p * count + m);
          const uint4 first = from[0], second = from[32];
          const uint32_t tile[8] = {first.x,  first.y,  first.z,  first.w,
                                    second.x, second.y, second.z, second.w};
          multiply_tile(tile, b, tiles, sum[m]);
        }
        operand.template advance<planes>(c * planes + p, tiles);
      }
    }
  }

 private:
  // This lane's words of a tile: of its 16 bytes in rows g and g + 8, in the order of two
  // fragments.
  template <class Row>
  RNN_EXT_DEVICE void read_tile(int columns, const Row& row, int c, int m,
                                uint32_t (&tile)[8]) const {
    const int k = ((share_.first + c) * kChunkBytes + lane_ % 4 * 16) / static_cast<int>(sizeof(T));
    RNN_EXT_UNROLL
    for (int half = 0; half < 2; half++) {
      const uint4 words = read_weights<T>(row(m * 16 + half * 8 + lane_ / 4), k, columns);
      tile[half] = Numbers::prepare(words.x);
      tile[half + 2] = Numbers::prepare(words.y);
      tile[half + 4] = Numbers::prepare(words.z);
      tile[half + 6] = Numbers::prepare(words.w);
    }
  }

  RNN_EXT_DEVICE uint4* tile_at(int c, int m) const {
    return shared_ + ((c - kHeld) * row_tiles + m) * (kTileBytes / 16) + lane_;
  }

  template <int column_tiles>
  RNN_EXT_DEVICE static void multiply_tile(const uint32_t (&tile)[8],
                                           const uint4 (&b)[column_tiles], int tiles,
                                           float (&sum)[column_tiles][4]) {
    RNN_EXT_UNROLL
    for (int half = 0; half < 2; half++) {
      const uint32_t a[4] = {tile[4 * half], tile[4 * half + 1], tile[4 * half + 2],
                             tile[4 * half + 3]};
      RNN_EXT_UNROLL
      for (int n = 0; n < column_tiles; n++) {
        const uint32_t b_half[2] = {half ? b[n].z : b[n].x, half ? b[n].w : b[n].y};
        if (n < tiles) Numbers::multiply(sum[n], a, b_half);
      }
    }
  }

  const WarpShare share_;
  const int lane_;
  uint4* shared_;
  uint32_t held_[kHeld][row_tiles][8];
};

// Where the sums of the warps meet: [warp][column][row], of one pass.
class PartialSums {
 public:
  RNN_EXT_DEVICE PartialSums(const BlockLayout& layout, unsigned char* shared)
      : sums_(reinterpret_cast<float*>(shared + layout.partial_at())),
        stride_(layout.partial_stride()),
        warp_stride_(layout.columns() * layout.partial_stride()) {}

  template <int row_tiles, int column_tiles>
  RNN_EXT_DEVICE void write(const float (&sum)[row_tiles][column_tiles][4], int tiles) const {
    const int lane = threadIdx.x % 32;
    float* to = sums_ + threadIdx.x / 32 * warp_stride_ + lane % 4 * 2 * stride_ + lane / 4;
    RNN_EXT_UNROLL
    for (int m = 0; m < row_tiles; m++) {
      RNN_EXT_UNROLL
      for (int n = 0; n < column_tiles; n++) {
        if (n < tiles) {
          RNN_EXT_UNROLL
          for (int i = 0; i < 4; i++)
            to[(n * 8 + i % 2) * stride_ + m * 16 + i / 2 * 8] = sum[m][n][i];
        }
      }
    }
  }

  // The whole product of a weight row with a row of the batch.
  RNN_EXT_DEVICE float read(int row, int column) const {
    const float* from = sums_ + column * stride_ + row;
    float sum = from[0];
    RNN_EXT_UNROLL
    for (int w = 1; w < kWarps; w++) sum += from[w * warp_stride_];
    return sum;
  }

 private:
  float* const sums_;
  const int stride_, warp_stride_;
};

}  // namespace rnn_ext::cuda
