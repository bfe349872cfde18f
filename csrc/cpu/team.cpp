#include "team.h"

#include <pthread.h>
#include <sched.h>

// OpenMP 5.0; weak, because an older runtime has none.
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);

namespace rnn_ext {

void Barrier::wait_longer(const Flag& flag, int count, Core& own, const Core& other) {
  constexpr int kPatience = 4000;  // while the other is on another core
#ifdef __linux__
  const int here = sched_getcpu();
#else
  const int here = -1;
#endif
  __atomic_store_n(&own.number, here, __ATOMIC_RELAXED);
  const bool together = here >= 0 && __atomic_load_n(&other.number, __ATOMIC_RELAXED) == here;
  for (int spins = together ? kPatience : 0; !arrived(flag, count);) {
    if (spins < kPatience)
      spins++, spin_pause();
    else
      sched_yield();
  }
}

void end_teams_before_fork() {
  if (!omp_pause_resource_all) return;
  constexpr auto end_team = [] {
    constexpr int kSoft = 1;  // the threads end, settings stay
    omp_pause_resource_all(kSoft);
  };
  pthread_atfork(end_team, nullptr, nullptr);
}

}  // namespace rnn_ext
