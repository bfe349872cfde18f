// Elman network (Elman 1990):   a = W x + b_x + U h' + b_r        h = f(a)
// h' is the previous hidden state, f one of tanh, relu, sigmoid. Every derivative below is a function of h alone,
// so the output sequence is all that training has to keep.
#pragma once
#include "target.h"

namespace rnn_ext::RNN_EXT_TARGET {

struct Tanh {
  template <class R>
  RNN_EXT_INLINE static R forward(R a) {
    return Math<R>::tanh(a);
  }
  template <class R>
  RNN_EXT_INLINE static R derivative(R h) {
    return 1 - h * h;
  }
};

struct Relu {
  template <class R>
  RNN_EXT_INLINE static R forward(R a) {
    const R zero{};
    return a < zero ? zero : a;  // written so that NaN stays NaN
  }
  template <class R>
  RNN_EXT_INLINE static R derivative(R h) {
    const R zero{};
    return h > zero ? 1 - zero : zero;
  }
};

struct Sigmoid {
  template <class R>
  RNN_EXT_INLINE static R forward(R a) {
    return Math<R>::sigmoid(a);
  }
  template <class R>
  RNN_EXT_INLINE static R derivative(R h) {
    return h * (1 - h);
  }
};

template <class R, class Activation>
struct Elman {
  RNN_EXT_INLINE static R forward(R a) { return Activation::forward(a); }
  // delta = dL/da, given h and dL/dh
  RNN_EXT_INLINE static R vjp(R h, R dh) { return dh * Activation::derivative(h); }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
