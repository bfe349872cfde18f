#include "scratch.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace rnn_ext {
namespace {
constexpr size_t kKeptBytes = size_t(128) << 20;

constexpr size_t kHugePage = size_t(2) << 20;

char* allocate(size_t bytes) {
  const size_t align = bytes >= 2 * kHugePage ? kHugePage : Arena::kAlign;
  const size_t rounded = (bytes + align - 1) / align * align;
  void* p = std::aligned_alloc(align, rounded ? rounded : align);
  if (!p) throw std::bad_alloc();
  advise_huge_pages(p, rounded);
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

void advise_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                  last = end / kHugePage * kHugePage;
  // It is advice: where the system has no such pages nothing is lost.
  if (last > first + kHugePage)
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

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
