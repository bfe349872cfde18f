// Backpropagation through the reset-before GRU in one launch, up to delta: two products a step, so
// its blocks meet twice, over delta of n and over delta of r and z.
#pragma once
#include "persistent_block.cuh"
#include "persistent_cells.cuh"

namespace rnn_ext::cuda {

// One unit of one row of the batch in a step: what both phases need to know of it.
template <class T>
struct ResetBeforeBackwardItem {
  using Cell = GruResetBefore<float>;
  T net_r{}, net_z{}, net_n{}, h_prev{}, d_h{};
  bool alive = false, reset = false;
  int row = 0;  // of the [N, ...] matrices

  // `tile_row` of the tile is row `sequence` of the batch.
  RNN_EXT_DEVICE void fetch_previous(const BackwardDirection& d, const Sequences& sequences,
                                     const TileRows& rows, int t, int tile_row, int64_t sequence,
                                     int unit) {
    const int64_t hidden = sequences.hidden;
    reset = d.resets && d.resets[row];
    if (reset) {
      if (d.restored.h) h_prev = read_at<T>(d.restored.h, sequence * hidden + unit);
    } else if (rows.takes_part(rows.before(t), tile_row)) {
      h_prev = read_at<T>(d.h, (rows.begin(rows.before(t)) + sequence) * d.h_stride + unit);
    } else {
      h_prev = read_at<T>(d.h0, sequence * hidden + unit);
    }
  }
  RNN_EXT_DEVICE T net(const BackwardDirection& d, int64_t hidden, int gate, int unit) const {
    return read_at<T>(d.gates, row * d.gates_stride + gate * hidden + unit);
  }

  // dh: dL/dh within limit; what is no number stays so. carry out: the part of dL/dh' that flows
  // through z h'.
  RNN_EXT_DEVICE void interpolate(float dh, float limit, float& delta_z, float& delta_n,
                                  float& carry) const {
    const float before = to_float(h_prev);
    float r = 0, z = to_float(net_z), n = to_float(net_n);
    Cell::reset(r, z, before);
    Cell::forward(n, z, before);
    Cell::interpolate_vjp(z, n, before,
                          dh > limit    ? limit
                          : dh < -limit ? -limit
                                        : dh,
                          delta_z, delta_n, carry);
  }

  // d_reset: dL/d(r h'), whose part of dL/dh' is added to carry. Returns delta_r.
  RNN_EXT_DEVICE float reset_gate(float d_reset, float& carry) const {
    const float before = to_float(h_prev);
    float r = to_float(net_r), z = 0;
    Cell::reset(r, z, before);
    return Cell::reset_vjp(r, before, d_reset, carry);
  }

