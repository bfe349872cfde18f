// The words of CUDA C++ that kernels may use, for a host compiler. What they do is in the sources
// beside this file.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

#define __global__
#define __device__
#define __host__
// Really inlined, and so is everything here that may return a structure: where a call's result goes
// straight to memory, -fsanitize=thread does not see the store.
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x, y, z;
};

#define CUDA_ON_CPU_VECTORS(type, name)                                                       \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  __forceinline__ name##2 make_##name##2(type x, type y) { return {x, y}; }                   \
  __forceinline__ name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)
CUDA_ON_CPU_VECTORS(short, short)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
#undef CUDA_ON_CPU_VECTORS

// Of the running thread; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// Where the source calls a function that waits: threads that meet must come from the same place.
using Here = std::source_location;

enum class Pick { kLane, kXor, kUp, kDown };

void block_barrier(Here here);
void warp_barrier(unsigned mask, Here here);
void shuffle(unsigned mask, const void* in, void* out, size_t bytes, Pick pick, int operand,
             int width, Here here);
unsigned ballot(unsigned mask, bool vote, Here here);
void fence();
void atomic(void* address, void (*change)(void* address, void* argument), void* argument);

template <class T>
__forceinline__ T shuffled(unsigned mask, T value, Pick pick, int operand, int width, Here here) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  T result;
  shuffle(mask, &value, &result, sizeof value, pick, operand, width, here);
  return result;
}

template <class T, class Function>
T atomically(T* address, Function function) {
  struct Call {
    Function& function;
    T before;
  } call{function, {}};
  atomic(
      address,
      [](void* p, void* argument) {
        Call& c = *static_cast<Call*>(argument);
        std::memcpy(&c.before, p, sizeof(T));
        const T after = c.function(c.before);
        std::memcpy(p, &after, sizeof(T));
      },
      &call);
  return call.before;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(cuda_on_cpu::Here here = cuda_on_cpu::Here::current()) {
  cuda_on_cpu::block_barrier(here);
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Here here = cuda_on_cpu::Here::current()) {
  cuda_on_cpu::warp_barrier(mask, here);
}
#define CUDA_ON_CPU_SHUFFLE(name, pick)                                                       \
  template <class T>                                                                          \
  __forceinline__ T name(unsigned mask, T value, int operand, int width = 32,                 \
                         cuda_on_cpu::Here here = cuda_on_cpu::Here::current()) {             \
    return cuda_on_cpu::shuffled(mask, value, cuda_on_cpu::Pick::pick, operand, width, here); \
  }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, kLane)
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, kXor)
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, kUp)
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, kDown)
#undef CUDA_ON_CPU_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, bool vote,
                              cuda_on_cpu::Here here = cuda_on_cpu::Here::current()) {
  return cuda_on_cpu::ballot(mask, vote, here);
}
inline bool __any_sync(unsigned mask, bool vote,
                       cuda_on_cpu::Here here = cuda_on_cpu::Here::current()) {
  return cuda_on_cpu::ballot(mask, vote, here) != 0;
}
inline bool __all_sync(unsigned mask, bool vote,
                       cuda_on_cpu::Here here = cuda_on_cpu::Here::current()) {
  return cuda_on_cpu::ballot(mask, vote, here) == mask;
}

inline void __threadfence() { cuda_on_cpu::fence(); }
template <class T>
T atomicAdd(T* p, T value) {
  return cuda_on_cpu::atomically(p, [=](T before) { return before + value; });
}
template <class T>
T atomicMax(T* p, T value) {
  return cuda_on_cpu::atomically(p, [=](T before) { return before < value ? value : before; });
}
template <class T>
T atomicExch(T* p, T value) {
  return cuda_on_cpu::atomically(p, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* p, T expected, T value) {
  return cuda_on_cpu::atomically(p, [=](T before) { return before == expected ? value : before; });
}

template <class T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcg(const T* p) {
  return *p;
}
template <class T>
__forceinline__ T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// As CUDA has them for every pair of arithmetic types.
template <class A, class B>
constexpr auto min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr auto max(A a, B b) {
  return a < b ? b : a;
}
