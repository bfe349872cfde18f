// Every primitive of platform.h in a kernel of its own. They run in the emulator and on a GPU, and
// conformance.py knows what each must give. A thread reads and writes 32-bit words; `out` is filled
// with 0xff before.
#include "../entry.h"
#include "launch.h"

namespace {

using namespace rnn_ext::cuda;

struct Words {
  const uint32_t* in;
  uint32_t* out;
  uint32_t* flags;  // 64, all zero
};

RNN_EXT_DEVICE unsigned global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Numbers: in 1 float; out bf16, fp16, tf32, both back as floats, packed pairs
__global__ void numbers(const Words w) {
  const unsigned i = global_thread();
  const float x = __uint_as_float(w.in[i]);
  const bf16 brain = from_float<bf16>(x);
  const fp16 half = from_float<fp16>(x);
  uint32_t* out = w.out + i * 5;
  out[0] = pack(brain, from_float<bf16>(0.f));
  out[1] = pack(from_float<fp16>(0.f), half);
  out[2] = to_tf32(x);
  out[3] = __float_as_uint(to_float(brain));
  out[4] = __float_as_uint(to_float(half));
}

// Approximations: in 1 float; out exp, tanh, quotient by x
__global__ void approximations(const Words w) {
  const unsigned i = global_thread();
  const float x = __uint_as_float(w.in[i]);
  w.out[i * 3] = __float_as_uint(fast_exp(x));
  w.out[i * 3 + 1] = __float_as_uint(fast_tanh(x));
  w.out[i * 3 + 2] = __float_as_uint(fast_divide(3.f, x));
}

// Products: in a[4], b[2], d[4] of each lane, out d[4]; T bf16, fp16, or float for TF32
template <class T>
__global__ void product(const Words w) {
  const uint32_t* in = w.in + global_thread() * 10;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = in[i];
  for (int i = 0; i < 2; i++) b[i] = in[4 + i];
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(in[6 + i]);
  if constexpr (sizeof(T) == 4) {
    mma_m16n8k8_tf32(d, a, b);
  } else {
    mma_m16n8k16<T>(d, a, b);
  }
  for (int i = 0; i < 4; i++) w.out[global_thread() * 4 + i] = __float_as_uint(d[i]);
}

// ldmatrix: in 32 row numbers, then 64 rows of 8 16-bit elements; out x2[2], x4[4], x2_trans[2],
// x4_trans[4]
__global__ void matrices(const Words w) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (unsigned i = threadIdx.x; i < 64 * 4; i += 32) shared[i] = w.in[32 + i];
  __syncthreads();
  const uint32_t* row = shared + w.in[threadIdx.x] * 4;
  uint32_t two[2], four[4];
  uint32_t* out = w.out + threadIdx.x * 12;
  ldmatrix_x2(two, row);
  for (int i = 0; i < 2; i++) out[i] = two[i];
  ldmatrix_x4(four, row);
  for (int i = 0; i < 4; i++) out[2 + i] = four[i];
  ldmatrix_x2_trans(two, row);
  for (int i = 0; i < 2; i++) out[6 + i] = two[i];
  ldmatrix_x4_trans(four, row);
  for (int i = 0; i < 4; i++) out[8 + i] = four[i];
}

// Copies in three groups: 16 whole bytes, 16 of which 6 are valid, 8 and 4 of which 3 are valid; in
// 4 words a thread, out 11 words of the next thread's copies
__global__ void copies(const Words w) {
  unsigned char* shared = shared_memory();
  const unsigned i = threadIdx.x, n = blockDim.x, next = (i + 1) % n;
  const uint32_t* in = w.in + i * 4;
  unsigned char *whole = shared, *part = whole + 16 * n, *eight = part + 16 * n,
                *four = eight + 8 * n;
  copy_async<16>(whole + 16 * i, in);
  copy_async_commit();
  copy_async_part<16>(part + 16 * i, in, 6);
  copy_async_commit();
  copy_async<8>(eight + 8 * i, in + 2);
  copy_async_part<4>(four + 4 * i, in + 1, 3);
  copy_async_commit();
  const auto hand_over = [&](const unsigned char* from, int words, int at) {
    __syncthreads();
    const uint32_t* data = reinterpret_cast<const uint32_t*>(from) + next * words;
    for (int j = 0; j < words; j++) w.out[i * 11 + at + j] = data[j];
  };
  copy_async_wait<2>();
  hand_over(whole, 4, 0);
  copy_async_wait<1>();
  hand_over(part, 4, 4);
  copy_async_wait<0>();
  hand_over(eight, 2, 8);
  hand_over(four, 1, 10);
}

