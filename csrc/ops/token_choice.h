// Which token follows: greedy, sampled, or by beam search. What rnn_ext/reference/generation.py says
// in NumPy; the random numbers are those that torch.multinomial draws.
#pragma once
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "../cpu/generate_problem.h"

namespace rnn_ext {

struct ChoiceOptions {
  int64_t batch, tokens, steps;  // sequences; how many tokens there are; how many to choose
  double temperature;            // 0: the likeliest
  int64_t top_k;                 // 0: all
  double top_p;                  // 1: all
  int64_t eos;                   // ends a sequence; -1: none
  bool log_probs;                // sum them
  int64_t beams;                 // 1: no beam search
  double length_penalty;
};

// Sequences chosen so far: tokens [B, n], of which lengths [B] count; log_probs [B], float64.
struct Chosen {
  at::Tensor tokens, lengths, log_probs;
};

// The logits of one step, float or double.
struct Logits {
  const float* narrow;
  const double* wide;
  int64_t stride;
};

class TokenChoice : public TokenChooser {
 public:
  explicit TokenChoice(const ChoiceOptions& options);

  int64_t rows() const { return options_.batch * options_.beams; }
  const ChoiceOptions& options() const { return options_; }
  bool choose(const float* logits, long stride) noexcept final {
    return guarded({logits, nullptr, stride});
  }
  bool choose(const double* logits, long stride) noexcept final {
    return guarded({nullptr, logits, stride});
  }
  const int64_t* tokens() const final { return tokens_.data(); }
  // Throws what choose() could not.
  void check() const;
  virtual Chosen chosen() const = 0;

  // Called ten times a second; what it throws ends the choice.
  std::function<void()> poll;

 protected:
  virtual bool next(const Logits& logits) = 0;
  // logits of `row` as doubles, into `to`. Throws where no token can be chosen from them.
  void read(const Logits& logits, int64_t row, double* to) const;

  const ChoiceOptions options_;
  int64_t step_ = 0;             // how many steps have been chosen
  std::vector<int64_t> tokens_;  // [rows]

 private:
  bool guarded(const Logits& logits) noexcept;

  std::chrono::steady_clock::time_point polled_;
  std::exception_ptr failure_;
};

// log(sum(exp(row)))
double log_sum_exp(const double* row, int64_t count);

// generator: torch's default one where there is none.
std::unique_ptr<TokenChoice> make_sampler(const ChoiceOptions& options,
                                          std::optional<at::Generator> generator);
std::unique_ptr<TokenChoice> make_beam_search(const ChoiceOptions& options);

}  // namespace rnn_ext
