// How the blocks of a group pass the operand on: what each makes of it in a step, all multiply with
// in the next.
//
// Both ways hold the operand twice. Publication number e is written to half e % 2 after its writer
// has seen everybody's publication e - 1, which each made after reading publication e - 2 from that
// half: nothing is overwritten too early.
//
//   wait()            until this warp can read its chunks of the last publication, once its lanes
//                     have met
//   start(), read(), advance()   this warp's chunks, in order, of a pass: its tiles of 8 rows from
//                     `row` on; of several planes each chunk in turn
//   put()             numbers of this block's share of the next publication; then __syncthreads()
//   pass_on()         after the puts of a pass and their __syncthreads(), for each plane
//   publish()         all passes of this block are complete
#pragma once
#include "persistent_product.cuh"

namespace rnn_ext::cuda {

// The place of this block in the launch: [direction][group][block].
struct GroupPlace {
  int direction, group, block;
  int index;  // of the group, among those of all directions

  RNN_EXT_DEVICE GroupPlace(int groups, int blocks) {
    index = static_cast<int>(blockIdx.x) / blocks;
    block = static_cast<int>(blockIdx.x) % blocks;
    direction = index / groups;
    group = index % groups;
  }
};

// Count numbers next to each other, at an address that is a multiple of their size if that is 4, 8
// or 16 bytes.
template <class T, int count>
RNN_EXT_DEVICE void store_together(T* to, const T (&values)[count]) {
  if constexpr (sizeof(T) * count == 16) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                   __float_as_uint(values[2]), __float_as_uint(values[3]));
  } else if constexpr (sizeof(T) * count == 8 && count == 4) {
    *reinterpret_cast<uint2*>(to) =
        make_uint2(pack(values[0], values[1]), pack(values[2], values[3]));
  } else {
    RNN_EXT_UNROLL
    for (int i = 0; i < count; i++) to[i] = values[i];
  }
}

// Through global memory, for groups of any size: every block has a flag that counts its
// publications. A lane copies just the bytes that it multiplies, some chunks ahead, into a ring of
// its own, so reading needs no barrier at all.
template <class Numbers, int ring>
class FlagExchange {
 public:
  static constexpr bool kCluster = false;
  using T = typename Numbers::Storage;

  RNN_EXT_DEVICE FlagExchange(const BlockLayout& layout, const GroupPlace& place, int all_groups,
                              void* workspace, unsigned char* shared)
      : share_(layout), lane_(threadIdx.x % 32), row_bytes_(layout.global_row_bytes()) {
    unsigned char* memory = static_cast<unsigned char*>(workspace);
    flags_ =
        reinterpret_cast<uint32_t*>(memory + static_cast<long>(place.index) * layout.flag_bytes());
    memory += static_cast<long>(all_groups) * layout.flag_bytes();
    operand_ = memory + place.index * layout.exchange_bytes();
    plane_bytes_ = layout.rows * row_bytes_;
    half_bytes_ = layout.planes * plane_bytes_;
    block_ = place.block;
    own_at_ = place.block * layout.produced_bytes;
    first_producer_ = share_.first * kChunkBytes / layout.produced_bytes;
    const int end = (share_.first + share_.count) * kChunkBytes + layout.produced_bytes - 1;
    end_producer_ =
        share_.count ? min(end / layout.produced_bytes, layout.producers) : first_producer_;
    ring_ = shared + layout.operand_at() +
            threadIdx.x / 32 * ring * layout.columns() * kChunkBytes + lane_ * 16;
    slot_bytes_ = layout.columns() * kChunkBytes;
  }

  RNN_EXT_DEVICE void wait() {
    for (int producer = first_producer_ + lane_; producer < end_producer_; producer += 32) {
      const uint32_t published = published_;
      spin_until(flags_ + producer, [=](uint32_t count) { return count >= published; });
    }
  }

  template <int planes>
  RNN_EXT_DEVICE void start(int row, int tiles) {
    const int half = static_cast<int>((published_ - 1) % 2) * half_bytes_;
    from_ = operand_ + half + (row + lane_ / 4) * row_bytes_ + share_.first * kChunkBytes +
            lane_ % 4 * 16;
    for (int c = 0; c < ring; c++) fetch<planes>(c, tiles);
  }

  template <int planes, int column_tiles>
  RNN_EXT_DEVICE void read(int c, int tiles, uint4 (&b)[column_tiles]) {
    copy_async_wait<ring - 1>();
    RNN_EXT_UNROLL
    for (int n = 0; n < column_tiles; n++) {
      if (n < tiles)
        b[n] = *reinterpret_cast<const uint4*>(slot(c) + n * kColumnTile * kChunkBytes);
    }
  }
  template <int planes>
  RNN_EXT_DEVICE void advance(int c, int tiles) {
    fetch<planes>(c + ring, tiles);
  }

  template <int count>
  RNN_EXT_DEVICE void put(int row, int /*pass_row*/, int column, const T (&values)[count],
                          int plane = 0) {
    unsigned char* to = operand_ + published_ % 2 * half_bytes_ + row * row_bytes_ + own_at_;
    store_together(reinterpret_cast<T*>(to + plane * plane_bytes_) + column, values);
  }
  RNN_EXT_DEVICE void pass_on(int /*row*/, int /*rows*/, int /*plane*/ = 0) {}

