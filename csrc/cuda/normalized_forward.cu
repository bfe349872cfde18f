// The forward pass of a step of a layer with layer normalisation or peepholes, between two matrix
// products.
#include "normalized_rows.cuh"

namespace rnn_ext::cuda {
namespace {

// U h' of a group of gates, in a row.
template <class R>
struct HiddenSide {
  const R* values;  // of the group's first column; null: zeros
  int64_t first;    // that column, among the gates
  Moments<R> m;

  RNN_EXT_DEVICE R at(int64_t column) const { return values ? values[column - first] : R(0); }
};

template <class S, int gates, int groups>
struct NormalizedRow {
  using R = Real<S>;
  const NormalizedForward& p;
  const int64_t row, hidden;
  const bool reset;

  RNN_EXT_DEVICE explicit NormalizedRow(const NormalizedForward& params)
      : p(params), row(blockIdx.x), hidden(params.hidden), reset(is_reset(params.rows, row)) {}

  // `columns`: of a row of the product.
  RNN_EXT_DEVICE const R* product(int64_t columns) const {
    const void* from = reset ? p.restored_product : p.product;
    return from ? static_cast<const R*>(from) + row * columns : nullptr;
  }
  RNN_EXT_DEVICE HiddenSide<R> hidden_side(int group, int64_t first, int64_t count,
                                           const R* values) const {
    HiddenSide<R> side{values, first, {0, 1}};
    if (!p.weights.gain_hh) return side;
    side.m = moments<R>(count, [&](int64_t i) { return side.at(first + i); });
    if (p.record.u_scale && threadIdx.x == 0)
      store<R>(p.record.u_scale, row * groups + group, side.m.scale);
    return side;
  }

  RNN_EXT_DEVICE int64_t place(int gate, int64_t unit) const { return gate * hidden + unit; }
  RNN_EXT_DEVICE R input(int gate, int64_t unit) const {
    const int64_t at = place(gate, unit);
    return load<R>(p.x, row * gates * hidden + at) * weight<S>(p.weights.gain_ih, at, 1) +
           weight<S>(p.weights.b_ih, at, 0);
  }
  RNN_EXT_DEVICE R of_hidden(const HiddenSide<R>& side, int gate, int64_t unit) const {
    const int64_t at = place(gate, unit);
    const R hat = (side.at(at) - side.m.mean) * side.m.scale;
    if (p.record.u) store<R>(p.record.u, row * gates * hidden + at, hat);
    return hat * weight<S>(p.weights.gain_hh, at, 1) + weight<S>(p.weights.b_hh, at, 0);
  }
  RNN_EXT_DEVICE R net_input(const HiddenSide<R>& side, int gate, int64_t unit) const {
    return input(gate, unit) + of_hidden(side, gate, unit);
  }
  RNN_EXT_DEVICE void keep(int gate, int64_t unit, R activation) const {
    store<R>(p.record.gates, row * gates * hidden + place(gate, unit), activation);
  }
  RNN_EXT_DEVICE R kept(int gate, int64_t unit) const {
    return load<R>(p.record.gates, row * gates * hidden + place(gate, unit));
  }

