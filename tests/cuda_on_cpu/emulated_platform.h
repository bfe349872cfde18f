// The emulated body of csrc/cuda/platform.h, which says what each function means.
#pragma once
#include <type_traits>

#include "cuda_language.h"

#define RNN_EXT_DEVICE __forceinline__

namespace cuda_on_cpu {

unsigned char* shared_memory();
unsigned lane();

void mma_16bit(float* d, const uint32_t* a, const uint32_t* b, bool brain, Here here);
void mma_tf32(float* d, const uint32_t* a, const uint32_t* b, Here here);
// The addresses of the two rows of each 8x8 matrix that this lane reads: row g twice, or with
// `trans` 2 t and 2 t + 1.
void ldmatrix_rows(const void* row, const uint16_t** rows, int matrices, bool trans, Here here);

void copy_async(void* to, const void* from, unsigned bytes, unsigned valid);
void copy_async_commit();
void copy_async_wait(unsigned pending);

enum class Order { kRelaxed, kAcquire, kRelease, kBoth };
uint32_t load_flag(const uint32_t* p, Order order);
void store_flag(uint32_t* p, uint32_t value, Order order);
uint32_t add_flag(uint32_t* p, uint32_t value, Order order);
void spin_pause(Here here);

void named_barrier(int id, int threads, bool wait, Here here);
void cluster_arrive(Here here);
void cluster_wait(Here here);
unsigned cluster_rank();
unsigned cluster_size();
unsigned cluster_index();
void* peer_pointer(const void* p, unsigned rank);

void mbarrier_init(uint64_t* b, unsigned arrivals);
void mbarrier_arrive(uint64_t* b, unsigned expected_bytes);
void mbarrier_wait(uint64_t* b, unsigned parity, Here here);
void store_async(void* to, const void* value, unsigned bytes, uint64_t* b);

}  // namespace cuda_on_cpu

namespace rnn_ext::cuda {

using cuda_on_cpu::Here;
using cuda_on_cpu::Order;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

using cuda_on_cpu::cluster_index;
using cuda_on_cpu::cluster_rank;
using cuda_on_cpu::cluster_size;
using cuda_on_cpu::shared_memory;

// Numbers

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, 2);
  return static_cast<float>(value);
}

template <class T>
__forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, fp16>) {
    const _Float16 value = static_cast<_Float16>(x);
    fp16 result;
    std::memcpy(&result.bits, &value, 2);
    return result;
  } else {
    return static_cast<T>(x);
  }
}

inline uint32_t pack(bf16 low, bf16 high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
inline uint32_t pack(fp16 low, fp16 high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}
inline uint32_t to_tf32(float x) {  // to nearest, ties away from zero: the 13 lower bits go
  const uint32_t bits = __float_as_uint(x);
  return x - x != 0 ? bits : (bits + 0x1000) & ~0x1fffu;
}

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float a, float b) { return a / b; }
inline float fast_tanh(float x) { return std::tanh(x); }

// Matrices

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Here here = Here::current()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  cuda_on_cpu::mma_16bit(d, a, b, std::is_same_v<T, bf16>, here);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Here here = Here::current()) {
  cuda_on_cpu::mma_tf32(d, a, b, here);
}

template <int matrices, bool trans>
void ldmatrix(uint32_t* r, const void* row, Here here) {
  const uint16_t* rows[2 * matrices];
  cuda_on_cpu::ldmatrix_rows(row, rows, matrices, trans, here);
  for (int m = 0; m < matrices;
       m++) {  // read here, by the lane that receives it, so that races are seen
    const unsigned t = cuda_on_cpu::lane() % 4, g = cuda_on_cpu::lane() / 4;
    const uint16_t low = rows[2 * m][trans ? g : 2 * t];
    const uint16_t high = rows[2 * m + 1][trans ? g : 2 * t + 1];
    r[m] = low | static_cast<uint32_t>(high) << 16;
  }
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Here here = Here::current()) {
  ldmatrix<2, false>(r, row, here);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Here here = Here::current()) {
  ldmatrix<4, false>(r, row, here);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Here here = Here::current()) {
  ldmatrix<2, true>(r, row, here);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Here here = Here::current()) {
  ldmatrix<4, true>(r, row, here);
}

// Asynchronous copies

