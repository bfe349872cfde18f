// Backpropagation through a whole sequence in one launch, up to delta: the gradients of weights and
// input are products over all rows at once, made outside.
#pragma once
#include "persistent_block.cuh"
#include "persistent_cells.cuh"

namespace rnn_ext::cuda {

// One unit of one row of the batch in a step, in three parts as in the forward pass.
template <class Cell, class T>
struct BackwardItem {
  T net[Cell::kGates] = {}, middle{}, h{}, h_prev{}, d_h{}, d_cells{};
  float c = 0, c_prev = 0, delta[Cell::kDeltaBlocks] = {};
  bool alive = false, reset = false;
  int row = 0;  // of the [N, ...] matrices

  // `tile_row` of the tile is row `sequence` of the batch.
  RNN_EXT_DEVICE void fetch(const BackwardDirection& d, const Sequences& sequences,
                            const TileRows& rows, int t, int tile_row, int sequence, int unit) {
    const int64_t hidden = sequences.hidden;
    reset = d.resets && d.resets[row];
    if constexpr (Cell::kKeepsNet) {
      RNN_EXT_UNROLL
      for (int g = 0; g < Cell::kGates; g++) {
        net[g] = read_at<T>(d.gates, row * d.gates_stride + g * hidden + unit);
      }
    } else {
      h = read_at<T>(d.h, row * d.h_stride + unit);
    }
    if constexpr (Cell::kHasMiddle) middle = read_at<T>(d.middle, row * hidden + unit);
    if (d.d_h) d_h = read_at<T>(d.d_h, row * d.d_h_stride + unit);

    const bool has_before = rows.takes_part(rows.before(t), tile_row);
    const int before = has_before ? rows.begin(rows.before(t)) + sequence : sequence;
    if (Cell::kReadsPrevious || d.previous) {
      const int64_t at = before * (has_before ? d.h_stride : hidden) + unit;
      if (!reset)
        h_prev = read_at<T>(has_before ? d.h : d.h0, at);
      else if (d.restored.h)
        h_prev = read_at<T>(d.restored.h, sequence * hidden + unit);
    }
    if constexpr (Cell::kHasCells) {
      c = d.cells[row * hidden + unit];
      c_prev = reset ? 0 : (has_before ? d.cells : d.c0)[before * hidden + unit];
      if (reset && d.restored.c) c_prev = read_at<float>(d.restored.c, sequence * hidden + unit);
      if (d.d_cells) d_cells = read_at<T>(d.d_cells, row * hidden + unit);
    }
  }

  // carry: dL/dh but for d_h in, what flows to h' beside the product out. dc: dL/dc in, dL/dc' out.
  // The values of dL/dh are held within limit; what is no number stays so.
  RNN_EXT_DEVICE void compute(float& carry, float& dc, float limit) {
    Kept<Cell::kGates> kept{};
    if constexpr (Cell::kKeepsNet) {
      RNN_EXT_UNROLL
      for (int g = 0; g < Cell::kGates; g++) kept.net[g] = to_float(net[g]);
    } else {
      kept.h = to_float(h);
    }
    if constexpr (Cell::kHasMiddle) kept.middle = to_float(middle);
    if constexpr (Cell::kReadsPrevious) kept.h_prev = to_float(h_prev);
    if constexpr (Cell::kHasCells) {
      kept.c = c;
      kept.c_prev = c_prev;
      dc += to_float(d_cells);
    }
    const float dh = carry + to_float(d_h);
    Cell::backward(kept, dh > limit ? limit : dh < -limit ? -limit : dh, carry, dc, delta);
  }

  // What a reset keeps from the step before, as part of the gradients of the restored state.
  RNN_EXT_DEVICE void end(const RestoredSums& sums, int64_t hidden, int64_t sequence, int unit,
                          float& carry, float& dc) const {
    const int64_t at = sequence * hidden + unit;
    if (float* d_h = static_cast<float*>(sums.h)) d_h[at] += carry;
    if (float* d_c = static_cast<float*>(sums.c)) d_c[at] += dc;
    if (float* deltas = static_cast<float*>(sums.delta)) {
      RNN_EXT_UNROLL
      for (int b = 0; b < Cell::kGates; b++) {
        deltas[(sequence * Cell::kGates + Cell::recurrent_gate(b)) * hidden + unit] += delta[b];
      }
    }
    carry = dc = 0;
  }

