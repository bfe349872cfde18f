// The race checker's hooks. race.cpp has them; race_off.cpp, for plain builds, has them empty.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace cuda_on_cpu {

struct Fiber;

void race_begin_launch();
void race_begin_blocks(unsigned fibers);  // those fibers run together from here on
void race_meet(
    const std::vector<Fiber*>& members);  // everything before is ordered before everything after
void race_acquire(const void* key);       // the running thread sees what was released under the key
void race_release(const void* key,
                  bool adds);  // adds: to what was released there; otherwise instead of it
void race_relaxed_load(const void* key);              // a fence afterwards makes it an acquire
void race_relaxed_store(const void* key, bool adds);  // a fence before makes it a release
void race_fence();
void race_read(const void* p, size_t bytes, const void* code);  // by the running thread
void race_write(const void* p, size_t bytes, const void* code);
size_t race_snapshot();  // what the running thread has done so far,
void race_release_snapshot(size_t snapshot, const void* key);  // released later, by the machine
void race_watch(const void* p, size_t bytes, const char* name, bool initialised);
void race_forget(const void* p);
void race_initialise(const void* p, size_t bytes);
std::string race_reports();  // one line each; forgets them

}  // namespace cuda_on_cpu
