// The forward pass of the reset-before GRU in one launch: two products a step, so its blocks meet
// twice, over r h' and over h.
#pragma once
#include "persistent_block.cuh"
#include "persistent_cells.cuh"

namespace rnn_ext::cuda {

// One unit of one row of the batch in a step. As in persistent_forward.cuh, each phase fetches
// while other blocks compute, then computes and publishes, then stores.
template <class T>
struct ResetBeforeForwardItem {
  using Cell = GruResetBefore<float>;
  T input[2] = {};  // W x of the gates of the phase: r and z, then n
  float net[2] = {};
  bool alive = false, reset = false;
  int row = 0;  // of the [N, ...] matrices

  template <int first_gate, int gates>
  RNN_EXT_DEVICE void fetch(const ForwardDirection& d, int64_t hidden, int unit) {
    RNN_EXT_UNROLL
    for (int g = 0; g < gates; g++) {
      input[g] = read_at<T>(d.gates, row * d.gates_stride + (first_gate + g) * hidden + unit);
    }
  }

  // product: U_rz h', h_prev: h', both carried; what a reset puts in the place of h' is left in it.
  // Returns r h'.
  RNN_EXT_DEVICE float reset_gate(const ForwardDirection& d, int64_t hidden, int64_t sequence,
                                  int unit, const float (&bias)[3], float (&product)[2],
                                  float& h_prev) {
    if (reset) h_prev = product[0] = product[1] = 0;
    if (reset && d.restored.h) {
      h_prev = to_float(read_at<T>(d.restored.h, sequence * hidden + unit));
      RNN_EXT_UNROLL
      for (int g = 0; g < 2; g++)
        product[g] = d.restored_product[(sequence * 2 + g) * hidden + unit];
    }
    RNN_EXT_UNROLL
    for (int g = 0; g < 2; g++) net[g] = to_float(input[g]) + bias[g] + product[g];
    float r = net[0], z = net[1];
    return Cell::reset(r, z, h_prev);
  }

  // product: U_n (r h'), z: its net input. Returns h.
  RNN_EXT_DEVICE float new_state(float bias, float product, float z, float h_prev) {
    net[0] = to_float(input[0]) + bias + product;
    float r = 0, n = net[0];
    Cell::reset(r, z, h_prev);
    return Cell::forward(n, z, h_prev);
  }

