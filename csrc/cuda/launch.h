// How kernels are started: checked, with a clear error, and never so that a grid could wait for
// blocks that are not running. A launcher is then about ten lines:
//
//   DeviceScope scope(device);
//   launch("elman_step", elman_step_kernel<bf16>,
//          {.blocks = dim3(n), .threads = 256, .stream = stream}, params);
//
// Every function here throws std::runtime_error with a sentence that names the kernel and the
// reason.
#pragma once
#include <cstddef>
#include <stdexcept>
#include <string>

#include "device_limits.h"
#include "platform.h"

namespace rnn_ext::cuda {

struct LaunchConfig {
  dim3 blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks in a cluster, along x
  // The blocks wait for each other: all of them must be resident, or nothing is launched.
  bool cooperative = false;
  void* stream = nullptr;  // a cudaStream_t
};

inline size_t count(dim3 n) { return static_cast<size_t>(n.x) * n.y * n.z; }

[[noreturn]] inline void launch_failed(const char* name, const std::string& why) {
  throw std::runtime_error(std::string(name) + ": " + why);
}

}  // namespace rnn_ext::cuda

#ifdef RNN_EXT_EMULATED
#include "emulated_launch.h"
#else

namespace rnn_ext::cuda {

// What a CUDA error means for whoever reads it.
std::string describe(cudaError_t error);

inline void check(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // not to be reported again by the next call
  launch_failed(name, describe(error));
}

// Makes `device` current, and what was current before again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~DeviceScope() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline void fill_zero(void* p, size_t bytes, void* stream) {
  if (bytes)
    check(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
}

// The launch as the runtime wants it; `attributes` has room for two.
inline cudaLaunchConfig_t runtime_config(const LaunchConfig& config,
                                         cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t result{};
  result.gridDim = config.blocks;
  result.blockDim = dim3(static_cast<unsigned>(config.threads));
  result.dynamicSmemBytes = config.shared_bytes;
  result.stream = static_cast<cudaStream_t>(config.stream);
  result.attrs = attributes;
  if (config.cooperative) {
    attributes[result.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[result.numAttrs++].val.cooperative = 1;
  }
  if (config.cluster > 1) {
    attributes[result.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[result.numAttrs].val.clusterDim.x = static_cast<unsigned>(config.cluster);
    attributes[result.numAttrs].val.clusterDim.y = 1;
    attributes[result.numAttrs++].val.clusterDim.z = 1;
  }
  return result;
}

// Allows a kernel what it must ask for, and returns how many of its blocks the current device can
// hold at once.
// Asked before every cooperative or cluster launch, and by plans that want to know beforehand.
size_t resident_blocks(const char* name, const void* kernel, const LaunchConfig& config);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config,
            const Arguments&... arguments) {
  if (count(config.blocks) == 0) return;
  const void* address = reinterpret_cast<const void*>(kernel);
  const bool waits = config.cooperative || config.cluster > 1;
  if (waits || config.shared_bytes > 48 * 1024) {
    const size_t room = resident_blocks(name, address, config);
    const size_t needed =
        config.cooperative ? count(config.blocks) : static_cast<size_t>(config.cluster);
    if (needed > room) {
      launch_failed(name, "its " + std::to_string(needed) +
                              " blocks have to run together, and this GPU holds " +
                              std::to_string(room) + " of them");
    }
  }
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t runtime = runtime_config(config, attributes);
  check(cudaLaunchKernelEx(&runtime, kernel, Parameters(arguments)...), name);
  check(cudaGetLastError(), name);
}

}  // namespace rnn_ext::cuda
#endif
