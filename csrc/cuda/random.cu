// Random masks: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011), whose words depend on the key and the counter alone. rnn_ext/random.py says which they are.
#include "random.h"

#include "step.cuh"

namespace rnn_ext::cuda {
namespace {

constexpr int kWords = 4;

// The four words of a counter, in its place.
RNN_EXT_DEVICE void philox(uint64_t seed, uint32_t (&c)[kWords]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

template <class S>
RNN_EXT_DEVICE S entry(double value) {
  if constexpr (std::is_same_v<S, Real<S>> || std::is_same_v<S, bool>)
    return static_cast<S>(value);
  else
    return from_float<S>(static_cast<float>(value));
}

template <class S>
struct alignas(kWords * sizeof(S)) Quad {
  S entry[kWords];
};

// Reads the place of each row, writes the mask. Parallel over rows and columns: a thread fills as
// many columns as a counter gives words.
template <class S>
__global__ void __launch_bounds__(kTileThreads) random_mask_kernel(const RandomMask p) {
  const int64_t quads = (p.columns + kWords - 1) / kWords;
  const Place at = own_place(quads);
  if (at.row >= p.rows || at.unit >= quads) return;
  uint32_t words[kWords] = {static_cast<uint32_t>(at.unit),
                            static_cast<uint32_t>(p.sequences[at.row]),
                            static_cast<uint32_t>(p.steps[at.row]), p.stream};
  philox(p.seed, words);
  const S kept = entry<S>(p.kept), dropped = entry<S>(p.dropped);
  Quad<S> quad;
  for (int i = 0; i < kWords; i++) quad.entry[i] = words[i] >= p.threshold ? kept : dropped;
  if (p.columns % kWords == 0) {
    static_cast<Quad<S>*>(p.mask)[at.row * quads + at.unit] = quad;
    return;
  }
  S* const row = static_cast<S*>(p.mask) + at.row * p.columns;
  for (int i = 0; i < kWords; i++)
    if (at.unit * kWords + i < p.columns) row[at.unit * kWords + i] = quad.entry[i];
}

template <class S>
void start(const RandomMask& p, const Stream& stream) {
  const int64_t blocks = tiles(p.rows, divided_up(p.columns, kWords));
  launch_blocks("random_mask", random_mask_kernel<S>, blocks, kTileThreads, 0, stream, p);
}

}  // namespace

void random_mask(Storage storage, const RandomMask& p, const Stream& stream) {
  with_storage(storage, [&](auto zero) { start<decltype(zero)>(p, stream); });
}

void random_flags(const RandomMask& p, const Stream& stream) { start<bool>(p, stream); }

}  // namespace rnn_ext::cuda