  RNN_EXT_DEVICE void publish() {
    published_++;
    if (threadIdx.x == 0) add_release(flags_ + block_, 1);
  }

 private:
  RNN_EXT_DEVICE unsigned char* slot(int c) const { return ring_ + c % ring * slot_bytes_; }

  // An empty group where there is no chunk, so that groups count chunks.
  template <int planes>
  RNN_EXT_DEVICE void fetch(int c, int tiles) {
    if (c < planes * share_.count) {
      const unsigned char* chunk = from_ + c % planes * plane_bytes_ + c / planes * kChunkBytes;
      for (int n = 0; n < tiles; n++) {
        copy_async<16>(slot(c) + n * kColumnTile * kChunkBytes,
                       chunk + n * kColumnTile * row_bytes_);
      }
    }
    copy_async_commit();
  }

  const WarpShare share_;
  const int lane_, row_bytes_;
  int block_, own_at_, plane_bytes_, half_bytes_, first_producer_, end_producer_, slot_bytes_;
  uint32_t* flags_;
  unsigned char *operand_, *ring_;
  const unsigned char* from_ = nullptr;
  uint32_t published_ = 0;
};

// Through the shared memory of a cluster: a block pushes its share into every block's copy of the
// operand, and one cluster barrier a step tells that all of it has arrived.
template <class Numbers>
class ClusterExchange {
 public:
  static constexpr bool kCluster = true;
  using T = typename Numbers::Storage;

  RNN_EXT_DEVICE ClusterExchange(const BlockLayout& layout, const GroupPlace& place,
                                 int /*all_groups*/, void* /*workspace*/, unsigned char* shared)
      : share_(layout), lane_(threadIdx.x % 32), row_bytes_(layout.shared_row_bytes()) {
    operand_ = shared + layout.operand_at();
    outgoing_ = shared + layout.outgoing_at();
    plane_bytes_ = layout.rows * row_bytes_;
    half_bytes_ = layout.planes * plane_bytes_;
    block_ = place.block;
    blocks_ = layout.blocks;
    producers_ = layout.producers;
    produced_bytes_ = layout.produced_bytes;
    outgoing_bytes_ = layout.columns() * produced_bytes_;
    // What nobody writes is multiplied too, by zero weights: it must not be NaN.
    uint4* words = reinterpret_cast<uint4*>(operand_);
    const int count = (layout.operand_bytes() + layout.outgoing_bytes()) / 16;
    for (int i = threadIdx.x; i < count; i += kBlockThreads) words[i] = make_uint4(0, 0, 0, 0);
    cluster_barrier();
  }

  RNN_EXT_DEVICE void wait() {
    __syncwarp();
    cluster_wait();
  }
  template <int planes>
  RNN_EXT_DEVICE void start(int row, int /*tiles*/) {
    from_ = operand_ + (published_ - 1) % 2 * half_bytes_ + (row + lane_ / 4) * row_bytes_ +
            share_.first * kChunkBytes + lane_ % 4 * 16;
  }

  template <int planes, int column_tiles>
  RNN_EXT_DEVICE void read(int c, int tiles, uint4 (&b)[column_tiles]) {
    const unsigned char* chunk = from_ + c % planes * plane_bytes_ + c / planes * kChunkBytes;
    RNN_EXT_UNROLL
    for (int n = 0; n < column_tiles; n++) {
      if (n < tiles) b[n] = *reinterpret_cast<const uint4*>(chunk + n * kColumnTile * row_bytes_);
    }
  }
  template <int planes>
  RNN_EXT_DEVICE void advance(int /*c*/, int /*tiles*/) {}

  template <int count>
  RNN_EXT_DEVICE void put(int /*row*/, int pass_row, int column, const T (&values)[count],
                          int plane = 0) {
    unsigned char* to = outgoing_ + plane * outgoing_bytes_ + pass_row * produced_bytes_;
    store_together(reinterpret_cast<T*>(to) + column, values);
  }

  RNN_EXT_DEVICE void pass_on(int row, int rows, int plane = 0) {
    if (block_ >= producers_) return;
    const int row_pieces = produced_bytes_ / 16, pieces = rows * row_pieces;
    unsigned char* half =
        operand_ + published_ % 2 * half_bytes_ + plane * plane_bytes_ + block_ * produced_bytes_;
    const unsigned char* outgoing = outgoing_ + plane * outgoing_bytes_;
    for (int i = threadIdx.x; i < pieces * blocks_; i += kBlockThreads) {
      const int piece = i % pieces, in_row = piece % row_pieces * 16;
      const int peer = (block_ + i / pieces) % blocks_;  // blocks start with different peers
      const uint4 value = *reinterpret_cast<const uint4*>(outgoing + piece * 16);
      store_peer(peer_address(half + (row + piece / row_pieces) * row_bytes_ + in_row, peer),
                 value);
    }
  }

  RNN_EXT_DEVICE void publish() {
    published_++;
    __syncwarp();
    cluster_arrive();
  }

 private:
  const WarpShare share_;
  const int lane_, row_bytes_;
  int block_, blocks_, producers_, produced_bytes_, outgoing_bytes_, plane_bytes_, half_bytes_;
  unsigned char *operand_, *outgoing_;
  const unsigned char* from_ = nullptr;
  uint32_t published_ = 0;
};

}  // namespace rnn_ext::cuda
