// The time loop of a layer as one persistent kernel each way, in place of the step-wise loops of
// cuda_forward.cpp and cuda_backward.cpp: the same tensors before it and after it, the same saved
// values.
#pragma once
#include "../cuda/params.h"
#include "../cuda/plan.h"
#include "cuda_layer.h"

namespace rnn_ext {

// How a pass of the call runs on the device of its input. float takes TF32 products where torch
// may. Where path insists on a persistent kernel and there is none, forward raises and backward
// runs step by step.
cuda::CudaPlan cuda_plan(const Call& call, std::span<const LayerInputs> directions, cuda::Pass pass,
                         cuda::Path path, bool norms = false);

// What forward reads and writes beside the inputs. S is the dtype of the call.
struct ForwardLoop {
  const LayerInputs* in;
  at::Tensor gates;        // S [N, G*H] = W x, contiguous rows; Elman: the memory of states
  at::Tensor states;       // S [N, H], every h_t
  at::Tensor h_n;          // S [B, H]
  OptionalTensor c0, c_n;  // float [B, H], LSTM
  OptionalTensor resets;   // bool [N]
  Restored restored;
  OptionalTensor restored_product;  // float [B, G*H] = restored.h U^T
  OptionalTensor cells;             // float [N, H], LSTM when saving
  OptionalTensor middle;            // S [N, H], both GRUs when saving
  bool save;
};

// What backward reads and writes.
struct BackwardLoop {
  const LayerInputs* in;
  OptionalTensor gates, middle, cells;  // as forward left them
  at::Tensor states;                    // as forward left them
  OptionalTensor c0;                    // float [B, H], LSTM
  OptionalTensor resets;                // bool [N]
  Restored restored;
  RestoredSums restored_sums;
  OptionalTensor d_output, d_cells;  // S [N, H], contiguous
  at::Tensor carry;                  // float [B, H]: dL/dh_n in, dL/dh0 out
  OptionalTensor dc;                 // float [B, H], LSTM: dL/dc_n in, dL/dc0 out
  at::Tensor delta;                  // S [N, D*H]
  OptionalTensor previous;           // S [N, H]: h', where reset the restored one
};

// Each puts one kernel on the stream, for one direction or both. The plan is that of the pass, and
// persistent. Backward holds the values of dL/dh_t within `limit`.
void run_persistent(const cuda::CudaPlan& plan, const Call& call, const OptionalTensor& lengths,
                    const std::vector<ForwardLoop>& loops, const cuda::Stream& stream);
void run_persistent(const cuda::CudaPlan& plan, const Call& call, const OptionalTensor& lengths,
                    const std::vector<BackwardLoop>& loops, float limit,
                    const cuda::Stream& stream);

}  // namespace rnn_ext
