// A team of threads that really run together, with a barrier cheap enough to stand in every time
// step.
#pragma once

// torch's OpenMP runtime, called directly: compiling with -fopenmp could bring a second runtime
// into the process.
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

// A dissemination barrier (Hensgen, Finkel and Manber 1988): in round r a member tells the one 2^r
// places on and waits for the one 2^r places back, each flag on a cache line of its own. For two
// members that is a single exchange, half of what a counter that both increment costs.
// Spins with bounded patience, then gives the core away: a team shares the machine with others. A
// member on the same core as the one it waits for gives it away at once.
class Barrier {
 public:
  static constexpr int kMaxMembers = 128;

  explicit Barrier(int members) {
    for (int i = 0; i < members; i++) {
      for (int r = 0; r < kRounds; r++) flags_[i][r].count = 0;
      cores_[i].number = -1;
    }
  }
  // `count`: how often this member has waited, this time included
  void wait(int id, int members, int count) {
    for (int r = 0, distance = 1; distance < members; r++, distance *= 2) {
      const int to = id + distance < members ? id + distance : id + distance - members;
      __atomic_store_n(&flags_[to][r].count, count, __ATOMIC_RELEASE);
      const int from = id >= distance ? id - distance : id - distance + members;
      for (int spins = 0; !arrived(flags_[id][r], count); spin_pause())
        if (++spins == kSpins) {
          wait_longer(flags_[id][r], count, cores_[id], cores_[from]);
          break;
        }
    }
  }

 private:
  static constexpr int kSpins = 64, kRounds = 7;
  struct alignas(64) Flag {
    int count;
  };
  struct alignas(64) Core {
    int number;  // where the member last waited long, -1: nowhere yet
  };

  static bool arrived(const Flag& flag, int count) {
    return __atomic_load_n(&flag.count, __ATOMIC_ACQUIRE) >= count;
  }
  static void wait_longer(const Flag& flag, int count, Core& own, const Core& other);

  Flag flags_[kMaxMembers][kRounds];
  Core cores_[kMaxMembers];
};

struct Member {
  int id, count;
  Barrier* barrier;
  mutable int waits = 0;
  void wait() const {
    if (count > 1) barrier->wait(id, count, ++waits);
  }
  // This member's share of n things.
  long begin(long n) const { return n * id / count; }
  long end(long n) const { return n * (id + 1) / count; }
};

// Runs body(Member) on up to `threads` threads; the team may be smaller (a nested call gets one).
template <class Body>
void run_team(int threads, const Body& body) {
  if (threads <= 1) {
    body(Member{0, 1, nullptr});
    return;
  }
  if (threads > Barrier::kMaxMembers) threads = Barrier::kMaxMembers;
  Barrier barrier(threads);
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

// To be called once. The child of a fork() inherits the runtime's record of its team but none of the
// threads, and would wait for them forever (torch alone does). So the thread that forks ends its
// team first; parent and child each start a new one when they need it.
void end_teams_before_fork();

}  // namespace rnn_ext