  template <int first_gate, int gates>
  RNN_EXT_DEVICE void store_net(const ForwardDirection& d, int64_t hidden, int unit) const {
    RNN_EXT_UNROLL
    for (int g = 0; g < gates; g++) {
      write_at<T>(d.gates, row * d.gates_stride + (first_gate + g) * hidden + unit, net[g]);
    }
  }
};

// Reads: W x, U, h0. Writes: h, h_n, when saving the net inputs and r h'. In parallel: as
// persistent_forward_kernel.
template <class Numbers, int unit_tiles, class Exchange>
__global__ void __launch_bounds__(kBlockThreads, 1)
    persistent_reset_before_forward_kernel(const __grid_constant__ PersistentForward p,
                                           const __grid_constant__ Tiling tiling) {
  using T = typename Numbers::Storage;
  constexpr int kUnits = kUnitTile * unit_tiles, kRows = pass_rows(kUnits), kGates = 3;
  const GroupPlace place(tiling.groups, tiling.blocks);
  const ForwardDirection& d = p.direction[place.direction];
  const Sequences& sequences = p.sequences;
  const int hidden = sequences.hidden;
  const BlockLayout layout = block_layout(step_products(kGates, true, true), unit_tiles, sizeof(T),
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
  float* const h_state = reinterpret_cast<float*>(shared + layout.state_at());
  float* const z_state = h_state + layout.rows * kUnits;  // its net input, between the phases
  const TileRows rows(sequences, reinterpret_cast<int*>(shared + layout.lengths_at()), d.reverse);
  const OwnUnit<kUnits> own(place.block, hidden);
  float bias[kGates] = {};
  if (d.b_ih && own.exists) {
    RNN_EXT_UNROLL
    for (int g = 0; g < kGates; g++) {
      const int64_t at = g * int64_t{hidden} + own.in_layer;
      bias[g] = to_float(read_at<T>(d.b_ih, at)) + to_float(read_at<T>(d.b_hh, at));
    }
  }

  for (int tile = place.group; tile * tiling.rows < sequences.batch; tile += tiling.groups) {
    const int first = tile * tiling.rows, count = min(tiling.rows, sequences.batch - first);
    rows.enter(first, tiling.rows);
    for (int pass = 0; pass < count; pass += kRows) {
      const int row = pass + own.row_in_pass;
      if (own.exists && row < count) {
        const float h = to_float(read_at<T>(d.h0, int64_t{first + row} * hidden + own.in_layer));
        h_state[own.state_at(row)] = h;
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

      for (int pass = 0; pass < count; pass += kRows) {  // the gates r and z, and r h'
        const int row = pass + own.row_in_pass;
        const bool mine = own.exists && row < count;
        ResetBeforeForwardItem<T> item;
        item.row = begin + first + row;
        item.alive = mine && rows.takes_part(t, row);
        if (item.alive) {
          item.reset = d.resets && d.resets[item.row];
          item.template fetch<0, 2>(d, hidden, own.in_layer);
        }
        if (pass == 0) exchange.wait();
        multiply_pass<2 * unit_tiles, kRows>(weights, exchange, sums, pass, tiling.rows);
        __syncthreads();

        float operand = 0;
        if (mine) {
          if (item.alive) {
            const int at = own.state_at(row);
            float product[2];
            RNN_EXT_UNROLL
            for (int g = 0; g < 2; g++)
              product[g] = sums.read(g * kUnits + own.in_block, own.row_in_pass);
            float h_prev = h_state[at];
            operand = item.reset_gate(d, hidden, first + row, own.in_layer, bias, product, h_prev);
            if (item.reset) h_state[at] = h_prev;
            z_state[at] = item.net[1];
          }
          exchange.put(row, own.row_in_pass, own.in_block, {Numbers::encode(operand)});
        }
        __syncthreads();
        exchange.pass_on(pass, min(count - pass, kRows));
        if (pass + kRows >= count) exchange.publish();
        if (p.save && (item.alive || (mine && rows.padded()))) {
          if (item.alive) item.template store_net<0, 2>(d, hidden, own.in_layer);
          write_at<T>(d.middle, int64_t{item.row} * hidden + own.in_layer, operand);
        }
      }

      for (int pass = 0; pass < count; pass += kRows) {  // n and h
        const int row = pass + own.row_in_pass;
        const bool mine = own.exists && row < count;
        ResetBeforeForwardItem<T> item;
        item.row = begin + first + row;
        item.alive = mine && rows.takes_part(t, row);
        if (item.alive) item.template fetch<2, 1>(d, hidden, own.in_layer);
        if (pass == 0) exchange.wait();
        multiply_pass<unit_tiles, kRows, 2 * unit_tiles>(weights, exchange, sums, pass,
                                                         tiling.rows);
        __syncthreads();

        float h = 0;
        if (mine) {
          const int at = own.state_at(row);
          h = h_state[at];
          if (item.alive) {
            h = item.new_state(bias[2], sums.read(own.in_block, own.row_in_pass), z_state[at], h);
            h_state[at] = h;
          }
          if (!last) exchange.put(row, own.row_in_pass, own.in_block, {Numbers::encode(h)});
        }
        __syncthreads();
        if (!last) {
          exchange.pass_on(pass, min(count - pass, kRows));
          if (pass + kRows >= count) exchange.publish();
        }
        if (item.alive || (mine && rows.padded())) {
          if (p.save && item.alive) item.template store_net<2, 1>(d, hidden, own.in_layer);
          write_at<T>(d.h, item.row * d.h_stride + own.in_layer, item.alive ? h : 0);
        }
      }
    }

    for (int row = own.row_in_pass; own.exists && row < count; row += kRows) {
      const int64_t at = int64_t{first + row} * hidden + own.in_layer;
      write_at<T>(d.h_n, at, h_state[own.state_at(row)]);
    }
  }
}

}  // namespace rnn_ext::cuda
