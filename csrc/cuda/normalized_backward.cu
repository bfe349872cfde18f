// Backpropagation through a step of a layer with layer normalisation or peepholes, between two
// matrix products, and through the normalisation of W x.
#include <algorithm>

#include "normalized_rows.cuh"

namespace rnn_ext::cuda {
namespace {

// So many leave each thread 80 registers; without a number ptxas takes 64 and spills.
constexpr int kBlocksPerMultiprocessor = 3;

// What of dL/dh reaches the cell, and what goes past it to h'.
template <class R>
struct Reaching {
  R cell, held;
};

template <class S, int gates, int groups>
struct NormalizedRowBackward {
  using R = Real<S>;
  const NormalizedBackward& p;
  const int64_t row, hidden;
  const bool reset, has_previous, continues;
  R factor = 1;  // of dL/dh whose norm is clipped

  RNN_EXT_DEVICE explicit NormalizedRowBackward(const NormalizedBackward& params)
      : p(params),
        row(blockIdx.x),
        hidden(params.hidden),
        reset(row < params.rows.count && is_reset(params.rows, row)),
        has_previous(row < params.previous_count),
        continues(row < params.next.count) {}

  RNN_EXT_DEVICE int64_t state(int64_t unit) const { return row * hidden + unit; }
  RNN_EXT_DEVICE int64_t gate_at(int gate, int64_t unit) const {
    return (row * gates + gate) * hidden + unit;
  }

  // dL/dh from the steps that follow.
  template <bool carries>
  RNN_EXT_DEVICE R from_later_steps(int64_t unit) const {
    const R carry = load<R>(p.carry, state(unit));
    if (!continues) return carry;
    const R product = is_reset(p.next, row) ? R(0) : load<R>(p.product, state(unit));
    return carries || p.zoneout.on ? product + carry : product;
  }
  // dL/dh, before it is clipped.
  template <bool carries>
  RNN_EXT_DEVICE R whole(int64_t unit) const {
    const R later = from_later_steps<carries>(unit);
    return p.d_h ? later + load<S>(p.d_h, state(unit)) : later;
  }
  template <bool carries>
  RNN_EXT_DEVICE R arrived(int64_t unit) const {
    const R dh = whole<carries>(unit), limit = static_cast<R>(p.limit);
    if (p.clip == Clip::kValue) return dh > limit ? limit : dh < -limit ? -limit : dh;
    return dh * factor;
  }
  template <bool carries>
  RNN_EXT_DEVICE Reaching<R> reaching(int64_t unit) const {
    const R dh = arrived<carries>(unit);
    const R kept = p.zoneout.on ? held<R>(p.zoneout.h, state(unit)) * dh : R(0);
    return {dh - kept, kept};
  }
  // Notes the norm of dL/dh, and what it is to be clipped with.
  template <bool carries>
  RNN_EXT_DEVICE void control() {
    if (!p.norms && p.clip != Clip::kNorm) return;
    double squares = 0;
    for_own(hidden, [&](int64_t unit) {
      const double dh = whole<carries>(unit);
      squares += dh * dh;
    });
    const double norm = std::sqrt(block_sum(squares));
    if (p.norms && threadIdx.x == 0) store<R>(p.norms, row, static_cast<R>(norm));
    if (p.clip == Clip::kNorm && !(norm <= p.limit)) factor = static_cast<R>(p.limit / norm);
  }

  RNN_EXT_DEVICE R previous_h(int64_t unit) const {
    if (reset) return p.restored.h ? load<S>(p.restored.h, state(unit)) : R(0);
    return load<S>(has_previous ? p.h_before : p.h0, state(unit));
  }
  RNN_EXT_DEVICE R previous_c(int64_t unit) const {
    if (reset) return p.restored.c ? load<R>(p.restored.c, state(unit)) : R(0);
    return load<R>(has_previous ? p.cells_before : p.c0, state(unit));
  }
  RNN_EXT_DEVICE void keep_previous(int64_t unit) const {
    if (p.previous) store<S>(p.previous, state(unit), previous_h(unit));
  }
  // What the previous step gets of a gradient of its state, which a reset keeps.
  RNN_EXT_DEVICE R passed_on(int64_t unit, R gradient, void* restored_sum) const {
    if (!reset) return gradient;
    if (restored_sum) add<R>(restored_sum, state(unit), gradient);
    return R(0);
  }
  RNN_EXT_DEVICE void store_carry(int64_t unit, R carry) const {
    store<R>(p.carry, state(unit), passed_on(unit, carry, p.restored_sums.h));
  }

