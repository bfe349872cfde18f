#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rnn_ext {
namespace {
constexpr size_t kKeptBytes = size_t(16) << 20;

char* allocate(size_t bytes) {
  const size_t rounded = (bytes + Arena::kAlign - 1) / Arena::kAlign * Arena::kAlign;
  void* p = std::aligned_alloc(Arena::kAlign, rounded ? rounded : Arena::kAlign);
  if (!p) throw std::bad_alloc();
  return static_cast<char*>(p);
}

struct Kept {
  char* data = nullptr;
  size_t bytes = 0;
  bool in_use = false;
  ~Kept() { std::free(data); }
};
thread_local Kept kept;
std::atomic<bool> poisoned{false};
}  // namespace

Scratch::Scratch(size_t bytes) : owned_(bytes > kKeptBytes || kept.in_use) {
  if (owned_) {
    data_ = allocate(bytes);
  } else {
    if (kept.bytes < bytes) {
      char* larger = allocate(bytes);
      std::free(kept.data);
      kept.data = larger;
      kept.bytes = bytes;
    }
    kept.in_use = true;
    data_ = kept.data;
  }
  if (poisoned) std::memset(data_, 0xff, bytes);  // all ones is a NaN
}

Scratch::~Scratch() {
  if (owned_)
    std::free(data_);
  else
    kept.in_use = false;
}

void Scratch::poison(bool on) { poisoned = on; }

}  // namespace rnn_ext
