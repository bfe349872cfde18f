#include "kept_memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/accumulate.h>

#include <bit>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <vector>

#include "../cpu/scratch.h"

namespace rnn_ext {
namespace {

constexpr size_t kSmallest = size_t(16) << 10, kLargest = size_t(16) << 20,
                 kKeptBytes = size_t(64) << 20, kKeptBlocks = 256;

// What stands in front of a tensor's values: as long as they are aligned.
struct alignas(64) Header {
  size_t bytes;  // with the header
};

// So many bytes, or up to an eighth more, that sizes close to each other may take each other's place.
size_t rounded(size_t bytes) {
  const size_t unit = std::bit_floor(bytes) / 8;
  return (bytes + unit - 1) / unit * unit;
}

// Blocks that nobody uses. Nothing here waits: a thread that finds another one at it goes on without,
// and so does a child process that was forked at such a moment.
class FreeBlocks {
 public:
  FreeBlocks() { blocks_.reserve(kKeptBlocks); }

  Header* take(size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (size_t i = blocks_.size(); i-- > 0;)
      if (blocks_[i]->bytes == bytes) return remove(i);
    return nullptr;
  }

  void put(Header* block) noexcept {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      c10::free_cpu(block);
      return;
    }
    while (blocks_.size() == kKeptBlocks || bytes_ + block->bytes > kKeptBytes)
      c10::free_cpu(remove(0));
    bytes_ += block->bytes;
    blocks_.push_back(block);
  }

 private:
  Header* remove(size_t i) {
    Header* const block = blocks_[i];
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
    bytes_ -= block->bytes;
    return block;
  }

  std::mutex mutex_;
  std::vector<Header*> blocks_;  // the one free for longest comes first
  size_t bytes_ = 0;
};

FreeBlocks& free_blocks() {
  static auto* const blocks = new FreeBlocks;  // tensors may outlive the end of main()
  return *blocks;
}

void free_block(void* header) {
  c10::profiledCPUMemoryReporter().Delete(header);
  free_blocks().put(static_cast<Header*>(header));
}

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t whole = rounded(bytes + sizeof(Header));
    Header* block = free_blocks().take(whole);
    if (!block) {
      block = static_cast<Header*>(c10::alloc_cpu(whole));
      block->bytes = whole;
      advise_huge_pages(block, whole);
    }
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block + 1, block, free_block, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

at::Tensor kept(at::IntArrayRef sizes, at::ScalarType dtype) {
  static KeepingAllocator allocator;
  const at::Tensor t(at::detail::empty_generic(
      sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt));
  // torch's rule for memory without values where results must be the same every time
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    std::memset(t.mutable_data_ptr(), dtype == at::kBool ? 1 : 0xff, t.nbytes());  // a NaN
  return t;
}

}  // namespace

at::Tensor uninitialized(at::IntArrayRef sizes, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (bytes >= kSmallest && bytes <= kLargest) return kept(sizes, dtype);
  const at::Tensor t = at::empty(sizes, dtype);
  advise_huge_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

}  // namespace rnn_ext
