// The emulated GPU's state, shared by the files that act on it.
//
// One thread of the operating system runs everything. Each CUDA thread is a fiber with a stack of
// its own; a fiber runs until it waits (barrier, warp operation, flag) and then another is resumed:
// the next in line with seed 0, a random one with any other seed. When none can be resumed and some
// are left, the kernel would hang, and the launch fails.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda_language.h"

namespace cuda_on_cpu {

struct Block;
struct Warp;

struct Copy {  // a cp.async on its way
  void* to;
  const void* from;
  unsigned bytes, valid;
  bool read;  // the source has been read: `data` holds it
  unsigned char data[16];
};

struct Fiber {
  void* stack_pointer = nullptr;
  uint3 thread{};
  unsigned id = 0, lane = 0;  // id: index among the resident fibers
  Block* block = nullptr;
  Warp* warp = nullptr;
  const char* waits = nullptr;  // for what, and where: for the report of a deadlock
  Here where;
  uint64_t polled = 0;  // the machine's progress when the fiber last polled in vain
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // sizes of the committed groups of copies, oldest first
  uint64_t cluster_arrival = 0;
};

// Threads that meet. All members' clocks are joined (race checker) when the last one comes.
struct Meeting {
  unsigned arrived = 0, expected = 0;
  Here where;
  std::vector<Fiber*> members, waiting;
};

struct WarpMeeting : Meeting {
  static constexpr int kBytes = 64;
  unsigned mask = 0, present = 0;
  alignas(16) unsigned char in[32][kBytes], out[32][kBytes];
};

struct Warp {
  unsigned alive = 0;
  std::unique_ptr<WarpMeeting> meetings[32];  // by the lowest lane of the mask
};

struct Cluster {
  unsigned alive = 0, arrived = 0;
  uint64_t phase = 1;
  std::vector<Fiber*> waiting;
  char clocks[2];  // addresses under which the race checker keeps the clocks of even and odd phases
};

struct Block {
  uint3 index{};
  unsigned threads = 0, alive = 0, cluster_rank = 0;
  Cluster* cluster = nullptr;
  unsigned char* shared = nullptr;
  std::vector<Warp> warps;
  Meeting barriers[16];
};

struct SharedBarrier {  // an mbarrier
  unsigned arrivals = 0, pending = 0, phase = 0;
  long bytes = 0;
  std::vector<Fiber*> waiting;
};

struct Delivery {  // a store_async on its way
  void* to;
  unsigned bytes;
  unsigned char data[16];
  uint64_t* barrier;
  size_t clock;  // the sender's, when it sent
};

struct Machine {
  uint64_t seed = 0;     // of the schedule; 0: first come, first served
  unsigned preempt = 0;  // race build: yield at about every n-th access to watched memory; 0: never
  int sm_count = 132, shared_per_block = 227 * 1024, cluster_size = 16;

  dim3 grid, block;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;

  Fiber* current = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::unordered_map<const void*, SharedBarrier> shared_barriers;
  std::vector<Delivery> deliveries;
  std::vector<Fiber*> ready;  // a queue that starts at `first_ready`
  size_t first_ready = 0, alive = 0;
  std::vector<Fiber*> polling;  // found a flag unchanged; resumed when any flag changes
  uint64_t progress = 1;
  uint64_t random_state = 1;
  std::string error;
  uint64_t switches = 0;
  bool quiet = false;  // race checker: what runs now is an atomic's own access
};
extern Machine machine;  // scheduler.cpp

inline Fiber& self() { return *machine.current; }

// scheduler.cpp
[[noreturn]] void fail(const std::string& why);  // ends the launch
void wait(const char* what,
          Here where);  // the current fiber is in some list; runs others until it is woken
void wake(std::vector<Fiber*>& waiting);
void flags_changed();  // wakes who polls
void maybe_yield();    // a random schedule may run others here
void yield();
uint64_t random_number();
std::string place(Here where);                // "lstm.cuh:42"
std::string thread_name(const Fiber& fiber);  // "block 3 thread 17"
bool resume_all();  // runs every fiber to its end; false if the launch failed

// memory.cpp
constexpr size_t kGuard = 256 * 1024;  // bytes behind an allocation that fault
unsigned char* guarded_allocation(
    size_t bytes);  // 128-byte aligned, NaN, ends at a page that faults
void guarded_release(unsigned char* p, size_t bytes);
bool guard_intact(const unsigned char* p, size_t bytes);
void forbid(unsigned char* p, size_t bytes);

void leave();        // barriers.cpp: what a thread does at its end
bool deliver_one();  // asynchronous.cpp: completes a store_async; false when none is on its way

}  // namespace cuda_on_cpu
