// The launch, and what Python calls.
#include <algorithm>
#include <numeric>

#include "../../csrc/cuda/launch.h"
#include "entry.h"
#include "machine.h"
#include "race.h"

namespace cuda_on_cpu {

char last_error[4000];

namespace {

constexpr size_t kMostThreads = 16384;  // resident; each has a stack

size_t count(dim3 n) { return static_cast<size_t>(n.x) * n.y * n.z; }

uint3 position(size_t i, dim3 n) {
  return {static_cast<unsigned>(i % n.x), static_cast<unsigned>(i / n.x % n.y),
          static_cast<unsigned>(i / n.x / n.y)};
}

// Blocks `numbers` of the grid, all of them resident.
bool run_blocks(const size_t* numbers, size_t blocks) {
  Machine& m = machine;
  const size_t threads = count(m.block);
  m.fibers.clear();
  m.blocks.clear();
  m.clusters.clear();
  for (size_t i = 0; i < blocks; i++) {
    if (i % m.cluster == 0) m.clusters.push_back(std::make_unique<Cluster>());
    auto block = std::make_unique<Block>();
    block->index = position(numbers[i], m.grid);
    block->threads = block->alive = static_cast<unsigned>(threads);
    block->cluster = m.clusters.back().get();
    block->cluster->alive += block->threads;
    block->cluster_rank = static_cast<unsigned>(i % m.cluster);
    block->warps = std::vector<Warp>((threads + 31) / 32);
    block->shared = guarded_allocation(m.shared_bytes);
    race_watch(block->shared, m.shared_bytes, "shared memory", false);
    for (size_t t = 0; t < threads; t++) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread = position(t, m.block);
      fiber->lane = static_cast<unsigned>(t % 32);
      fiber->block = block.get();
      fiber->warp = &block->warps[t / 32];
      fiber->warp->alive |= 1u << fiber->lane;
      m.fibers.push_back(std::move(fiber));
    }
    m.blocks.push_back(std::move(block));
  }
  race_begin_blocks(static_cast<unsigned>(m.fibers.size()));
  const bool done = resume_all();
  for (auto& block : m.blocks) {
    race_forget(block->shared);
    guarded_release(block->shared, m.shared_bytes);
  }
  return done;
}

}  // namespace

std::string run(const Grid& grid, const std::function<void()>& body) {
  Machine& m = machine;
  const size_t threads = count(grid.block), blocks = count(grid.blocks);
  if (threads == 0 || threads > 1024) return std::to_string(threads) + " threads in a block";
  if (grid.cluster == 0 || grid.blocks.x % grid.cluster)
    return "the grid is not a whole number of clusters";
  const size_t together = grid.cooperative ? blocks : grid.cluster;
  if (together * threads > kMostThreads)
    return "too many threads for the emulator; test a smaller shape";
  m.grid = gridDim = grid.blocks;
  m.block = blockDim = grid.block;
  m.cluster = grid.cluster;
  m.shared_bytes = grid.shared_bytes;
  m.body = &body;
  m.error.clear();
  m.random_state = m.seed * 0x9E3779B97F4A7C15ull + 1;
  // Without a cooperative launch only a cluster's blocks run together, and clusters run in any
  // order.
  std::vector<size_t> clusters(blocks / grid.cluster), numbers(together);
  std::iota(clusters.begin(), clusters.end(), size_t{0});
  if (m.seed && !grid.cooperative) {
    for (size_t i = clusters.size(); i > 1; i--)
      std::swap(clusters[i - 1], clusters[random_number() % i]);
  }
  race_begin_launch();
  for (size_t first = 0; first < blocks; first += together) {
    for (size_t i = 0; i < together; i++) {
      const size_t at = first + i;
      numbers[i] = clusters[at / grid.cluster] * grid.cluster + at % grid.cluster;
    }
    if (!run_blocks(numbers.data(), together)) break;
  }
  return m.error;
}

}  // namespace cuda_on_cpu

namespace rnn_ext::cuda {

size_t resident_blocks(const char* name, const void*, const LaunchConfig& config) {
  const cuda_on_cpu::Machine& m = cuda_on_cpu::machine;
  constexpr size_t kThreadsPerSm = 2048, kReserved = 1024;
  if (config.shared_bytes > static_cast<size_t>(m.shared_per_block)) {
    launch_failed(name, "it needs " + std::to_string(config.shared_bytes) +
                            " bytes of shared memory, and this GPU has " +
                            std::to_string(m.shared_per_block));
  }
  if (config.cluster > m.cluster_size) {
    launch_failed(name, "it needs clusters of " + std::to_string(config.cluster) +
                            " blocks, and this GPU has at most " + std::to_string(m.cluster_size));
  }
  const size_t by_memory =
      (static_cast<size_t>(m.shared_per_block) + kReserved) / (config.shared_bytes + kReserved);
  const size_t by_threads = kThreadsPerSm / static_cast<size_t>(config.threads);
  return std::min(by_memory, by_threads) * static_cast<size_t>(m.sm_count);
}

DeviceLimits device_limits(int) {
  const cuda_on_cpu::Machine& m = cuda_on_cpu::machine;
  DeviceLimits limits{};
  limits.major = m.cluster_size > 1 ? 9 : 8;
  limits.sm_count = m.sm_count;
  limits.registers_per_sm = 65536;
  limits.shared_per_sm = m.shared_per_block + 1024;
  limits.shared_per_block = m.shared_per_block;
  limits.shared_reserved = 1024;
  limits.threads_per_sm = 2048;
  limits.blocks_per_sm = 32;
  limits.l2_bytes = 50 << 20;
  limits.cluster_size = m.cluster_size;
  limits.cooperative = true;
  return limits;
}
std::string unavailable_reason() { return ""; }
int device_count() { return 1; }

}  // namespace rnn_ext::cuda

using namespace cuda_on_cpu;

extern "C" {

const char* cuda_on_cpu_error() { return last_error; }
void cuda_on_cpu_schedule(uint64_t seed, unsigned preempt) {
  machine.seed = seed;
  machine.preempt = preempt;
}
void cuda_on_cpu_device(int sm_count, int shared_per_block, int cluster_size) {
  machine.sm_count = sm_count;
  machine.shared_per_block = shared_per_block;
  machine.cluster_size = cluster_size;
}
void* cuda_on_cpu_allocate(size_t bytes, const char* name, bool initialised) {
  void* p = guarded_allocation(bytes);
  race_watch(p, bytes, name, initialised);
  return p;
}
// Whether nothing was written between the end and the page that faults.
bool cuda_on_cpu_intact(const void* p, size_t bytes) {
  return guard_intact(static_cast<const unsigned char*>(p), bytes);
}
void cuda_on_cpu_initialise(const void* p, size_t bytes) { race_initialise(p, bytes); }
void cuda_on_cpu_free(void* p, size_t bytes) {
  race_forget(p);
  guarded_release(static_cast<unsigned char*>(p), bytes);
}
int cuda_on_cpu_reports(char* text, size_t bytes) {
  const std::string reports = race_reports();
  std::snprintf(text, bytes, "%s", reports.c_str());
  return static_cast<int>(reports.size());
}
uint64_t cuda_on_cpu_switches() { return machine.switches; }
}
