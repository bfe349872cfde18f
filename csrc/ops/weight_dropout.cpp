#include "weight_dropout.h"

#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kept_memory.h"
#include "parallel.h"
#include "training.h"

namespace rnn_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// out = from * (keep ? kept : 0), without a branch that nobody could predict
RNN_EXT_VARIANTS void multiply(const float* from, const uint8_t* keep, float kept, float* out,
                               int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = from[i] * (kept * float(int(keep[i])));
}
RNN_EXT_VARIANTS void multiply(const double* from, const uint8_t* keep, double kept, double* out,
                               int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = from[i] * (kept * double(int(keep[i])));
}
void multiply(const at::BFloat16* from, const uint8_t* keep, at::BFloat16 kept, at::BFloat16* out,
              int64_t count) {
  const float factor = kept;
  for (int64_t i = 0; i < count; i++) out[i] = float(from[i]) * (factor * float(int(keep[i])));
}

// Writes from * (keep ? kept : 0) to `out`, which may be `from`; both are contiguous.
void multiply(const Tensor& from, const Tensor& keep, double kept, const Tensor& out) {
  const int64_t count = from.numel();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, from.scalar_type(), "dropped_weight", [&] {
    const auto* a = from.const_data_ptr<scalar_t>();
    const auto* chosen = reinterpret_cast<const uint8_t*>(keep.const_data_ptr<bool>());
    auto* to = out.mutable_data_ptr<scalar_t>();
    run_team(threads_for(count), [&](const Member& m) {
      const int64_t begin = m.begin(count);
      multiply(a + begin, chosen + begin, static_cast<scalar_t>(kept), to + begin,
               m.end(count) - begin);
    });
  });
}

// Whether nobody else can see the values of `t`.
bool is_ours(const Tensor& t) {
  return t.use_count() == 1 && t.storage().use_count() == 1 && t.is_contiguous();
}

struct WeightDropout : torch::autograd::Function<WeightDropout> {
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& keep,
                        double kept) {
    ctx->save_for_backward({keep});
    ctx->saved_data["kept"] = kept;
    const Tensor from = weight.contiguous(), out = uninitialized(from.sizes(), from.scalar_type());
    multiply(from, keep, kept, out);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    const Tensor &d = upstream[0], keep = ctx->get_saved_variables()[0];
    const double kept = ctx->saved_data["kept"].toDouble();
    if (at::GradMode::is_enabled() || is_watched(d))
      return {at::mul(d, at::mul(keep.to(d.scalar_type()), kept)), {}, {}};
    const bool in_place = is_ours(d);
    const Tensor from = d.contiguous(),
                 out = in_place ? d : uninitialized(from.sizes(), from.scalar_type());
    multiply(from, keep, kept, out);
    return {out, {}, {}};
  }
};

}  // namespace

Tensor dropped_weight(const Tensor& weight, const Tensor& keep, double p) {
  return WeightDropout::apply(weight, keep, 1 / (1 - p));
}

}  // namespace rnn_ext
