// What can be done to a row of dL/dh_t on its way back in time.
#pragma once
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

}  // namespace rnn_ext::RNN_EXT_TARGET
