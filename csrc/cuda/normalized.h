// What the kernels of layers with layer normalisation (RNN, LSTM, GRU), peepholes (LSTM) or both read
// and write, in the words of params.h. Between two matrix products there is one kernel, in which a
// block owns a row: sums over its units stay within the block. What is kept for the backward pass is
// R, as wide as what is computed with.
//
// A group of gates is normalised together: all of a cell's, but r and z of the GRU, and its n alone.
#pragma once
#include "params.h"

namespace rnn_ext::cuda {

// S; null: ones for gains, zeros for the others. Without gain_hh nothing is normalised.
struct NormalizedWeights {
  const void *b_ih, *b_hh, *gain_ih, *gain_hh;  // [G*H]
  const void *gain_cell, *bias_cell;            // [H], LSTM
  const void* peephole;                         // [3*H], of i, f and o, LSTM
};

// R; what is null is not kept.
struct NormalizedRecord {
  void* gates;    // [count, G*H]: activations. Not of Elman cells, of the others never null
  void* u;        // [count, G*H]: U h', normalised
  void* u_scale;  // [count, groups]: what it was multiplied with
  void* cell;     // [count, 2]: mean and scale of c, LSTM
};

// The gates of one step. Reset-before GRU has two phases, the others one:
//   phase 0: product = h' U_rz (columns r, z), middle = r h'
//   phase 1: second_product = (r h') U_n, h
struct NormalizedForward {
  Rows rows;  // all that are there take part
  int64_t hidden;
  NormalizedWeights weights;
  const void* x;  // R [count, G*H]: W x, normalised
  // R [count, G*H] = h' U^T, of reset-before GRU [count, 2*H]; not read in rows that are reset.
  const void* product;
  Restored restored;
  const void* restored_product;  // R [B, as product], or null: zeros
  const void* second_product;    // R [count, H], reset-before GRU
  NormalizedRecord record;
  void* middle;   // S [count, H], reset-before GRU
  void* h;        // S [count, H]
  void* h_state;  // S [B, H]: h' on entry, h afterwards
  void* h_wide;   // R [B, H]: the same, not rounded; GRU where S is not R, otherwise null
  void* c_state;  // R [B, H]: c' on entry, c afterwards; LSTM
  void* cells;    // R [count, H]: c once more, or null
  // What the LSTM shows, looks at and normalises is c~.
  Zoneout zoneout;
};

// Backward through the gates of one step, called as StepBackward is. Phases:
//   all:               phase 0: product = delta_u_next U -> dL/dh -> delta, delta_u
//   reset-before GRU:  phase 0: -> delta of z, n, delta_u of n;
//                      phase 1: second_product = delta_u_n U_n -> delta of r, delta_u of r, z
struct NormalizedBackward {
  Rows rows, next;
  int64_t previous_count;
  int64_t hidden;
  NormalizedWeights weights;
  const void* product;         // R [next.count, H], read in rows whose next step is no reset
  const void* second_product;  // R [count, H]
  NormalizedRecord record;     // as forward left it, as what follows; _before: of the previous step
  const void *h, *cells, *h_before, *cells_before;
  const void *h0, *c0;  // S [B, H], R [B, H]
  Restored restored;
  RestoredSums restored_sums;  // delta: dL/d(U h')
  const void *d_h, *d_cells;   // S [count, H]: gradients of the results; or null
  void* carry;    // R [B, H]: dL/dh_n until a row's last step is done. GRU, zoneout: see params.h
  void* dc;       // R [B, H]: dL/dc, LSTM
  void* delta;    // R [count, G*H]: dL/d(net input), of GRU's n of its input's side
  void* extra;    // R [count, H]: GRU, of n's hidden side; LSTM, dL/ds (lstm_peephole.h)
  void* delta_u;  // S [count, G*H]: dL/d(U h')
  void *previous,
      *previous_c;  // S and R [count, H]: h' and c', where reset the restored ones; or null
  Clip clip;        // of dL/dh
  double limit;
  void* norms;    // R [count]: of the rows of dL/dh before they are clipped; or null
  const void* x;  // R [count, G*H]: W x, normalised; Elman with zoneout
  void* made;     // R [count, H]: c~, LSTM with zoneout; or null
  Zoneout zoneout;
};

// A group of `count` columns from `first` on, of rows of `columns`; number `group` of `groups`.
struct NormalizedGroup {
  int64_t rows, columns, first, count;
  int groups, group;
};
// values becomes (values - mean) scale.
struct NormalizeRows {
  NormalizedGroup of;
  void* values;  // R [rows, columns]
  void* scales;  // R [rows, groups]
};
// to = dL/d(values) from d = dL/d(normalised values * gain)
struct NormalizeRowsBackward {
  NormalizedGroup of;
  const void* d;       // R [rows, columns]
  const void* gain;    // S [columns]
  const void* values;  // R [rows, columns], normalised
  const void* scales;  // R [rows, groups]
  void* to;            // S [rows, columns]
};

void normalized_forward(CellKind cell, Storage storage, int phase, const NormalizedForward& p,
                        const Stream& stream);
void normalized_backward(CellKind cell, Storage storage, int phase, const NormalizedBackward& p,
                         const Stream& stream);
void normalize_rows(Storage storage, const NormalizeRows& p, const Stream& stream);
void normalize_rows_backward(Storage storage, const NormalizeRowsBackward& p, const Stream& stream);

}  // namespace rnn_ext::cuda
