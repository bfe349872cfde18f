// Matrix products and ldmatrix, with the layout of fragments that platform.h states. A warp's
// product is decoded and computed once, by the lane that comes last.
#include "emulated_platform.h"
#include "warp.h"

namespace cuda_on_cpu {
namespace {

float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
float half_to_float(uint32_t bits, bool brain) {
  if (brain) return bits_to_float(bits << 16);
  const uint16_t half = static_cast<uint16_t>(bits);
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return static_cast<float>(value);
}

struct Fragments {
  uint32_t a[4], b[2];
  float d[4];
};
static_assert(sizeof(Fragments) <= WarpMeeting::kBytes);

// k columns of A; element(fragments of a lane, register, which of its elements) decodes one.
template <int k, int per_register, class Decode>
void multiply(WarpMeeting& m, Decode decode) {
  float a[16][k], b[k][8];
  constexpr int half = k / 2;  // columns of A's first two registers
  for (int lane = 0; lane < 32; lane++) {
    Fragments f;
    std::memcpy(&f, m.in[lane], sizeof f);
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < per_register; j++) {
      const int column = t * per_register + j;
      for (int i = 0; i < 4; i++) a[g + i % 2 * 8][column + i / 2 * half] = decode(f.a[i], j);
      for (int i = 0; i < 2; i++) b[column + i * half][g] = decode(f.b[i], j);
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    Fragments f;
    std::memcpy(&f, m.in[lane], sizeof f);
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int j = 0; j < k; j++) sum += a[row][j] * b[j][column];
      f.d[i] += sum;
    }
    std::memcpy(m.out[lane], f.d, sizeof f.d);
  }
}

template <class Combine>
void meet_for_product(float* d, const uint32_t* a, const uint32_t* b, Here here, Combine combine) {
  Fragments f;
  std::memcpy(f.a, a, sizeof f.a);
  std::memcpy(f.b, b, sizeof f.b);
  std::memcpy(f.d, d, sizeof f.d);
  meet_in_warp(~0u, &f, sizeof f, d, sizeof f.d, false, "mma", here, combine);
}

}  // namespace

void mma_16bit(float* d, const uint32_t* a, const uint32_t* b, bool brain, Here here) {
  meet_for_product(d, a, b, here, [brain](WarpMeeting& m) {
    multiply<16, 2>(m, [brain](uint32_t bits, int j) {
      return half_to_float(j ? bits >> 16 : bits & 0xffff, brain);
    });
  });
}

void mma_tf32(float* d, const uint32_t* a, const uint32_t* b, Here here) {
  meet_for_product(d, a, b, here, [](WarpMeeting& m) {
    multiply<8, 1>(m, [](uint32_t bits, int) { return bits_to_float(bits & ~0x1fffu); });
  });
}

void ldmatrix_rows(const void* row, const uint16_t** rows, int matrices, bool trans, Here here) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail("ldmatrix at " + place(here) + ": address not a multiple of 16");
  const size_t bytes = sizeof(void*) * 2 * static_cast<size_t>(matrices);
  meet_in_warp(
      ~0u, &row, sizeof row, rows, bytes, false, "ldmatrix", here, [=](WarpMeeting& meeting) {
        for (int lane = 0; lane < 32; lane++) {
          const int g = lane / 4, t = lane % 4;
          for (int m = 0; m < matrices; m++) {
            const int low = 8 * m + (trans ? 2 * t : g), high = 8 * m + (trans ? 2 * t + 1 : g);
            std::memcpy(meeting.out[lane] + 16 * m, meeting.in[low], sizeof(void*));
            std::memcpy(meeting.out[lane] + 16 * m + 8, meeting.in[high], sizeof(void*));
          }
        }
      });
}

}  // namespace cuda_on_cpu
