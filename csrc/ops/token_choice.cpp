#include "token_choice.h"

#include <algorithm>
#include <cmath>

namespace rnn_ext {
namespace {
using Clock = std::chrono::steady_clock;
constexpr auto kBetweenPolls = std::chrono::milliseconds(100);
}  // namespace

TokenChoice::TokenChoice(const ChoiceOptions& options)
    : options_(options), tokens_(rows()), polled_(Clock::now()) {}

void TokenChoice::check() const {
  if (failure_) std::rethrow_exception(failure_);
}

bool TokenChoice::guarded(const Logits& logits) noexcept {
  try {
    if (poll && Clock::now() - polled_ > kBetweenPolls) {
      poll();
      polled_ = Clock::now();
    }
    const bool more = next(logits);
    step_++;
    return more;
  } catch (...) {
    failure_ = std::current_exception();
    return false;
  }
}

void TokenChoice::read(const Logits& logits, int64_t row, double* to) const {
  const int64_t count = options_.tokens, first = row * logits.stride;
  if (logits.narrow)
    std::copy_n(logits.narrow + first, count, to);
  else
    std::copy_n(logits.wide + first, count, to);
  double most = -INFINITY;
  bool usual = true;
  for (int64_t i = 0; i < count; i++) {
    usual &= to[i] < INFINITY;  // false for NaN too
    most = std::max(most, to[i]);
  }
  TORCH_CHECK_VALUE(usual && most > -INFINITY, "generate: the logits of token ", step_,
                    " of sequence ", row / options_.beams,
                    usual ? " are all -inf: no token can follow" : " have NaN or inf among them");
}

double log_sum_exp(const double* row, int64_t count) {
  const double most = *std::max_element(row, row + count);
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += std::exp(row[i] - most);
  return most + std::log(sum);
}

}  // namespace rnn_ext
