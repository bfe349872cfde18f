// Tensors as the CPU kernels read and write them.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "../cpu/scratch.h"
#include "call.h"

namespace rnn_ext {

using at::Tensor;

template <class T>
struct ElementOf {
  using type = T;
};
template <>
struct ElementOf<BFloat16> {
  using type = at::BFloat16;
};
// torch's name for the same number.
template <class T>
using Element = typename ElementOf<T>::type;

template <class T>
constexpr at::ScalarType kDtype = c10::CppTypeToScalarType<Element<T>>::value;

template <class T>
T* writable(const Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr<Element<T>>());
}

template <class T>
T* writable(const OptionalTensor& t) {
  return t ? writable<T>(*t) : nullptr;
}

// t.to(dtype), without asking torch where that is t.
inline Tensor converted(const Tensor& t, at::ScalarType dtype) {
  return t.scalar_type() == dtype ? t : t.to(dtype);
}

// Contiguous values of the dtype asked for, of tensors that live as long as this does; copies that
// takes are kept alive while the kernel reads them.
class Operands {
 public:
  template <class T>
  const T* read(const Tensor& t) {
    if (t.scalar_type() == kDtype<T> && t.is_contiguous())
      return reinterpret_cast<const T*>(t.const_data_ptr<Element<T>>());
    held_.push_back(t.to(kDtype<T>).contiguous());
    return reinterpret_cast<const T*>(held_.back().const_data_ptr<Element<T>>());
  }
  template <class T>
  const T* read(const OptionalTensor& t) {
    return t && t->defined() ? read<T>(*t) : nullptr;
  }
  template <class value>
  Weights<value> weights(const LayerInputs& in) {
    using real = Real<value>;
    return {read<value>(in.w_ih), read<value>(in.w_hh), read<real>(in.b_ih), read<real>(in.b_hh),
            read<value>(in.w_hr)};
  }
  // `h` and `c` are h0 and c0 as the kernel reads them.
  template <class value>
  Resets<value> resets(const Call& call, const LayerInputs& in, const value* h,
                       const Real<value>* c) {
    if (!in.resets || call.rows == 0) return {};
    const Sizes& s = call.sizes;
    held_.push_back(parted_rows(call, in));
    const bool* rows = held_.back().const_data_ptr<bool>();
    if (call.restores)
      return {rows, h + call.batch * s.output, c ? c + call.batch * s.hidden : c, false};
    held_.push_back(at::zeros({call.batch, s.output}, kDtype<value>));
    const value* no_h = read<value>(held_.back());
    held_.push_back(at::zeros({call.batch, s.hidden}, kDtype<Real<value>>));
    return {rows, no_h, read<Real<value>>(held_.back()), true};
  }

 private:
  std::vector<Tensor> held_;
};

// at::empty, on large pages where it is large.
inline Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  Tensor t = at::empty(sizes, dtype);
  advise_huge_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

// to = from; `to` is contiguous and of type T.
template <class T>
void copy_values(const Tensor& from, const Tensor& to) {
  if (from.scalar_type() == kDtype<T> && from.is_contiguous())
    std::memcpy(writable<T>(to), from.const_data_ptr(), to.nbytes());
  else
    to.copy_(from);
}

// The state of every sequence after its last step.
template <class T>
Tensor last_states(const Tensor& all, const Steps& time, long features) {
  Tensor last = at::empty({time.batch, features}, all.options());
  const auto* from = static_cast<const T*>(all.const_data_ptr());
  auto* to = static_cast<T*>(last.mutable_data_ptr());
  for (long t = 0; t < time.count; t++) {
    const long first = time.continuing(t), ending = time.rows(t) - first;
    if (ending > 0)
      std::memcpy(to + first * features, from + (time.begin(t) + first) * features,
                  ending * features * sizeof(T));
  }
  return last;
}

// Calls body with a number of the type that is stored and multiplied.
template <class Body>
auto with_value(const Call& call, const Kernels& kernels, const Body& body) {
  if (call.dtype == at::kDouble) return body(double{});
  if (call.dtype == at::kBFloat16 && kernels.bfloat16) return body(BFloat16{});
  return body(float{});
}

}  // namespace rnn_ext
