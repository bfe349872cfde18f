#include "rtrl.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/sigmoid.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/dispatch.h"
#include "../cpu/rtrl_problem.h"
#include "../cpu/scratch.h"
#include "kept_memory.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// As choose_plan: what pays for a team.
constexpr double kMinFlopsForTeam = 400e3;

int threads_for(double flops) { return flops < kMinFlopsForTeam ? 1 : at::get_num_threads(); }

// Where a net finds its rows of W and of U, in units of H rows; kNone: it has none.
constexpr int kNone = -1;
struct Rows {
  int ih, hh;
};

// A layer's nets, and the rows of its weights that they have.
struct Layout : RtrlShape {
  int gates;
  bool bias;
  Rows rows[kMaxNets];

  Layout(const RtrlLayer& layer, long of_batch) : RtrlShape{} {
    kind = cell_kind(layer.cell);
    gates = nets = cell_gates(kind);
    states = kind == CellKind::kLstm ? 2 : 1;
    batch = of_batch;
    input = layer.w_ih.size(1);
    hidden = layer.w_hh.size(1);
    bias = layer.b_ih.has_value();
    operand_width = input + bias + hidden;
    for (int k = 0; k < gates; k++) rows[k] = {k, k};
    if (kind == CellKind::kGru) {
      nets = 4;
      rows[2] = {2, kNone};
      rows[3] = {kNone, 2};
      operand_width += bias;
    }
    for (int k = 0; k < nets; k++) {
      const bool x = rows[k].ih != kNone, h = rows[k].hh != kNone;
      net[k] = {columns, x ? 0 : input + bias, (x ? input : 0) + bias + (h ? hidden : 0)};
      columns += hidden * net[k].length;
    }
    if (kind == CellKind::kGruResetBefore) {
      net[2].operand = operand_width;
      operand_width *= 2;
    }
  }
};

template <class Body>
auto with_kernels(at::ScalarType dtype, const Body& body) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, "RTRL: ", dtype,
              " is not supported; use float32 or float64");
  return dtype == at::kFloat ? body(*active_kernels().rtrl_float, float{})
                             : body(*active_kernels().rtrl_double, double{});
}

std::vector<int64_t> influence_shape(const Layout& layout, bool diagonal, at::ScalarType dtype) {
  if (diagonal) return {layout.batch, layout.states, layout.columns};
  return with_kernels(dtype, [&](const auto&, auto zero) -> std::vector<int64_t> {
    const InfluenceLayout<decltype(zero)> l(layout);
    return {l.batch, l.panels, l.states, l.hidden, l.width};
  });
}

int64_t pending_size(const Layout& layout, at::ScalarType dtype) {
  return with_kernels(dtype, [&](const auto&, auto zero) -> int64_t {
    using real = decltype(zero);
    return PendingSteps<real>::size(InfluenceLayout<real>(layout));
  });
}

void check(const char* name, const Tensor& t, const Tensor& like, at::IntArrayRef shape) {
  TORCH_CHECK(t.is_cpu() && t.layout() == at::kStrided, "RTRL: ", name, " is on ", t.device(),
              ", but this stream is on the CPU; call reset() to begin anew");
  TORCH_CHECK(t.scalar_type() == like.scalar_type(), "RTRL: ", name, " has dtype ", t.scalar_type(),
              ", but the weights have ", like.scalar_type(), "; convert one of them");
  TORCH_CHECK(t.sizes() == shape, "RTRL: expected ", name, " of shape ", shape, ", got ",
              t.sizes());
}

Tensor times(const Tensor& a, const Tensor& weight, const OptionalTensor& bias) {
  return bias ? at::addmm(*bias, a, weight.t()) : at::mm(a, weight.t());
}

// What the reset-before GRU's net inputs are made of.
struct Terms {
  Tensor input_gates, hidden_gates, operands, reset_jacobian;
};

