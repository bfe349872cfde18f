// Kernels that multiply bfloat16 (AVX512_BF16). For float and double this instruction set is
// avx512 (dispatch.cpp).
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa.h"
#define RNN_EXT_TARGET avx512_bf16
#define RNN_EXT_BFLOAT16  // values may be BFloat16
#define RNN_EXT_VECTOR_BYTES 64
#define RNN_EXT_VECTOR_REGISTERS 32
#ifdef __clang__
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#include "kernels.h"
namespace rnn_ext {
extern const Bfloat16Kernels bfloat16_avx512;
const Bfloat16Kernels bfloat16_avx512 = {
    []() -> bool { return __builtin_cpu_supports("avx512bf16"); },
    avx512_bf16::run_forward<BFloat16>,
    avx512_bf16::run_backward<BFloat16>,
    avx512_bf16::run_generate<BFloat16>,
    &avx512_bf16::normalized_kernels<BFloat16>,
};
}  // namespace rnn_ext
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