// Warps: in 1 word; out by lane, xor, up, down, in groups of 8, ballot, any, all
__global__ void warps(const Words w) {
  const unsigned i = threadIdx.x, all = 0xffffffffu;
  const uint32_t x = w.in[i];
  uint32_t* out = w.out + i * 8;
  out[0] = __shfl_sync(all, x, (i * 7) % 32);
  out[1] = __shfl_xor_sync(all, x, 5);
  out[2] = __shfl_up_sync(all, x, 3);
  out[3] = __shfl_down_sync(all, x, 9);
  out[4] = __shfl_down_sync(all, x, 2, 8);
  out[5] = __ballot_sync(all, x % 3 == 0);
  out[6] = __any_sync(all, x % 2 == 1) ? 1 : 0;
  out[7] = __all_sync(all, x > 0) ? 1 : 0;
}

// A warp that produces and one that consumes, by two named barriers: in 1 word, out the sum of 1 x
// .. 8 x
__global__ void pipeline(const Words w) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  constexpr int kFull = 1, kEmpty = 2, kRounds = 8;
  const unsigned lane = threadIdx.x % 32;
  uint32_t sum = 0;
  for (uint32_t round = 1; round <= kRounds; round++) {
    if (threadIdx.x < 32) {
      if (round > 1) named_barrier(kEmpty, 64);
      shared[lane] = w.in[lane] * round;
      named_arrive(kFull, 64);
    } else {
      named_barrier(kFull, 64);
      sum += shared[31 - lane];
      if (round < kRounds) named_arrive(kEmpty, 64);
    }
  }
  if (threadIdx.x >= 32) w.out[lane] = sum;
}

// Numbers go round all blocks through global memory, by a grid barrier a round, then by flags: in 1
// word, out 1
__global__ void rounds(const Words w) {
  const unsigned threads = blockDim.x, blocks = gridDim.x, me = blockIdx.x,
                 left = (me + blocks - 1) % blocks;
  uint32_t* half[2] = {w.out + blocks * threads, w.out + 2 * blocks * threads};
  uint32_t* counts = w.flags + 8;
  uint32_t x = w.in[global_thread()];
  for (unsigned round = 0; round < blocks; round++) {
    half[round % 2][me * threads + threadIdx.x] = x + round;
    grid_barrier(w.flags);
    x = half[round % 2][left * threads + threadIdx.x];
  }
  grid_barrier(w.flags);
  for (unsigned round = 1; round <= blocks; round++) {
    half[round % 2][me * threads + threadIdx.x] = x + round;
    __syncthreads();
    if (threadIdx.x == 0) {
      if (round % 2) {
        add_release(counts + me, 1);
      } else {
        store_release(counts + me, round);
      }
    }
    // Both neighbours: the right one has then read what the next round overwrites.
    const unsigned right = (me + 1) % blocks;
    if (threadIdx.x < 2) {
      spin_until(counts + (threadIdx.x ? right : left),
                 [=](uint32_t count) { return count >= round; });
    }
    __syncthreads();
    x = half[round % 2][left * threads + threadIdx.x];
  }
  w.out[global_thread()] = x;
  if (threadIdx.x == 0) {
    nano_sleep(10);
    atomicAdd(w.flags + 40, me + 1);
    atomicMax(w.flags + 41, me);
  }
}

// Groups of two blocks that meet three times: in 1 word, out the other block's
__global__ void groups(const Words w) {
  const unsigned group = blockIdx.x / 2, other = blockIdx.x ^ 1;
  uint32_t* exchange = w.out + gridDim.x * blockDim.x;
  uint32_t x = w.in[global_thread()];
  for (int round = 0; round < 3; round++) {
    exchange[global_thread()] = x + 1;
    group_barrier(w.flags + group, 2, blockIdx.x % 2 == 0);
    x = exchange[other * blockDim.x + threadIdx.x];
    group_barrier(w.flags + group, 2, blockIdx.x % 2 == 0);
  }
  w.out[global_thread()] = x;
}

