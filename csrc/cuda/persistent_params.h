// What the persistent kernels read and write, as plain data: the border between torch's side
// (csrc/ops) and the kernels. Neither torch's nor CUDA's headers.
//
// One launch walks a whole sequence, in one direction or both. Names, layouts and saved values are
// those of the step-wise kernels (params.h), so that either can do the backward pass of the other:
// S is the storage type (float, fp16 or bf16), G gates, H hidden units, N rows in all, gate after
// gate. Matrices are row-major; where a stride is given, rows are that many elements apart, so that
// both directions can share one matrix.
#pragma once
#include <cstdint>

#include "../cells/kind.h"
#include "params.h"
#include "plan.h"

namespace rnn_ext::cuda {

// The time axis. Row r of step t is row offsets[t] + r of every [N, ...] matrix, or t * batch + r
// of a padded batch, and belongs to sequence r. It takes part if t < lengths[r]: otherwise its
// state stays as it is, its output and its gradients are zero (of a packed batch such rows are not
// there).
struct Sequences {
  int steps, batch, hidden;  // T, B, H; none is 0
  int directions;            // 1 or 2
  const int64_t* offsets;    // [T], the layout of a PackedSequence; null: padded. Needs lengths
  const int64_t* lengths;    // [B], or null: all take part
};

struct ForwardDirection {
  const void* weights;      // S [G*H, H] = U
  const void *b_ih, *b_hh;  // S [G*H], or both null
  // S [N, G*H], W x on entry; when saving, the net inputs afterwards (GRU: of n the input's part).
  // Elman keeps none; its gates and h may be the same memory.
  void* gates;
  int64_t gates_stride;
  void* h;  // S [N, H]
  int64_t h_stride;
  void*
      middle;  // S [N, H], when saving: GRU's U_n h' + b_rn, reset-before GRU's r h' (0 in rows that
               //   take no part); otherwise null
  float* cells;        // [N, H], LSTM: every c_t, or null
  const void* h0;      // S [B, H]
  const float* c0;     // [B, H], LSTM
  const bool* resets;  // [N], or null: true replaces the state that is carried into the row's step
  Restored restored;
  // [B, G*H] = restored.h U^T, of reset-before GRU [B, 2*H]; or null: zeros
  const float* restored_product;
  void* h_n;     // S [B, H]
  float* c_n;    // [B, H], LSTM
  bool reverse;  // time runs from T - 1 to 0
};

struct PersistentForward {
  Sequences sequences;
  ForwardDirection direction[2];
  // plan.workspace_bytes on the device, 16-byte aligned; its content does not matter.
  void* workspace;
  bool save;  // keep what the backward pass reads: gates, middle (and cells, which must be there)
};

struct BackwardDirection {
  // S [H, H*G]: column u * G + g of row j is U[g * H + u][j]; reset-before GRU S [G*H, H]: column u
  // of row g * H + j is U[g * H + u][j]
  const void* weights;
  const void *gates, *middle, *h;  // as forward left them
  int64_t gates_stride, h_stride;
  const float* cells;
  const void* h0;      // S [B, H]
  const float* c0;     // [B, H], LSTM
  const bool* resets;  // as in the forward pass
  Restored restored;
  RestoredSums restored_sums;
  const void* d_h;  // S [N, H]: gradient of h, or null
  int64_t d_h_stride;
  const void* d_cells;  // S [N, H]: gradient of every c_t, or null
  float* carry;         // [B, H]: dL/dh_n on entry, dL/dh0 afterwards
  float* dc;            // [B, H], LSTM: dL/dc_n on entry, dL/dc0 afterwards
  void* delta;  // S [N, D*H]: dL/d(net input). D = G; GRU: 4, n of the hidden side, then r, z, n of
                //   the input's side
  int64_t delta_stride;
  void* previous;  // S [N, H]: h', where reset the restored one; or null
  bool reverse;    // as in the forward pass
};

struct PersistentBackward {
  Sequences sequences;
  BackwardDirection direction[2];
  // plan.workspace_bytes on the device, 16-byte aligned; its content does not matter.
  void* workspace;
  float limit;  // of the values of dL/dh_t on their way to the cell; infinite: none
};

// Each starts one kernel. `plan` must come from choose(), for the same shape and a persistent
// kernel. Gradients are the same in every run. Both throw std::runtime_error, also where the GPU
// cannot hold the launch.
void persistent_forward(CellKind cell, const CudaPlan& plan, const PersistentForward& args,
                        const Stream& stream);
void persistent_backward(CellKind cell, const CudaPlan& plan, const PersistentBackward& args,
                         const Stream& stream);

}  // namespace rnn_ext::cuda