Terms reset_before_terms(const Layout& layout, const RtrlLayer& layer, const Tensor& x,
                         const Tensor& h) {
  const long n = layout.hidden;
  const auto rows = [&](const Tensor& t, int first, int count) {
    return t.narrow(0, first * n, count * n);
  };
  const auto bias = [&](int first, int count) {
    return layout.bias ? OptionalTensor(rows(*layer.b_hh, first, count)) : OptionalTensor();
  };
  const Tensor input_gates = times(x, layer.w_ih, layer.b_ih);
  const Tensor rz = times(h, rows(layer.w_hh, 0, 2), bias(0, 2));
  const Tensor r = at::sigmoid(at::add(input_gates.narrow(1, 0, n), rz.narrow(1, 0, n)));
  const Tensor reset = at::mul(r, h);
  const Tensor u_n = rows(layer.w_hh, 2, 1);
  const Tensor hidden_gates = at::cat({rz, times(reset, u_n, bias(2, 1))}, 1);
  std::vector<Tensor> operands;
  for (const Tensor& last : {h, reset}) {
    operands.push_back(x);
    if (layout.bias) operands.push_back(at::ones({x.size(0), 1}, x.options()));
    operands.push_back(last);
  }
  const Tensor slope = at::sigmoid_backward(h, r).unsqueeze(2);  // h' r (1 - r)
  const Tensor d_reset = at::mul(slope, rows(layer.w_hh, 0, 1)).add_(at::diag_embed(r));
  return {input_gates, hidden_gates, at::cat(operands, 1), at::matmul(u_n, d_reset).contiguous()};
}

RtrlLayer contiguous(const RtrlLayer& layer) {
  const auto plain = [](const Tensor& t) { return t.resolve_neg().contiguous(); };
  const auto optional = [&](const OptionalTensor& t) {
    return t ? OptionalTensor(plain(*t)) : OptionalTensor();
  };
  return {layer.cell, plain(layer.w_ih), plain(layer.w_hh), optional(layer.b_ih),
          optional(layer.b_hh)};
}

template <class real>
bool finite(const real* values, long count) {
  bool all = true;
  for (long i = 0; i < count; i++) all &= std::isfinite(values[i]);
  return all;
}

// Where the gradient of a weight is added, or written if the weight has none to add to.
template <class real>
struct Target {
  Tensor weight, found;
  real* data = nullptr;
  bool add = false;

  explicit Target(const OptionalTensor& given) {
    if (!given || !given->requires_grad()) return;
    weight = *given;
    const Tensor& grad = weight.mutable_grad();
    add = grad.defined() && grad.is_cpu() && grad.layout() == at::kStrided &&
          grad.is_contiguous() && grad.sizes() == weight.sizes() &&
          grad.scalar_type() == weight.scalar_type() && !grad.requires_grad();
    found = add ? grad : at::empty_like(weight, at::MemoryFormat::Contiguous);
    data = found.mutable_data_ptr<real>();
  }

  void put(long at, const real* values, long count) const {
    if (!data) return;
    real* to = data + at;
    if (!add) std::copy(values, values + count, to);
    if (add)
      for (long i = 0; i < count; i++) to[i] += values[i];
  }

  void finish() const {
    if (!data) return;
    if (add) return found.unsafeGetTensorImpl()->bump_version();
    Tensor& grad = weight.mutable_grad();
    if (grad.defined())
      grad.add_(found);
    else
      grad = found;
  }
};

// Takes the gradient of the exact influence apart, which is by operand value and unit, and that of
// SnAp-1, by unit and operand value. h' is the last of an operand that has x, the first of one that
// has not.
template <class real>
void split(const Layout& layout, bool diagonal, const RtrlLayer& layer, const real* gradient) {
  const InfluenceLayout<real> l(layout);
  const long inputs = layout.input, hidden = layout.hidden;
  const Target<real> w_ih(layer.w_ih), w_hh(layer.w_hh), b_ih(layer.b_ih), b_hh(layer.b_hh);
  std::vector<real> of_unit(inputs + hidden + 1);
  for (int k = 0; k < layout.nets; k++) {
    const long length = layout.net[k].length;
    const auto [ih, hh] = layout.rows[k];
    for (long unit = 0; unit < hidden; unit++) {
      const real* row = gradient + layout.net[k].column + unit * length;
      if (!diagonal) {
        const real* from = gradient + l.panel(k, unit / l.width) * l.width + unit % l.width;
        for (long i = 0; i < length; i++) of_unit[i] = from[i * l.width];
        row = of_unit.data();
      }
      const real* h = ih == kNone ? row : row + length - hidden;
      const real* bias = ih == kNone ? row + hidden : row + inputs;
      if (ih != kNone) {
        w_ih.put((ih * hidden + unit) * inputs, row, inputs);
        b_ih.put(ih * hidden + unit, bias, 1);
      }
      if (hh != kNone) {
        w_hh.put((hh * hidden + unit) * hidden, h, hidden);
        b_hh.put(hh * hidden + unit, bias, 1);
      }
    }
  }
  for (const auto* target : {&w_ih, &w_hh, &b_ih, &b_hh}) target->finish();
}

