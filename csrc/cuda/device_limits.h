// What a GPU can hold and do, as plain numbers: all that choosing a kernel (plan.h) may look at.
#pragma once
#include <string>

namespace rnn_ext::cuda {

struct DeviceLimits {
  int major, minor;  // compute capability
  int sm_count;
  int registers_per_sm;  // of 32 bits
  int shared_per_sm;     // bytes
  int shared_per_block;  // bytes a kernel can ask for (the opt-in limit)
  int shared_reserved;   // bytes the system takes of shared_per_sm for every block
  int threads_per_sm;
  int blocks_per_sm;
  int l2_bytes;
  int cluster_size;  // most blocks in a cluster: 8 on GPUs with clusters, 16 on some, 1 without
  bool cooperative;  // whether all blocks of a launch can be made resident together
};

// Of one device. Throws std::runtime_error.
DeviceLimits device_limits(int device);

// Why no kernel of ours can run here ("no NVIDIA driver is installed..."), or "" when one can.
std::string unavailable_reason();

int device_count();  // 0 without a driver

}  // namespace rnn_ext::cuda