  RNN_EXT_DEVICE int64_t state(int64_t unit) const { return row * hidden + unit; }
  RNN_EXT_DEVICE R previous_h(int64_t unit) const {
    if (reset) return p.restored.h ? load<S>(p.restored.h, state(unit)) : R(0);
    return p.h_wide ? load<R>(p.h_wide, state(unit)) : load<S>(p.h_state, state(unit));
  }
  RNN_EXT_DEVICE R previous_c(int64_t unit) const {
    if (reset) return p.restored.c ? load<R>(p.restored.c, state(unit)) : R(0);
    return load<R>(p.c_state, state(unit));
  }
  RNN_EXT_DEVICE void keep_c(int64_t unit, R c) const {
    store<R>(p.c_state, state(unit), c);
    if (p.cells) store<R>(p.cells, state(unit), c);
  }
  RNN_EXT_DEVICE void finish(int64_t unit, R h) const {
    if (p.zoneout.on) h = mixed(p.zoneout.h, state(unit), previous_h(unit), h);
    store<S>(p.h, state(unit), h);
    store<S>(p.h_state, state(unit), h);
    if (p.h_wide) store<R>(p.h_wide, state(unit), h);
  }
};

template <class S, class Activation>
struct NormalizedElman {
  using R = Real<S>;
  using Row = NormalizedRow<S, 1, 1>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    const auto u = row.hidden_side(0, 0, row.hidden, row.product(row.hidden));
    for_own(row.hidden, [&](int64_t unit) {
      row.finish(unit, Elman<R, Activation>::forward(row.net_input(u, 0, unit)));
    });
  }
};

template <class S>
struct NormalizedLstm {
  using R = Real<S>;
  using Row = NormalizedRow<S, 4, 1>;
  using Cell = PeepholeLstm<R>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    const NormalizedForward& p = row.p;
    const auto u = row.hidden_side(0, 0, 4 * row.hidden, row.product(4 * row.hidden));
    for_own(row.hidden, [&](int64_t unit) {
      typename Cell::Gates gates{row.net_input(u, 0, unit), row.net_input(u, 1, unit),
                                 row.net_input(u, 2, unit), row.net_input(u, 3, unit)};
      const auto peephole = peepholes<S>(p.weights, row.hidden, unit);
      const R c = Cell::forward(gates, peephole, row.previous_c(unit));
      row.keep(0, unit, gates.i);
      row.keep(1, unit, gates.f);
      row.keep(2, unit, gates.g);
      row.keep(3, unit, gates.o);
      if (!p.zoneout.on) row.keep_c(unit, c);
    });
    // A thread reads what it wrote. With zoneout c' is needed to the end, and c~ made again.
    const auto c = [&](int64_t unit) {
      if (!p.zoneout.on) return load<R>(p.c_state, row.state(unit));
      return row.kept(1, unit) * row.previous_c(unit) + row.kept(0, unit) * row.kept(2, unit);
    };
    Moments<R> m{0, 1};
    if (p.weights.gain_cell) m = moments<R>(row.hidden, c);
    if (p.record.cell && threadIdx.x == 0) {
      store<R>(p.record.cell, 2 * row.row, m.mean);
      store<R>(p.record.cell, 2 * row.row + 1, m.scale);
    }
    for_own(row.hidden, [&](int64_t unit) {
      const R s = (c(unit) - m.mean) * m.scale * weight<S>(p.weights.gain_cell, unit, 1) +
                  weight<S>(p.weights.bias_cell, unit, 0);
      row.finish(unit, Cell::output(row.kept(3, unit), s));
      if (p.zoneout.on)
        row.keep_c(unit, mixed(p.zoneout.c, row.state(unit), row.previous_c(unit), c(unit)));
    });
  }
};

template <class S>
struct NormalizedGru {
  using R = Real<S>;
  using Row = NormalizedRow<S, 3, 2>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    const int64_t hidden = row.hidden;
    const R* product = row.product(3 * hidden);
    const auto rz = row.hidden_side(0, 0, 2 * hidden, product);
    const auto n = row.hidden_side(1, 2 * hidden, hidden, product ? product + 2 * hidden : nullptr);
    for_own(hidden, [&](int64_t unit) {
      typename Gru<R>::Gates gates{row.net_input(rz, 0, unit), row.net_input(rz, 1, unit),
                                   row.input(2, unit)};
      const R hidden_n = row.of_hidden(n, 2, unit);
      row.finish(unit, GruResetAfter<R>::forward(gates, hidden_n, row.previous_h(unit)));
      row.keep(0, unit, gates.r);
      row.keep(1, unit, gates.z);
      row.keep(2, unit, gates.n);
    });
  }
};

