#include "cuda_persistent.h"

#include <ATen/ops/empty.h>

#include <mutex>
#include <unordered_map>

#include "../cuda/persistent_params.h"
#include "cuda_numbers.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// Asked of the driver once for each device.
const cuda::DeviceLimits& limits_of(int device) {
  static std::mutex mutex;
  static std::unordered_map<int, cuda::DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second
                              : known.emplace(device, cuda::device_limits(device)).first->second;
}

void* data(const Tensor& t) { return const_cast<void*>(t.const_data_ptr()); }
void* data(const OptionalTensor& t) { return t && t->defined() ? data(*t) : nullptr; }
float* floats(const OptionalTensor& t) { return static_cast<float*>(data(t)); }

// The time axis of one direction, with what it needs on the device.
class DeviceSequences {
 public:
  DeviceSequences(const Call& call, c10::Device device, const OptionalTensor& lengths,
                  size_t directions) {
    args_.steps = static_cast<int>(call.steps);
    args_.batch = static_cast<int>(call.batch);
    args_.hidden = static_cast<int>(call.sizes.hidden);
    args_.directions = static_cast<int>(directions);
    if (lengths) lengths_ = lengths->contiguous();
    if (call.packed) pack(call, device);
    if (lengths_.defined()) args_.lengths = lengths_.const_data_ptr<int64_t>();
  }
  const cuda::Sequences& args() const { return args_; }

 private:
  // Of a packed batch, whose sizes are on the host: where steps begin, then how long rows are, in
  // one copy.
  void pack(const Call& call, c10::Device device) {
    Tensor host = at::empty({call.steps + call.batch}, at::kLong);
    int64_t* to = host.mutable_data_ptr<int64_t>();
    for (long t = 0; t < call.steps; t++) {
      to[t] = call.offsets[t];
      const long next = t + 1 < call.steps ? call.offsets[t + 2] - call.offsets[t + 1] : 0;
      for (long row = next; row < call.offsets[t + 1] - call.offsets[t]; row++)
        to[call.steps + row] = t + 1;
    }
    offsets_ = host.to(device);
    args_.offsets = offsets_.const_data_ptr<int64_t>();
    if (!lengths_.defined()) lengths_ = offsets_.narrow(0, call.steps, call.batch);
  }

  Tensor offsets_, lengths_;
  cuda::Sequences args_{};
};

Tensor workspace_of(const cuda::CudaPlan& plan, const LayerInputs& in) {
  return at::empty({plan.workspace_bytes}, in.input.options().dtype(at::kByte));
}

}  // namespace

cuda::CudaPlan cuda_plan(const Call& call, std::span<const LayerInputs> directions, cuda::Pass pass,
                         cuda::Path path, bool norms) {
  const LayerInputs& in = directions[0];
  const cuda::LayerShape shape{call.kind,
                               numbers_of(call.dtype),
                               call.steps,
                               call.batch,
                               call.sizes.hidden,
                               static_cast<int>(directions.size()),
                               in.w_hr.has_value(),
                               norms,
                               in.hold_h.has_value()};
  const c10::Device device = in.input.device();
  const cuda::CudaPlan plan =
      cuda::choose(shape, pass, limits_of(device.is_cpu() ? 0 : device.index()), path);
  TORCH_CHECK(path != cuda::Path::kPersistent || pass == cuda::Pass::kBackward || plan.persistent ||
                  !call.rows,
              "rnn_ext: the backend 'cuda-persistent' cannot run this ", in.cell, ": ", plan.reason,
              "; use 'auto'");
  return plan;
}

void run_persistent(const cuda::CudaPlan& plan, const Call& call, const OptionalTensor& lengths,
                    const std::vector<ForwardLoop>& loops, const cuda::Stream& stream) {
  const LayerInputs& in = *loops[0].in;
  const DeviceSequences sequences(call, in.input.device(), lengths, loops.size());
  const Tensor workspace = workspace_of(plan, in);
  std::vector<Tensor> held;  // what is read lives until the kernel is on the stream
  const auto read = [&held](const OptionalTensor& t) -> const void* {
    return t ? held.emplace_back(t->contiguous()).const_data_ptr() : nullptr;
  };
  cuda::PersistentForward p{};
  p.sequences = sequences.args();
  p.workspace = data(workspace);
  p.save = loops[0].save;
  for (size_t i = 0; i < loops.size(); i++) {
    const ForwardLoop& loop = loops[i];
    cuda::ForwardDirection& d = p.direction[i];
    d.weights = read(loop.in->w_hh);
    d.b_ih = read(loop.in->b_ih);
    d.b_hh = read(loop.in->b_hh);
    d.gates = data(loop.gates);
    d.gates_stride = loop.gates.size(-1);
    d.h = data(loop.states);
    d.h_stride = loop.states.size(-1);
    d.middle = data(loop.middle);
    d.cells = floats(loop.cells);
    d.h0 = read(loop.in->h0);
    d.c0 = floats(loop.c0);
    d.resets = static_cast<const bool*>(data(loop.resets));
    d.restored = {data(loop.restored.h), data(loop.restored.c)};
    d.restored_product = floats(loop.restored_product);
    d.h_n = data(loop.h_n);
    d.c_n = floats(loop.c_n);
    d.reverse = loop.in->reverse;
  }
  cuda::persistent_forward(call.kind, plan, p, stream);
}

void run_persistent(const cuda::CudaPlan& plan, const Call& call, const OptionalTensor& lengths,
                    const std::vector<BackwardLoop>& loops, float limit,
                    const cuda::Stream& stream) {
  const LayerInputs& in = *loops[0].in;
  const long hidden = call.sizes.hidden;
  const DeviceSequences sequences(call, in.input.device(), lengths, loops.size());
  const Tensor workspace = workspace_of(plan, in);
  std::vector<Tensor> held;
  cuda::PersistentBackward p{};
  p.limit = limit;
  p.sequences = sequences.args();
  p.workspace = data(workspace);
  for (size_t i = 0; i < loops.size(); i++) {
    const BackwardLoop& loop = loops[i];
    cuda::BackwardDirection& d = p.direction[i];
    const Tensor w_hh = loop.in->w_hh.reshape({call.gates, hidden, hidden});
    held.push_back(
        (call.kind == CellKind::kGruResetBefore ? w_hh.transpose(1, 2) : w_hh.permute({2, 1, 0}))
            .contiguous());
    d.weights = data(held.back());
    held.push_back(loop.in->h0.contiguous());
    d.h0 = data(held.back());
    d.gates = data(loop.gates);
    d.gates_stride = call.gates * hidden;
    d.middle = data(loop.middle);
    d.h = data(loop.states);
    d.h_stride = d.d_h_stride = hidden;
    d.cells = floats(loop.cells);
    d.c0 = floats(loop.c0);
    d.resets = static_cast<const bool*>(data(loop.resets));
    d.restored = {data(loop.restored.h), data(loop.restored.c)};
    const RestoredSums& sums = loop.restored_sums;
    d.restored_sums = {data(sums.delta), data(sums.h), data(sums.c)};
    d.d_h = data(loop.d_output);
    d.d_cells = data(loop.d_cells);
    d.carry = loop.carry.mutable_data_ptr<float>();
    d.dc = floats(loop.dc);
    d.delta = data(loop.delta);
    d.delta_stride = loop.delta.size(-1);
    d.previous = data(loop.previous);
    d.reverse = loop.in->reverse;
  }
  cuda::persistent_backward(call.kind, plan, p, stream);
}

}  // namespace rnn_ext
