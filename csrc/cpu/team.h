// A team of threads that really run together, with a barrier cheap enough to stand in every time step.
#pragma once
#include <sched.h>

// torch's OpenMP runtime, called directly: compiling with -fopenmp could bring a second runtime into the process.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
}

namespace rnn_ext {

inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Spins with bounded patience, then gives the core away: a team shares the machine with other programs.
class Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const int generation = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation;) {
      if (++spins < kPatience)
        spin_pause();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kPatience = 4000;
  alignas(64) int arrived_ = 0;
  alignas(64) int generation_ = 0;
};

struct Member {
  int id, count;
  Barrier* barrier;
  void wait() const { barrier->wait(count); }
  // This member's share of n things.
  long begin(long n) const { return n * id / count; }
  long end(long n) const { return n * (id + 1) / count; }
};

// Runs body(Member) on up to `threads` threads; the team may be smaller (a nested call gets one).
template <class Body>
void run_team(int threads, const Body& body) {
  Barrier barrier;
  if (threads <= 1) {
    body(Member{0, 1, &barrier});
    return;
  }
  struct Call {
    const Body* body;
    Barrier* barrier;
  } call{&body, &barrier};
  GOMP_parallel(
      [](void* data) {
        const Call& c = *static_cast<const Call*>(data);
        (*c.body)(Member{omp_get_thread_num(), omp_get_num_threads(), c.barrier});
      },
      &call, static_cast<unsigned>(threads), 0);
}

}  // namespace rnn_ext