// A plain tensor of this shape that is of use beside `like`.
bool suits(const Tensor& t, const Tensor& like, at::IntArrayRef shape) {
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == like.scalar_type() &&
         t.sizes() == shape;
}

void zero_rows(const bool* rows, const Tensor& t) {
  const size_t each = t.nbytes() / t.size(0);
  char* data = static_cast<char*>(t.mutable_data_ptr());
  for (long b = 0; b < t.size(0); b++)
    if (rows[b]) std::memset(data + b * each, 0, each);
}

template <class real>
PendingSteps<real> steps_of(const Layout& layout, const RtrlPending& pending) {
  return {InfluenceLayout<real>(layout), pending.steps.mutable_data_ptr<real>(),
          pending.start.const_data_ptr<int64_t>(), pending.count};
}

void check_influence(const Layout& layout, const RtrlLayer& layer, const Tensor& influence,
                     const std::optional<RtrlPending>& pending) {
  const at::ScalarType dtype = layer.w_hh.scalar_type();
  check("influence", influence, layer.w_hh, influence_shape(layout, !pending, dtype));
  TORCH_CHECK(influence.is_contiguous(), "RTRL: the influence must be contiguous");
  if (!pending) return;
  check("the pending steps", pending->steps, layer.w_hh, {pending_size(layout, dtype)});
  const Tensor& start = pending->start;
  TORCH_CHECK(start.is_cpu() && start.is_contiguous() && start.scalar_type() == at::kLong &&
                  start.sizes() == at::IntArrayRef{layout.batch},
              "RTRL: the starts of the pending steps must be int64 [", layout.batch, "]");
  const int64_t* values = start.const_data_ptr<int64_t>();
  const bool within = std::all_of(values, values + layout.batch, [&](int64_t value) {
    return 0 <= value && value <= pending->count;
  });
  TORCH_CHECK(within && pending->count <= kPendingSteps, "RTRL: there is no room for ",
              pending->count, " pending steps");
}

}  // namespace

std::tuple<Tensor, OptionalTensor> rtrl_influence(const RtrlLayer& layer, long batch,
                                                  bool diagonal) {
  const Layout layout(layer, batch);
  const at::ScalarType dtype = layer.w_hh.scalar_type();
  const auto zeros = [&](at::IntArrayRef shape) { return uninitialized(shape, dtype).zero_(); };
  OptionalTensor pending;
  if (!diagonal) pending = zeros({pending_size(layout, dtype)});
  return {zeros(influence_shape(layout, diagonal, dtype)), pending};
}