  RNN_EXT_DEVICE R gate(int gate, int64_t unit) const {
    return load<R>(p.record.gates, gate_at(gate, unit));
  }
  RNN_EXT_DEVICE R delta(int gate, int64_t unit) const {
    return load<R>(p.delta, gate_at(gate, unit));
  }
  RNN_EXT_DEVICE void store_delta(int gate, int64_t unit, R value) const {
    store<R>(p.delta, gate_at(gate, unit), value);
  }

  // dL/d(U h') of a group of gates from `delta(column)`, dL/d(net input) of their hidden side. What
  // a reset row has of the first `restored` columns is the restored state's.
  template <class Delta>
  RNN_EXT_DEVICE void finish_group(int group, int64_t first, int64_t count, int64_t restored,
                                   const Delta& delta) const {
    __syncthreads();  // delta is there
    const auto d_hat = [&](int64_t i) {
      return delta(first + i) * weight<S>(p.weights.gain_hh, first + i, 1);
    };
    const bool normalized = p.weights.gain_hh != nullptr;
    const auto hat = [&](int64_t i) {
      return normalized ? load<R>(p.record.u, row * gates * hidden + first + i) : R(0);
    };
    Losses<R> lost{0, 0};
    R scale = 1;
    if (normalized) {
      lost = losses<R>(count, d_hat, hat);
      scale = load<R>(p.record.u_scale, row * groups + group);
    }
    for_own(count, [&](int64_t i) {
      const R d = (d_hat(i) - lost.mean - hat(i) * lost.along) * scale;
      store<S>(p.delta_u, row * gates * hidden + first + i, d);
      if (reset && p.restored_sums.delta && first + i < restored)
        add<R>(p.restored_sums.delta, row * restored + first + i, d);
    });
  }
};

template <class S, class Activation>
struct NormalizedElmanBackward {
  using R = Real<S>;
  using Row = NormalizedRowBackward<S, 1, 1>;
  static constexpr bool carries = false;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    for_own(row.hidden, [&](int64_t unit) {
      const Reaching<R> dh = row.template reaching<carries>(unit);
      row.store_delta(0, unit, Elman<R, Activation>::vjp(made(row, unit), dh.cell));
      row.keep_previous(unit);
      if (row.p.zoneout.on) row.store_carry(unit, dh.held);
    });
    row.finish_group(0, 0, row.hidden, row.hidden,
                     [&](int64_t column) { return row.delta(0, column); });
  }

