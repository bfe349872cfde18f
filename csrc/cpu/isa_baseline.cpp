// Kernels that run on every CPU of the architecture: SSE2 on x86-64, NEON on 64-bit ARM.
#include "isa.h"
#define RNN_EXT_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RNN_EXT_TARGET neon
#define RNN_EXT_VECTOR_REGISTERS 32
#include "kernels.h"
RNN_EXT_DEFINE_KERNELS(neon, true)
#else
#define RNN_EXT_TARGET sse2
#define RNN_EXT_VECTOR_REGISTERS 16
#include "kernels.h"
RNN_EXT_DEFINE_KERNELS(sse2, true)
#endif