template <class S>
struct NormalizedGruResetBefore {
  using R = Real<S>;
  using Row = NormalizedRow<S, 3, 2>;
  using Cell = GruResetBefore<R>;
  template <int phase>
  RNN_EXT_DEVICE static void run(const Row& row) {
    const int64_t hidden = row.hidden;
    if constexpr (phase == 0) {
      const auto rz = row.hidden_side(0, 0, 2 * hidden, row.product(2 * hidden));
      for_own(hidden, [&](int64_t unit) {
        R r = row.net_input(rz, 0, unit), z = row.net_input(rz, 1, unit);
        store<S>(row.p.middle, row.state(unit), Cell::reset(r, z, row.previous_h(unit)));
        row.keep(0, unit, r);
        row.keep(1, unit, z);
      });
    } else {
      const R* product = static_cast<const R*>(row.p.second_product) + row.row * hidden;
      const auto side = row.hidden_side(1, 2 * hidden, hidden, product);
      for_own(hidden, [&](int64_t unit) {
        R n = row.net_input(side, 2, unit);
        row.finish(unit, Cell::forward(n, row.kept(1, unit), row.previous_h(unit)));
        row.keep(2, unit, n);
      });
    }
  }
};

// Reads W x, the recurrent product and the state, writes the state, h and the record (normalized.h).
// Parallel over rows, and within a block over units.
template <class S, class Cell, int phase>
__global__ void __launch_bounds__(kRowThreads)
    normalized_forward_kernel(const NormalizedForward p) {
  Cell::template run<phase>(typename Cell::Row(p));
}

// values becomes (values - mean) scale, in a group of the columns. Parallel over rows, and within a
// block over columns.
template <class R>
__global__ void __launch_bounds__(kRowThreads) normalize_rows_kernel(const NormalizeRows p) {
  const int64_t row = blockIdx.x;
  R* const values = static_cast<R*>(p.values) + row * p.of.columns + p.of.first;
  const Moments<R> m = moments<R>(p.of.count, [&](int64_t i) { return values[i]; });
  for_own(p.of.count, [&](int64_t i) { values[i] = (values[i] - m.mean) * m.scale; });
  if (p.scales && threadIdx.x == 0) store<R>(p.scales, row * p.of.groups + p.of.group, m.scale);
}

template <class S, class Cell, int phase = 0>
void start_normalized(const NormalizedForward& p, const Stream& stream) {
  launch_rows<S>("normalized_forward", normalized_forward_kernel<S, Cell, phase>, p.rows.count,
                 stream, p);
}

}  // namespace

void normalized_forward(CellKind cell, Storage storage, int phase, const NormalizedForward& p,
                        const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    switch (cell) {
      case CellKind::kRnnTanh:
        return start_normalized<S, NormalizedElman<S, Tanh>>(p, stream);
      case CellKind::kRnnRelu:
        return start_normalized<S, NormalizedElman<S, Relu>>(p, stream);
      case CellKind::kRnnSigmoid:
        return start_normalized<S, NormalizedElman<S, Sigmoid>>(p, stream);
      case CellKind::kLstm:
        return start_normalized<S, NormalizedLstm<S>>(p, stream);
      case CellKind::kGru:
        return start_normalized<S, NormalizedGru<S>>(p, stream);
      case CellKind::kGruResetBefore:
        return phase == 0 ? start_normalized<S, NormalizedGruResetBefore<S>, 0>(p, stream)
                          : start_normalized<S, NormalizedGruResetBefore<S>, 1>(p, stream);
      default:
        launch_failed("normalized_forward", "this cell has no CUDA kernel");
    }
  });
}

void normalize_rows(Storage storage, const NormalizeRows& p, const Stream& stream) {
  with_storage(storage, [&](auto zero) {
    using S = decltype(zero);
    launch_rows<S>("normalize_rows", normalize_rows_kernel<Real<S>>, p.of.rows, stream, p);
  });
}

}  // namespace rnn_ext::cuda
