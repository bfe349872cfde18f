// Beam search over sums of log-probabilities.
//
// At every step each of the n hypotheses of a sequence is continued by every token, and the 2 n
// likeliest continuations are looked at in order: one that ends with eos and is among the first n is
// finished; of the others the first n live on. The n best finished ones are kept, by
// sum / length^penalty. A sequence is over when n are finished and none that lives can become better
// than the worst of them.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>

#include "token_choice.h"

namespace rnn_ext {
namespace {

class BeamSearch final : public TokenChoice {
 public:
  explicit BeamSearch(const ChoiceOptions& options)
      : TokenChoice(options),
        sums_(rows(), -INFINITY),
        new_sums_(options.beams),
        parents_(rows()),
        over_(options.batch),
        finished_(options.batch),
        row_(options.tokens) {
    for (int64_t b = 0; b < options.batch; b++)
      sums_[b * options.beams] = 0;  // all are the same yet
  }

  const int64_t* parents() const override { return parents_.data(); }

  Chosen chosen() const override {
    const int64_t batch = options_.batch;
    std::vector<std::vector<int64_t>> tokens(batch);
    Chosen result{{}, at::empty({batch}, at::kLong), at::empty({batch}, at::kDouble)};
    size_t longest = 0;
    for (int64_t b = 0; b < batch; b++) {
      const Hypothesis best = best_of(b);
      tokens[b] = tokens_of(best);
      longest = std::max(longest, tokens[b].size());
      result.lengths.mutable_data_ptr<int64_t>()[b] = tokens[b].size();
      result.log_probs.mutable_data_ptr<double>()[b] = best.sum;
    }
    result.tokens = at::full({batch, int64_t(longest)}, options_.eos, at::kLong);
    for (int64_t b = 0; b < batch; b++)
      std::copy(tokens[b].begin(), tokens[b].end(),
                result.tokens.mutable_data_ptr<int64_t>() + b * longest);
    return result;
  }

 private:
  // `length` tokens: those that led to `row` before the last one, and that.
  struct Hypothesis {
    double score, sum;
    int64_t length, row, last;
  };
  struct Continuation {
    double sum;
    int64_t parent, token;
  };

  double score(double sum, int64_t length) const {
    return sum / std::pow(double(length), options_.length_penalty);
  }

  bool next(const Logits& logits) override {
    for (int64_t r = 0; r < rows(); r++) parents_[r] = r;
    bool more = false;
    for (int64_t b = 0; b < options_.batch; b++) {
      if (over_[b]) continue;
      extend(logits, b);
      over_[b] = is_over(b);
      more |= !over_[b];
    }
    token_history_.insert(token_history_.end(), tokens_.begin(), tokens_.end());
    parent_history_.insert(parent_history_.end(), parents_.begin(), parents_.end());
    return more && step_ + 1 < options_.steps;
  }

  void extend(const Logits& logits, int64_t b) {
    const int64_t beams = options_.beams, first = b * beams, count = options_.tokens;
    continued_.clear();
    for (int64_t r = first; r < first + beams; r++) {
      if (sums_[r] == -INFINITY) continue;
      read(logits, r, row_.data());
      const double norm = log_sum_exp(row_.data(), count);
      for (int64_t i = 0; i < count; i++)
        if (row_[i] > -INFINITY) continued_.push_back({sums_[r] + row_[i] - norm, r, i});
    }
    const auto better = [](const Continuation& x, const Continuation& y) {
      return x.sum != y.sum         ? x.sum > y.sum
             : x.parent != y.parent ? x.parent < y.parent
                                    : x.token < y.token;
    };
    const int64_t looked_at = std::min<int64_t>(2 * beams, continued_.size());
    std::partial_sort(continued_.begin(), continued_.begin() + looked_at, continued_.end(), better);

    int64_t living = first;
    for (int64_t i = 0; i < looked_at && living < first + beams; i++) {
      const Continuation& c = continued_[i];
      if (c.token == options_.eos) {
        if (i < beams) finish(b, c);
        continue;
      }
      new_sums_[living - first] = c.sum;
      tokens_[living] = c.token;
      parents_[living++] = c.parent;
    }
    std::copy_n(new_sums_.begin(), living - first, sums_.begin() + first);
    std::fill(sums_.begin() + living, sums_.begin() + first + beams, -INFINITY);
  }

  void finish(int64_t b, const Continuation& c) {
    std::vector<Hypothesis>& kept = finished_[b];
    kept.push_back({score(c.sum, step_ + 1), c.sum, step_ + 1, c.parent, c.token});
    std::stable_sort(kept.begin(), kept.end(), better_score);
    if (int64_t(kept.size()) > options_.beams) kept.pop_back();
  }

  static bool better_score(const Hypothesis& x, const Hypothesis& y) { return x.score > y.score; }

  bool is_over(int64_t b) const {
    const double sum = sums_[b * options_.beams];  // the likeliest that lives
    if (sum == -INFINITY) return true;
    if (int64_t(finished_[b].size()) < options_.beams) return false;
    // Sums only fall; a positive penalty favours the longest.
    const int64_t length = options_.length_penalty > 0 ? options_.steps : step_ + 2;
    return finished_[b].back().score >= score(sum, length);
  }

  Hypothesis best_of(int64_t b) const {
    std::vector<Hypothesis> all = finished_[b];
    const int64_t first = b * options_.beams;
    if (!over_[b])
      for (int64_t r = first; r < first + options_.beams; r++)
        if (sums_[r] > -INFINITY) all.push_back({score(sums_[r], step_), sums_[r], step_, r, -1});
    return *std::min_element(all.begin(), all.end(), better_score);
  }

  std::vector<int64_t> tokens_of(const Hypothesis& h) const {
    std::vector<int64_t> tokens;
    int64_t row = h.row, step = h.length;
    if (h.last >= 0) tokens.push_back(h.last), step--;
    while (step-- > 0) {
      tokens.push_back(token_history_[step * rows() + row]);
      row = parent_history_[step * rows() + row];
    }
    std::reverse(tokens.begin(), tokens.end());
    return tokens;
  }

  std::vector<double> sums_;                       // [rows]; -inf: there is no such hypothesis
  std::vector<double> new_sums_;                   // [beams]
  std::vector<int64_t> parents_;                   // [rows]
  std::vector<char> over_;                         // [B]
  std::vector<std::vector<Hypothesis>> finished_;  // [B], best first
  std::vector<int64_t> token_history_, parent_history_;  // [steps, rows]
  std::vector<double> row_;
  std::vector<Continuation> continued_;
};

}  // namespace

std::unique_ptr<TokenChoice> make_beam_search(const ChoiceOptions& options) {
  return std::make_unique<BeamSearch>(options);
}

}  // namespace rnn_ext
