// Tensors as the CPU kernels read and write them.
#pragma once
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <span>

#include "../cpu/problem.h"
#include "call.h"
#include "kept_memory.h"

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
  // What both passes read of a layer's inputs.
  template <class value, class Args>
  void inputs(const Call& call, const LayerInputs& in, Args& args) {
    args.steps = call.time(in.reverse);
    args.sizes = call.sizes;
    args.weights = weights<value>(in);
    args.x = read<value>(in.input);
    args.h0 = read<value>(in.h0);
    args.c0 = read<Real<value>>(in.c0);
    args.resets = resets<value>(call, in, args.h0, args.c0);
    args.zoneout = zoneout(in);
  }
  // What the backward pass reads beside them.
  template <class value>
  void upstream(const Saved& saved, const LayerGradients& d, BackwardArgs<value>& args) {
    using real = Real<value>;
    args.out = read<value>(saved.states);
    args.c = read<real>(saved.cells);
    args.gates = read<real>(saved.gates);
    args.middle = read<value>(saved.middle);
    args.d_out = read<value>(d.d_output);
    args.d_hn = read<real>(d.d_h_n);
    args.d_c = read<real>(d.d_cells);
  }

 private:
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
  Zoneout zoneout(const LayerInputs& in) {
    return {in.hold_h.has_value(), hold(in.hold_h), hold(in.hold_c)};
  }

  Hold hold(const OptionalTensor& t) {
    if (!t) return {};
    if (t->dim() == 0) return {nullptr, *t->const_data_ptr<double>()};
    held_.push_back(t->contiguous());
    return {held_.back().const_data_ptr<bool>(), 0};
  }

  std::vector<Tensor> held_;
};

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

// Where the forward pass keeps c_t where it saves none: it begins as c0 and ends as c_n.
template <class T>
Tensor running_cells(const Call& call, const LayerInputs& in) {
  Tensor c = at::empty({call.batch, call.sizes.hidden}, kDtype<T>);
  copy_values<T>(call.restores ? in.c0->narrow(0, 0, call.batch) : *in.c0, c);
  return c;
}

// The results of a forward pass that wrote `states` and, in `out`, saved cells or running ones.
template <class value>
void complete(const Call& call, const Steps& time, const Tensor& states, bool save,
              LayerOutputs& out) {
  if (save && out.saved.cells)
    out.c_n = last_states<Real<value>>(*out.saved.cells, time, call.sizes.hidden);
  if (out.c_n) out.c_n = converted(*out.c_n, call.dtype);
  out.h_n = converted(last_states<value>(states, time, call.sizes.output), call.dtype);
  out.output = converted(states, call.dtype);
  if (save) out.saved.states = states;
}

// Where the backward pass writes; `out` has the order of LayerInputs.
template <class value>
void write_gradients(const Call& call, std::span<const OptionalTensor> out,
                     BackwardArgs<value>& args) {
  using real = Real<value>;
  args.dx = writable<value>(out[0]);
  args.dh0 = writable<real>(out[1]);
  args.dc = writable<real>(out[2]);
  args.dw_ih = writable<real>(out[3]);
  args.dw_hh = writable<real>(out[4]);
  args.db_ih = writable<real>(out[5]);
  args.db_hh = writable<real>(out[6]);
  args.dw_hr = writable<real>(out[7]);
  if (!call.restores || !call.rows) return;
  if (args.dh0) args.d_reset_h = args.dh0 + call.batch * call.sizes.output;
  if (args.dc) args.d_reset_c = args.dc + call.batch * call.sizes.hidden;
}

// Calls body with a number of the type that is stored and multiplied.
template <class Body>
auto with_value(const Call& call, const Kernels& kernels, const Body& body) {
  if (call.dtype == at::kDouble) return body(double{});
  if (call.dtype == at::kBFloat16 && kernels.bfloat16) return body(BFloat16{});
  return body(float{});
}

}  // namespace rnn_ext
