#include "cuda_random.h"

#include "../cuda/random.h"
#include "cuda_step.h"

namespace rnn_ext {

at::Tensor cuda_random_mask(int64_t seed, int64_t stream, const at::Tensor& steps,
                            const at::Tensor& rows, int64_t columns, int64_t threshold,
                            MaskValues values, at::ScalarType dtype) {
  TORCH_CHECK(dtype == at::kBool || at::isFloatingType(dtype),
              "random_mask: fills floating point numbers or bool, not ", dtype);
  const DeviceScope scope(steps);
  const at::Tensor mask = at::empty({steps.size(0), columns}, steps.options().dtype(dtype));
  const at::Tensor step = steps.to(at::kLong).contiguous(), row = rows.to(at::kLong).contiguous();
  const cuda::RandomMask p{steps.size(0),
                           columns,
                           step.const_data_ptr<int64_t>(),
                           row.const_data_ptr<int64_t>(),
                           static_cast<uint64_t>(seed),
                           static_cast<uint32_t>(stream),
                           static_cast<uint32_t>(threshold),
                           values.dropped,
                           values.kept,
                           mask.mutable_data_ptr()};
  if (dtype == at::kBool)
    cuda::random_flags(p, scope.stream());
  else
    cuda::random_mask(storage_of(dtype), p, scope.stream());
  return mask;
}

}  // namespace rnn_ext
