// Which CUDA kernel runs a layer's time loop, and how it is laid out on the GPU: a pure function of
// the shape, the numbers and the device, so that it can be tested and printed on any machine. No
// CUDA header, no state.
//
// A persistent kernel keeps U on chip for the whole sequence. A group of blocks holds one copy of
// it, every block the rows of its units, and walks the sequence over a tile of the batch (then over
// the next tile). Groups never wait for each other. The blocks of a group are a cluster, which the
// hardware starts as a whole, or a part of a cooperative launch, which is resident as a whole: a
// plan counts one block for each multiprocessor and never more than there are.
#pragma once
#include <cstdint>
#include <string>

#include "../cells/kind.h"
#include "device_limits.h"

namespace rnn_ext::cuda {

// What is multiplied: the storage type, and for float how many products of TF32 numbers make one of
// float.
enum class Numbers { kBfloat16, kHalf, kTf32, kTf32x3, kDouble };

enum class Pass { kForward, kBackward };

// What the caller insists on. kPersistent takes the best persistent arrangement where there is one,
// faster or not.
enum class Path { kAuto, kStep, kPersistent };

struct LayerShape {
  CellKind cell;
  Numbers numbers;
  int64_t steps, batch, hidden;  // T, B, H
  int directions;                // 1 or 2, in one launch
  bool projected;                // LSTM with a projection
  bool norms = false;            // of dL/dh_t are asked for in the backward pass
  bool zoneout = false;
};

struct CudaPlan {
  bool persistent;  // false: one product and one kernel a step (step.cuh); the fields below are 0
  Pass pass;
  Numbers numbers;
  int groups;  // of each direction
  int blocks;  // in a group
  // A group is a cluster; otherwise flags in global memory tell its blocks what is ready.
  bool cluster;
  int units;           // hidden units of a block: 16 or 32
  int rows;            // of the batch, in a tile
  int tiles;           // of the batch, shared out among the groups
  int register_bytes;  // of a block, that hold weights
  int weight_bytes;    // of its shared memory, that hold the rest of them
  int shared_bytes;    // of a block, in all
  int64_t workspace_bytes;
  std::string reason;  // one phrase, for explain()

  const char* kernel() const { return persistent ? "cuda-persistent" : "cuda-step"; }
  int launched_blocks(int directions) const { return directions * groups * blocks; }
};

CudaPlan choose(const LayerShape& shape, Pass pass, const DeviceLimits& limits,
                Path path = Path::kAuto);

}  // namespace rnn_ext::cuda
