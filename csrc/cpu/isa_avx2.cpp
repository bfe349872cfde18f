// Kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include "isa.h"
#define RNN_EXT_TARGET avx2
#define RNN_EXT_VECTOR_BYTES 32
#define RNN_EXT_VECTOR_REGISTERS 16
// The target lasts to the end of the file, where templates are instantiated; no library header may
// follow.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels.h"
RNN_EXT_DEFINE_KERNELS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
