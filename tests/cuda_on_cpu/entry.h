// What a shared object for the tests exports: functions with a plain C interface that launch
// kernels.
//
//   extern "C" int my_launcher(const MyParams* p) {
//     return cuda_on_cpu::entry([&] { launch_my_kernel(*p); });
//   }
#pragma once
#include <cstdio>
#include <exception>

namespace cuda_on_cpu {

extern char last_error[4000];

// 0, or 1 and cuda_on_cpu_error() says what went wrong.
template <class Function>
int entry(Function function) {
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(last_error, sizeof last_error, "%s", error.what());
    return 1;
  }
}

}  // namespace cuda_on_cpu
