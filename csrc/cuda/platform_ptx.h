// The NVIDIA body of platform.h, which says what each function means; clusters are in
// platform_ptx_clusters.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#define RNN_EXT_DEVICE __device__ __forceinline__

namespace rnn_ext::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

RNN_EXT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char rnn_ext_shared[];
  return rnn_ext_shared;
}
RNN_EXT_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
RNN_EXT_DEVICE size_t global_address(const void* p) { return __cvta_generic_to_global(p); }

// Numbers

RNN_EXT_DEVICE float to_float(float x) { return x; }
RNN_EXT_DEVICE float to_float(double x) { return static_cast<float>(x); }
RNN_EXT_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
RNN_EXT_DEVICE float to_float(fp16 x) { return __half2float(x); }

template <class T>
RNN_EXT_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, fp16>) {
    return __float2half_rn(x);
  } else {
    return static_cast<T>(x);
  }
}

RNN_EXT_DEVICE uint32_t pack(bf16 low, bf16 high) {
  return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}
RNN_EXT_DEVICE uint32_t pack(fp16 low, fp16 high) {
  return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
}
RNN_EXT_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

RNN_EXT_DEVICE float fast_exp(float x) { return __expf(x); }
RNN_EXT_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }
RNN_EXT_DEVICE float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Matrices

template <class T>
RNN_EXT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

RNN_EXT_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RNN_EXT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1},[%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
RNN_EXT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
RNN_EXT_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1},[%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
RNN_EXT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Asynchronous copies

template <int bytes>
RNN_EXT_DEVICE void copy_async_part(void* to, const void* from, int count) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const uint32_t target = shared_address(to);
  const size_t source = global_address(from);
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(count)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source),
                 "n"(bytes), "r"(count)
                 : "memory");
  }
}
template <int bytes>
RNN_EXT_DEVICE void copy_async(void* to, const void* from) {
  copy_async_part<bytes>(to, from, bytes);
}
RNN_EXT_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
RNN_EXT_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Flags

RNN_EXT_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(global_address(p))
               : "memory");
  return value;
}
RNN_EXT_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(global_address(p))
               : "memory");
  return value;
}
RNN_EXT_DEVICE void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global_address(p)), "r"(value)
               : "memory");
}
RNN_EXT_DEVICE void store_relaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(global_address(p)), "r"(value)
               : "memory");
}
RNN_EXT_DEVICE void add_release(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global_address(p)), "r"(value)
               : "memory");
}
RNN_EXT_DEVICE uint32_t add_acq_rel(uint32_t* p, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(global_address(p)), "r"(value)
               : "memory");
  return before;
}
RNN_EXT_DEVICE void spin_pause() {}
RNN_EXT_DEVICE void nano_sleep(unsigned nanoseconds) { __nanosleep(nanoseconds); }

// Barriers of some of a block's threads

RNN_EXT_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
RNN_EXT_DEVICE void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace rnn_ext::cuda