  RNN_EXT_DEVICE void store(const BackwardDirection& d, int64_t hidden, int unit) const {
    RNN_EXT_UNROLL
    for (int b = 0; b < Cell::kDeltaBlocks; b++) {
      write_at<T>(d.delta, row * d.delta_stride + b * hidden + unit, delta[b]);
    }
    if (d.previous) static_cast<T*>(d.previous)[row * hidden + unit] = h_prev;
  }
};

// Reads: U, what forward kept, the gradients of h (and of the cells), of h_n in carry, of c_n in
// dc. Writes: delta, previous, and in carry and dc the gradients of h0 and c0. In parallel: as
// forward. Step -1 is only the product that reaches h0.
template <class Cell, class Numbers, int unit_tiles, class Exchange>
__global__ void __launch_bounds__(kBlockThreads, 1)
    persistent_backward_kernel(const __grid_constant__ PersistentBackward p,
                               const __grid_constant__ Tiling tiling) {
  using T = typename Numbers::Storage;
  constexpr int kUnits = kUnitTile * unit_tiles, kRows = pass_rows(kUnits), kDeltas = Cell::kGates;
  const GroupPlace place(tiling.groups, tiling.blocks);
  const BackwardDirection& d = p.direction[place.direction];
  const Sequences& sequences = p.sequences;
  const int hidden = sequences.hidden;
  const BlockLayout layout =
      block_layout(step_products(kDeltas, false, false), unit_tiles, sizeof(T), hidden,
                   tiling.blocks, tiling.rows, Exchange::kCluster);
  unsigned char* shared = shared_memory();

  ResidentWeights<Numbers, unit_tiles> weights(layout, shared);
  weights.load(hidden * kDeltas, [&](int row) -> const T* {
    const int64_t unit = place.block * kUnits + row;
    return unit < hidden ? static_cast<const T*>(d.weights) + unit * hidden * kDeltas : nullptr;
  });
  const PartialSums sums(layout, shared);
  Exchange exchange(layout, place, sequences.directions * tiling.groups, p.workspace, shared);
  float* const carry_state = reinterpret_cast<float*>(shared + layout.state_at());
  float* const dc_state = carry_state + layout.rows * kUnits;
  const TileRows rows(sequences, reinterpret_cast<int*>(shared + layout.lengths_at()), d.reverse);
  const OwnUnit<kUnits> own(place.block, hidden);

  for (int tile = place.group; tile * tiling.rows < sequences.batch; tile += tiling.groups) {
    const int first = tile * tiling.rows, count = min(tiling.rows, sequences.batch - first);
    rows.enter(first, tiling.rows);
    for (int row = own.row_in_pass; own.exists && row < count; row += kRows) {
      const int64_t at = int64_t{first + row} * hidden + own.in_layer;
      carry_state[own.state_at(row)] = d.carry[at];
      if constexpr (Cell::kHasCells) dc_state[own.state_at(row)] = d.dc[at];
    }

    for (int step = sequences.steps - 1; step >= -1; step--) {
      const bool has_product = step + 1 < sequences.steps;
      const int t = rows.time(step);
      const int begin = step < 0 ? 0 : rows.begin(t);
      for (int pass = 0; pass < count; pass += kRows) {
        const int row = pass + own.row_in_pass;
        const bool mine = own.exists && row < count;
        BackwardItem<Cell, T> item;
        item.row = begin + first + row;
        item.alive = mine && step >= 0 && rows.takes_part(t, row);
        if (item.alive) item.fetch(d, sequences, rows, t, row, first + row, own.in_layer);
        if (has_product) {
          if (pass == 0) exchange.wait();
          multiply_pass<unit_tiles, kRows>(weights, exchange, sums, pass, tiling.rows);
        }
        __syncthreads();

        if (mine) {
          const int at = own.state_at(row);
          float carry = carry_state[at], dc = Cell::kHasCells ? dc_state[at] : 0;
          if (has_product) carry += sums.read(own.in_block, own.row_in_pass);
          if (item.alive) item.compute(carry, dc, p.limit);
          if (item.reset) item.end(d.restored_sums, hidden, first + row, own.in_layer, carry, dc);
          carry_state[at] = carry;
          if constexpr (Cell::kHasCells) dc_state[at] = dc;
          if (step >= 0) {
            T encoded[kDeltas];
            RNN_EXT_UNROLL
            for (int b = 0; b < kDeltas; b++) {
              encoded[Cell::recurrent_gate(b)] = Numbers::encode(item.reset ? 0 : item.delta[b]);
            }
            exchange.put(row, own.row_in_pass, own.in_block * kDeltas, encoded);
          }
        }
        __syncthreads();
        if (step >= 0) {
          exchange.pass_on(pass, min(count - pass, kRows));
          if (pass + kRows >= count) exchange.publish();
          if (item.alive || (mine && rows.padded())) item.store(d, hidden, own.in_layer);
        }
      }
    }

    for (int row = own.row_in_pass; own.exists && row < count; row += kRows) {
      const int64_t at = int64_t{first + row} * hidden + own.in_layer;
      d.carry[at] = carry_state[own.state_at(row)];
      if constexpr (Cell::kHasCells) d.dc[at] = dc_state[own.state_at(row)];
    }
  }
}

}  // namespace rnn_ext::cuda
