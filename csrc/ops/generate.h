// The loop of a recurrent language model on the CPU, in one call.
#pragma once
#include "layer.h"
#include "quantized.h"
#include "token_choice.h"

namespace rnn_ext {

// Contiguous or not, of one dtype (float32, float64 or bfloat16) on the CPU.
struct LanguageModel {
  std::string cell;
  at::Tensor embedding;                               // [vocabulary, I]
  std::vector<std::array<OptionalTensor, 5>> layers;  // w_ih, w_hh, b_ih, b_hh, w_hr of each; or,
  std::vector<QuantizedWeights> quantized;            // in their place
  at::Tensor head;                                    // [tokens, P]
  OptionalTensor head_bias;                           // [tokens]
};

// Chooses tokens until `choice` ends it. h [layers, rows, P] and c [layers, rows, H] (LSTM) are the
// state to go on from; `first` int64 [rows] are tokens to read before the first choice, if there are
// any: otherwise that goes by the last layer of h.
void generate(const LanguageModel& model, TokenChoice& choice, const at::Tensor& h,
              const OptionalTensor& c, const OptionalTensor& first);

}  // namespace rnn_ext
