// Small kernels, right with bug 0 and wrong with any other: what the emulator and the race checker
// must tell apart.
#include "../entry.h"
#include "launch.h"

namespace {

using namespace rnn_ext::cuda;

struct Args {
  float* x;         // [2, blocks * threads]: input, then results
  uint32_t* flags;  // 64, zero
  int bug;
};

RNN_EXT_DEVICE unsigned global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }
RNN_EXT_DEVICE float* result(const Args& a) {
  return a.x + gridDim.x * blockDim.x + global_thread();
}
RNN_EXT_DEVICE unsigned next_block_thread() {
  return (blockIdx.x + 1) % gridDim.x * blockDim.x + threadIdx.x;
}
RNN_EXT_DEVICE float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }
RNN_EXT_DEVICE bool first_thread() { return threadIdx.x == 0; }

__global__ void block_barrier(
    const Args a) {  // 1: no barrier, 2: in a branch, 3: a thread never comes
  float* shared = shared_floats();
  shared[threadIdx.x] = a.x[global_thread()];
  if (a.bug == 2 && threadIdx.x < 32) {
    __syncthreads();
  } else if (a.bug == 3 && threadIdx.x == 5) {
    while (load_acquire(a.flags) == 0) spin_pause();
  } else if (a.bug != 1) {
    __syncthreads();
  }
  *result(a) = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void warp_barrier(const Args a) {  // 1: no __syncwarp, 2: lanes in different shuffles
  float* shared = shared_floats() + threadIdx.x / 32 * 32;
  const unsigned lane = threadIdx.x % 32;
  shared[lane] = a.x[global_thread()];
  if (a.bug != 1) __syncwarp();
  float v = shared[31 - lane];
  if (a.bug == 2) {
    v = lane < 7 ? __shfl_sync(0xffffffffu, v, 0) : v;
  }
  *result(a) = v;
}

__global__ void fences(const Args a) {  // 1: no fence before the flag, 2: none after it
  const float v = a.x[global_thread()];
  __syncthreads();
  a.x[global_thread()] = v + 1;
  __syncthreads();
  if (first_thread()) {
    if (a.bug != 1) __threadfence();
    atomicAdd(a.flags, 1u);
    while (load_relaxed(a.flags) < gridDim.x) spin_pause();
    if (a.bug != 2) __threadfence();
  }
  __syncthreads();
  *result(a) = a.x[next_block_thread()];
}

__global__ void release_acquire(
    const Args a) {  // 1: relaxed store, 2: relaxed load, 3: no __syncthreads before, 4: after
  *result(a) = 0;
  a.x[global_thread()] += 1;
  if (a.bug != 3) __syncthreads();
  if (first_thread()) {
    if (a.bug == 1) {
      store_relaxed(a.flags + blockIdx.x, 1);
    } else {
      store_release(a.flags + blockIdx.x, 1);
    }
    const uint32_t* flag = a.flags + (blockIdx.x + 1) % gridDim.x;
    while ((a.bug == 2 ? load_relaxed(flag) : load_acquire(flag)) == 0) spin_pause();
  }
  if (a.bug != 4) __syncthreads();
  *result(a) = a.x[next_block_thread()];
}

__global__ void double_buffer(const Args a) {  // 1: one buffer, 2: one barrier too few
  float* half[2] = {a.x + gridDim.x * blockDim.x, a.x};
  float v = a.x[global_thread()];
  for (int round = 0; round < 4; round++) {
    float* out = half[a.bug == 1 ? 0 : round % 2];
    out[global_thread()] = v + 1;
    if (a.bug != 2 || round != 2) grid_barrier(a.flags);
    v = out[next_block_thread()];
  }
  grid_barrier(a.flags);
  *result(a) = v;
}

__global__ void cluster_ring(
    const Args a) {  // 1: no barrier before, 2: none at the end, 3: leaves unwaited
  float* shared = shared_floats();
  shared[threadIdx.x] = a.x[global_thread()];
  if (a.bug != 1) cluster_barrier();
  if (a.bug == 2 && cluster_rank() == 1) {
    *result(a) = 0;
    return;
  }
  *result(a) = peer_pointer(shared, (cluster_rank() + 1) % cluster_size())[threadIdx.x];
  if (a.bug == 3 && cluster_rank() == 0) {
    cluster_arrive();
  } else if (a.bug != 2) {
    cluster_barrier();
  }
}

__global__ void pipeline(
    const Args a) {  // 1: the producer does not wait, 2: the consumer does not, 3: wrong count
  float* shared = shared_floats();
  const unsigned lane = threadIdx.x % 32;
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    if (threadIdx.x < 32) {
      if (i && a.bug != 1) named_barrier(2, 64);
      shared[lane] = a.x[global_thread() + 32] / 4;
      named_arrive(1, 64);
    } else {
      if (a.bug != 2) named_barrier(1, a.bug == 3 ? 32 : 64);
      sum += shared[31 - lane];
      if (i < 3) named_arrive(2, 64);
    }
  }
  *result(a) = threadIdx.x < 32 ? 0 : sum;
}