std::tuple<RtrlStatus, OptionalTensor> rtrl_step(const RtrlLayer& given, const Tensor& given_x,
                                                 const OptionalTensor& reset, const Tensor& h,
                                                 const OptionalTensor& c, const Tensor& influence,
                                                 const std::optional<RtrlPending>& pending) {
  at::NoGradGuard no_grad;
  const RtrlLayer layer = contiguous(given);
  const Layout layout(layer, h.size(0));
  const bool before = layout.kind == CellKind::kGruResetBefore;
  const long batch = layout.batch, hidden = layout.hidden;
  const at::ScalarType dtype = layer.w_hh.scalar_type();
  check("weight_hh", layer.w_hh, layer.w_hh, {layout.gates * hidden, hidden});
  check("weight_ih", layer.w_ih, layer.w_hh, {layout.gates * hidden, layout.input});
  for (const OptionalTensor& bias : {layer.b_ih, layer.b_hh})
    if (bias) check("bias", *bias, layer.w_hh, {layout.gates * hidden});
  check("h", h, layer.w_hh, {batch, hidden});
  TORCH_CHECK(c.has_value() == (layout.states == 2), "RTRL: c belongs to the LSTM alone");
  if (c) check("c", *c, layer.w_hh, {batch, hidden});
  TORCH_CHECK(h.is_contiguous() && (!c || c->is_contiguous()),
              "RTRL: the state must be contiguous");
  check_influence(layout, layer, influence, pending);
  TORCH_CHECK(!pending || pending->count < kPendingSteps,
              "RTRL: the influence must advance before the next step");
  TORCH_CHECK(pending || !before,
              "RTRL: SnAp-1 does not exist for the GRU with the reset before the product");
  if (!suits(given_x, layer.w_hh, {batch, layout.input})) return {RtrlStatus::kUnsuitable, {}};
  if (reset && !(reset->is_cpu() && reset->scalar_type() == at::kBool &&
                 reset->sizes() == at::IntArrayRef{batch}))
    return {RtrlStatus::kUnsuitable, {}};
  const Tensor x = given_x.resolve_neg().contiguous();

  const Tensor h_new = at::empty_like(h), c_new = c ? at::empty_like(*c) : Tensor();
  const RtrlStatus status = with_kernels(dtype, [&](const auto& kernels, auto zero) {
    using real = decltype(zero);
    if (!finite(x.const_data_ptr<real>(), x.numel())) return RtrlStatus::kInputNotFinite;
    if (reset && batch) {
      const Tensor rows = reset->contiguous();
      const bool* which = rows.const_data_ptr<bool>();
      zero_rows(which, h);
      if (c) zero_rows(which, *c);
      zero_rows(which, influence);
      if (pending) {
        int64_t* start = pending->start.mutable_data_ptr<int64_t>();
        for (long b = 0; b < batch; b++)
          if (which[b]) start[b] = pending->count;
      }
    }
    const auto read = [](const OptionalTensor& t) {
      return t && t->defined() ? t->const_data_ptr<real>() : nullptr;
    };
    const Terms terms = before ? reset_before_terms(layout, layer, x, h) : Terms{};
    RtrlArgs<real> args{
        layout, pending ? steps_of<real>(layout, *pending)
                        : PendingSteps<real>{InfluenceLayout<real>(layout), nullptr, nullptr, 0}};
    args.x = read(x);
    args.w_ih = read(layer.w_ih);
    args.b_ih = read(layer.b_ih);
    args.b_hh = read(layer.b_hh);
    args.input_gates = read(terms.input_gates);
    args.hidden_gates = read(terms.hidden_gates);
    args.operands = read(terms.operands);
    args.w_hh = read(layer.w_hh);
    args.reset_jacobian = read(terms.reset_jacobian);
    args.h_prev = read(h);
    args.c_prev = read(c);
    args.h = h_new.mutable_data_ptr<real>();
    args.c = c ? c_new.mutable_data_ptr<real>() : nullptr;
    args.diagonal = pending ? nullptr : influence.mutable_data_ptr<real>();
    args.threads = threads_for(4. * layout.columns * batch);
    return kernels.step(args) ? RtrlStatus::kDone : RtrlStatus::kNotFinite;
  });
  if (status != RtrlStatus::kDone) return {status, {}};
  std::memcpy(h.mutable_data_ptr(), h_new.const_data_ptr(), h.nbytes());
  if (c) std::memcpy(c->mutable_data_ptr(), c_new.const_data_ptr(), c->nbytes());
  return {status, h_new};
}

void rtrl_advance(const RtrlLayer& layer, const Tensor& influence, const RtrlPending& pending) {
  const Layout layout(layer, influence.size(0));
  check_influence(layout, layer, influence, pending);
  with_kernels(layer.w_hh.scalar_type(), [&](const auto& kernels, auto zero) {
    using real = decltype(zero);
    const double rows = double(layout.states) * layout.hidden;
    const int threads = threads_for(2. * rows * rows * layout.columns * layout.batch);
    kernels.advance({steps_of<real>(layout, pending), influence.mutable_data_ptr<real>(), threads});
  });
  pending.start.zero_();
}

RtrlStatus rtrl_accumulate(const RtrlLayer& layer, const Tensor& d_h, const Tensor& influence,
                           const std::optional<RtrlPending>& pending) {
  at::NoGradGuard no_grad;
  const Layout layout(layer, influence.size(0));
  check_influence(layout, layer, influence, pending);
  if (!suits(d_h, layer.w_hh, {layout.batch, layout.hidden})) return RtrlStatus::kUnsuitable;
  const Tensor d = d_h.resolve_neg().contiguous();
  return with_kernels(layer.w_hh.scalar_type(), [&](const auto& kernels, auto zero) {
    using real = decltype(zero);
    const InfluenceLayout<real> l(layout);
    const long size = pending ? l.panels * l.width : layout.columns;
    Scratch scratch(size * sizeof(real));
    real* gradient = reinterpret_cast<real*>(scratch.data());
    const real* d_data = d.const_data_ptr<real>();
    const real* carried = influence.const_data_ptr<real>();
    const double flops = 2. * layout.columns * layout.batch * (pending ? layout.hidden : 1);
    if (pending)
      kernels.gradient(
          {steps_of<real>(layout, *pending), carried, d_data, gradient, threads_for(flops)});
    else
      kernels.diagonal_gradient({layout, carried, d_data, gradient, threads_for(flops)});
    if (!finite<real>(gradient, size)) return RtrlStatus::kNotFinite;
    split<real>(layout, !pending, layer, gradient);
    return RtrlStatus::kDone;
  });
}

}  // namespace rnn_ext