template <int bytes>
void copy_async_part(void* to, const void* from, int count) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  cuda_on_cpu::copy_async(to, from, bytes, static_cast<unsigned>(count));
}
template <int bytes>
void copy_async(void* to, const void* from) {
  copy_async_part<bytes>(to, from, bytes);
}
inline void copy_async_commit() { cuda_on_cpu::copy_async_commit(); }
template <int pending>
void copy_async_wait() {
  cuda_on_cpu::copy_async_wait(pending);
}

// Flags

inline uint32_t load_acquire(const uint32_t* p) {
  return cuda_on_cpu::load_flag(p, Order::kAcquire);
}
inline uint32_t load_relaxed(const uint32_t* p) {
  return cuda_on_cpu::load_flag(p, Order::kRelaxed);
}
inline void store_release(uint32_t* p, uint32_t value) {
  cuda_on_cpu::store_flag(p, value, Order::kRelease);
}
inline void store_relaxed(uint32_t* p, uint32_t value) {
  cuda_on_cpu::store_flag(p, value, Order::kRelaxed);
}
inline void add_release(uint32_t* p, uint32_t value) {
  cuda_on_cpu::add_flag(p, value, Order::kRelease);
}
inline uint32_t add_acq_rel(uint32_t* p, uint32_t value) {
  return cuda_on_cpu::add_flag(p, value, Order::kBoth);
}
inline void spin_pause(Here here = Here::current()) { cuda_on_cpu::spin_pause(here); }
inline void nano_sleep(unsigned, Here here = Here::current()) { cuda_on_cpu::spin_pause(here); }

// Barriers of some of a block's threads

inline void named_barrier(int id, int threads, Here here = Here::current()) {
  cuda_on_cpu::named_barrier(id, threads, true, here);
}
inline void named_arrive(int id, int threads, Here here = Here::current()) {
  cuda_on_cpu::named_barrier(id, threads, false, here);
}

// Clusters

class PeerAddress {  // an address with arithmetic in bytes, as the 32-bit shared address has
 public:
  PeerAddress() = default;
  explicit PeerAddress(void* p) : byte_(static_cast<unsigned char*>(p)) {}
  PeerAddress operator+(long bytes) const { return PeerAddress(byte_ + bytes); }
  PeerAddress& operator+=(long bytes) { return *this = *this + bytes; }
  void* get() const { return byte_; }

 private:
  unsigned char* byte_ = nullptr;
};

inline void cluster_arrive(Here here = Here::current()) { cuda_on_cpu::cluster_arrive(here); }
inline void cluster_wait(Here here = Here::current()) { cuda_on_cpu::cluster_wait(here); }
template <class T>
T* peer_pointer(T* p, unsigned rank) {
  return static_cast<T*>(cuda_on_cpu::peer_pointer(p, rank));
}
inline PeerAddress peer_address(const void* p, unsigned rank) {
  return PeerAddress(cuda_on_cpu::peer_pointer(p, rank));
}
template <class T>
__forceinline__ T load_peer(PeerAddress address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  return *static_cast<const T*>(address.get());
}
template <class T>
void store_peer(PeerAddress address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  *static_cast<T*>(address.get()) = value;
}

inline uint32_t load_acquire_cluster(const uint32_t* p) { return load_acquire(p); }
inline void store_release_cluster(uint32_t* p, uint32_t value) { store_release(p, value); }
inline void add_release_cluster(uint32_t* p, uint32_t value) { add_release(p, value); }

// Barriers in shared memory that also count bytes

inline void mbarrier_init(uint64_t* b, unsigned arrivals) {
  cuda_on_cpu::mbarrier_init(b, arrivals);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* b) { cuda_on_cpu::mbarrier_arrive(b, 0); }
inline void mbarrier_arrive_expect(uint64_t* b, unsigned bytes) {
  cuda_on_cpu::mbarrier_arrive(b, bytes);
}
inline void mbarrier_arrive_peer(PeerAddress b) {
  cuda_on_cpu::mbarrier_arrive(static_cast<uint64_t*>(b.get()), 0);
}
inline void mbarrier_wait(uint64_t* b, unsigned parity, Here here = Here::current()) {
  cuda_on_cpu::mbarrier_wait(b, parity, here);
}
template <class T>
void store_async(PeerAddress address, T value, PeerAddress b) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  cuda_on_cpu::store_async(address.get(), &value, sizeof value, static_cast<uint64_t*>(b.get()));
}

}  // namespace rnn_ext::cuda