__global__ void copies(
    const Args
        a) {  // 1: no wait, 2: no commit, 3: no barrier behind, 4: source changes, 5: misaligned
  float* shared = shared_floats();
  const unsigned piece = threadIdx.x * 4;
  const bool copying = piece < blockDim.x;
  if (copying) copy_async<16>(shared + piece, a.x + blockIdx.x * blockDim.x + piece + (a.bug == 5));
  if (a.bug != 2) copy_async_commit();
  if (a.bug == 4) a.x[global_thread()] = 0;
  if (a.bug != 1) copy_async_wait<0>();
  if (a.bug != 3) __syncthreads();
  *result(a) = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void deliveries(
    const Args a) {  // 1: nobody waits, 2: wrong parity, 3: too few bytes, 4: init not published
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared_memory());
  float* received = shared_floats() + 32;
  if (first_thread()) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, blockDim.x * 4 - (a.bug == 3 ? 4 : 0));
  }
  if (a.bug == 4) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
  const unsigned left = (cluster_rank() + cluster_size() - 1) % cluster_size();
  store_async(peer_address(received + threadIdx.x, left), a.x[global_thread()],
              peer_address(barrier, left));
  if (a.bug != 1) mbarrier_wait(barrier, a.bug == 2 ? 1 : 0);
  *result(a) = received[threadIdx.x];
  cluster_barrier();
}

// Shared memory: 1 far read, 2 write just behind; x: 3 far read, 4 write just behind; 5: null.
__global__ void bounds(const Args a) {
  float* shared = shared_floats();
  const unsigned i = threadIdx.x;
  shared[i] = a.x[global_thread()];
  __syncthreads();
  *result(a) = shared[blockDim.x - 1 - i];
  const unsigned all = 2 * gridDim.x * blockDim.x;
  if (a.bug == 1) *result(a) = shared[i + 4096];
  if (a.bug == 2 && i == 0) shared[66] = 0;
  if (a.bug == 3) *result(a) = a.x[all + 4096];
  if (a.bug == 4 && first_thread()) a.x[all] = 0;
  if (a.bug == 5) *result(a) = *static_cast<volatile float*>(nullptr);
}

__global__ void initialised(
    const Args a) {  // 1: shared memory read before a write, hidden by what is done with it
  float* shared = shared_floats();
  if (a.bug != 1) shared[threadIdx.x] = 0;
  const float unused = shared[threadIdx.x];
  *result(a) = a.x[global_thread()] + (unused == 1.f ? 1 : 0);
}

__global__ void ordinary(
    const Args a) {  // no block waits for another; 1: one does, 2: two write one place
  if (a.bug == 1 && first_thread()) {
    atomicAdd(a.flags, 1u);
    while (load_acquire(a.flags) < gridDim.x) spin_pause();
  }
  *result(a) = a.x[global_thread()];
  if (a.bug == 2 && first_thread()) a.x[gridDim.x * blockDim.x] = a.x[0];
}

// Numbers of 16 bits and vectors are structures, and here what a function returns goes to memory;
// each function is called twice, so that the compiler is not keen on inlining it.
__global__ void returned(const Args a) {  // no barrier after 1: fp16, 2: bf16, 3: a vector
  float2* pairs = reinterpret_cast<float2*>(shared_memory());
  fp16* halves = reinterpret_cast<fp16*>(pairs + blockDim.x);
  bf16* brains = reinterpret_cast<bf16*>(halves + blockDim.x);
  const unsigned i = threadIdx.x, other = blockDim.x - 1 - i;
  const float x = a.x[global_thread()];
  halves[i] = from_float<fp16>(x);
  if (a.bug != 1) __syncthreads();
  const float half = to_float(halves[other]);
  brains[i] = from_float<bf16>(half);
  if (a.bug != 2) __syncthreads();
  const float brain = to_float(brains[other]);
  pairs[i] = i % 2 ? make_float2(x, brain) : make_float2(half, brain);
  if (a.bug != 3) __syncthreads();
  const bf16 rounded = from_float<bf16>(to_float(from_float<fp16>(pairs[other].y)));
  *result(a) = to_float(rounded);
}

struct Case {
  const char* name;
  void (*kernel)(const Args);
  bool cooperative;
};
const Case kCases[] = {
    {"block_barrier", block_barrier, false},
    {"warp_barrier", warp_barrier, false},
    {"fences", fences, true},
    {"release_acquire", release_acquire, true},
    {"double_buffer", double_buffer, true},
    {"cluster_ring", cluster_ring, false},
    {"pipeline", pipeline, false},
    {"copies", copies, false},
    {"deliveries", deliveries, false},
    {"bounds", bounds, false},
    {"initialised", initialised, false},
    {"ordinary", ordinary, false},
    {"returned", returned, false},
};

}  // namespace

extern "C" int planted(const char* name, float* x, uint32_t* flags, int bug, int blocks,
                       int threads, int cluster, int shared_bytes) {
  return cuda_on_cpu::entry([&] {
    for (const Case& c : kCases) {
      if (std::string(c.name) != name) continue;
      LaunchConfig config{};
      config.blocks.x = static_cast<unsigned>(blocks);
      config.threads = threads;
      config.shared_bytes = static_cast<size_t>(shared_bytes);
      config.cluster = cluster;
      config.cooperative = c.cooperative;
      return launch(c.name, c.kernel, config, Args{x, flags, bug});
    }
    throw std::runtime_error("no such case");
  });
}
