// Products of rows with weights of fewer bits, 16 units of every gate at a time.
//
// Everywhere: weights are widened to float in registers. With AVX512_VNNI bytes are multiplied as
// bytes: an activation a of a row is round(a / s) = 256 hi + lo, s = max|a| / 32512, and the two
// sums of digits are exact, so a product is off by at most s / 2 for each unit of sum|w|.
#pragma once
#include "cell_steps.h"
#include "quantized_problem.h"

namespace rnn_ext::RNN_EXT_TARGET {

// Digits of this many rows are kept at a time, and used for every panel.
constexpr int kDigitRows = 48;
// Beyond this depth a sum of digits could overflow.
constexpr long kMaxDigitDepth = 1 << 17;

// One thread's rows of activations as digits.
struct Digits {
  int8_t* planes;  // [kDigitRows][hi, lo][row_bytes]
  long row_bytes;  // a multiple of 64
  float scale[kDigitRows];
  int32_t hi_start[kDigitRows], lo_start[kDigitRows];  // -128 times the sums of digits

  static long bytes(long depth) { return (depth + 63) / 64 * 64; }
  const int8_t* hi(int row) const { return planes + 2 * row * row_bytes; }
};

template <int per>
RNN_EXT_INLINE Vec<float> widened(typename Simd<float>::Bits w, int j) {
  using Ints = int32_t __attribute__((vector_size(RNN_EXT_VECTOR_BYTES)));
  if constexpr (per == 2)
    return (Vec<float>)(j ? w & 0xffff0000u : w << 16);
  else
    return __builtin_convertvector((Ints)((w >> (8 * j)) & 255u) - 128, Vec<float>);
}

template <class Shape>
struct WideningTile {
  // As kSumLength, but shorter: one row has few accumulators, so each holds more of the sum.
  static constexpr long kPiece = 64;
  static constexpr int lanes = kLanes<float>, parts = kStrip / lanes;
  // Strips that are read side by side; a small register file holds one.
  static constexpr int together = lanes == 4 ? 1 : Shape::vectors;
  static constexpr int fitting = kAccumulators / (together * parts);
  static constexpr int rows = fitting < 1 ? 1 : fitting < 8 ? fitting : 8;

  // out[count][Shape::vectors][16] = rows a times a panel
  template <int per, int count>
  RNN_EXT_NOINLINE static void run(long depth, const float* a, long a_row, const uint32_t* w,
                                   const float* scales, float* out) {
    for (int v = 0; v < Shape::vectors; v += together)
      for (long k = 0; k < depth || k == 0; k += kPiece)
        sum<per, count>(depth - k < kPiece ? depth - k : kPiece, a + k, a_row,
                        w + (k / per * Shape::vectors + v) * kStrip, out + v * kStrip, k > 0);
    if (per == 4)
      for (int i = 0; i < count; i++)
        for (int l = 0; l < Shape::vectors * kStrip; l += lanes) {
          float* o = out + i * Shape::vectors * kStrip + l;
          store(o, load(o) * load(scales + l));
        }
  }

 private:
  template <int per, int count>
  RNN_EXT_INLINE static void sum(long depth, const float* a, long a_row, const uint32_t* w,
                                 float* out, bool accumulate) {
    using Bits = typename Simd<float>::Bits;
    constexpr int sums = count * together * parts, stride = Shape::vectors * kStrip;
    // Few sums would wait for each other's latency.
    constexpr int chains = sums <= 2 ? per : sums <= 4 ? 2 : 1;
    Vec<float> acc[chains][count][together * parts];
    RNN_EXT_UNROLL
    for (int s = 0; s < chains; s++) RNN_EXT_UNROLL
    for (int i = 0; i < count; i++) RNN_EXT_UNROLL
    for (int v = 0; v < together * parts; v++) acc[s][i][v] = Vec<float>{};
    const auto group = [&](long k, int used) __attribute__((always_inline)) {
      RNN_EXT_UNROLL
      for (int v = 0; v < together * parts; v++) {
        Bits word = (Bits)load(reinterpret_cast<const float*>(w) + v * lanes);
#if RNN_EXT_VECTOR_BYTES == 64
        __asm__("" : "+v"(word));  // in a register: read once, not once for each of its parts
#endif
        RNN_EXT_UNROLL
        for (int j = 0; j < per; j++) {
          if (j >= used) break;
          const Vec<float> wide = widened<per>(word, j);
          RNN_EXT_UNROLL
          for (int i = 0; i < count; i++) acc[j % chains][i][v] += a[i * a_row + k + j] * wide;
        }
      }
    };
    long k = 0;
    for (; k + per <= depth; k += per, w += stride) group(k, per);
    if (k < depth) group(k, int(depth - k));
    RNN_EXT_UNROLL
    for (int i = 0; i < count; i++) RNN_EXT_UNROLL
    for (int v = 0; v < together * parts; v++) {
      Vec<float> total = acc[0][i][v];
      RNN_EXT_UNROLL
      for (int s = 1; s < chains; s++) total += acc[s][i][v];
      float* o = out + i * stride + v * lanes;
      store(o, accumulate ? load(o) + total : total);
    }
  }
};

#if RNN_EXT_VECTOR_BYTES == 64
constexpr bool kHasDigits = true;
typedef int32_t Sums __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16), aligned(1), may_alias));

