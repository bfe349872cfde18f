// The forward pass of a whole sequence in one launch.
#pragma once
#include "persistent_block.cuh"
#include "persistent_cells.cuh"

namespace rnn_ext::cuda {

// The biases of a unit: those of the net inputs, and that of the GRU's U_n h'.
template <class Cell, class T>
struct UnitBias {
  float net[Cell::kGates] = {}, hidden = 0;

  RNN_EXT_DEVICE UnitBias(const ForwardDirection& d, int64_t hidden_size, int unit) {
    RNN_EXT_UNROLL
    for (int g = 0; g < Cell::kGates; g++) {
      const int64_t at = g * hidden_size + unit;
      const float of_hidden = to_float(read_at<T>(d.b_hh, at));
      net[g] = to_float(read_at<T>(d.b_ih, at));
      (Cell::kHasMiddle && g == Cell::kGates - 1 ? hidden : net[g]) += of_hidden;
    }
  }
  RNN_EXT_DEVICE UnitBias() {}
};

// One unit of one row of the batch in a step. The three parts of the step are apart because what
// other blocks wait for comes first: fetch while they compute, then compute and publish, then
// store.
template <class Cell, class T>
struct ForwardItem {
  T input[Cell::kGates] = {};
  float net[Cell::kGates] = {}, middle = 0;
  State state = {};
  bool alive = false, reset = false;
  int row = 0;  // of the [N, ...] matrices

  RNN_EXT_DEVICE void fetch(const ForwardDirection& d, const Sequences& sequences, int unit) {
    reset = d.resets && d.resets[row];
    RNN_EXT_UNROLL
    for (int g = 0; g < Cell::kGates; g++) {
      input[g] = read_at<T>(d.gates, row * d.gates_stride + g * sequences.hidden + unit);
    }
  }

  // What a reset puts in the place of the carried state of a sequence, and of its product with U.
  RNN_EXT_DEVICE void restore(const ForwardDirection& d, int64_t hidden, int64_t sequence, int unit,
                              float (&product)[Cell::kGates]) {
    const int64_t at = sequence * hidden + unit;
    state.h = to_float(read_at<T>(d.restored.h, at));
    if constexpr (Cell::kHasCells) state.c = read_at<float>(d.restored.c, at);
    RNN_EXT_UNROLL
    for (int g = 0; g < Cell::kGates; g++) {
      product[g] = d.restored_product[(sequence * Cell::kGates + g) * hidden + unit];
    }
  }

  RNN_EXT_DEVICE void compute(const UnitBias<Cell, T>& bias, const float (&product)[Cell::kGates]) {
    RNN_EXT_UNROLL
    for (int g = 0; g < Cell::kGates; g++) net[g] = to_float(input[g]) + bias.net[g];
    Cell::forward(net, product, bias.hidden, state, middle);
  }

