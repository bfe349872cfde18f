// Working memory of one call. Small amounts are kept per calling thread from call to call, large
// ones are not.
#pragma once
#include <cstddef>

namespace rnn_ext {

// Hands out aligned pieces of one allocation. Lay the pieces out once without memory to learn the
// size, then again.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(size_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return piece;
  }
  size_t used() const { return used_; }
  static constexpr size_t kAlign = 64;

 private:
  char* base_;
  size_t used_ = 0;
};

// Asks for pages of 2 MiB for memory that is about to be written for the first time, if it is large:
// there are fewer page faults, and rows far apart need fewer entries of the TLB.
void advise_huge_pages(void* data, size_t bytes);

class Scratch {
 public:
  explicit Scratch(size_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return data_; }
  // For tests: fill what is handed out with NaN, so that a read of memory never written shows.
  static void poison(bool on);

 private:
  char* data_;
  bool owned_;
};

}  // namespace rnn_ext
