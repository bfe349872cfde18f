// Greedy choice and sampling.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "token_choice.h"

namespace rnn_ext {
namespace {

class Sampler final : public TokenChoice {
 public:
  Sampler(const ChoiceOptions& options, std::optional<at::Generator> generator)
      : TokenChoice(options),
        generator_(std::move(generator)),
        row_(options.tokens),
        weights_(options.tokens),
        kept_(options.tokens),
        ended_(options.batch),
        lengths_(options.batch),
        log_probs_(options.batch) {
    history_.reserve(options.batch * std::min<int64_t>(options.steps, 1 << 16));
  }

  const int64_t* parents() const override { return nullptr; }

  Chosen chosen() const override {
    const int64_t batch = options_.batch, steps = batch ? history_.size() / batch : 0;
    Chosen result{at::empty({batch, steps}, at::kLong), at::empty({batch}, at::kLong),
                  at::empty({batch}, at::kDouble)};
    int64_t* to = result.tokens.mutable_data_ptr<int64_t>();
    for (int64_t t = 0; t < steps; t++)
      for (int64_t b = 0; b < batch; b++) to[b * steps + t] = history_[t * batch + b];
    std::copy(lengths_.begin(), lengths_.end(), result.lengths.mutable_data_ptr<int64_t>());
    std::copy(log_probs_.begin(), log_probs_.end(), result.log_probs.mutable_data_ptr<double>());
    return result;
  }

 private:
  bool next(const Logits& logits) override {
    if (options_.temperature > 0) draw(logits.wide ? at::kDouble : at::kFloat);
    bool more = false;
    for (int64_t b = 0; b < options_.batch; b++) {
      if (ended_[b]) continue;  // its last token, eos, is fed again, to no effect
      read(logits, b, row_.data());
      const int64_t token = options_.temperature > 0 ? sampled(b) : likeliest();
      tokens_[b] = token;
      lengths_[b]++;
      if (options_.log_probs)
        log_probs_[b] += row_[token] - log_sum_exp(row_.data(), options_.tokens);
      ended_[b] = token == options_.eos;
      more |= !ended_[b];
    }
    history_.insert(history_.end(), tokens_.begin(), tokens_.end());
    return more && step_ + 1 < options_.steps;
  }

  // As torch.multinomial does for one sample of each row, which takes the largest p / noise.
  void draw(at::ScalarType dtype) {
    if (!noise_.defined()) noise_ = at::empty({options_.batch, options_.tokens}, dtype);
    noise_.exponential_(1, generator_);
  }

  int64_t likeliest() const { return std::max_element(row_.begin(), row_.end()) - row_.begin(); }

  bool likelier(int64_t a, int64_t b) const {
    return row_[a] != row_[b] ? row_[a] > row_[b] : a < b;
  }

  int64_t sampled(int64_t b) {
    const double most = row_[likeliest()];
    for (int64_t i = 0; i < options_.tokens; i++)
      weights_[i] = std::exp((row_[i] - most) / options_.temperature);
    const int64_t first = b * options_.tokens;
    if (noise_.scalar_type() == at::kDouble)
      return fastest(noise_.const_data_ptr<double>() + first);
    return fastest(noise_.const_data_ptr<float>() + first);
  }

  // The token with the largest weight / noise among those that top_k and top_p leave.
  template <class T>
  int64_t fastest(const T* noise) {
    int64_t winner = -1;
    double best = -1;
    const auto race = [&](int64_t i) {
      const double value = weights_[i] / noise[i];
      if (value > best || (value == best && i < winner)) best = value, winner = i;
    };
    if (options_.top_k || options_.top_p < 1) {
      const auto [begin, end] = filtered();
      for (const int64_t* i = begin; i != end; i++) race(*i);
    } else {
      for (int64_t i = 0; i < options_.tokens; i++) race(i);
    }
    return winner;
  }

  // Of the top_k likeliest tokens the fewest, likeliest first, whose probabilities among these k
  // sum to top_p or more.
  std::pair<const int64_t*, const int64_t*> filtered() {
    std::iota(kept_.begin(), kept_.end(), 0);
    int64_t *begin = kept_.data(), *end = begin + options_.tokens;
    if (options_.top_k && options_.top_k < options_.tokens) {
      std::nth_element(begin, begin + options_.top_k - 1, end,
                       [this](int64_t a, int64_t b) { return likelier(a, b); });
      end = begin + options_.top_k;
    }
    if (options_.top_p >= 1) return {begin, end};
    double left = 0;  // of the mass that is to be kept
    for (const int64_t* i = begin; i != end; i++) left += weights_[*i];
    left *= options_.top_p;
    const auto later = [this](int64_t a, int64_t b) { return likelier(b, a); };
    std::make_heap(begin, end, later);
    int64_t* heap_end = end;
    do {
      std::pop_heap(begin, heap_end, later);
      left -= weights_[*--heap_end];
    } while (left > 0 && heap_end != begin);
    return {heap_end, end};
  }

  std::optional<at::Generator> generator_;
  at::Tensor noise_;             // [B, tokens], exponentially distributed
  std::vector<double> row_;      // of logits
  std::vector<double> weights_;  // proportional to the probabilities
  std::vector<int64_t> kept_;
  std::vector<int64_t> history_;  // [steps, B]
  std::vector<char> ended_;
  std::vector<int64_t> lengths_;
  std::vector<double> log_probs_;
};

}  // namespace

std::unique_ptr<TokenChoice> make_sampler(const ChoiceOptions& options,
                                          std::optional<at::Generator> generator) {
  return std::make_unique<Sampler>(options, std::move(generator));
}

}  // namespace rnn_ext