// acc[l] += sum of weights[4 l + j] digits[j], unsigned times signed bytes
RNN_EXT_INLINE void dot(Sums& acc, Sums weights, Sums digits) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(digits));
}

// The four digits of a group, for every lane
RNN_EXT_INLINE Sums four(const int8_t* digits) {
  typedef int32_t Four __attribute__((may_alias));
  return Sums{} + *reinterpret_cast<const Four*>(digits);
}

// Reads a[depth]; writes row `row` of d.
RNN_EXT_NOINLINE inline void split_into_digits(const float* a, long depth, Digits& d, int row) {
  constexpr int lanes = 16;
  typedef uint32_t Bits __attribute__((vector_size(64)));
  const long full = depth / lanes * lanes;
  Vec<float> most{}, odd{};  // odd: NaN where an entry is not finite
  const auto look = [&](Vec<float> v) __attribute__((always_inline)) {
    const Vec<float> size = (Vec<float>)((Bits)v & 0x7fffffffu);
    most = size > most ? size : most;
    odd += v - v;
  };
  for (long k = 0; k < full; k += lanes) look(load(a + k));
  if (full < depth) look(load(a + full, int(depth - full)));
  float top = 0, sum = 0;
  for (int l = 0; l < lanes; l++) top = most[l] > top ? most[l] : top, sum += odd[l];

  const bool usable = sum == 0 && top > 1e-30f;
  const float factor = usable ? 32512.f / top : 0.f;
  d.scale[row] = sum != 0 || sum != sum ? sum : usable ? top / 32512.f : 0.f;
  int8_t* hi = d.planes + 2 * row * d.row_bytes;
  Sums his{}, los{};
  const auto split = [&](Vec<float> v, long k) __attribute__((always_inline)) {
    // Adding 1.5 * 2^23 rounds to an integer in the low bits.
    const Sums q = (Sums)(v * factor + 12582912.f) - 0x4b400000;
    const Sums low = (q << 24) >> 24, high = (q - low) >> 8;
    his += high;
    los += low;
    *reinterpret_cast<Bytes*>(hi + k) = __builtin_convertvector(high, Bytes);
    *reinterpret_cast<Bytes*>(hi + d.row_bytes + k) = __builtin_convertvector(low, Bytes);
  };
  for (long k = 0; k < full; k += lanes) split(usable ? load(a + k) : Vec<float>{}, k);
  if (full < depth) split(usable ? load(a + full, int(depth - full)) : Vec<float>{}, full);
  int32_t all_hi = 0, all_lo = 0;
  for (int l = 0; l < lanes; l++) all_hi += his[l], all_lo += los[l];
  // Weights are stored plus 128. Wrapping around is harmless: the sum in the end fits.
  d.hi_start[row] = int32_t(uint32_t(all_hi) * -128u);
  d.lo_start[row] = int32_t(uint32_t(all_lo) * -128u);
}

template <class Shape>
struct DigitTile {
  static constexpr int fitting = kAccumulators / (2 * Shape::vectors);
  static constexpr int rows = fitting < 4 ? fitting : 4;