// Clusters: in 4 words, out rank, size, index, the right neighbour's words by pointer, by load_peer
// of 8 bytes, what the left one stored with 16 bytes, and a flag of the left one
__global__ void clusters(const Words w) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const unsigned i = threadIdx.x, n = blockDim.x, rank = cluster_rank(), size = cluster_size();
  const unsigned right = (rank + 1) % size;
  uint32_t *mine = shared, *pushed = shared + 4 * n, *flag = shared + 8 * n;
  const uint32_t* in = w.in + global_thread() * 4;
  uint32_t* out = w.out + global_thread() * 11;
  for (int j = 0; j < 4; j++) mine[i * 4 + j] = in[j];
  if (i == 0) *flag = 0;
  cluster_barrier();
  out[0] = rank;
  out[1] = size;
  out[2] = cluster_index();
  out[3] = peer_pointer(mine, right)[i * 4];
  const uint2 pair = load_peer<uint2>(peer_address(mine + i * 4 + 2, right));
  out[4] = pair.x;
  out[5] = pair.y;
  store_peer(peer_address(pushed + i * 4, right), make_uint4(in[3], in[2], in[1], in[0]));
  cluster_arrive();
  cluster_wait();
  for (int j = 0; j < 4; j++) out[6 + j] = pushed[i * 4 + j];
  mine[i * 4] = rank + 100;
  __syncthreads();
  if (i == 0) {
    store_release_cluster(peer_pointer(flag, right), 7);
    add_release_cluster(peer_pointer(flag, right), rank);
    while (load_acquire_cluster(flag) < 7 + (rank + size - 1) % size) spin_pause();
  }
  __syncthreads();
  out[10] = *peer_pointer(mine + i * 4, (rank + size - 1) % size);
  cluster_barrier();  // nobody leaves while a peer reads
}

// Stores that arrive at an mbarrier, for five phases: in 1 word; out what came round the cluster,
// five words
__global__ void deliveries(const Words w) {
  uint64_t* barriers = reinterpret_cast<uint64_t*>(shared_memory());  // [2], one for each half
  uint4* received = reinterpret_cast<uint4*>(shared_memory() + 128);  // [2][threads]
  const unsigned i = threadIdx.x, n = blockDim.x, right = (cluster_rank() + 1) % cluster_size();
  if (i == 0) {
    mbarrier_init(barriers, 1);
    mbarrier_init(barriers + 1, 1);
    mbarrier_init_fence();
    for (int half = 0; half < 2; half++) mbarrier_arrive_expect(barriers + half, n * 16);
  }
  cluster_barrier();
  uint32_t x = w.in[global_thread()];
  for (unsigned phase = 0; phase < 5; phase++) {
    const unsigned half = phase % 2, parity = phase / 2 % 2;
    const PeerAddress barrier = peer_address(barriers + half, right);
    const PeerAddress to = peer_address(received + half * n + i, right);
    store_async(to, make_uint2(x, x + 1), barrier);
    store_async(to + 8, x + 2, barrier);
    store_async(to + 12, x + 3, barrier);
    mbarrier_wait(barriers + half, parity);
    const uint4 got = received[half * n + i];
    x = got.x + got.y + got.z + got.w;
    w.out[global_thread() * 5 + phase] = x;
    __syncthreads();
    if (i == 0) mbarrier_arrive_expect(barriers + half, n * 16);  // for the phase after next
    cluster_barrier();
  }
}

struct Case {
  const char* name;
  void (*kernel)(const Words);
  bool cooperative;
};
const Case kCases[] = {
    {"numbers", numbers, false},
    {"approximations", approximations, false},
    {"product_bf16", product<bf16>, false},
    {"product_fp16", product<fp16>, false},
    {"product_tf32", product<float>, false},
    {"matrices", matrices, false},
    {"copies", copies, false},
    {"warps", warps, false},
    {"pipeline", pipeline, false},
    {"rounds", rounds, true},
    {"groups", groups, true},
    {"clusters", clusters, false},
    {"deliveries", deliveries, false},
};

}  // namespace

extern "C" int conformance(const char* name, const uint32_t* in, uint32_t* out, uint32_t* flags,
                           int blocks, int threads, int cluster) {
  return cuda_on_cpu::entry([&] {
    for (const Case& c : kCases) {
      if (std::string(c.name) != name) continue;
      LaunchConfig config{};
      config.blocks.x = static_cast<unsigned>(blocks);
      config.threads = threads;
      config.shared_bytes = 16 * 1024;
      config.cluster = cluster;
      config.cooperative = c.cooperative;
      return launch(c.name, c.kernel, config, Words{in, out, flags});
    }
    throw std::runtime_error("no such case");
  });
}
