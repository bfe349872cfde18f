// How long blocks take to meet and to pass data on: what the design of the persistent kernels rests
// on. Each kernel does `rounds` times the same thing; latency.py divides. In the emulator they only
// show that they end.
#include "../entry.h"
#include "launch.h"

// Not in the namespace below: nvcc would then not export the function that takes it.
struct Args {
  uint32_t* flags;  // one for each block, 32 apart, and one more; all zero
  uint4* data;      // [bytes / 16] of what is gathered
  int rounds, bytes, group;
};

namespace {

using namespace rnn_ext::cuda;

constexpr int kFlagStride = 32;

__global__ void block_barriers(const Args a) {
  for (int i = 0; i < a.rounds; i++) __syncthreads();
}

__global__ void cluster_barriers(const Args a) {
  for (int i = 0; i < a.rounds; i++) cluster_barrier();
}

__global__ void grid_barriers(const Args a) {
  for (int i = 0; i < a.rounds; i++) grid_barrier(a.flags);
}

// Groups of `group` blocks; everyone publishes, then waits for everyone, as the persistent kernels
// do.
__global__ void flag_rounds(const Args a) {
  const int first = static_cast<int>(blockIdx.x) / a.group * a.group;
  for (int i = 1; i <= a.rounds; i++) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(a.flags + blockIdx.x * kFlagStride, 1);
    if (threadIdx.x < 32) {
      for (int b = first + static_cast<int>(threadIdx.x); b < first + a.group; b += 32) {
        const uint32_t wanted = static_cast<uint32_t>(i);
        spin_until(a.flags + b * kFlagStride, [=](uint32_t count) { return count >= wanted; });
      }
    }
    __syncthreads();
  }
}

// Every block copies the same bytes to its shared memory: what gathering h from L2 costs.
__global__ void gather(const Args a) {
  unsigned char* shared = shared_memory();
  for (int i = 0; i < a.rounds; i++) {
    for (int at = static_cast<int>(threadIdx.x) * 16; at < a.bytes;
         at += static_cast<int>(blockDim.x) * 16) {
      copy_async<16>(shared + at, reinterpret_cast<const unsigned char*>(a.data) + at);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
  }
}

// Every block pushes its share of the bytes to all blocks of its cluster, and they meet.
__global__ void push(const Args a) {
  unsigned char* shared = shared_memory();
  const int size = static_cast<int>(cluster_size()), share = a.bytes / size;
  unsigned char* mine = shared + static_cast<int>(cluster_rank()) * share;
  for (int i = 0; i < a.rounds; i++) {
    for (int peer = 0; peer < size; peer++) {
      const PeerAddress to = peer_address(mine, static_cast<unsigned>(peer));
      for (int at = static_cast<int>(threadIdx.x) * 16; at < share;
           at += static_cast<int>(blockDim.x) * 16) {
        store_peer(to + at, make_uint4(1, 2, 3, 4));
      }
    }
    cluster_barrier();
  }
}

struct Case {
  const char* name;
  void (*kernel)(const Args);
  bool cooperative;
};
const Case kCases[] = {
    {"block_barriers", block_barriers, false},
    {"cluster_barriers", cluster_barriers, false},
    {"grid_barriers", grid_barriers, true},
    {"flag_rounds", flag_rounds, true},
    {"gather", gather, false},
    {"push", push, false},
};

void timed(const Case& c, const LaunchConfig& config, const Args& args, float* milliseconds) {
#ifdef RNN_EXT_EMULATED
  launch(c.name, c.kernel, config, args);
  *milliseconds = 0;
#else
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  Args warm = args;
  warm.rounds = 0;
  launch(c.name, c.kernel, config, warm);
  check(cudaEventRecord(begin), "cudaEventRecord");
  launch(c.name, c.kernel, config, args);
  check(cudaEventRecord(end), "cudaEventRecord");
  check(cudaEventSynchronize(end), c.name);
  check(cudaEventElapsedTime(milliseconds, begin, end), "cudaEventElapsedTime");
  (void)cudaEventDestroy(begin);
  (void)cudaEventDestroy(end);
#endif
}

}  // namespace

extern "C" {

// Milliseconds of `rounds` rounds.
int latency(const char* name, const Args* args, int blocks, int threads, int cluster,
            int shared_bytes, float* milliseconds) {
  return cuda_on_cpu::entry([&] {
    for (const Case& c : kCases) {
      if (std::string(c.name) != name) continue;
      LaunchConfig config{};
      config.blocks.x = static_cast<unsigned>(blocks);
      config.threads = threads;
      config.shared_bytes = static_cast<size_t>(shared_bytes);
      config.cluster = cluster;
      config.cooperative = c.cooperative;
      return timed(c, config, *args, milliseconds);
    }
    throw std::runtime_error("no such case");
  });
}

// Blocks of clusters of this size that the GPU holds at once, each with so much shared memory.
int resident(int cluster, int threads, int shared_bytes, int* blocks) {
  return cuda_on_cpu::entry([&] {
    LaunchConfig config{};
    config.blocks.x = static_cast<unsigned>(cluster);
    config.threads = threads;
    config.shared_bytes = static_cast<size_t>(shared_bytes);
    config.cluster = cluster;
    const void* kernel = reinterpret_cast<const void*>(&cluster_barriers);
    *blocks = static_cast<int>(resident_blocks("clusters", kernel, config));
  });
}

int limits(DeviceLimits* result) {
  return cuda_on_cpu::entry([&] { *result = device_limits(0); });
}
}
