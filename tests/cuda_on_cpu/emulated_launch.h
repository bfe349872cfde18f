// The emulated part of csrc/cuda/launch.h.
#pragma once
#include <functional>

namespace cuda_on_cpu {

struct Grid {
  dim3 blocks, block;
  size_t shared_bytes;
  unsigned cluster;
  bool cooperative;
};

// Runs body once for every thread of the grid. Returns "" or what went wrong.
std::string run(const Grid& grid, const std::function<void()>& body);

void fill_zero(void* p, size_t bytes);

}  // namespace cuda_on_cpu

namespace rnn_ext::cuda {

class DeviceScope {
 public:
  explicit DeviceScope(int) {}
};

inline void fill_zero(void* p, size_t bytes, void*) { cuda_on_cpu::fill_zero(p, bytes); }

// By threads and shared memory alone: a host compiler knows nothing of registers.
size_t resident_blocks(const char* name, const void* kernel, const LaunchConfig& config);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config,
            const Arguments&... arguments) {
  if (count(config.blocks) == 0) return;
  const size_t needed =
      config.cooperative ? count(config.blocks) : static_cast<size_t>(config.cluster);
  const size_t room = resident_blocks(name, reinterpret_cast<const void*>(kernel), config);
  if (needed > room) {
    launch_failed(name, "its " + std::to_string(needed) +
                            " blocks have to run together, and this GPU holds " +
                            std::to_string(room) + " of them");
  }
  const cuda_on_cpu::Grid grid{config.blocks,
                               {static_cast<unsigned>(config.threads)},
                               config.shared_bytes,
                               static_cast<unsigned>(config.cluster),
                               config.cooperative};
  const std::string error = cuda_on_cpu::run(grid, [&] { kernel(Parameters(arguments)...); });
  if (!error.empty()) launch_failed(name, error);
}

}  // namespace rnn_ext::cuda
