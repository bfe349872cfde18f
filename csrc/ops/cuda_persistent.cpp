#include "cuda_persistent.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <mutex>
#include <unordered_map>

#include "../cuda/persistent_params.h"

namespace rnn_ext {
namespace {

using at::Tensor;

cuda::Numbers numbers_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return cuda::Numbers::kBfloat16;
    case at::kHalf:
      return cuda::Numbers::kHalf;
    case at::kDouble:
      return cuda::Numbers::kDouble;
    default:
      return at::globalContext().allowTF32CuBLAS() ? cuda::Numbers::kTf32 : cuda::Numbers::kTf32x3;
  }
}

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
  DeviceSequences(const Call& call, const LayerInputs& in, const RowPredicates& predicates) {
    args_.steps = static_cast<int>(call.steps);
    args_.batch = static_cast<int>(call.batch);
    args_.hidden = static_cast<int>(call.sizes.hidden);
    args_.directions = 1;
    if (predicates.lengths) lengths_ = predicates.lengths->contiguous();
    if (predicates.resets) resets_ = predicates.resets->contiguous();
    if (call.packed) pack(call, in.input.device());
    if (lengths_.defined()) args_.lengths = lengths_.const_data_ptr<int64_t>();
    if (resets_.defined()) args_.resets = resets_.const_data_ptr<bool>();
  }
  const cuda::Sequences& args() const { return args_; }

 private:
  // Of a packed batch, whose sizes are on the host: where steps begin, then how long rows are, in one copy.
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

  Tensor offsets_, lengths_, resets_;
  cuda::Sequences args_{};
};

Tensor workspace_of(const cuda::CudaPlan& plan, const LayerInputs& in) {
  return at::empty({plan.workspace_bytes}, in.input.options().dtype(at::kByte));
}

}  // namespace

cuda::CudaPlan cuda_plan(const Call& call, const LayerInputs& in, int directions, cuda::Pass pass) {
  const cuda::LayerShape shape{call.kind,          numbers_of(call.dtype), call.steps,
                               call.batch,         call.sizes.hidden,      directions,
                               in.w_hr.has_value()};
  const c10::Device device = in.input.device();
  return cuda::choose(shape, pass, limits_of(device.is_cpu() ? 0 : device.index()));
}

void run_persistent(const cuda::CudaPlan& plan, const Call& call, const LayerInputs& in,
                    const RowPredicates& predicates, const ForwardLoop& loop,
                    const cuda::Stream& stream) {
  const DeviceSequences sequences(call, in, predicates);
  const Tensor weights = in.w_hh.contiguous(), h0 = in.h0.contiguous(),
               workspace = workspace_of(plan, in);
  const Tensor b_ih = in.b_ih ? in.b_ih->contiguous() : Tensor(),
               b_hh = in.b_hh ? in.b_hh->contiguous() : Tensor();
  cuda::PersistentForward p{};
  p.sequences = sequences.args();
  p.workspace = data(workspace);
  p.save = loop.save;
  cuda::ForwardDirection& d = p.direction[0];
  d.weights = data(weights);
  if (in.b_ih) d.b_ih = data(b_ih), d.b_hh = data(b_hh);
  d.gates = data(loop.gates);
  d.gates_stride = loop.gates.size(-1);
  d.h = data(loop.states);
  d.h_stride = loop.states.size(-1);
  d.middle = data(loop.middle);
  d.cells = floats(loop.cells);
  d.h0 = data(h0);
  d.c0 = floats(loop.c0);
  d.h_n = data(loop.h_n);
  d.c_n = floats(loop.c_n);
  d.reverse = in.reverse;
  cuda::persistent_forward(call.kind, plan, p, stream);
}

void run_persistent(const cuda::CudaPlan& plan, const Call& call, const LayerInputs& in,
                    const RowPredicates& predicates, const BackwardLoop& loop,
                    const cuda::Stream& stream) {
  const DeviceSequences sequences(call, in, predicates);
  const long hidden = call.sizes.hidden;
  const Tensor weights =
      in.w_hh.reshape({call.gates, hidden, hidden}).permute({2, 1, 0}).contiguous();
  const Tensor h0 = in.h0.contiguous(), workspace = workspace_of(plan, in);
  cuda::PersistentBackward p{};
  p.sequences = sequences.args();
  p.workspace = data(workspace);
  cuda::BackwardDirection& d = p.direction[0];
  d.weights = data(weights);
  d.gates = data(loop.gates);
  d.gates_stride = call.gates * hidden;
  d.middle = data(loop.middle);
  d.h = data(loop.states);
  d.h_stride = d.d_h_stride = hidden;
  d.cells = floats(loop.cells);
  d.h0 = data(h0);
  d.c0 = floats(loop.c0);
  d.d_h = data(loop.d_output);
  d.d_cells = data(loop.d_cells);
  d.carry = loop.carry.mutable_data_ptr<float>();
  d.dc = floats(loop.dc);
  d.delta = data(loop.delta);
  d.delta_stride = loop.delta.size(-1);
  d.previous = data(loop.previous);
  d.reverse = in.reverse;
  cuda::persistent_backward(call.kind, plan, p, stream);
}

}  // namespace rnn_ext
