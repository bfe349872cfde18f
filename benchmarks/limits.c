// Two rates that no kernel exceeds on the CPU for which this is compiled (limits.py does, with -march=native):
// multiply-adds on values that stay in registers, and loads from a piece of memory read over and over.

#if defined(__AVX512F__)
#define BYTES 64
#define CHAINS 20
#elif defined(__AVX__)
#define BYTES 32
#define CHAINS 12
#elif defined(__aarch64__)
#define BYTES 16
#define CHAINS 24
#else
#define BYTES 16
#define CHAINS 12
#endif

// `repeats` rounds of one multiply-add on each of CHAINS registers: enough independent ones to hide the latency.
#define DEFINE_MULTIPLY_ADD(real, name)                                    \
  typedef real name##_vector __attribute__((vector_size(BYTES)));          \
  real name(long repeats) {                                                \
    name##_vector chain[CHAINS], sum = {0}, factor = sum + (real)0.5;      \
    for (int i = 0; i < CHAINS; i++) chain[i] = sum + (real)(repeats + i); \
    for (long r = 0; r < repeats; r++) {                                   \
      _Pragma("GCC unroll 32") for (int i = 0; i < CHAINS; i++) chain[i] = \
          chain[i] * factor + factor;                                      \
    }                                                                      \
    for (int i = 0; i < CHAINS; i++) sum += chain[i];                      \
    return sum[0];                                                         \
  }

DEFINE_MULTIPLY_ADD(float, multiply_add_float32)
DEFINE_MULTIPLY_ADD(double, multiply_add_float64)

long flops_per_repeat(long item_size) { return 2L * CHAINS * BYTES / item_size; }

// Reads `bytes` (a multiple of 8 * BYTES, aligned to BYTES) from `memory`, `passes` times.
float read_memory(const float* memory, long bytes, long passes) {
  typedef multiply_add_float32_vector vector;
  const vector* source = (const vector*)memory;
  vector sum[8] = {{0}};
  for (long pass = 0; pass < passes; pass++) {
    for (long i = 0; i < bytes / BYTES; i += 8) {
      _Pragma("GCC unroll 8") for (int j = 0; j < 8; j++) sum[j] += source[i + j];
    }
  }
  for (int j = 1; j < 8; j++) sum[0] += sum[j];
  return sum[0][0];
}
