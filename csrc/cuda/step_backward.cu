// The fused gate kernels of step-wise backpropagation: everything that happens between two matrix
// products.
#include "step.cuh"

namespace rnn_ext::cuda {
namespace {

// dL/dh of a row's state after this step, from the steps that follow.
template <class S, bool carries>
RNN_EXT_DEVICE Real<S> from_later_steps(const StepBackward& p, bool continues, int64_t row,
                                        int64_t at) {
  using R = Real<S>;
  if (!continues) return load<R>(p.carry, at);
  const R through_product = is_reset(p.next, row) ? R(0) : load<R>(p.product, at);
  return carries || p.zoneout.on ? through_product + load<R>(p.carry, at) : through_product;
}

// dL/dh of a row that takes part, as it has arrived from the output and from later steps.
template <class S, bool carries>
RNN_EXT_DEVICE Real<S> arrived(const StepBackward& p, int64_t row, int64_t at) {
  const bool continues = row < p.next.count && takes_part(p.next, row);
  const Real<S> later = from_later_steps<S, carries>(p, continues, row, at);
  return p.d_h ? later + load<S>(p.d_h, at) : later;
}

// Of one of its values. What is no number stays so.
template <class R>
RNN_EXT_DEVICE R clipped(const StepBackward& p, int64_t row, R dh) {
  const R limit = static_cast<R>(p.limit);
  if (p.clip == Clip::kValue) return dh > limit ? limit : dh < -limit ? -limit : dh;
  if (p.clip == Clip::kNone) return dh;
  const R norm = load<R>(p.norms, row);
  return norm <= limit ? dh : dh * (limit / norm);
}

// One row and unit of a step, among `units` of hidden or output units.
template <class S>
struct Backward {
  using R = Real<S>;
  const StepBackward& p;
  int64_t row, unit, state;  // state: offset into [rows, units]
  bool reset, has_previous;

  RNN_EXT_DEVICE Backward(const StepBackward& params, Place at, int64_t units)
      : p(params),
        row(at.row),
        unit(at.unit),
        state(at.row * units + at.unit),
        reset(is_reset(params.rows, at.row)),
        has_previous(at.row < params.previous_count &&
                     takes_part(params.rows.lengths, at.row, params.previous_step)) {}

  RNN_EXT_DEVICE R gate(int gate, int gates) const {
    return load<S>(p.gates, (row * gates + gate) * p.hidden + unit);
  }
  RNN_EXT_DEVICE void store_delta(int gate, int gates, R value) const {
    store<S>(p.delta, (row * gates + gate) * p.hidden + unit, value);
  }
  // dL/d(U h') of a gate among `gates` of U: in a row that is reset it ends here.
  RNN_EXT_DEVICE void end_delta(int gate, int gates, R value) const {
    if (reset && p.restored_sums.delta)
      add<R>(p.restored_sums.delta, (row * gates + gate) * p.hidden + unit, value);
  }
  RNN_EXT_DEVICE R previous_h() const {
    if (reset) return p.restored.h ? load<S>(p.restored.h, state) : R(0);
    return load<S>(has_previous ? p.h_before : p.h0, state);
  }
  RNN_EXT_DEVICE R previous_c() const {
    if (reset) return p.restored.c ? load<R>(p.restored.c, state) : R(0);
    return load<R>(has_previous ? p.cells_before : p.c0, state);
  }
  // What the previous step gets of a gradient of its state, which a reset keeps.
  RNN_EXT_DEVICE R passed_on(R gradient, void* restored_sum) const {
    if (!reset) return gradient;
    if (restored_sum) add<R>(restored_sum, state, gradient);
    return R(0);
  }
  // The rest of dL/dh' beside what flows through the product.
  RNN_EXT_DEVICE void store_carry(R carry) const {
    store<R>(p.carry, state, passed_on(carry, p.restored_sums.h));
  }
};

// A cell's run<0> takes dL/dh~ and returns dL/dh' beside what flows through the product.
template <class S, class Activation>
struct ElmanBackward {
  using R = Real<S>;
  static constexpr int deltas = 1;
  static constexpr bool carries = false;

  template <int phase>
  RNN_EXT_DEVICE static R run(const Backward<S>& at, R dh) {
    // Where h' is held whole there is no delta, so that h does for h~.
    const R made = load<S>(at.p.middle ? at.p.middle : at.p.h, at.state);
    const R delta = Elman<R, Activation>::vjp(made, dh);
    at.store_delta(0, 1, delta);
    at.end_delta(0, 1, delta);
    return 0;
  }
};

template <class S>
struct LstmBackward {
  using R = Real<S>;
  static constexpr int deltas = 4;
  static constexpr bool carries = false;

