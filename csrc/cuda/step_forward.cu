// The fused gate kernels of the step-wise forward pass: everything that happens between two matrix
// products.
#include "step.cuh"

namespace rnn_ext::cuda {
namespace {

// One row and unit of a step.
template <class S>
struct Forward {
  using R = Real<S>;
  const StepForward& p;
  int64_t row, unit, state;  // state: offset into [rows, H]
  bool reset;

  RNN_EXT_DEVICE Forward(const StepForward& params, Place at)
      : p(params),
        row(at.row),
        unit(at.unit),
        state(at.row * params.hidden + at.unit),
        reset(is_reset(params.rows, at.row)) {}

  RNN_EXT_DEVICE int64_t gate_at(int gate, int gates) const {
    return (row * gates + gate) * p.hidden + unit;
  }

  // Both sides of a net input: W x + b_x of a gate, U h' + b_r of the same gate in one of `columns`
  // columns of units.
  RNN_EXT_DEVICE R input_side(int gate, int gates) const {
    const R a = load<S>(p.gates, gate_at(gate, gates));
    return p.b_ih ? a + load<S>(p.b_ih, gate * p.hidden + unit) : a;
  }
  RNN_EXT_DEVICE R hidden_side(const void* product, int gate, int column, int columns) const {
    const R a = product ? load<R>(product, gate_at(column, columns)) : R(0);
    return p.b_hh ? a + load<S>(p.b_hh, gate * p.hidden + unit) : a;
  }
  // h' U^T, or null: zeros
  RNN_EXT_DEVICE const void* product() const { return reset ? p.restored_product : p.product; }
  RNN_EXT_DEVICE R net_input(int gate, int gates) const {
    return input_side(gate, gates) + hidden_side(product(), gate, gate, gates);
  }
  RNN_EXT_DEVICE void save(int gate, int gates, R a) const {
    if (p.save) store<S>(p.gates, gate_at(gate, gates), a);
  }

  // h', not rounded
  RNN_EXT_DEVICE R previous() const {
    if (reset) return p.restored.h ? load<S>(p.restored.h, state) : R(0);
    return p.h_wide ? load<R>(p.h_wide, state) : load<S>(p.h_state, state);
  }
  RNN_EXT_DEVICE R previous_c() const {
    if (reset) return p.restored.c ? load<R>(p.restored.c, state) : R(0);
    return load<R>(p.c_state, state);
  }
  RNN_EXT_DEVICE void finish(R h) const {
    if (p.zoneout.on) h = mixed(p.zoneout.h, state, previous(), h);
    store<S>(p.h, state, h);
    store<S>(p.h_state, state, h);
    if (p.h_wide) store<R>(p.h_wide, state, h);
  }
};

template <class S, class Activation>
struct ElmanForward {
  using R = Real<S>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Forward<S>& at) {
    const R h = Elman<R, Activation>::forward(at.net_input(0, 1));
    if (at.p.middle) store<S>(at.p.middle, at.state, h);
    at.finish(h);
  }
};

template <class S>
struct LstmForward {
  using R = Real<S>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Forward<S>& at) {
    const StepForward& p = at.p;
    typename Lstm<R>::Gates gates{at.net_input(0, 4), at.net_input(1, 4), at.net_input(2, 4),
                                  at.net_input(3, 4)};
    at.save(0, 4, gates.i);
    at.save(1, 4, gates.f);
    at.save(2, 4, gates.g);
    at.save(3, 4, gates.o);
    const R c_prev = at.previous_c();
    R c, m;
    Lstm<R>::forward(gates, c_prev, c, m);
    if (p.zoneout.on) c = mixed(p.zoneout.c, at.state, c_prev, c);
    store<R>(p.c_state, at.state, c);
    if (p.cells) store<R>(p.cells, at.state, c);
    if (p.h)
      at.finish(m);
    else
      store<S>(p.middle, at.state, m);
  }
};

template <class S>
struct GruForward {
  using R = Real<S>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Forward<S>& at) {
    typename Gru<R>::Gates gates{at.net_input(0, 3), at.net_input(1, 3), at.input_side(2, 3)};
    const R hidden_n = at.hidden_side(at.product(), 2, 2, 3);
    at.save(0, 3, gates.r);
    at.save(1, 3, gates.z);
    at.save(2, 3, gates.n);
    if (at.p.middle) store<S>(at.p.middle, at.state, hidden_n);
    at.finish(GruResetAfter<R>::forward(gates, hidden_n, at.previous()));
  }
};

