#include "team.h"

#include <pthread.h>

// OpenMP 5.0; weak, because an older runtime has none.
extern "C" __attribute__((weak)) int omp_pause_resource_all(int kind);

namespace rnn_ext {

void end_teams_before_fork() {
  if (!omp_pause_resource_all) return;
  constexpr auto end_team = [] {
    constexpr int kSoft = 1;  // the threads end, settings stay
    omp_pause_resource_all(kSoft);
  };
  pthread_atfork(end_team, nullptr, nullptr);
}

}  // namespace rnn_ext
