#include "scratch.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rnn_ext {
namespace {
constexpr size_t kKeptBytes = size_t(64) << 20;

// Large pieces lie on pages of 2 MiB where the system has them: first touch costs a tenth, and rows
// far apart need fewer entries of the TLB.
constexpr size_t kHugePage = size_t(2) << 20;

char* allocate(size_t bytes) {
  const size_t align = bytes >= 2 * kHugePage ? kHugePage : Arena::kAlign;
  const size_t rounded = (bytes + align - 1) / align * align;
  void* p = std::aligned_alloc(align, rounded ? rounded : align);
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (align == kHugePage) madvise(p, rounded, MADV_HUGEPAGE);  // may fail: it is advice
#endif
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