template <class S>
struct GruResetBeforeForward {
  using R = Real<S>;
  using Cell = GruResetBefore<R>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Forward<S>& at) {
    const StepForward& p = at.p;
    if constexpr (phase == 0) {
      R r = at.input_side(0, 3) + at.hidden_side(at.product(), 0, 0, 2), z{};
      at.save(0, 3, r);
      store<S>(p.middle, at.state, Cell::reset(r, z, at.previous()));
    } else {
      R r{}, z = at.input_side(1, 3) + at.hidden_side(at.product(), 1, 1, 2);
      R n = at.input_side(2, 3) + at.hidden_side(p.second_product, 2, 0, 1);
      at.save(1, 3, z);
      at.save(2, 3, n);
      const R h_prev = at.previous();
      Cell::reset(r, z, h_prev);
      at.finish(Cell::forward(n, z, h_prev));
    }
  }
};

// A row that does not take part: finite numbers where a product over all rows will read.
template <class S>
RNN_EXT_DEVICE void leave_out(const StepForward& p, int64_t state) {
  using R = Real<S>;
  if (p.cells) store<R>(p.cells, state, 0);
  if (p.middle) store<S>(p.middle, state, 0);
  if (p.h) store<S>(p.h, state, 0);
}

// Reads W x, the recurrent product and the state, writes the state, h and what is saved (params.h).
// Parallel over rows and units.
template <class S, class Cell, int phase>
__global__ void __launch_bounds__(kTileThreads, 1) forward_kernel(const StepForward p) {
  const Place at = own_place(p.hidden);
  if (at.row >= p.rows.count || at.unit >= p.hidden) return;
  if (takes_part(p.rows, at.row))
    Cell::template run<phase>(Forward<S>(p, at));
  else if (phase == 0)
    leave_out<S>(p, at.row * p.hidden + at.unit);
}

// Reads the projected product and, with zoneout, the state; writes h and the state. Parallel over rows and units.
template <class S>
__global__ void __launch_bounds__(kTileThreads, 1) project_kernel(const StepProject p) {
  using R = Real<S>;
  const Place at = own_place(p.output);
  if (at.row >= p.rows.count || at.unit >= p.output) return;
  const int64_t state = at.row * p.output + at.unit;
  const bool active = takes_part(p.rows, at.row);
  R h = active ? load<R>(p.product, state) : R(0);
  if (active && p.zoneout.on) {
    const void* before = is_reset(p.rows, at.row) ? p.restored_h : p.h_state;
    h = mixed(p.zoneout.h, state, before ? load<S>(before, state) : R(0), h);
  }
  store<S>(p.h, state, h);
  if (active) store<S>(p.h_state, state, h);
}

template <class S, class Cell, int phase>
void start(const StepForward& p, const Stream& stream) {
  const int64_t blocks = tiles(p.rows.count, p.hidden);
  launch_blocks("step_forward", forward_kernel<S, Cell, phase>, blocks, kTileThreads, 0, stream, p);
}

}  // namespace

void step_forward(CellKind cell, Storage storage, int phase, const StepForward& p,
                  const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    switch (cell) {
      case CellKind::kRnnTanh:
        return start<S, ElmanForward<S, Tanh>, 0>(p, stream);
      case CellKind::kRnnRelu:
        return start<S, ElmanForward<S, Relu>, 0>(p, stream);
      case CellKind::kRnnSigmoid:
        return start<S, ElmanForward<S, Sigmoid>, 0>(p, stream);
      case CellKind::kLstm:
        return start<S, LstmForward<S>, 0>(p, stream);
      case CellKind::kGru:
        return start<S, GruForward<S>, 0>(p, stream);
      case CellKind::kGruResetBefore:
        return phase == 0 ? start<S, GruResetBeforeForward<S>, 0>(p, stream)
                          : start<S, GruResetBeforeForward<S>, 1>(p, stream);
      default:
        launch_failed("step_forward", "this cell has no CUDA kernel");
    }
  });
}

void step_project(Storage storage, const StepProject& p, const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    const int64_t blocks = tiles(p.rows.count, p.output);
    launch_blocks("step_project", project_kernel<decltype(zero)>, blocks, kTileThreads, 0, stream,
                  p);
  });
}

}  // namespace rnn_ext::cuda
