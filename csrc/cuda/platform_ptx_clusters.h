// The NVIDIA body of platform.h for what came with Hopper: clusters, and barriers in shared memory
// that count bytes. Older architectures have none: there a block is a cluster of one, and what
// needs a peer traps.
#pragma once
#include "platform_ptx.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RNN_EXT_HAS_CLUSTERS 1
#else
#define RNN_EXT_HAS_CLUSTERS 0
#endif

namespace rnn_ext::cuda {

using PeerAddress = uint32_t;

RNN_EXT_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
#if RNN_EXT_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
RNN_EXT_DEVICE unsigned cluster_size() {
  unsigned size = 1;
#if RNN_EXT_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
RNN_EXT_DEVICE unsigned cluster_index() {
#if RNN_EXT_HAS_CLUSTERS
  unsigned index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
#else
  return blockIdx.x;
#endif
}
RNN_EXT_DEVICE void cluster_arrive() {
#if RNN_EXT_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
RNN_EXT_DEVICE void cluster_wait() {
#if RNN_EXT_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

template <class T>
RNN_EXT_DEVICE T* peer_pointer(T* p, unsigned rank) {
#if RNN_EXT_HAS_CLUSTERS
  uint64_t peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(peer);
#else
  if (rank != 0) __trap();
  return p;
#endif
}
RNN_EXT_DEVICE PeerAddress peer_address(const void* p, unsigned rank) {
#if RNN_EXT_HAS_CLUSTERS
  uint32_t peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(shared_address(p)), "r"(rank));
  return peer;
#else
  if (rank != 0) __trap();
  return shared_address(p);
#endif
}

// A value as the 32-bit registers that carry it.
template <class T>
union Registers {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  uint32_t word[sizeof(T) / 4];
  RNN_EXT_DEVICE Registers() {}
};

#if RNN_EXT_HAS_CLUSTERS
#define RNN_EXT_PEER_SPACE "shared::cluster"
#else
#define RNN_EXT_PEER_SPACE "shared"
#endif

template <class T>
RNN_EXT_DEVICE T load_peer(PeerAddress address) {
  Registers<T> r;
  if constexpr (sizeof(T) == 4) {
    asm volatile("ld." RNN_EXT_PEER_SPACE ".u32 %0, [%1];"
                 : "=r"(r.word[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("ld." RNN_EXT_PEER_SPACE ".v2.u32 {%0,%1}, [%2];"
                 : "=r"(r.word[0]), "=r"(r.word[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ld." RNN_EXT_PEER_SPACE ".v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
                 : "r"(address)
                 : "memory");
  }
  return r.value;
}
template <class T>
RNN_EXT_DEVICE void store_peer(PeerAddress address, T value) {
  Registers<T> r;
  r.value = value;
  if constexpr (sizeof(T) == 4) {
    asm volatile("st." RNN_EXT_PEER_SPACE ".u32 [%0], %1;" ::"r"(address), "r"(r.word[0])
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile("st." RNN_EXT_PEER_SPACE ".v2.u32 [%0], {%1,%2};" ::"r"(address), "r"(r.word[0]),
                 "r"(r.word[1])
                 : "memory");
  } else {
    asm volatile("st." RNN_EXT_PEER_SPACE ".v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(r.word[0]), "r"(r.word[1]), "r"(r.word[2]), "r"(r.word[3])
                 : "memory");
  }
}

#if RNN_EXT_HAS_CLUSTERS
#define RNN_EXT_CLUSTER_SCOPE "cluster"
#else
#define RNN_EXT_CLUSTER_SCOPE "gpu"
#endif

RNN_EXT_DEVICE uint32_t load_acquire_cluster(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire." RNN_EXT_CLUSTER_SCOPE ".u32 %0, [%1];"
               : "=r"(value)
               : "l"(p)
               : "memory");
  return value;
}
RNN_EXT_DEVICE void store_release_cluster(uint32_t* p, uint32_t value) {
  asm volatile("st.release." RNN_EXT_CLUSTER_SCOPE ".u32 [%0], %1;" ::"l"(p), "r"(value)
               : "memory");
}
RNN_EXT_DEVICE void add_release_cluster(uint32_t* p, uint32_t value) {
  asm volatile("red.release." RNN_EXT_CLUSTER_SCOPE ".add.u32 [%0], %1;" ::"l"(p), "r"(value)
               : "memory");
}

// Barriers in shared memory that also count bytes

RNN_EXT_DEVICE void mbarrier_init(uint64_t* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals)
               : "memory");
}
RNN_EXT_DEVICE void mbarrier_arrive(uint64_t* b) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(b))
      : "memory");
}
RNN_EXT_DEVICE void mbarrier_init_fence() {
#if RNN_EXT_HAS_CLUSTERS
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __threadfence_block();
#endif
}
RNN_EXT_DEVICE void mbarrier_arrive_expect(uint64_t* b, unsigned bytes) {
#if RNN_EXT_HAS_CLUSTERS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
               "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}
RNN_EXT_DEVICE void mbarrier_arrive_peer(PeerAddress b) {
#if RNN_EXT_HAS_CLUSTERS
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(b) : "memory");
#else
  __trap();
#endif
}
RNN_EXT_DEVICE void mbarrier_wait(uint64_t* b, unsigned parity) {
#if RNN_EXT_HAS_CLUSTERS
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(b)), "r"(parity)
        : "memory");
  } while (!done);
#else
  __trap();
#endif
}
template <class T>
RNN_EXT_DEVICE void store_async(PeerAddress address, T value, PeerAddress b) {
#if RNN_EXT_HAS_CLUSTERS
  Registers<T> r;
  r.value = value;
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address),
        "r"(r.word[0]), "r"(b)
        : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1,%2}, [%3];" ::"r"(
            address),
        "r"(r.word[0]), "r"(r.word[1]), "r"(b)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1,%2,%3,%4}, [%5];" ::
            "r"(address),
        "r"(r.word[0]), "r"(r.word[1]), "r"(r.word[2]), "r"(r.word[3]), "r"(b)
        : "memory");
  }
#else
  __trap();
#endif
}

}  // namespace rnn_ext::cuda
