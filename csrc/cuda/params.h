// What the step-wise kernels read and write, as plain data: the border between torch's side
// (csrc/ops/cuda_step_*.cpp) and the kernels. Neither torch's nor CUDA's headers.
//
// S is the storage type of the call, R what is computed in: double for double, otherwise float.
// Matrices are row-major. Row 0 of a pointer to [rows, ...] is the first row of the step, row 0 of
// [B, ...] the first sequence; row r of a step belongs to sequence r. All units of gate 0 come
// first, then those of gate 1 (torch's order). G gates, H hidden units, P output units (P = H
// without a projection).
#pragma once
#include <cstdint>

#include "../cells/kind.h"

namespace rnn_ext::cuda {

enum class Storage { kFloat, kDouble, kHalf, kBfloat16 };

// Rows r < count exist in step `step`. Of those, row r takes part if step < lengths[r]: otherwise
// its state stays as it is, its output is zero and no gradient comes from it.
struct Rows {
  int64_t step, count;
  const int64_t* lengths;  // [B], or null: all take part
  const bool* resets;  // [rows], or null: true replaces the state that comes into the row's step
};

// What a step holds on to of the state before (zoneout): with z what is held of a unit,
//   h = z h' + (1 - z) h~        c = z c' + (1 - z) c~        h~ and c~ are what the cell makes
//   dL/dh~ = (1 - z) dL/dh       z dL/dh is added to dL/dh', and so for c
struct Hold {
  const bool* units;  // [rows, units]: where z is 1; or null:
  double share;       // z of every unit
};
struct Zoneout {
  bool on;
  Hold h, c;
};

// What a reset puts in the place of the state; null: zeros.
struct Restored {
  const void* h;  // S [B, P]
  const void* c;  // R [B, H], LSTM
};

// What backward adds up over the steps that began from it, or null: nobody asks.
struct RestoredSums {
  void* delta;  // R [B, G*H], reset-before GRU [B, 2*H]: dL/d(U h') in the order of U
  void* h;      // R [B, P], GRU, zoneout: dL/dh' beside the product's part
  void* c;      // R [B, H], LSTM: dL/dc'
};

// The gates of one step. Reset-before GRU has two phases, the others one:
//   phase 0: product = h' U_rz (columns r, z), middle = r h'
//   phase 1: second_product = (r h') U_n, h
struct StepForward {
  Rows rows;
  int64_t hidden;           // H
  const void *b_ih, *b_hh;  // S [G*H], or both null
  // R [count, G*H] = h' U^T, of reset-before GRU [count, 2*H]. Not read in rows that are reset.
  const void* product;
  Restored restored;
  const void* restored_product;  // R [B, as product] = restored.h U^T, or null: zeros
  const void* second_product;    // R [count, H], reset-before GRU
  // S [count, G*H]: W x on entry; when saving, the net inputs afterwards (GRU: of n the input's
  // part). Net inputs, not activations: a gate near 1 would lose in 16 bits what it lets through.
  // Elman: the same memory as h.
  void* gates;
  // S [count, H]: GRU's U_n h' + b_rn when saving, reset-before GRU's r h', projected LSTM's
  // o tanh(c), Elman's h~ when saving and a share of h' is held; otherwise null.
  void* middle;
  void* h;        // S [count, H], or null where a projection follows
  void* h_state;  // S [B, H]: h' on entry, h afterwards; with a projection, project writes it
  void* h_wide;   // R [B, H]: the same, not rounded; GRU where S is not R, otherwise null
  void* c_state;  // R [B, H]: c' on entry, c afterwards; LSTM
  void* cells;    // R [count, H]: c once more, or null
  bool save;
  Zoneout zoneout;
};

// h = the projection of middle, in the rows that take part.
struct StepProject {
  Rows rows;
  int64_t output;       // P
  const void* product;  // R [count, P] = middle W_hr^T
  void* h;              // S [count, P]
  void* h_state;        // S [B, P]
  const void* restored_h;
  Zoneout zoneout;
};

// Backward through the gates of one step, called from the last step in running order to the first
// and once more with rows.count = 0, which leaves dL/dh0 in carry. Phases:
//   all:               phase 0: product = delta_next U -> dL/dh -> delta
//   projected LSTM:    phase 0: -> dh;             phase 1: second_product = dh W_hr -> delta
//   reset-before GRU:  phase 0: -> delta of z, n;  phase 1: second_product = delta_n U_n -> of r
struct StepBackward {
  Rows rows;
  Rows next;  // the following step in running order; next.count = 0 if there is none
  // The step before in running order; rows r < previous_count of this step have one.
  int64_t previous_step, previous_count;
  int64_t hidden, output;  // H, P
  // R [next.count, P], read in rows whose next step takes part and is no reset.
  const void* product;
  const void* second_product;  // R [count, H]
  // As forward left them; _before: of the previous step, [previous_count, ...].
  const void *gates, *middle, *h, *cells, *h_before, *cells_before;
  const void *h0, *c0;  // S [B, P], R [B, H]
  Restored restored;
  RestoredSums restored_sums;
  const void *d_h, *d_cells;  // S [count, P], S [count, H]: gradients of the results; or null
  // R [B, P]: dL/dh_n until a row's last step is done, then, of GRU and with zoneout, dL/dh' beside
  // the product's part.
  void* carry;
  void* dc;  // R [B, H]: dL/dc, LSTM
  // S [count, D*H]: dL/d(net input), D = G in the order of the gates. GRU: D = 4, n of the hidden
  // side, then r, z, n of the input's side, so that either side is adjacent columns.
  void* delta;
  void* dh;   // S [count, P]: dL/dh~, projected LSTM, otherwise null
  Clip clip;  // of dL/dh
  double limit;
  void* norms;     // R [count]: of the rows of dL/dh before they are clipped; or null
  void* previous;  // S [count, P]: h', where reset the restored one; or null
  Zoneout zoneout;
};

// sums[c] = the sum over rows of matrix[., c], in a fixed order whatever the device.
struct ColumnSums {
  int64_t rows, columns, row_stride;
  const void* matrix;  // S [rows, columns], rows row_stride apart
  void* scratch;       // R [column_sums_scratch(rows), columns]
  void* sums;          // S [columns]
};
int64_t column_sums_scratch(int64_t rows);

// A device and a cudaStream_t of it.
struct Stream {
  int device;
  void* handle;
};

// Each starts kernels on the stream. They throw std::runtime_error when a launch fails.
void step_forward(CellKind cell, Storage storage, int phase, const StepForward& p,
                  const Stream& stream);
void step_project(Storage storage, const StepProject& p, const Stream& stream);
// Writes p.norms, for phase 0 of step_backward where p.clip is kNorm, and for whoever asks for them.
void step_norms(CellKind cell, Storage storage, const StepBackward& p, const Stream& stream);
void step_backward(CellKind cell, Storage storage, int phase, const StepBackward& p,
                   const Stream& stream);
void column_sums(Storage storage, const ColumnSums& p, const Stream& stream);

}  // namespace rnn_ext::cuda
