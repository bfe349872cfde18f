// Where threads meet: barriers of a block, a warp or a cluster, and shuffles.
#include <algorithm>

#include "emulated_platform.h"
#include "machine.h"
#include "race.h"
#include "warp.h"

namespace cuda_on_cpu {
constexpr unsigned kWarp = 32;

void block_barrier(Here here) {
  Fiber& f = self();
  Meeting& barrier = f.block->barriers[0];
  if (barrier.arrived && !same_place(barrier.where, here)) {
    fail("threads of a block meet in different barriers: " + place(barrier.where) + " and " +
         place(here));
  }
  barrier.where = here;
  barrier.members.push_back(&f);
  if (++barrier.arrived == f.block->alive) {
    complete(barrier);
    maybe_yield();
  } else {
    barrier.waiting.push_back(&f);
    wait("__syncthreads", here);
  }
}

void named_barrier(int id, int threads, bool waits, Here here) {
  Fiber& f = self();
  if (id < 1 || id > 15) fail("named barrier " + std::to_string(id) + ": there are 1 to 15");
  if (threads < 1 || threads % kWarp || threads > static_cast<int>(f.block->threads)) {
    fail("named barrier for " + std::to_string(threads) + " threads");
  }
  Meeting& barrier = f.block->barriers[id];
  const unsigned expected = static_cast<unsigned>(threads);
  if (barrier.arrived && barrier.expected != expected)
    fail("threads expect different numbers at a named barrier");
  barrier.expected = expected;
  barrier.members.push_back(&f);
  if (++barrier.arrived == expected) {
    complete(barrier);
    maybe_yield();
  } else if (waits) {
    barrier.waiting.push_back(&f);
    wait("a named barrier", here);
  }
}

void warp_barrier(unsigned mask, Here here) {
  meet_in_warp(mask, nullptr, 0, nullptr, 0, true, "__syncwarp", here, [](WarpMeeting&) {});
}

void shuffle(unsigned mask, const void* in, void* out, size_t bytes, Pick pick, int operand,
             int width, Here here) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("shuffle of width " + std::to_string(width));
  struct Request {
    unsigned char value[8];
    int source;
  } request{};
  const int lane = static_cast<int>(self().lane), first = lane / width * width;
  int source = 0;
  switch (pick) {
    case Pick::kLane:
      source = first + (operand & (width - 1));
      break;
    case Pick::kXor:
      source = lane ^ operand;
      break;
    case Pick::kUp:
      source = lane - operand;
      break;
    case Pick::kDown:
      source = lane + operand;
      break;
  }
  if (source < first || source >= first + width) source = lane;
  if (!(mask >> source & 1)) fail("shuffle at " + place(here) + " from a lane outside its mask");
  std::memcpy(request.value, in, bytes);
  request.source = source;
  meet_in_warp(mask, &request, sizeof request, out, bytes, false, "a shuffle", here,
               [](WarpMeeting& m) {
                 for (unsigned i = 0; i < kWarp; i++) {
                   if (!(m.mask >> i & 1)) continue;
                   Request wanted;
                   std::memcpy(&wanted, m.in[i], sizeof wanted);
                   std::memcpy(m.out[i], m.in[wanted.source], sizeof wanted.value);
                 }
               });
}

unsigned ballot(unsigned mask, bool vote, Here here) {
  unsigned result;
  meet_in_warp(mask, &vote, sizeof vote, &result, sizeof result, false, "a vote", here,
               [](WarpMeeting& m) {
                 unsigned votes = 0;
                 for (unsigned i = 0; i < kWarp; i++)
                   votes |= static_cast<unsigned>((m.mask >> i & 1) && m.in[i][0]) << i;
                 for (auto& out : m.out) std::memcpy(out, &votes, sizeof votes);
               });
  return result;
}

// Clusters

void cluster_arrive(Here here) {
  Fiber& f = self();
  Cluster& c = *f.block->cluster;
  if (f.cluster_arrival) fail("cluster_arrive at " + place(here) + " twice without cluster_wait");
  f.cluster_arrival = c.phase;
  race_release(&c.clocks[c.phase % 2], true);
  if (++c.arrived == c.alive) {
    c.arrived = 0;
    c.phase++;
    wake(c.waiting);
  }
  maybe_yield();
}

void cluster_wait(Here here) {
  Fiber& f = self();
  Cluster& c = *f.block->cluster;
  if (!f.cluster_arrival) fail("cluster_wait at " + place(here) + " without cluster_arrive");
  const uint64_t phase = f.cluster_arrival;
  if (c.phase == phase) {
    c.waiting.push_back(&f);
    wait("cluster_wait", here);
  }
  race_acquire(&c.clocks[phase % 2]);
  f.cluster_arrival = 0;
}

unsigned cluster_rank() { return self().block->cluster_rank; }
unsigned cluster_size() { return machine.cluster; }
unsigned cluster_index() { return blockIdx.x / machine.cluster; }
unsigned char* shared_memory() { return self().block->shared; }
unsigned lane() { return self().lane; }

void* peer_pointer(const void* p, unsigned rank) {
  const Block& block = *self().block;
  if (rank >= machine.cluster)
    fail("peer " + std::to_string(rank) + " of a cluster of " + std::to_string(machine.cluster));
  const long offset = static_cast<const unsigned char*>(p) - block.shared;
  if (offset < 0 || offset >= static_cast<long>(machine.shared_bytes))
    fail("peer address of what is not shared memory");
  const size_t here = static_cast<size_t>(std::find_if(machine.blocks.begin(), machine.blocks.end(),
                                                       [&](auto& b) { return b.get() == &block; }) -
                                          machine.blocks.begin());
  return machine.blocks[here - block.cluster_rank + rank]->shared + offset;
}

// A thread at its end: the others no longer wait for it.
void leave() {
  Fiber& f = self();
  Block& block = *f.block;
  machine.alive--;
  block.alive--;
  f.warp->alive &= ~(1u << f.lane);
  Meeting& barrier = block.barriers[0];
  if (barrier.arrived && barrier.arrived == block.alive) complete(barrier);
  Cluster& c = *block.cluster;
  c.alive--;
  if (f.cluster_arrival) {
    machine.error =
        "a thread leaves between cluster_arrive and cluster_wait (" + thread_name(f) + ")";
  }
  if (c.arrived && c.arrived == c.alive) {
    c.arrived = 0;
    c.phase++;
    wake(c.waiting);
  }
  if (block.alive == 0) {
    if (!guard_intact(block.shared, machine.shared_bytes)) {
      machine.error =
          "a write behind the end of shared memory, in block " + std::to_string(block.index.x);
    }
    if (machine.cluster > 1) forbid(block.shared, machine.shared_bytes);
  }
}

}  // namespace cuda_on_cpu
