// The memory of the tensors that CPU kernels write.
#pragma once
#include <ATen/core/Tensor.h>

namespace rnn_ext {

// A tensor on the CPU whose values are still to be written. Its memory is, where that suits, what
// another one of these tensors has just given up; else it is new, on large pages where it is large.
//
// Every step of a training takes the same sizes and frees them again. In between the C library hands
// memory back to the system and then takes it anew, page by page, each of them cleared first
// (docs/performance.md, the log). So blocks of 16 KiB to 16 MiB are kept when they are freed, 64 MiB of
// them in all threads together; beyond that the one free for longest goes.
at::Tensor uninitialized(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace rnn_ext
