// A race checker: which accesses are ordered, whatever the schedule of this run was.
//
// The kernels, and nothing else, are compiled with -fsanitize=thread, which makes the compiler call
// __tsan_read4 and the like before every access to memory; those functions are here, and nothing is
// linked with -fsanitize. Every resident thread has a vector clock. Barriers join clocks, release
// and acquire carry them through a flag. Two accesses to the same two bytes of watched memory, one
// of them a write, must be ordered by the clocks, and memory that is not initialised must not be
// read.
#include "race.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <unordered_map>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

using Clock = std::vector<unsigned>;  // by fiber; what is missing is 0
using SharedClock = std::shared_ptr<const Clock>;

// What a fiber knows: `known` of all others and its own time. Fibers that met share `known`.
struct Thread {
  SharedClock known;
  unsigned time = 1;
  SharedClock fenced;   // at its last fence: what a relaxed store releases
  SharedClock pending;  // from relaxed loads: what the next fence acquires
};

struct Access {
  unsigned fiber = 0, time = 0, batch = 0;
  const void* code = nullptr;
};

struct Cell {  // two bytes
  Access write;
  std::vector<Access> reads;
  bool initialised = false;
};

struct Range {
  uintptr_t begin, end;
  std::string name;
  std::vector<Cell> cells;
};

std::vector<Thread> threads;
std::vector<SharedClock> snapshots;
std::unordered_map<const void*, SharedClock> flags;
std::map<uintptr_t, Range> ranges;  // by end
Range* last_range;
unsigned batch;  // counts groups of blocks that ran together; the clocks order accesses within one
unsigned launch_first_batch;
std::vector<std::string> reports;

constexpr size_t kMostReports = 20;

unsigned time_of(const SharedClock& clock, unsigned fiber) {
  return clock && fiber < clock->size() ? (*clock)[fiber] : 0;
}

SharedClock joined(const SharedClock& a, const SharedClock& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto result = std::make_shared<Clock>(a->size() > b->size() ? *a : *b);
  const Clock& other = a->size() > b->size() ? *b : *a;
  for (size_t i = 0; i < other.size(); i++) (*result)[i] = std::max((*result)[i], other[i]);
  return result;
}

SharedClock knowledge(unsigned fiber) {  // with its own time
  const Thread& t = threads[fiber];
  auto result = t.known ? std::make_shared<Clock>(*t.known) : std::make_shared<Clock>();
  if (result->size() <= fiber) result->resize(threads.size());
  (*result)[fiber] = t.time;
  return result;
}

bool ordered(const Access& before, unsigned fiber) {
  if (before.time == 0 || before.batch < launch_first_batch) return true;  // launches are ordered
  if (before.batch != batch) return false;  // blocks that wait for nothing are not
  return before.fiber == fiber || before.time <= time_of(threads[fiber].known, before.fiber);
}

Range* find(uintptr_t address) {
  if (last_range && address >= last_range->begin && address < last_range->end) return last_range;
  const auto it = ranges.upper_bound(address);
  if (it == ranges.end() || address < it->second.begin) return nullptr;
  return last_range = &it->second;
}

std::string code_place(const void* code) {
  Dl_info info;
  char text[40];
  const bool known = dladdr(code, &info) != 0;
  const uintptr_t offset =
      reinterpret_cast<uintptr_t>(code) - (known ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0);
  std::snprintf(text, sizeof text, "@%lx",
                static_cast<unsigned long>(offset - 1));  // of the call, not behind it
  return text;
}

void report(const char* kind, const Range& range, size_t cell, const void* code,
            const Access* other) {
  if (reports.size() >= kMostReports) return;
  std::string text = std::string(kind) + " " + range.name + " byte " + std::to_string(2 * cell) +
                     ": " + thread_name(self()) + " at " + code_place(code);
  if (other) {
    text += " and ";
    text += other->batch == batch ? thread_name(*machine.fibers[other->fiber])
                                  : std::string("another block");
    text += " at " + code_place(other->code);
  }
  const auto same_kind = [&](const std::string& old) {
    return old.compare(0, old.find(" byte"), text, 0, text.find(" byte")) == 0;
  };
  if (std::none_of(reports.begin(), reports.end(), same_kind)) reports.push_back(text);
}

void check_write(Range& range, size_t i, unsigned me, const void* code) {
  Cell& cell = range.cells[i];
  if (!ordered(cell.write, me)) report("race, write after write:", range, i, code, &cell.write);
  for (const Access& read : cell.reads) {
    if (!ordered(read, me)) report("race, write after read:", range, i, code, &read);
  }
  cell.reads.clear();
  cell.write = {me, threads[me].time, batch, code};
  cell.initialised = true;
}

void check_read(Range& range, size_t i, unsigned me, const void* code) {
  Cell& cell = range.cells[i];
  const unsigned now = threads[me].time;
  if (!cell.initialised) report("uninitialised read of", range, i, code, nullptr);
  if (!ordered(cell.write, me)) report("race, read after write:", range, i, code, &cell.write);
  for (Access& read : cell.reads) {
    if (read.fiber == me && read.time == now && read.batch == batch) return;
  }
  // Reads that this one comes after need not be remembered.
  std::erase_if(cell.reads, [me](const Access& read) { return ordered(read, me); });
  cell.reads.push_back({me, now, batch, code});
}

