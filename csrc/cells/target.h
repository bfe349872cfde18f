// What a cell's header needs from the place it is compiled for. The same cells are compiled once for every CPU
// instruction set (R is a register of floats or doubles) and for CUDA (R is one number), each time inside a
// namespace of its own, rnn_ext::RNN_EXT_TARGET, so that code for one target can never be linked into another.
#pragma once

#ifdef __CUDACC__
#define RNN_EXT_INLINE __host__ __device__ __forceinline__
#else
#define RNN_EXT_INLINE __attribute__((always_inline)) inline
#endif

namespace rnn_ext::RNN_EXT_TARGET {
// Math<R>::sigmoid(R) and Math<R>::tanh(R); each target defines its own.
template <class R>
struct Math;
}  // namespace rnn_ext::RNN_EXT_TARGET
