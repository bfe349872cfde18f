// Memory that ends at pages that fault, so that an overrun is seen at once.
#include <sys/mman.h>

#include <cstdlib>

#include "machine.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 4096, kAlignment = 128;
constexpr unsigned char kPoison = 0xff;  // a NaN in every format

size_t padded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
size_t body(size_t bytes) { return (padded(bytes) + kPage - 1) / kPage * kPage; }
unsigned char* base(unsigned char* p, size_t bytes) { return p + padded(bytes) - body(bytes); }

}  // namespace

unsigned char* guarded_allocation(size_t bytes) {
  const size_t size = body(bytes);
  void* p = mmap(nullptr, size + kGuard, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  unsigned char* begin = static_cast<unsigned char*>(p);
  mprotect(begin + size, kGuard, PROT_NONE);
  unsigned char* result = begin + size - padded(bytes);
  std::memset(result, kPoison, padded(bytes));
  return result;
}

void guarded_release(unsigned char* p, size_t bytes) {
  munmap(base(p, bytes), body(bytes) + kGuard);
}

// The bytes between the end and the page that faults, at most 127.
bool guard_intact(const unsigned char* p, size_t bytes) {
  for (size_t i = bytes; i < padded(bytes); i++) {
    if (p[i] != kPoison) return false;
  }
  return true;
}

void forbid(unsigned char* p, size_t bytes) { mprotect(base(p, bytes), body(bytes), PROT_NONE); }

}  // namespace cuda_on_cpu