  // h~
  RNN_EXT_DEVICE static R made(const Row& row, int64_t unit) {
    const NormalizedBackward& p = row.p;
    const NormalizedWeights& w = p.weights;
    const int64_t at = row.state(unit);
    if (!p.zoneout.on) return load<S>(p.h, at);
    return Elman<R, Activation>::forward(
        load<R>(p.x, at) * weight<S>(w.gain_ih, unit, 1) + weight<S>(w.b_ih, unit, 0) +
        load<R>(p.record.u, at) * weight<S>(w.gain_hh, unit, 1) + weight<S>(w.b_hh, unit, 0));
  }
};

template <class S>
struct NormalizedLstmBackward {
  using R = Real<S>;
  using Row = NormalizedRowBackward<S, 4, 1>;
  using Cell = PeepholeLstm<R>;
  static constexpr bool carries = false;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    const NormalizedBackward& p = row.p;
    const NormalizedWeights& w = p.weights;
    Moments<R> m{0, 1};
    if (w.gain_cell)
      m = {load<R>(p.record.cell, 2 * row.row), load<R>(p.record.cell, 2 * row.row + 1)};
    const auto made = [&](int64_t unit) {
      if (!p.zoneout.on) return load<R>(p.cells, row.state(unit));
      return row.gate(1, unit) * row.previous_c(unit) + row.gate(0, unit) * row.gate(2, unit);
    };
    const auto hat = [&](int64_t unit) { return (made(unit) - m.mean) * m.scale; };
    for_own(row.hidden, [&](int64_t unit) {
      const R s = hat(unit) * weight<S>(w.gain_cell, unit, 1) + weight<S>(w.bias_cell, unit, 0);
      const Reaching<R> dh = row.template reaching<carries>(unit);
      R delta_o;
      const R ds = Cell::output_vjp(row.gate(3, unit), s, dh.cell, delta_o);
      row.store_delta(3, unit, delta_o);
      store<R>(p.extra, row.state(unit), ds);
      row.keep_previous(unit);
      if (p.zoneout.on) row.store_carry(unit, dh.held);
    });
    // A thread reads what it wrote.
    const auto d_hat = [&](int64_t unit) {
      return load<R>(p.extra, row.state(unit)) * weight<S>(w.gain_cell, unit, 1);
    };
    Losses<R> lost{0, 0};
    if (w.gain_cell) lost = losses<R>(row.hidden, d_hat, hat);
    for_own(row.hidden, [&](int64_t unit) {
      const int64_t state = row.state(unit);
      R dc = load<R>(p.dc, state);
      if (p.d_cells) dc += load<S>(p.d_cells, state);
      const R kept = p.zoneout.on ? held<R>(p.zoneout.c, state) * dc : R(0);
      dc -= kept;
      dc += (d_hat(unit) - lost.mean - hat(unit) * lost.along) * m.scale;
      const typename Cell::Gates gates{row.gate(0, unit), row.gate(1, unit), row.gate(2, unit), 0};
      typename Cell::Gates delta{};
      delta.o = row.delta(3, unit);
      const R c_prev = row.previous_c(unit);
      if (p.previous_c) store<R>(p.previous_c, state, c_prev);
      if (p.made) store<R>(p.made, state, made(unit));
      R dc_prev;
      Cell::vjp(gates, peepholes<S>(w, row.hidden, unit), c_prev, dc, delta, dc_prev);
      row.store_delta(0, unit, delta.i);
      row.store_delta(1, unit, delta.f);
      row.store_delta(2, unit, delta.g);
      store<R>(p.dc, state, row.passed_on(unit, dc_prev + kept, p.restored_sums.c));
    });
    const int64_t all = 4 * row.hidden;
    row.finish_group(0, 0, all, all, [&](int64_t column) { return row.delta(0, column); });
  }
};

template <class S>
struct NormalizedGruBackward {
  using R = Real<S>;
  using Row = NormalizedRowBackward<S, 3, 2>;
  static constexpr bool carries = true;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    const NormalizedBackward& p = row.p;
    const int64_t hidden = row.hidden, all = 3 * hidden;
    for_own(hidden, [&](int64_t unit) {
      const typename Gru<R>::Gates gates{row.gate(0, unit), row.gate(1, unit), row.gate(2, unit)};
      const int64_t n = 2 * hidden + unit;
      const R hidden_n =
          load<R>(p.record.u, row.gate_at(2, unit)) * weight<S>(p.weights.gain_hh, n, 1) +
          weight<S>(p.weights.b_hh, n, 0);
      typename Gru<R>::Gates delta;
      R delta_hidden_n, carry;
      const Reaching<R> dh = row.template reaching<carries>(unit);
      GruResetAfter<R>::vjp(gates, hidden_n, row.previous_h(unit), dh.cell, delta, delta_hidden_n,
                            carry);
      row.keep_previous(unit);
      row.store_carry(unit, carry + dh.held);
      row.store_delta(0, unit, delta.r);
      row.store_delta(1, unit, delta.z);
      row.store_delta(2, unit, delta.n);
      store<R>(p.extra, row.state(unit), delta_hidden_n);
    });
    row.finish_group(0, 0, 2 * hidden, all, [&](int64_t column) { return row.delta(0, column); });
    row.finish_group(1, 2 * hidden, hidden, all, [&](int64_t column) {
      return load<R>(p.extra, row.state(column - 2 * hidden));
    });
  }
};

