// Plain builds: the race checker's hooks do nothing.
#include "race.h"

namespace cuda_on_cpu {
void race_begin_launch() {}
void race_begin_blocks(unsigned) {}
void race_meet(const std::vector<Fiber*>&) {}
void race_acquire(const void*) {}
void race_release(const void*, bool) {}
void race_relaxed_load(const void*) {}
void race_relaxed_store(const void*, bool) {}
void race_fence() {}
void race_read(const void*, size_t, const void*) {}
void race_write(const void*, size_t, const void*) {}
size_t race_snapshot() { return 0; }
void race_release_snapshot(size_t, const void*) {}
void race_watch(const void*, size_t, const char*, bool) {}
void race_forget(const void*) {}
void race_initialise(const void*, size_t) {}
std::string race_reports() { return ""; }
}  // namespace cuda_on_cpu