  // out[count][Shape::vectors][16] = rows [first, + count) of d times a panel
  template <int count>
  RNN_EXT_NOINLINE static void run(long groups, const Digits& d, int first, const uint32_t* w,
                                   const float* scales, float* out) {
    // Few sums would wait for each other's latency.
    constexpr int chains = count * Shape::vectors <= 2 ? 2 : 1, stride = Shape::vectors * kStrip;
    Sums hi[chains][count][Shape::vectors], lo[chains][count][Shape::vectors];
    RNN_EXT_UNROLL
    for (int i = 0; i < count; i++) RNN_EXT_UNROLL
    for (int v = 0; v < Shape::vectors; v++) {
      hi[0][i][v] = Sums{} + d.hi_start[first + i];
      lo[0][i][v] = Sums{} + d.lo_start[first + i];
      if constexpr (chains == 2) hi[1][i][v] = lo[1][i][v] = Sums{};
    }
    const int8_t* a = d.hi(first);
    const long a_row = 2 * d.row_bytes, low = d.row_bytes;
    const auto group = [&](int chain) __attribute__((always_inline)) {
      Sums weights[Shape::vectors];
      RNN_EXT_UNROLL
      for (int v = 0; v < Shape::vectors; v++)
        weights[v] = (Sums)load(reinterpret_cast<const float*>(w) + v * kStrip);
      RNN_EXT_UNROLL
      for (int i = 0; i < count; i++) {
        const Sums high_digits = four(a + i * a_row), low_digits = four(a + i * a_row + low);
        RNN_EXT_UNROLL
        for (int v = 0; v < Shape::vectors; v++) {
          dot(hi[chain][i][v], weights[v], high_digits);
          dot(lo[chain][i][v], weights[v], low_digits);
        }
      }
      a += 4;
      w += stride;
    };
    long k = 0;
    for (; k + chains <= groups; k += chains) RNN_EXT_UNROLL
    for (int chain = 0; chain < chains; chain++) group(chain);
    if (k < groups) group(0);
    RNN_EXT_UNROLL
    for (int i = 0; i < count; i++) RNN_EXT_UNROLL
    for (int v = 0; v < Shape::vectors; v++) {
      if constexpr (chains == 2) hi[0][i][v] += hi[1][i][v], lo[0][i][v] += lo[1][i][v];
      const Vec<float> total = __builtin_convertvector(hi[0][i][v], Vec<float>) * 256.f +
                               __builtin_convertvector(lo[0][i][v], Vec<float>);
      store(out + (i * Shape::vectors + v) * kStrip,
            total * d.scale[first + i] * load(scales + v * kStrip));
    }
  }
};
#else
constexpr bool kHasDigits = false;
#endif

// The right-hand side of y = W x for W of Shape::gates matrices [units, depth].
template <class Shape>
struct QuantizedPanels {
  QuantizedMatrix matrix;
  long units, depth;

  static constexpr int width = Shape::vectors * kStrip;
  long count() const {
    constexpr long panel = Shape::blocks * kStrip;
    return (units + panel - 1) / panel;
  }

  // done(panel, first, count, products) for panels [p0, p1) and blocks of rows of a; products are
  // [count][Shape::vectors][16]. Going back over the panels that the last call left in the cache
  // (`backwards` in every other step) saves reading as much of the weights as it holds.
  template <class Done>
  RNN_EXT_INLINE void multiply(long p0, long p1, bool backwards, long rows, const float* a,
                               long a_row, Digits* d, const Done& done) const {
    alignas(64) float products[8 * width];
    const long groups = matrix.scales ? (depth + 3) / 4 : (depth + 1) / 2;
    const auto* data = static_cast<const uint32_t*>(matrix.data);
    for (long m = 0; m < rows; m += kDigitRows) {
      const long end = m + kDigitRows < rows ? m + kDigitRows : rows;
      if constexpr (kHasDigits)
        if (d)
          for (long i = m; i < end; i++) digits(a + i * a_row, *d, int(i - m));
      for (long i = p0; i < p1; i++) {
        const long p = backwards ? p0 + p1 - 1 - i : i;
        const uint32_t* w = data + p * groups * width;
        const float* scales = matrix.scales ? matrix.scales + p * width : nullptr;
        for_row_blocks(m, end, tile_rows(d), [&](long first, int n) {
          if (d)
            by_digits(n, groups, *d, int(first - m), w, scales, products);
          else
            widening(n, a + first * a_row, a_row, w, scales, products);
          done(p, first, n, products);
        });
      }
    }
  }

 private:
#if RNN_EXT_VECTOR_BYTES == 64
  void digits(const float* a, Digits& d, int row) const { split_into_digits(a, depth, d, row); }
  static int tile_rows(const Digits* d) {
    return d ? DigitTile<Shape>::rows : WideningTile<Shape>::rows;
  }
  static void by_digits(int n, long groups, const Digits& d, int first, const uint32_t* w,
                        const float* scales, float* out) {
    with_count<DigitTile<Shape>::rows>(n, [&](auto count) __attribute__((always_inline)) {
      DigitTile<Shape>::template run<count()>(groups, d, first, w, scales, out);
    });
  }
#else
  void digits(const float*, Digits&, int) const {}
  static int tile_rows(const Digits*) { return WideningTile<Shape>::rows; }
  static void by_digits(int, long, const Digits&, int, const uint32_t*, const float*, float*) {}
#endif
  void widening(int n, const float* a, long a_row, const uint32_t* w, const float* scales,
                float* out) const {
    with_count<WideningTile<Shape>::rows>(n, [&](auto count) __attribute__((always_inline)) {
      if (scales)
        WideningTile<Shape>::template run<4, count()>(depth, a, a_row, w, scales, out);
      else
        WideningTile<Shape>::template run<2, count()>(depth, a, a_row, w, scales, out);
    });
  }

  // Calls body with n as a constant, 1 <= n <= most.
  template <int most, class Body>
  RNN_EXT_INLINE static void with_count(int n, const Body& body) {
    if constexpr (most > 1)
      if (n < most) return with_count<most - 1>(n, body);
    body(std::integral_constant<int, most>{});
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
