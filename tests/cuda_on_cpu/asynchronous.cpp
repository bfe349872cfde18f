// What one thread starts and others see later: flags, copies to shared memory, stores to a peer.
#include "../../csrc/cuda/launch.h"
#include "machine.h"
#include "race.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned char kPoison = 0xff;

// What the order of a flag's load and store means for the race checker.
void before_store(const uint32_t* p, Order order, bool adds) {
  if (order == Order::kRelaxed) {
    race_relaxed_store(p, adds);
  } else {
    race_release(p, adds);
  }
}
void after_load(const uint32_t* p, Order order) {
  if (order == Order::kAcquire || order == Order::kBoth) {
    race_acquire(p);
  } else {
    race_relaxed_load(p);
  }
}

const void* flag(const uint32_t* p) {
  if (!p || reinterpret_cast<uintptr_t>(p) % 4) fail("a flag at a misaligned address or null");
  return p;
}

}  // namespace

uint32_t load_flag(const uint32_t* p, Order order) {
  flag(p);
  const uint32_t value = *p;
  after_load(p, order);
  return value;
}

void store_flag(uint32_t* p, uint32_t value, Order order) {
  flag(p);
  before_store(p, order, false);
  *p = value;
  race_initialise(p, sizeof *p);
  flags_changed();
}

uint32_t add_flag(uint32_t* p, uint32_t value, Order order) {
  flag(p);
  const uint32_t before = *p;
  if (order == Order::kBoth) race_acquire(p);
  before_store(p, order, true);
  *p = before + value;
  flags_changed();
  return before;
}

void atomic(void* address, void (*change)(void*, void*), void* argument) {
  race_relaxed_load(address);
  race_relaxed_store(address, true);
  machine.quiet = true;
  change(address, argument);
  machine.quiet = false;
  flags_changed();
}

void fence() { race_fence(); }

// A thread that polled in vain twice since the last change of a flag waits for the next change.
void spin_pause(Here here) {
  Fiber& f = self();
  if (f.polled != machine.progress) {
    f.polled = machine.progress;
    yield();
    return;
  }
  machine.polling.push_back(&f);
  wait("a flag", here);
}

// Copies. The data arrives at the wait and is poison before; the source is read anywhere in
// between.

void copy_async(void* to, const void* from, unsigned bytes, unsigned valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes ||
      (valid && reinterpret_cast<uintptr_t>(from) % bytes)) {
    fail("copy_async of " + std::to_string(bytes) + " bytes: misaligned");
  }
  if (valid > bytes) fail("copy_async_part of more than its size");
  const long offset = static_cast<unsigned char*>(to) - self().block->shared;
  if (offset < 0 || offset + bytes > static_cast<long>(machine.shared_bytes))
    fail("copy_async to what is not shared memory");
  const void* code = __builtin_return_address(0);
  if (valid) race_read(from, valid, code);
  race_write(to, bytes, code);
  Copy copy{to, from, bytes, valid, false, {}};
  if (machine.seed && random_number() % 2) {
    copy.read = true;
    std::memcpy(copy.data, from, valid);
  }
  std::memset(to, kPoison, bytes);
  self().copies.push_back(copy);
}

void copy_async_commit() {
  Fiber& f = self();
  size_t open = f.copies.size();
  for (size_t group : f.groups) open -= group;
  f.groups.push_back(open);
}

void copy_async_wait(unsigned pending) {
  Fiber& f = self();
  const void* code = __builtin_return_address(0);
  while (f.groups.size() > pending) {
    const size_t count = f.groups[0];
    for (size_t i = 0; i < count; i++) {
      Copy& copy = f.copies[i];
      if (!copy.read && copy.valid) {
        race_read(copy.from, copy.valid, code);
        std::memcpy(copy.data, copy.from, copy.valid);
      }
      race_write(copy.to, copy.bytes, code);
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.data, copy.valid);
    }
    f.copies.erase(f.copies.begin(), f.copies.begin() + static_cast<long>(count));
    f.groups.erase(f.groups.begin());
  }
}

// Barriers in shared memory. Their state is kept beside the memory, which holds a pattern.

namespace {

constexpr uint64_t kPattern = 0x6d62617272696572;

SharedBarrier& shared_barrier(const uint64_t* b) {
  auto it = machine.shared_barriers.find(b);
  if (it == machine.shared_barriers.end() || *b != kPattern)
    fail("an mbarrier that is not initialised");
  return it->second;
}

// The race checker's key for a phase's clock.
const void* phase_key(const uint64_t* b, unsigned phase) {
  return reinterpret_cast<const char*>(b) + phase % 2;
}

void complete_phase(SharedBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  wake(barrier.waiting);
}

}  // namespace

void mbarrier_init(uint64_t* b, unsigned arrivals) {
  if (reinterpret_cast<uintptr_t>(b) % 8) fail("an mbarrier at a misaligned address");
  if (arrivals == 0) fail("an mbarrier that expects nobody");
  race_write(b, sizeof *b, __builtin_return_address(0));
  *b = kPattern;
  machine.shared_barriers[b] = {arrivals, arrivals, 0, 0, {}};
}

void mbarrier_arrive(uint64_t* b, unsigned expected_bytes) {
  race_read(b, sizeof *b, __builtin_return_address(0));
  SharedBarrier& barrier = shared_barrier(b);
  if (barrier.pending == 0) fail("more threads arrive at an mbarrier than it expects");
  race_release(phase_key(b, barrier.phase), true);
  barrier.bytes += expected_bytes;
  barrier.pending--;
  complete_phase(barrier);
  maybe_yield();
}

void mbarrier_wait(uint64_t* b, unsigned parity, Here here) {
  race_read(b, sizeof *b, __builtin_return_address(0));
  if (parity > 1) fail("mbarrier_wait for parity " + std::to_string(parity));
  while (shared_barrier(b).phase % 2 == parity) {
    shared_barrier(b).waiting.push_back(&self());
    wait("an mbarrier", here);
  }
  race_acquire(phase_key(b, parity));
}

void store_async(void* to, const void* value, unsigned bytes, uint64_t* b) {
  const void* code = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(to) % bytes) fail("store_async: misaligned");
  race_read(b, sizeof *b, code);
  shared_barrier(b);
  race_write(to, bytes, code);
  Delivery delivery{to, bytes, {}, b, race_snapshot()};
  std::memcpy(delivery.data, value, bytes);
  std::memset(to, kPoison, bytes);
  machine.deliveries.push_back(delivery);
  maybe_yield();
}

bool deliver_one() {
  auto& all = machine.deliveries;
  if (all.empty()) return false;
  const auto chosen =
      all.begin() + static_cast<long>(machine.seed ? random_number() % all.size() : 0);
  const Delivery delivery = *chosen;
  all.erase(chosen);
  std::memcpy(delivery.to, delivery.data, delivery.bytes);
  SharedBarrier& barrier = machine.shared_barriers[delivery.barrier];
  race_release_snapshot(delivery.clock, phase_key(delivery.barrier, barrier.phase));
  barrier.bytes -= delivery.bytes;
  complete_phase(barrier);
  return true;
}

void fill_zero(void* p, size_t bytes) {
  std::memset(p, 0, bytes);
  race_initialise(p, bytes);
}

}  // namespace cuda_on_cpu
