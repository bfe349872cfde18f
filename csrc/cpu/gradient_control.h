// What can be done to a row of dL/dh_t on its way back in time.
#pragma once
#include "problem.h"
#include "vector.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class real>
double norm_of(const real* row, long count) {
  double sum = 0;
  for (long i = 0; i < count; i++) sum += double(row[i]) * double(row[i]);
  return __builtin_sqrt(sum);
}

// NaN stays NaN.
template <class real>
void clip_values(real* row, long count, real limit) {
  for (long i = 0; i < count; i++)
    row[i] = row[i] > limit ? limit : row[i] < -limit ? -limit : row[i];
}

template <class real>
void scale(real* row, long count, real factor) {
  for (long i = 0; i < count; i++) row[i] *= factor;
}

// Notes the norm of dL/dh_t of row `at` of all, and clips it.
template <class value>
void control_gradient(const BackwardArgs<value>& a, long at, Real<value>* row) {
  using real = Real<value>;
  const long count = a.sizes.output;
  double norm = 0;
  if (a.dh_norms || a.clip == Clip::kNorm) norm = norm_of(row, count);
  if (a.dh_norms) a.dh_norms[at] = real(norm);
  if (a.clip == Clip::kValue) clip_values(row, count, real(a.limit));
  if (a.clip == Clip::kNorm && !(norm <= a.limit)) scale(row, count, real(a.limit / norm));
}

template <class value>
bool controls_gradients(const BackwardArgs<value>& a) {
  return a.clip != Clip::kNone || a.dh_norms;
}

}  // namespace rnn_ext::RNN_EXT_TARGET
