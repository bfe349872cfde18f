// How a layer is spread over threads: a pure function of its shape, so that it can be tested and
// printed.
#pragma once

namespace rnn_ext {

enum class Split {
  kNone,     // one thread
  kRows,     // each thread has its own sequences and never waits for another
  kColumns,  // each thread has its own hidden units; one barrier a product
};

struct PlanShape {
  long steps, batch, input, hidden, output, gates;  // T, B, I, H, P, gates per unit
  long value_bytes;                                 // of a weight as it is multiplied
  int max_threads;
};

struct Plan {
  int threads;
  Split split;
  bool pack;           // weights are copied into panels first; not worth it for a handful of rows
  const char* reason;  // one phrase, for explain()
  long piece_rows;     // of the backward walk that a piece has at least, see delta_window.h
};

Plan choose_plan(const PlanShape& shape);
// For tests: pieces of the backward walk are as short as they can be.
void shorten_pieces(bool on);
// For a layer that looks at whole rows (normalized_forward.h): one more barrier a step where columns
// are split, between the product and what is done with the rows.
Plan choose_row_plan(const PlanShape& shape);

// The same for a layer with that many directions. Side by side, each has a thread of its own.
struct DirectionsPlan {
  Plan plan;  // of each direction
  bool side_by_side;
};
DirectionsPlan choose_plan(const PlanShape& shape, int directions);

}  // namespace rnn_ext
