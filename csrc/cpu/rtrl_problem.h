// One step of real-time recurrent learning (RTRL), as plain pointers.
//
// A step of the exact influence is M = D M' + I. It is not taken at once: D and what I is made of are
// kept, and M follows kPendingSteps steps at a time. The product with all parameters is then needed
// once for so many steps; a gradient goes back through the pending steps first.
//
// Parameters are ordered by net: a net is a kind of net input a = <parameters of a unit, operand>,
// where the operand is the same for all units. SnAp-1 has those of a net as [H][length]. Nets and
// operands, with I features, 1 only where there is a bias:
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
constexpr long kInfluencePanelBytes = 64;
template <class real>
constexpr long kInfluenceWidth = kInfluencePanelBytes / sizeof(real);
// Steps that the exact influence may lag behind the state.
constexpr long kPendingSteps = 32;
constexpr int kSlopes = 2 * kMaxNets + 2;

struct Net {
  long column;   // its first
  long operand;  // where its operand starts in a row of `operands`
  long length;
};

struct RtrlShape {
  CellKind kind;
  long batch, input, hidden, columns;  // columns: P, of all nets
  long operand_width;
  int nets, states;
  Net net[kMaxNets];

  // Kept of a step, each [H, H]: dh/dh'; LSTM: the way to h past c, and the way to c; reset-before
  // GRU: after dh/dh' that from the net input of r to h.
  int matrices() const {
    return kind == CellKind::kLstm || kind == CellKind::kGruResetBefore ? 2 : 1;
  }
};

// Exact: dh/dtheta (LSTM: and dc/dtheta) as [B][panels][states][H][width]. A panel has one operand
// value's parameters of neighbouring units, zero beyond the last unit; panels are ordered by net,
// block of units and operand value.
template <class real>
struct InfluenceLayout : RtrlShape {
  static constexpr long width = kInfluenceWidth<real>;
  long blocks, padded;  // of units
  long panels, panel_size;

  explicit InfluenceLayout(const RtrlShape& shape)
      : RtrlShape(shape),
        blocks((hidden + width - 1) / width),
        padded(blocks * width),
        panels(hidden ? columns / hidden * blocks : 0),
        panel_size(states * hidden * width) {}

  long panel(int k, long block) const {
    return net[k].column / hidden * blocks + block * net[k].length;
  }
};

// Steps that the influence has not taken yet, for room of kPendingSteps: what each of them needs.
// Sample b has those from start[b] on; where that is not 0 its influence is zero.
template <class real>
struct PendingSteps {
  InfluenceLayout<real> layout;
  real* data;  // zero where never written
  const int64_t* start;
  long count;

  static long size(const InfluenceLayout<real>& l) {
    return kPendingSteps * l.batch *
           (l.operand_width + kSlopes * l.padded + l.matrices() * l.hidden * l.padded);
  }
  real* operands(long step, long b) const {
    return data + (step * layout.batch + b) * layout.operand_width;
  }
  // [kSlopes][padded]
  real* slopes(long step, long b) const {
    return data + kPendingSteps * layout.batch * layout.operand_width +
           (step * layout.batch + b) * kSlopes * layout.padded;
  }
  // [blocks][H][width]: blocks of columns
  real* matrix(long step, long b, int which) const {
    return slopes(kPendingSteps, 0) +
           ((step * layout.batch + b) * layout.matrices() + which) * layout.hidden * layout.padded;
  }
};

template <class real>
struct RtrlArgs : RtrlShape {
  PendingSteps<real> pending;  // exact: the step is written behind those there are
  // [B, I], [G*H, I], biases [G*H] or null
  const real *x = nullptr, *w_ih = nullptr, *b_ih = nullptr, *b_hh = nullptr;
  // Made here from the above, and null then, but for the reset-before GRU.
  const real* input_gates = nullptr;  // [B, G*H]: W x + b
  // [B, G*H]: U h' + b'; n of the reset-before GRU: U_n (r h') + b'
  const real* hidden_gates = nullptr;
  const real* operands = nullptr;                   // [B, operand_width]
  const real* w_hh = nullptr;                       // [G*H, H]
  const real* reset_jacobian = nullptr;             // reset-before GRU: [B, H, H], U_n d(r h')/dh'
  const real *h_prev = nullptr, *c_prev = nullptr;  // [B, H]; c: LSTM
  real *h = nullptr, *c = nullptr;                  // [B, H], written
  // SnAp-1, or null: [B][states][P], of each parameter only the entry of its own unit. In place.
  real* diagonal = nullptr;
  int threads = 1;
};

template <class real>
struct RtrlAdvanceArgs {
  PendingSteps<real> pending;
  real* influence;  // in place: from the state before the pending steps to the one after them
  int threads;
};

// gradient = the sum over samples and units of d_h[B, H] times the influence on h.
template <class real>
struct RtrlGradientArgs {
  PendingSteps<real> pending;
  const real *influence, *d_h;
  real* gradient;  // [panels][width]
  int threads;
};

template <class real>
struct DiagonalGradientArgs : RtrlShape {
  const real *diagonal, *d_h;
  real* gradient;  // [P]
  int threads;
};

// Kernels of one instruction set for one dtype.
template <class real>
struct RtrlKernels {
  // False where a new state is not finite; what is carried is then as it was.
  bool (*step)(const RtrlArgs<real>&);
  void (*advance)(const RtrlAdvanceArgs<real>&);
  void (*gradient)(const RtrlGradientArgs<real>&);
  void (*diagonal_gradient)(const DiagonalGradientArgs<real>&);
};

}  // namespace rnn_ext
