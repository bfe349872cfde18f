#include "rtrl.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/empty.h>
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

struct Layout {
  CellKind kind;
  int gates, nets, states;
  long input, hidden, columns;
  bool bias;
  Rows rows[kMaxNets];
  Net net[kMaxNets];

  explicit Layout(const RtrlLayer& layer)
      : kind(cell_kind(layer.cell)),
        gates(cell_gates(kind)),
        nets(gates),
        states(kind == CellKind::kLstm ? 2 : 1),
        input(layer.w_ih.size(1)),
        hidden(layer.w_hh.size(1)),
        columns(0),
        bias(layer.b_ih.has_value()) {
    for (int k = 0; k < gates; k++) rows[k] = {k, k};
    if (kind == CellKind::kGru) {
      nets = 4;
      rows[2] = {2, kNone};
      rows[3] = {kNone, 2};
    }
    for (int k = 0; k < nets; k++) {
      const bool x = rows[k].ih != kNone, h = rows[k].hh != kNone;
      net[k] = {columns, x ? 0 : input + bias, (x ? input : 0) + bias + (h ? hidden : 0)};
      columns += hidden * net[k].length;
    }
    if (kind == CellKind::kGruResetBefore) net[2].operand = input + bias + hidden;
  }
};

template <class Args>
void describe(const Layout& layout, long batch, bool diagonal, Args& args) {
  args.batch = batch;
  args.hidden = layout.hidden;
  args.columns = layout.columns;
  args.nets = layout.nets;
  std::copy(layout.net, layout.net + kMaxNets, args.net);
  args.diagonal = diagonal;
}

template <class Body>
auto with_kernels(at::ScalarType dtype, const Body& body) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, "RTRL: ", dtype,
              " is not supported; use float32 or float64");
  return dtype == at::kFloat ? body(*active_kernels().rtrl_float, float{})
                             : body(*active_kernels().rtrl_double, double{});
}

std::vector<int64_t> influence_shape(const Layout& layout, long batch, bool diagonal,
                                     at::ScalarType dtype) {
  if (diagonal) return {batch, layout.states, layout.columns};
  const long width = kInfluencePanelBytes / long(at::elementSize(dtype));
  const long panels = (layout.columns + width - 1) / width;
  return {batch, panels, layout.states, layout.hidden, width};
}

