// How threads meet; barriers.cpp and matrices.cpp build on it.
#pragma once
#include <cstring>
#include <memory>
#include <string>

#include "machine.h"
#include "race.h"

namespace cuda_on_cpu {

inline void complete(Meeting& meeting) {
  race_meet(meeting.members);
  meeting.members.clear();
  meeting.arrived = 0;
  wake(meeting.waiting);
}

inline bool same_place(Here a, Here b) {
  return a.line() == b.line() && !std::strcmp(a.file_name(), b.file_name());
}

// Lanes of `mask` meet; the last to come runs combine(meeting), which turns all `in` into all
// `out`. `orders` says whether the operation also orders memory accesses: of the warp operations
// only __syncwarp does.
template <class Combine>
void meet_in_warp(unsigned mask, const void* in, size_t in_bytes, void* out, size_t out_bytes,
                  bool orders, const char* what, Here here, Combine combine) {
  Fiber& f = self();
  Warp& warp = *f.warp;
  if (!(mask >> f.lane & 1))
    fail(std::string(what) + " at " + place(here) + ": the mask lacks this lane");
  if (mask & ~warp.alive)
    fail(std::string(what) + " at " + place(here) + ": the mask has lanes that are not there");
  auto& slot = warp.meetings[__builtin_ctz(mask)];
  if (!slot) slot = std::make_unique<WarpMeeting>();
  WarpMeeting& meeting = *slot;
  if (meeting.present && (meeting.mask != mask || !same_place(meeting.where, here))) {
    fail("lanes of a warp meet in different operations: " + place(meeting.where) + " and " +
         place(here));
  }
  meeting.mask = mask;
  meeting.where = here;
  meeting.present |= 1u << f.lane;
  std::memcpy(meeting.in[f.lane], in, in_bytes);
  if (orders) meeting.members.push_back(&f);
  if (meeting.present == mask) {
    combine(meeting);
    meeting.present = 0;
    complete(meeting);
    maybe_yield();
  } else {
    meeting.waiting.push_back(&f);
    wait(what, here);
  }
  std::memcpy(out, meeting.out[f.lane], out_bytes);
}

}  // namespace cuda_on_cpu
