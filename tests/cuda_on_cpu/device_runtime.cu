// What Python calls when the kernels of a test run on a GPU: memory, copies, and the last error.
#include "entry.h"
#include "launch.h"

namespace cuda_on_cpu {
char last_error[4000];
}

using namespace rnn_ext::cuda;

extern "C" {

const char* cuda_on_cpu_error() { return cuda_on_cpu::last_error; }

void* on_device_allocate(size_t bytes) {
  void* p = nullptr;
  cuda_on_cpu::entry([&] { check(cudaMalloc(&p, bytes), "cudaMalloc"); });
  return p;
}
void on_device_free(void* p) { (void)cudaFree(p); }
int on_device_copy(void* to, const void* from, size_t bytes) {
  return cuda_on_cpu::entry(
      [&] { check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault), "cudaMemcpy"); });
}
int on_device_wait() {
  return cuda_on_cpu::entry([] { check(cudaDeviceSynchronize(), "a kernel"); });
}
}