template <class S>
struct NormalizedGruResetBeforeBackward {
  using R = Real<S>;
  using Row = NormalizedRowBackward<S, 3, 2>;
  using Cell = GruResetBefore<R>;
  static constexpr bool carries = true;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    const int64_t hidden = row.hidden, recurrent = 2 * hidden;
    const auto delta = [&](int64_t column) { return row.delta(0, column); };
    if constexpr (phase == 0) {
      for_own(hidden, [&](int64_t unit) {
        R delta_z, delta_n, carry;
        const Reaching<R> dh = row.template reaching<carries>(unit);
        Cell::interpolate_vjp(row.gate(1, unit), row.gate(2, unit), row.previous_h(unit), dh.cell,
                              delta_z, delta_n, carry);
        row.keep_previous(unit);
        row.store_carry(unit, carry + dh.held);
        row.store_delta(1, unit, delta_z);
        row.store_delta(2, unit, delta_n);
      });
      row.finish_group(1, recurrent, hidden, recurrent, delta);
    } else {
      for_own(hidden, [&](int64_t unit) {
        R carry = load<R>(row.p.carry, row.state(unit));
        const R d_reset = load<R>(row.p.second_product, row.state(unit));
        row.store_delta(0, unit,
                        Cell::reset_vjp(row.gate(0, unit), row.previous_h(unit), d_reset, carry));
        row.store_carry(unit, carry);
      });
      row.finish_group(0, 0, recurrent, recurrent, delta);
    }
  }
};

// Reads the gradients of the results, the product of the next step's delta_u and what forward kept;
// writes delta, delta_u, h' and what is left for the previous step (normalized.h). Parallel over
// rows, and within a block over units.
template <class S, class Cell, int phase>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerMultiprocessor)
    normalized_backward_kernel(const NormalizedBackward p) {
  typename Cell::Row row(p);
  if (row.row < p.rows.count) {
    if (phase == 0) row.template control<Cell::carries>();
    return Cell::template run<phase>(row);
  }
  // The next step is the row's first: this is dL/dh0.
  for_own(row.hidden, [&](int64_t unit) {
    store<Real<S>>(p.carry, row.state(unit), row.template from_later_steps<Cell::carries>(unit));
  });
}

// Parallel over rows, and within a block over the columns of a group.
template <class S>
__global__ void __launch_bounds__(kRowThreads)
    normalize_rows_backward_kernel(const NormalizeRowsBackward p) {
  using R = Real<S>;
  const int64_t first = blockIdx.x * p.of.columns + p.of.first;
  const auto d_hat = [&](int64_t i) {
    return load<R>(p.d, first + i) * load<S>(p.gain, p.of.first + i);
  };
  const auto hat = [&](int64_t i) { return load<R>(p.values, first + i); };
  const Losses<R> lost = losses<R>(p.of.count, d_hat, hat);
  const R scale = load<R>(p.scales, int64_t{blockIdx.x} * p.of.groups + p.of.group);
  for_own(p.of.count, [&](int64_t i) {
    store<S>(p.to, first + i, (d_hat(i) - lost.mean - hat(i) * lost.along) * scale);
  });
}

template <class S, class Cell, int phase = 0>
void start_normalized(const NormalizedBackward& p, const Stream& stream) {
  const int64_t rows = phase == 0 ? std::max(p.rows.count, p.next.count) : p.rows.count;
  launch_rows<S>("normalized_backward", normalized_backward_kernel<S, Cell, phase>, rows, stream,
                 p);
}

}  // namespace

void normalized_backward(CellKind cell, Storage storage, int phase, const NormalizedBackward& p,
                         const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    switch (cell) {
      case CellKind::kRnnTanh:
        return start_normalized<S, NormalizedElmanBackward<S, Tanh>>(p, stream);
      case CellKind::kRnnRelu:
        return start_normalized<S, NormalizedElmanBackward<S, Relu>>(p, stream);
      case CellKind::kRnnSigmoid:
        return start_normalized<S, NormalizedElmanBackward<S, Sigmoid>>(p, stream);
      case CellKind::kLstm:
        return start_normalized<S, NormalizedLstmBackward<S>>(p, stream);
      case CellKind::kGru:
        return start_normalized<S, NormalizedGruBackward<S>>(p, stream);
      case CellKind::kGruResetBefore:
        return phase == 0 ? start_normalized<S, NormalizedGruResetBeforeBackward<S>, 0>(p, stream)
                          : start_normalized<S, NormalizedGruResetBeforeBackward<S>, 1>(p, stream);
      default:
        launch_failed("normalized_backward", "this cell has no CUDA kernel");
    }
  });
}

void normalize_rows_backward(Storage storage, const NormalizeRowsBackward& p,
                             const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    launch_rows<S>("normalize_rows_backward", normalize_rows_backward_kernel<S>, p.of.rows, stream,
                   p);
  });
}

}  // namespace rnn_ext::cuda
