// Questions to the CUDA runtime: is there a device, what are its limits, how many blocks does it
// hold.
#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"

namespace rnn_ext::cuda {

std::string describe(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      if (cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0) {
        return "the NVIDIA driver is too old for the CUDA " +
               std::to_string(CUDART_VERSION / 1000) + "." +
               std::to_string(CUDART_VERSION % 1000 / 10) + " that rnn_ext was compiled with";
      }
      return "no NVIDIA driver is installed";
    }
    case cudaErrorNoDevice:
      return "no CUDA device is visible";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "rnn_ext was not compiled for this GPU; reinstall it with TORCH_CUDA_ARCH_LIST set to "
             "its architecture";
    default:
      return std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
  }
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return count;
}

std::string unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count > 0 ? "" : describe(cudaErrorNoDevice);
  (void)cudaGetLastError();
  return describe(error);
}

DeviceLimits device_limits(int device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "device_limits");
    return value;
  };
  DeviceLimits limits{};
  limits.major = attribute(cudaDevAttrComputeCapabilityMajor);
  limits.minor = attribute(cudaDevAttrComputeCapabilityMinor);
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  limits.registers_per_sm = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  limits.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  limits.shared_reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  limits.threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  limits.blocks_per_sm = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch) != 0;
  // The portable limit; whether 16 blocks fit depends on the kernel, and resident_blocks answers
  // that.
  limits.cluster_size = !attribute(cudaDevAttrClusterLaunch)      ? 1
                        : limits.major == 9 || limits.major == 10 ? 16
                                                                  : 8;
  return limits;
}

namespace {

size_t count_resident_blocks(const char* name, const void* kernel, const LaunchConfig& config,
                             int device) {
  const DeviceLimits limits = device_limits(device);
  if (config.shared_bytes > static_cast<size_t>(limits.shared_per_block)) {
    launch_failed(name, "it needs " + std::to_string(config.shared_bytes) +
                            " bytes of shared memory, and this GPU has " +
                            std::to_string(limits.shared_per_block));
  }
  if (config.cluster > limits.cluster_size) {
    launch_failed(name,
                  "it needs clusters of " + std::to_string(config.cluster) +
                      " blocks, and this GPU has " +
                      (limits.cluster_size > 1 ? "at most " + std::to_string(limits.cluster_size)
                                               : "no clusters"));
  }
  // All there is, and not what this launch needs: the attribute stays with the kernel.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             limits.shared_per_block),
        name);
  if (config.cluster == 1) {
    int per_sm = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, config.threads,
                                                        config.shared_bytes),
          name);
    return static_cast<size_t>(per_sm) * limits.sm_count;
  }
  constexpr int kPortable = 8;
  if (config.cluster > kPortable) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
  }
  cudaLaunchAttribute attributes[2];
  LaunchConfig alone = config;
  alone.cooperative = false;
  alone.blocks = dim3(static_cast<unsigned>(config.cluster));  // the question is not about one grid
  const cudaLaunchConfig_t runtime = runtime_config(alone, attributes);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &runtime), name);
  return static_cast<size_t>(clusters) * config.cluster;
}

}  // namespace

size_t resident_blocks(const char* name, const void* kernel, const LaunchConfig& config) {
  int device = 0;
  check(cudaGetDevice(&device), name);
  // Asking takes longer than launching, so answers are kept.
  using Question = std::tuple<int, const void*, int, size_t, int>;
  static std::mutex mutex;
  static std::map<Question, size_t> answers;
  const Question question{device, kernel, config.threads, config.shared_bytes, config.cluster};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = answers.find(question);
  if (known != answers.end()) return known->second;
  return answers[question] = count_resident_blocks(name, kernel, config, device);
}

}  // namespace rnn_ext::cuda