  // What a reset keeps from the step before, as part of the gradients of the restored state.
  RNN_EXT_DEVICE void end(const RestoredSums& sums, int64_t hidden, int64_t sequence, int unit,
                          const float (&delta_rz)[2], float& carry) const {
    if (float* d_h = static_cast<float*>(sums.h)) d_h[sequence * hidden + unit] += carry;
    if (float* deltas = static_cast<float*>(sums.delta)) {
      RNN_EXT_UNROLL
      for (int g = 0; g < 2; g++) deltas[(sequence * 2 + g) * hidden + unit] += delta_rz[g];
    }
    carry = 0;
  }
};

// Reads: U, what forward kept, the gradients of h, and of h_n in carry. Writes: delta, previous,
// and in carry the gradient of h0. In parallel: as persistent_backward_kernel. Step -1 is only the
// product that reaches h0.
template <class Numbers, int unit_tiles, class Exchange>
__global__ void __launch_bounds__(kBlockThreads, 1)
    persistent_reset_before_backward_kernel(const __grid_constant__ PersistentBackward p,
                                            const __grid_constant__ Tiling tiling) {
  using T = typename Numbers::Storage;
  constexpr int kUnits = kUnitTile * unit_tiles, kRows = pass_rows(kUnits), kGates = 3;
  const GroupPlace place(tiling.groups, tiling.blocks);
  const BackwardDirection& d = p.direction[place.direction];
  const Sequences& sequences = p.sequences;
  const int hidden = sequences.hidden;
  const BlockLayout layout = block_layout(step_products(kGates, true, false), unit_tiles, sizeof(T),
                                          hidden, tiling.blocks, tiling.rows, Exchange::kCluster);
  unsigned char* shared = shared_memory();

  ResidentWeights<Numbers, kGates * unit_tiles> weights(layout, shared);
  weights.load(hidden, [&](int row) -> const T* {  // gate after gate
    const int64_t unit = place.block * kUnits + row % kUnits;
    return unit < hidden
               ? static_cast<const T*>(d.weights) + (row / kUnits * int64_t{hidden} + unit) * hidden
               : nullptr;
  });
  const PartialSums sums(layout, shared);
  Exchange exchange(layout, place, sequences.directions * tiling.groups, p.workspace, shared);
  float* const carry_state = reinterpret_cast<float*>(shared + layout.state_at());
  float* const delta_z_state = carry_state + layout.rows * kUnits;  // between the phases
  const TileRows rows(sequences, reinterpret_cast<int*>(shared + layout.lengths_at()), d.reverse);
  const OwnUnit<kUnits> own(place.block, hidden);

  for (int tile = place.group; tile * tiling.rows < sequences.batch; tile += tiling.groups) {
    const int first = tile * tiling.rows, count = min(tiling.rows, sequences.batch - first);
    rows.enter(first, tiling.rows);
    for (int row = own.row_in_pass; own.exists && row < count; row += kRows) {
      carry_state[own.state_at(row)] = d.carry[int64_t{first + row} * hidden + own.in_layer];
    }

    for (int step = sequences.steps - 1; step >= -1; step--) {
      const bool has_product = step + 1 < sequences.steps;
      const int t = rows.time(step);
      const int begin = step < 0 ? 0 : rows.begin(t);

      for (int pass = 0; pass < count; pass += kRows) {  // dL/dh, delta of z and n
        const int row = pass + own.row_in_pass;
        const bool mine = own.exists && row < count;
        ResetBeforeBackwardItem<T> item;
        item.row = begin + first + row;
        item.alive = mine && step >= 0 && rows.takes_part(t, row);
        if (item.alive) {
          item.fetch_previous(d, sequences, rows, t, row, first + row, own.in_layer);
          item.net_z = item.net(d, hidden, 1, own.in_layer);
          item.net_n = item.net(d, hidden, 2, own.in_layer);
          if (d.d_h) item.d_h = read_at<T>(d.d_h, item.row * d.d_h_stride + own.in_layer);
        }
        if (has_product) {
          if (pass == 0) exchange.wait();
          multiply_pass<unit_tiles, kRows, 0, 2>(weights, exchange, sums, pass, tiling.rows);
        }
        __syncthreads();

        float delta_z = 0, delta_n = 0;
        if (mine) {
          const int at = own.state_at(row);
          float carry = carry_state[at];
          if (has_product) carry += sums.read(own.in_block, own.row_in_pass);
          if (item.alive)
            item.interpolate(carry + to_float(item.d_h), p.limit, delta_z, delta_n, carry);
          carry_state[at] = carry;
          if (step >= 0) {
            delta_z_state[at] = delta_z;
            exchange.put(row, own.row_in_pass, own.in_block, {Numbers::encode(delta_n)});
          }
        }
        __syncthreads();
        if (step >= 0) {
          exchange.pass_on(pass, min(count - pass, kRows));
          if (pass + kRows >= count) exchange.publish();
          if (item.alive || (mine && rows.padded())) {
            const int64_t at = item.row * d.delta_stride + own.in_layer;
            write_at<T>(d.delta, at + hidden, delta_z);
            write_at<T>(d.delta, at + 2 * int64_t{hidden}, delta_n);
            if (d.previous)
              static_cast<T*>(d.previous)[int64_t{item.row} * hidden + own.in_layer] = item.h_prev;
          }
        }
      }

      for (int pass = 0; step >= 0 && pass < count; pass += kRows) {  // delta of r, dL/dh'
        const int row = pass + own.row_in_pass;
        const bool mine = own.exists && row < count;
        ResetBeforeBackwardItem<T> item;
        item.row = begin + first + row;
        item.alive = mine && rows.takes_part(t, row);
        if (item.alive) {
          item.fetch_previous(d, sequences, rows, t, row, first + row, own.in_layer);
          item.net_r = item.net(d, hidden, 0, own.in_layer);
        }
        if (pass == 0) exchange.wait();
        multiply_pass<unit_tiles, kRows, 2 * unit_tiles>(weights, exchange, sums, pass,
                                                         tiling.rows);
        __syncthreads();

        float delta[2] = {};  // of r and z
        if (mine) {
          const int at = own.state_at(row);
          delta[1] = delta_z_state[at];
          if (item.alive) {
            float carry = carry_state[at];
            delta[0] = item.reset_gate(sums.read(own.in_block, own.row_in_pass), carry);
            if (item.reset)
              item.end(d.restored_sums, hidden, first + row, own.in_layer, delta, carry);
            carry_state[at] = carry;
          }
          RNN_EXT_UNROLL
          for (int plane = 0; plane < 2; plane++) {
            exchange.put(row, own.row_in_pass, own.in_block,
                         {Numbers::encode(item.reset ? 0 : delta[plane])}, plane);
          }
        }
        __syncthreads();
        for (int plane = 0; plane < 2; plane++)
          exchange.pass_on(pass, min(count - pass, kRows), plane);
        if (pass + kRows >= count) exchange.publish();
        if (item.alive || (mine && rows.padded()))
          write_at<T>(d.delta, item.row * d.delta_stride + own.in_layer, delta[0]);
      }
    }

    for (int row = own.row_in_pass; own.exists && row < count; row += kRows) {
      d.carry[int64_t{first + row} * hidden + own.in_layer] = carry_state[own.state_at(row)];
    }
  }
}

}  // namespace rnn_ext::cuda
