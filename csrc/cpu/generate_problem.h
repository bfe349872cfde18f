// What the loop of a recurrent language model reads and writes, as plain pointers.
#pragma once
#include "problem.h"
#include "quantized_problem.h"

namespace rnn_ext {

// Says which tokens follow what the model has computed. Called by one thread; must not throw.
class TokenChooser {
 public:
  virtual ~TokenChooser() = default;
  // logits [rows, stride]. False: it is over. True: tokens() and parents() are what comes next.
  virtual bool choose(const float* logits, long stride) noexcept = 0;
  virtual bool choose(const double* logits, long stride) noexcept = 0;
  virtual const int64_t* tokens() const = 0;   // [rows]
  virtual const int64_t* parents() const = 0;  // [rows]: row r goes on from the state of row
                                               // parents()[r]; null: from its own
};

// logits = V h + b of the last layer; the chooser's tokens; a step of every layer over their
// embeddings; and so on, until the chooser ends it.
template <class value>
struct GenerateArgs {
  using real = Real<value>;
  long layers, rows;
  Sizes sizes;                     // of the first layer; input is the width of the embedding
  const int64_t* offsets;          // {0, rows}
  const Weights<value>* weights;   // [layers], or null:
  const QuantizedArgs* quantized;  // [layers], with ih, hh, second, b_ih, b_hh and projected set
  const value* embedding;          // [vocabulary, I]
  long vocabulary;
  const value* head;      // [logits, P]
  const real* head_bias;  // [logits] or null
  long logits;
  value* h;               // [layers, rows, P]: the state to start from; overwritten
  real* c;                // [layers, rows, H], LSTM; overwritten
  const int64_t* first;   // [rows]: tokens that come before the first logits, or null: none
  long kept_projections;  // of so many tokens W x of the first layer is kept; at least `rows`
  Plan plan;              // threads share columns
  bool vnni;
  TokenChooser* chooser;
};

}  // namespace rnn_ext
