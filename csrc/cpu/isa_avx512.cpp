// Kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "isa.h"
#define RNN_EXT_TARGET avx512
#define RNN_EXT_VECTOR_BYTES 64
#define RNN_EXT_VECTOR_REGISTERS 32
// The target lasts to the end of the file, where templates are instantiated; no library header may
// follow.
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include "kernels.h"
RNN_EXT_DEFINE_KERNELS(avx512,
                       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