bool access(uintptr_t address, size_t bytes, bool write, const void* code) {
  Range* range = find(address);
  if (!range || bytes == 0) return false;
  const unsigned me = self().id;
  const size_t first = (address - range->begin) / 2,
               last = (address + bytes - 1 - range->begin) / 2;
  for (size_t i = first; i <= last && i < range->cells.size(); i++) {
    if (write) {
      check_write(*range, i, me, code);
    } else {
      check_read(*range, i, me, code);
    }
  }
  return true;
}

// An access of the kernel, seen by the compiler.
void hook(void* p, size_t bytes, bool write, const void* code) {
  if (machine.quiet || !machine.current) return;
  const bool watched = access(reinterpret_cast<uintptr_t>(p), bytes, write, code);
  if (watched && machine.preempt && random_number() % machine.preempt == 0) yield();
}

}  // namespace

void race_begin_launch() { launch_first_batch = batch + 1; }

void race_begin_blocks(unsigned fibers) {
  batch++;
  threads.assign(fibers, {});
  snapshots.clear();
  flags.clear();
}

void race_meet(const std::vector<Fiber*>& members) {
  SharedClock all;
  for (const Fiber* f : members) all = joined(all, threads[f->id].known);
  auto clock = all ? std::make_shared<Clock>(*all) : std::make_shared<Clock>();
  if (clock->size() < threads.size()) clock->resize(threads.size());
  for (const Fiber* f : members) (*clock)[f->id] = threads[f->id].time;
  for (const Fiber* f : members) {
    threads[f->id].known = clock;
    threads[f->id].time++;
  }
}

void race_acquire(const void* key) {
  const auto it = flags.find(key);
  if (it == flags.end()) return;
  Thread& t = threads[self().id];
  t.known = joined(t.known, it->second);
}

void race_release(const void* key, bool adds) {
  SharedClock mine = knowledge(self().id);
  SharedClock& flag = flags[key];
  flag = adds ? joined(flag, mine) : mine;
  threads[self().id].time++;
}

void race_relaxed_load(const void* key) {
  const auto it = flags.find(key);
  if (it == flags.end()) return;
  Thread& t = threads[self().id];
  t.pending = joined(t.pending, it->second);
}

void race_relaxed_store(const void* key, bool adds) {
  SharedClock& flag = flags[key];
  const SharedClock& fenced = threads[self().id].fenced;
  flag = adds ? joined(flag, fenced) : fenced;
}

void race_fence() {
  Thread& t = threads[self().id];
  t.known = joined(t.known, t.pending);
  t.fenced = knowledge(self().id);
  t.time++;
}

size_t race_snapshot() {
  snapshots.push_back(knowledge(self().id));
  threads[self().id].time++;
  return snapshots.size() - 1;
}

void race_release_snapshot(size_t snapshot, const void* key) {
  SharedClock& flag = flags[key];
  flag = joined(flag, snapshots[snapshot]);
}

void race_read(const void* p, size_t bytes, const void* code) {
  access(reinterpret_cast<uintptr_t>(p), bytes, false, code);
}
void race_write(const void* p, size_t bytes, const void* code) {
  access(reinterpret_cast<uintptr_t>(p), bytes, true, code);
}

void race_watch(const void* p, size_t bytes, const char* name, bool initialised) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  last_range = nullptr;
  if (bytes == 0) return;
  Range range{begin, begin + bytes, name, std::vector<Cell>((bytes + 1) / 2)};
  for (Cell& cell : range.cells) cell.initialised = initialised;
  ranges[range.end] = std::move(range);
}

void race_forget(const void* p) {
  last_range = nullptr;
  std::erase_if(ranges, [p](const auto& item) {
    return item.second.begin == reinterpret_cast<uintptr_t>(p);
  });
}

void race_initialise(const void* p, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  Range* range = find(address);
  if (!range || bytes == 0) return;
  for (size_t i = (address - range->begin) / 2; i <= (address + bytes - 1 - range->begin) / 2;
       i++) {
    range->cells[i].initialised = true;
  }
}

std::string race_reports() {
  std::string text;
  for (const std::string& r : reports) text += r + "\n";
  reports.clear();
  return text;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_CODE __builtin_return_address(0)
#define CUDA_ON_CPU_HOOKS(n)                                                                   \
  void __tsan_read##n(void* p) { cuda_on_cpu::hook(p, n, false, CUDA_ON_CPU_CODE); }           \
  void __tsan_write##n(void* p) { cuda_on_cpu::hook(p, n, true, CUDA_ON_CPU_CODE); }           \
  void __tsan_unaligned_read##n(void* p) { cuda_on_cpu::hook(p, n, false, CUDA_ON_CPU_CODE); } \
  void __tsan_unaligned_write##n(void* p) { cuda_on_cpu::hook(p, n, true, CUDA_ON_CPU_CODE); }

extern "C" {
CUDA_ON_CPU_HOOKS(1)
CUDA_ON_CPU_HOOKS(2)
CUDA_ON_CPU_HOOKS(4)
CUDA_ON_CPU_HOOKS(8)
CUDA_ON_CPU_HOOKS(16)
void __tsan_read_range(void* p, size_t n) { cuda_on_cpu::hook(p, n, false, CUDA_ON_CPU_CODE); }
void __tsan_write_range(void* p, size_t n) { cuda_on_cpu::hook(p, n, true, CUDA_ON_CPU_CODE); }
char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
