// Sums over all rows that are no matrix products: the gradients of biases, gains and peepholes. Each
// block of rows has sums of its own, which are added up in the order of SumOrder (gradients.h): the
// result does not depend on the number of threads.
#pragma once
#include "gradients.h"
#include "layer_norm.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value>
struct NormalizedSums {
  using real = Real<value>;
  static constexpr long kRows = 64;

  // Those of one block, in the columns of the gates and of hidden units.
  struct Block {
    real *b_ih, *b_hh, *gain_ih, *gain_hh;   // [width]
    real *peephole, *gain_cell, *bias_cell;  // [3 * H], [H], [H]; LSTM

    RNN_EXT_INLINE static void add(real* sum, long at, Vec<real> term, int n) {
      store(sum + at, load(sum + at, n) + term, n);
    }
  };

  void lay_out(Arena& arena, long rows, long width, long hidden, bool lstm) {
    width_ = width;
    hidden_ = hidden;
    size_ = 4 * width + (lstm ? 5 * hidden : 0);
    blocks_ = (rows + kRows - 1) / kRows;
    parts_ = arena.take<real>((blocks_ + 1) * size_);
  }

  // The sum of all blocks; what it starts from is to be there before they are added.
  Block total() const { return block(blocks_); }
  void clear() const { std::memset(parts_ + blocks_ * size_, 0, size_ * sizeof(real)); }

  // Calls body(sums of its block, row) for each row; the members share the blocks.
  template <class Body>
  void for_blocks(const Member& member, long rows, const Body& body) const {
    for (long i = member.begin(blocks_); i < member.end(blocks_); i++) {
      std::memset(parts_ + i * size_, 0, size_ * sizeof(real));
      const Block sums = block(i);
      for (long row = i * kRows; row < rows && row < (i + 1) * kRows; row++) body(sums, row);
    }
  }

  // Adds the blocks to the total; the members share its columns.
  void reduce(const Member& member, SumOrder order) const {
    real* total = parts_ + blocks_ * size_;
    order.for_blocks(blocks_, 1, [&](long i, long, bool) {
      const real* part = parts_ + i * size_;
      for (long k = member.begin(size_); k < member.end(size_); k++) total[k] += part[k];
    });
  }

 private:
  Block block(long i) const {
    real* part = parts_ + i * size_;
    real* cell = part + 4 * width_;
    return {part, part + width_,      part + 2 * width_, part + 3 * width_,
            cell, cell + 3 * hidden_, cell + 4 * hidden_};
  }

  long width_ = 0, hidden_ = 0, size_ = 0, blocks_ = 0;
  real* parts_ = nullptr;
};

}  // namespace rnn_ext::RNN_EXT_TARGET
