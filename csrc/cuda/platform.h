// What kernels need from the machine beside the CUDA language itself. One meaning, two bodies: PTX
// for nvcc (platform_ptx.h, platform_ptx_clusters.h), plain C++ for the emulator
// (tests/cuda_on_cpu, built with -DRNN_EXT_EMULATED by a host compiler).
//
// Of CUDA's own words kernels may use: threadIdx blockIdx blockDim gridDim; __syncthreads
// __syncwarp __shfl_sync __shfl_xor_sync __shfl_down_sync __shfl_up_sync __ballot_sync __any_sync
// __all_sync; __threadfence; atomicAdd atomicMax atomicExch atomicCAS; __ldg __ldcg __ldcs __stcg
// __stcs; __float_as_uint __uint_as_float; dim3 and the vector types; unqualified min and max,
// std:: and C mathematics. Everything else that differs between machines is a function below.
// Shared memory is dynamic only, a loop that polls calls spin_pause(), and kernels are started by
// launch.h alone.
//
// Functions, in namespace rnn_ext::cuda (L = lane, threads of a warp all call what is marked *):
//   shared_memory()                       this block's dynamic shared memory, 128-byte aligned
//   to_float(T), from_float<T>(float)     T: float, double, bf16 or fp16; rounds to nearest even
//   pack(T low, T high)                   two bf16 or fp16 as the 32 bits of a fragment register
//   to_tf32(float)                        nearest TF32 number, as bits, for mma_m16n8k8_tf32
//   fast_exp, fast_tanh, fast_divide      hardware approximations of float functions
//
//   mma_m16n8k16<T>(d, a, b)            * d[4] += a[4] b[2]; T bf16 or fp16, d float; A 16x16 rows,
//                                         B 16x8 columns
//   mma_m16n8k8_tf32(d, a, b)           * d[4] += a[4] b[2]; A 16x8 rows, B 8x8 columns
//     with g = L / 4 and t = L % 4: d[i] is row g + 8 (i / 2), column 2 t + i % 2;
//     16 bits: a[i] is row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next; b[i] rows 2 t + 8 i
//     and the next, column g.
//     TF32: a[i] is row g + 8 (i % 2), column t + 4 (i / 2); b[i] row t + 4 i, column g.
//   ldmatrix_x2(r, row), ldmatrix_x4    * r[m] of lane L = elements 2 t, 2 t + 1 of row g of 8x8
//                                         matrix m (16 bits each); lane L gives the address
//                                         (shared, multiple of 16) of row L % 8 of matrix L / 8
//   ldmatrix_x2_trans, ldmatrix_x4_trans  transposed: rows 2 t, 2 t + 1 of column g
//
//   copy_async<bytes>(to, from)           shared <- global, 4, 8 or 16 bytes, aligned; arrives at
//                                         copy_async_wait
//   copy_async_part<bytes>(to, from, n)   the first n bytes, zeros behind them
//   copy_async_commit(), copy_async_wait<pending>()
//
//   load_acquire, load_relaxed,           32-bit flags in global memory, gpu scope
//   store_release, store_relaxed, add_release
//   add_acq_rel(p, n)                     returns the value before
//   spin_until(p, predicate)              one thread polls a flag (load_acquire) until
//                                         predicate(value)
//   spin_pause(), nano_sleep(ns)
//
//   named_barrier(id, threads), named_arrive(id, threads)     id 1..15, threads a multiple of 32
//   group_barrier(word, members, leader)  blocks of a cooperative launch meet; every thread of each
//                                         calls it
//   grid_barrier(word)                    all blocks meet. The word must be 0 before the first use
//                                         and is reusable.
//
//   cluster_rank(), cluster_size(), cluster_index()           of this block; 0, 1, blockIdx.x
//                                                             without clusters
//   cluster_barrier() = cluster_arrive() then cluster_wait()  all threads of a cluster's blocks;
//                                                             release, acquire
//   peer_pointer(p, rank)                 the same place in another block's shared memory, as an
//                                         ordinary pointer
//   peer_address(p, rank)                 the same as a PeerAddress, for
//   load_peer<T>(address), store_peer(address, value)         T of 4, 8 or 16 bytes
//   load_acquire_cluster(p), store_release_cluster(p, n), add_release_cluster(p, n)
//                                         flags through peer_pointer
//
//   mbarrier_init(b, arrivals), mbarrier_init_fence()         uint64_t in shared memory; Hopper and
//                                                             later, as all below
//   mbarrier_arrive(b), mbarrier_arrive_expect(b, bytes), mbarrier_arrive_peer(address of b)
//   mbarrier_wait(b, parity)              until the phase of that parity (0 first) is over
//   store_async(address, value, address of b)  value (4, 8 or 16 bytes) to a peer; arrives with the
//                                         phase of its barrier
#pragma once
#include <cstdint>

#ifndef RNN_EXT_TARGET
#define RNN_EXT_TARGET cuda
#endif

#ifdef RNN_EXT_EMULATED
#include "emulated_platform.h"
#else
#include "platform_ptx_clusters.h"
#endif

namespace rnn_ext::cuda {

template <class Predicate>
RNN_EXT_DEVICE uint32_t spin_until(const uint32_t* flag, Predicate predicate) {
  uint32_t value;
  while (!predicate(value = load_acquire(flag))) spin_pause();
  return value;
}

RNN_EXT_DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// A sense barrier: its top bit flips when the last of `members` blocks has arrived. Members add 1,
// the leader (exactly one of the blocks) what is missing to 2^31, so that each round leaves the
// lower bits at 0.
RNN_EXT_DEVICE void group_barrier(uint32_t* word, unsigned members, bool leader) {
  constexpr uint32_t kSense = 0x80000000u;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    const uint32_t before = add_acq_rel(word, leader ? kSense - (members - 1) : 1u);
    spin_until(word, [=](uint32_t now) { return ((before ^ now) & kSense) != 0; });
  }
  __syncthreads();
}

RNN_EXT_DEVICE void grid_barrier(uint32_t* word) {
  group_barrier(word, gridDim.x * gridDim.y * gridDim.z,
                blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0);
}

}  // namespace rnn_ext::cuda