  template <int phase>
  RNN_EXT_DEVICE static R run(const Backward<S>& at, R dm) {
    const StepBackward& p = at.p;
    typename Lstm<R>::Gates gates{at.gate(0, 4), at.gate(1, 4), at.gate(2, 4), at.gate(3, 4)},
        delta;
    const R c_prev = at.previous_c();
    R made, m, dc_prev, kept = 0, c = load<R>(p.cells, at.state), dc = load<R>(p.dc, at.state);
    if (p.d_cells) dc += load<S>(p.d_cells, at.state);
    Lstm<R>::forward(gates, c_prev, made, m);
    if (p.zoneout.on) {
      c = made;
      kept = held<R>(p.zoneout.c, at.state) * dc;
      dc -= kept;
    }
    Lstm<R>::vjp(gates, c_prev, c, dm, dc, delta, dc_prev);
    store<R>(p.dc, at.state, at.passed_on(dc_prev + kept, p.restored_sums.c));
    const auto keep = [&at](int gate, R value) {
      at.store_delta(gate, 4, value);
      at.end_delta(gate, 4, value);
    };
    keep(0, delta.i), keep(1, delta.f), keep(2, delta.g), keep(3, delta.o);
    return 0;
  }
};

// The first phase of a projected LSTM: dL/dh~ itself, which the product with W_hr needs whole.
template <class S>
struct ProjectionBackward {
  static constexpr int deltas = 0;
  static constexpr bool carries = false;

  template <int phase>
  RNN_EXT_DEVICE static Real<S> run(const Backward<S>& at, Real<S> dh) {
    store<S>(at.p.dh, at.state, dh);
    return 0;
  }
};

template <class S>
struct GruBackward {
  using R = Real<S>;
  static constexpr int deltas = 4;
  static constexpr bool carries = true;

  template <int phase>
  RNN_EXT_DEVICE static R run(const Backward<S>& at, R dh) {
    typename Gru<R>::Gates gates{at.gate(0, 3), at.gate(1, 3), at.gate(2, 3)}, delta;
    const R hidden_n = load<S>(at.p.middle, at.state), h_prev = at.previous_h();
    R delta_hidden_n, carry;
    GruResetAfter<R>::forward(gates, hidden_n, h_prev);
    GruResetAfter<R>::vjp(gates, hidden_n, h_prev, dh, delta, delta_hidden_n, carry);
    at.store_delta(0, 4, delta_hidden_n);
    at.store_delta(1, 4, delta.r);
    at.store_delta(2, 4, delta.z);
    at.store_delta(3, 4, delta.n);
    at.end_delta(0, 3, delta.r);
    at.end_delta(1, 3, delta.z);
    at.end_delta(2, 3, delta_hidden_n);
    return carry;
  }
};

template <class S>
struct GruResetBeforeBackward {
  using R = Real<S>;
  using Cell = GruResetBefore<R>;
  static constexpr int deltas = 3;
  static constexpr bool carries = true;