  RNN_EXT_DEVICE void store(const ForwardDirection& d, int64_t hidden, int unit, bool save) const {
    write_at<T>(d.h, row * d.h_stride + unit, alive ? state.h : 0);
    if (Cell::kHasCells && d.cells) d.cells[row * hidden + unit] = alive ? state.c : 0;
    if constexpr (Cell::kKeepsNet) {
      if (!save || !alive) return;
      RNN_EXT_UNROLL
      for (int g = 0; g < Cell::kGates; g++) {
        write_at<T>(d.gates, row * d.gates_stride + g * hidden + unit, net[g]);
      }
      if constexpr (Cell::kHasMiddle) write_at<T>(d.middle, row * hidden + unit, middle);
    }
  }
};

// Reads: W x, U, h0, c0. Writes: h, h_n (cells, c_n; the net inputs when saving). In parallel:
// groups of blocks over tiles of the batch, blocks of a group over units, threads over units x
// rows; warps over the columns of the product.
template <class Cell, class Numbers, int unit_tiles, class Exchange>
__global__ void __launch_bounds__(kBlockThreads, 1)
    persistent_forward_kernel(const __grid_constant__ PersistentForward p,
                              const __grid_constant__ Tiling tiling) {
  using T = typename Numbers::Storage;
  constexpr int kUnits = kUnitTile * unit_tiles, kRowTiles = Cell::kGates * unit_tiles,
                kRows = pass_rows(kUnits);
  const GroupPlace place(tiling.groups, tiling.blocks);
  const ForwardDirection& d = p.direction[place.direction];
  const Sequences& sequences = p.sequences;
  const int hidden = sequences.hidden;
  const BlockLayout layout =
      block_layout(step_products(Cell::kGates, false, true), unit_tiles, sizeof(T), hidden,
                   tiling.blocks, tiling.rows, Exchange::kCluster);
  unsigned char* shared = shared_memory();

  ResidentWeights<Numbers, kRowTiles> weights(layout, shared);
  weights.load(hidden, [&](int row) -> const T* {  // gate after gate
    const int64_t unit = place.block * kUnits + row % kUnits;
    return unit < hidden
               ? static_cast<const T*>(d.weights) + (row / kUnits * int64_t{hidden} + unit) * hidden
               : nullptr;
  });
  const PartialSums sums(layout, shared);
  Exchange exchange(layout, place, sequences.directions * tiling.groups, p.workspace, shared);
  float* const h_state = reinterpret_cast<float*>(shared + layout.state_at());
  float* const c_state = h_state + layout.rows * kUnits;
  const TileRows rows(sequences, reinterpret_cast<int*>(shared + layout.lengths_at()), d.reverse);
  const OwnUnit<kUnits> own(place.block, hidden);
  const UnitBias<Cell, T> bias =
      d.b_ih && own.exists ? UnitBias<Cell, T>(d, hidden, own.in_layer) : UnitBias<Cell, T>();

  for (int tile = place.group; tile * tiling.rows < sequences.batch; tile += tiling.groups) {
    const int first = tile * tiling.rows, count = min(tiling.rows, sequences.batch - first);
    rows.enter(first, tiling.rows);
    for (int pass = 0; pass < count; pass += kRows) {
      const int row = pass + own.row_in_pass;
      if (own.exists && row < count) {
        const int64_t at = int64_t{first + row} * hidden + own.in_layer;
        const float h = to_float(read_at<T>(d.h0, at));
        h_state[own.state_at(row)] = h;
        if constexpr (Cell::kHasCells) c_state[own.state_at(row)] = d.c0[at];
        exchange.put(row, own.row_in_pass, own.in_block, {Numbers::encode(h)});
      }
      __syncthreads();
      exchange.pass_on(pass, min(count - pass, kRows));
      __syncthreads();
    }
    exchange.publish();

    for (int step = 0; step < sequences.steps; step++) {
      const bool last = step + 1 == sequences.steps;
      const int t = rows.time(step);
      const int begin = rows.begin(t);
      for (int pass = 0; pass < count; pass += kRows) {
        const int row = pass + own.row_in_pass;
        const bool mine = own.exists && row < count;
        ForwardItem<Cell, T> item;
        item.row = begin + first + row;
        item.alive = mine && rows.takes_part(t, row);
        if (item.alive) item.fetch(d, sequences, own.in_layer);
        if (pass == 0) exchange.wait();
        multiply_pass<kRowTiles, kRows>(weights, exchange, sums, pass, tiling.rows);
        __syncthreads();

        if (mine) {
          const int at = own.state_at(row);
          item.state = {h_state[at], Cell::kHasCells ? c_state[at] : 0};
          if (item.alive) {
            float product[Cell::kGates];
            RNN_EXT_UNROLL
            for (int g = 0; g < Cell::kGates; g++) {
              product[g] = item.reset ? 0 : sums.read(g * kUnits + own.in_block, own.row_in_pass);
            }
            if (item.reset) item.state = {0, 0};
            if (item.reset && d.restored.h)
              item.restore(d, hidden, first + row, own.in_layer, product);
            item.compute(bias, product);
            h_state[at] = item.state.h;
            if constexpr (Cell::kHasCells) c_state[at] = item.state.c;
          }
          if (!last)
            exchange.put(row, own.row_in_pass, own.in_block, {Numbers::encode(item.state.h)});
        }
        __syncthreads();
        if (!last) {
          exchange.pass_on(pass, min(count - pass, kRows));
          if (pass + kRows >= count) exchange.publish();
        }
        if (item.alive || (mine && rows.padded())) item.store(d, hidden, own.in_layer, p.save);
      }
    }

    for (int row = own.row_in_pass; own.exists && row < count; row += kRows) {
      const int64_t at = int64_t{first + row} * hidden + own.in_layer;
      write_at<T>(d.h_n, at, h_state[own.state_at(row)]);
      if constexpr (Cell::kHasCells) d.c_n[at] = c_state[own.state_at(row)];
    }
  }
}

}  // namespace rnn_ext::cuda
