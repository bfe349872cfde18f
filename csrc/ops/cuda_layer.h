// A layer in one direction or both, on the tensors of a CUDA device: allocation, matrix products
// and the order of the kernels of csrc/cuda. The tests' emulated build runs the same on CPU tensors.
#pragma once
#include "../cuda/plan.h"
#include "call.h"

namespace rnn_ext {

#if defined(RNN_EXT_WITH_CUDA) || defined(RNN_EXT_EMULATED)
constexpr bool kHasCudaKernels = true;
#else
constexpr bool kHasCudaKernels = false;
#endif

// Whether these kernels take the tensor.
inline bool on_cuda(const at::Tensor& t) {
#ifdef RNN_EXT_EMULATED
  return t.is_cpu();
#else
  return kHasCudaKernels && t.is_cuda();
#endif
}

// What resets put in the place of the state; null: zeros.
struct Restored {
  OptionalTensor h, c;  // S [B, P]; R [B, H] of the LSTM
};

// What backward adds up over the steps that begin from it, as csrc/cuda/params.h says; null where
// nobody asks.
struct RestoredSums {
  OptionalTensor delta, h, c;
};

// Rows that end early or start afresh, both on the device of the input.
struct RowPredicates {
  // int64 [B]: sequence b takes part in steps t < lengths[b]; its outputs are 0 after that.
  OptionalTensor lengths;
  // Of each direction bool, laid out like input's rows: no state is carried into the row's step.
  std::array<OptionalTensor, 2> resets;
};

constexpr const char* kCuda = "cuda";

// Saved: states is the output; cells are in the compute dtype; gates [N, G*H] in the input's dtype
// holds the net inputs, in torch's order (none for Elman cells), middle [N, H] as
// csrc/cuda/params.h says. isa is "cuda": what either path saves, either may read. Two directions
// are one launch where the kernel is persistent.
std::vector<LayerOutputs> cuda_layer_forward(const Call& call,
                                             std::span<const LayerInputs> directions,
                                             const RowPredicates& predicates, bool save,
                                             cuda::Path path, const PassOptions& options = {});
std::vector<InputGradients> cuda_layer_backward(
    const Call& call, std::span<const LayerInputs> directions, const RowPredicates& predicates,
    std::span<const Saved> saved, std::span<const LayerGradients> d, std::span<const Wanted> wanted,
    cuda::Path path, const PassOptions& options = {});

}  // namespace rnn_ext