  // phase 0: the argument is dL/dh~; phase 1: dL/d(r h')
  template <int phase>
  RNN_EXT_DEVICE static R run(const Backward<S>& at, R gradient) {
    const R h_prev = at.previous_h();
    if constexpr (phase == 0) {
      R r{}, z = at.gate(1, 3), n = at.gate(2, 3), delta_z, delta_n, carry;
      Cell::reset(r, z, h_prev);
      Cell::forward(n, z, h_prev);
      Cell::interpolate_vjp(z, n, h_prev, gradient, delta_z, delta_n, carry);
      at.store_delta(1, 3, delta_z);
      at.store_delta(2, 3, delta_n);
      at.end_delta(1, 2, delta_z);
      return carry;
    } else {
      R r = at.gate(0, 3), z{}, carry = load<R>(at.p.carry, at.state);
      Cell::reset(r, z, h_prev);
      const R delta_r = Cell::reset_vjp(r, h_prev, gradient, carry);
      at.store_delta(0, 3, delta_r);
      at.end_delta(0, 2, delta_r);
      at.store_carry(carry);
      return carry;
    }
  }
};

template <class S, int deltas>
RNN_EXT_DEVICE void leave_out(const StepBackward& p, int64_t row, int64_t unit) {
  for (int gate = 0; gate < deltas; gate++)
    store<S>(p.delta, (row * deltas + gate) * p.hidden + unit, 0);
}

// Phase 0. Reads the gradients of the results, the product of the next step's delta and what
// forward saved; writes delta (a projected LSTM: dh), h' and what is left for the previous step
// (params.h). Parallel over rows and units.
template <class S, class Cell>
__global__ void __launch_bounds__(kTileThreads, 1) backward_kernel(const StepBackward p) {
  using R = Real<S>;
  const int64_t units = p.output;
  const Place at = own_place(units);
  const bool exists = at.row < p.rows.count, existed = at.row < p.next.count;
  if (!(exists || existed) || at.unit >= units) return;
  const int64_t state = at.row * units + at.unit;
  if (exists && takes_part(p.rows, at.row)) {
    const Backward<S> place(p, at, units);
    if (p.previous) store<S>(p.previous, state, place.previous_h());
    const R dh = clipped<R>(p, at.row, arrived<S, Cell::carries>(p, at.row, state));
    const R kept = p.zoneout.on ? held<R>(p.zoneout.h, state) * dh : R(0);
    const R carry = Cell::template run<0>(place, dh - kept);
    if (Cell::carries || p.zoneout.on) place.store_carry(carry + kept);
    return;
  }
  // The next step is the row's first: this is dL/dh0.
  if (existed && takes_part(p.next, at.row))
    store<R>(p.carry, state, from_later_steps<S, Cell::carries>(p, true, at.row, state));
  if (!exists) return;
  if (p.previous) store<S>(p.previous, state, 0);
  if (p.dh) store<S>(p.dh, state, 0);
  leave_out<S, Cell::deltas>(p, at.row, at.unit);
}

// Phase 1. Reads the second product and what forward saved, writes delta. Parallel over rows and
// units.
template <class S, class Cell>
__global__ void __launch_bounds__(kTileThreads, 1) second_backward_kernel(const StepBackward p) {
  const Place at = own_place(p.hidden);
  if (at.row >= p.rows.count || at.unit >= p.hidden) return;
  if (takes_part(p.rows, at.row))
    Cell::template run<1>(Backward<S>(p, at, p.hidden),
                          load<Real<S>>(p.second_product, at.row * p.hidden + at.unit));
  else
    leave_out<S, Cell::deltas>(p, at.row, at.unit);
}

constexpr int kNormThreads = 128;

// Reads what arrives at the rows of a step, writes their norms. A block sums the squares of a row,
// a thread those of every kNormThreads-th unit.
template <class S, bool carries>
__global__ void __launch_bounds__(kNormThreads) norms_kernel(const StepBackward p) {
  double* sums = reinterpret_cast<double*>(shared_memory());  // [kNormThreads]
  const int64_t row = blockIdx.x;
  const bool active = takes_part(p.rows, row);
  double sum = 0;
  for (int64_t unit = threadIdx.x; active && unit < p.output; unit += kNormThreads) {
    const double dh = arrived<S, carries>(p, row, row * p.output + unit);
    sum += dh * dh;
  }
  for (unsigned half = kNormThreads / 2; half > 0; half /= 2) {
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < half) sum += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) store<Real<S>>(p.norms, row, static_cast<Real<S>>(sqrt(sum)));
}

template <class S, class Cell>
void start(const StepBackward& p, const Stream& stream) {
  const int64_t rows = p.rows.count > p.next.count ? p.rows.count : p.next.count;
  launch_blocks("step_backward", backward_kernel<S, Cell>, tiles(rows, p.output), kTileThreads, 0,
                stream, p);
}

template <class S, class Cell>
void start_second(const StepBackward& p, const Stream& stream) {
  const int64_t blocks = tiles(p.rows.count, p.hidden);
  launch_blocks("step_backward", second_backward_kernel<S, Cell>, blocks, kTileThreads, 0, stream,
                p);
}

}  // namespace

void step_norms(CellKind cell, Storage storage, const StepBackward& p, const Stream& stream) {
  const bool carries = cell == CellKind::kGru || cell == CellKind::kGruResetBefore;
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    launch_blocks("step_norms", carries ? norms_kernel<S, true> : norms_kernel<S, false>,
                  p.rows.count, kNormThreads, kNormThreads * sizeof(double), stream, p);
  });
}

void step_backward(CellKind cell, Storage storage, int phase, const StepBackward& p,
                   const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    switch (cell) {
      case CellKind::kRnnTanh:
        return start<S, ElmanBackward<S, Tanh>>(p, stream);
      case CellKind::kRnnRelu:
        return start<S, ElmanBackward<S, Relu>>(p, stream);
      case CellKind::kRnnSigmoid:
        return start<S, ElmanBackward<S, Sigmoid>>(p, stream);
      case CellKind::kLstm:
        if (phase == 1) return start_second<S, LstmBackward<S>>(p, stream);
        return p.dh ? start<S, ProjectionBackward<S>>(p, stream)
                    : start<S, LstmBackward<S>>(p, stream);
      case CellKind::kGru:
        return start<S, GruBackward<S>>(p, stream);
      case CellKind::kGruResetBefore:
        return phase == 0 ? start<S, GruResetBeforeBackward<S>>(p, stream)
                          : start_second<S, GruResetBeforeBackward<S>>(p, stream);
      default:
        launch_failed("step_backward", "this cell has no CUDA kernel");
    }
  });
}

}  // namespace rnn_ext::cuda