void check(const char* name, const Tensor& t, const Tensor& like, at::IntArrayRef shape) {
  TORCH_CHECK(t.is_cpu() && t.layout() == at::kStrided, "RTRL: ", name, " is on ", t.device(),
              "; RTRL runs on the CPU alone, move it there");
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

// Takes the columns apart; h' is the last of an operand that has x, the first of one that has not.
template <class real>
void split(const Layout& layout, const RtrlLayer& layer, const real* columns) {
  const long inputs = layout.input, hidden = layout.hidden;
  const Target<real> w_ih(layer.w_ih), w_hh(layer.w_hh), b_ih(layer.b_ih), b_hh(layer.b_hh);
  for (int k = 0; k < layout.nets; k++) {
    const Net& net = layout.net[k];
    const auto [ih, hh] = layout.rows[k];
    for (long unit = 0; unit < hidden; unit++) {
      const real* row = columns + net.column + unit * net.length;
      const real* h = ih == kNone ? row : row + net.length - hidden;
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

}  // namespace

Tensor rtrl_influence(const RtrlLayer& layer, long batch, bool diagonal) {
  const Layout layout(layer);
  const Tensor influence = at::empty(
      influence_shape(layout, batch, diagonal, layer.w_hh.scalar_type()), layer.w_hh.options());
  advise_huge_pages(influence.mutable_data_ptr(), influence.nbytes());
  return influence.zero_();
}

std::tuple<RtrlStatus, OptionalTensor> rtrl_step(const RtrlLayer& given, const Tensor& given_x,
                                                 const OptionalTensor& reset, const Tensor& h,
                                                 const OptionalTensor& c, const Tensor& influence,
                                                 bool diagonal) {
  at::NoGradGuard no_grad;
  const RtrlLayer layer = contiguous(given);
  const Layout layout(layer);
  const bool before = layout.kind == CellKind::kGruResetBefore;
  const long batch = h.size(0), hidden = layout.hidden;
  const at::ScalarType dtype = layer.w_hh.scalar_type();
  check("weight_hh", layer.w_hh, layer.w_hh, {layout.gates * hidden, hidden});
  check("weight_ih", layer.w_ih, layer.w_hh, {layout.gates * hidden, layout.input});
  for (const OptionalTensor& bias : {layer.b_ih, layer.b_hh})
    if (bias) check("bias", *bias, layer.w_hh, {layout.gates * hidden});
  check("h", h, layer.w_hh, {batch, hidden});
  TORCH_CHECK(c.has_value() == (layout.states == 2), "RTRL: c belongs to the LSTM alone");
  if (c) check("c", *c, layer.w_hh, {batch, hidden});
  check("influence", influence, layer.w_hh, influence_shape(layout, batch, diagonal, dtype));
  TORCH_CHECK(influence.is_contiguous() && h.is_contiguous() && (!c || c->is_contiguous()),
              "RTRL: the influence and the state must be contiguous");
  TORCH_CHECK(!diagonal || !before,
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
    }
    const auto read = [](const OptionalTensor& t) {
      return t && t->defined() ? t->const_data_ptr<real>() : nullptr;
    };
    const Terms terms = before ? reset_before_terms(layout, layer, x, h) : Terms{};
    RtrlArgs<real> args;
    describe(layout, batch, diagonal, args);
    args.x = read(x);
    args.w_ih = read(layer.w_ih);
    args.b_ih = read(layer.b_ih);
    args.b_hh = read(layer.b_hh);
    args.input = layout.input;
    args.input_gates = read(terms.input_gates);
    args.hidden_gates = read(terms.hidden_gates);
    args.operands = read(terms.operands);
    args.operand_width = before ? terms.operands.size(1)
                                : layout.input + hidden + layout.bias +
                                      (layout.kind == CellKind::kGru && layout.bias);
    args.w_hh = read(layer.w_hh);
    args.reset_jacobian = read(terms.reset_jacobian);
    args.h_prev = read(h);
    args.c_prev = read(c);
    args.h = h_new.mutable_data_ptr<real>();
    args.c = c ? c_new.mutable_data_ptr<real>() : nullptr;
    args.influence = influence.mutable_data_ptr<real>();
    const double per_column = diagonal ? 4. : 2. * layout.states * hidden * hidden;
    args.threads = threads_for(per_column * layout.columns * batch);
    return kernels.step(layout.kind, args) ? RtrlStatus::kDone : RtrlStatus::kNotFinite;
  });
  if (status != RtrlStatus::kDone) return {status, {}};
  std::memcpy(h.mutable_data_ptr(), h_new.const_data_ptr(), h.nbytes());
  if (c) std::memcpy(c->mutable_data_ptr(), c_new.const_data_ptr(), c->nbytes());
  return {status, h_new};
}

RtrlStatus rtrl_accumulate(const RtrlLayer& layer, const Tensor& d_h, const Tensor& influence,
                           bool diagonal) {
  at::NoGradGuard no_grad;
  const Layout layout(layer);
  const long batch = influence.size(0), hidden = layout.hidden;
  const at::ScalarType dtype = layer.w_hh.scalar_type();
  check("influence", influence, layer.w_hh, influence_shape(layout, batch, diagonal, dtype));
  if (!suits(d_h, layer.w_hh, {batch, hidden})) return RtrlStatus::kUnsuitable;
  const Tensor d = d_h.resolve_neg().contiguous();
  return with_kernels(dtype, [&](const auto& kernels, auto zero) {
    using real = decltype(zero);
    const long room = diagonal ? layout.columns : influence.size(1) * influence.size(4);
    Scratch columns(room * sizeof(real));
    RtrlGradientArgs<real> args;
    describe(layout, batch, diagonal, args);
    args.states = layout.states;
    args.d_h = d.const_data_ptr<real>();
    args.influence = influence.const_data_ptr<real>();
    args.gradient = reinterpret_cast<real*>(columns.data());
    args.threads = threads_for(2. * layout.columns * batch * (diagonal ? 1 : hidden));
    kernels.gradient(args);
    if (!finite<real>(args.gradient, layout.columns)) return RtrlStatus::kNotFinite;
    split<real>(layout, layer, args.gradient);
    return RtrlStatus::kDone;
  });
}

}  // namespace rnn_ext
