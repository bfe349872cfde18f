// One step of real-time recurrent learning (RTRL), as plain pointers.
//
// Parameters are ordered by net: a net is a kind of net input a = <parameters of a unit, operand>,
// where the operand is the same for all units. The columns of a net are [H][length], unit after
// unit. Nets and operands, with I features, 1 only where there is a bias:
//   RNN, LSTM          a gate each           [x, 1, h']
//   GRU                r, z                  [x, 1, h']
//                      n: W_n x + b_n        [x, 1]
//                      n: U_n h' + b'_n      [h', 1]
//   reset-before GRU   r, z                  [x, 1, h']
//                      n                     [x, 1, r h']
#pragma once
#include "problem.h"

namespace rnn_ext {

constexpr int kMaxNets = 4;
// A row of a panel of the influence matrix has this many bytes with every instruction set, so that
// a stored matrix can be read with another one.
constexpr long kInfluencePanelBytes = 128;

struct Net {
  long column;   // its first
  long operand;  // where its operand starts in a row of `operands`
  long length;
};

template <class real>
struct RtrlArgs {
  long batch, hidden, columns;  // columns: P, of all nets
  int nets;
  Net net[kMaxNets];
  const real *x, *w_ih, *b_ih, *b_hh;  // [B, I], [G*H, I], biases [G*H] or null
  long input;
  // Made here from the above, and null then, but for the reset-before GRU.
  const real* input_gates;   // [B, G*H]: W x + b
  const real* hidden_gates;  // [B, G*H]: U h' + b'; n of the reset-before GRU: U_n (r h') + b'
  const real* operands;      // [B, operand_width]
  long operand_width;
  const real* w_hh;             // [G*H, H]
  const real* reset_jacobian;   // reset-before GRU: [B, H, H], U_n d(r h')/dh'
  const real *h_prev, *c_prev;  // [B, H]; c: LSTM
  real *h, *c;                  // [B, H], written
  // In place. Exact: dh/dtheta as [B][panels][states][H][panel], where the LSTM has two states,
  // h and c, and a panel is kInfluencePanelBytes of neighbouring columns, zero beyond the last.
  // Diagonal (SnAp-1): [B][states][P], of each parameter only the entry of its own unit.
  real* influence;
  bool diagonal;
  int threads;
};

// gradient[P] = sum over samples and units of d_h[B, H] times the influence on h.
template <class real>
struct RtrlGradientArgs {
  long batch, hidden, columns;
  int nets, states;
  Net net[kMaxNets];
  const real *d_h, *influence;
  real* gradient;  // exact: room for whole panels
  bool diagonal;
  int threads;
};

template <class real>
long influence_panels(long columns) {
  constexpr long width = kInfluencePanelBytes / sizeof(real);
  return (columns + width - 1) / width;
}

// Kernels of one instruction set for one dtype.
template <class real>
struct RtrlKernels {
  // False where a new state is not finite; the influence is then as it was.
  bool (*step)(CellKind, const RtrlArgs<real>&);
  void (*gradient)(const RtrlGradientArgs<real>&);
};

}  // namespace rnn_ext
