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

// What the net inputs are made of.
struct Terms {
  Tensor input_gates, hidden_gates, operands;
  Tensor reset_jacobian;  // of the reset-before GRU
};

Terms terms_of(const Layout& layout, const RtrlLayer& layer, const Tensor& x, const Tensor& h,
               bool diagonal) {
  const Tensor input_gates = times(x, layer.w_ih, layer.b_ih);
  std::vector<Tensor> operands{x};
  const auto add = [&](const Tensor& t) {
    if (layout.bias) operands.push_back(at::ones({x.size(0), 1}, x.options()));
    operands.push_back(t);
  };
  add(h);
  if (layout.kind != CellKind::kGruResetBefore) {
    if (layout.kind == CellKind::kGru && layout.bias)
      operands.push_back(at::ones({x.size(0), 1}, x.options()));
    return {input_gates, times(h, layer.w_hh, layer.b_hh), at::cat(operands, 1), {}};
  }
  const long n = layout.hidden;
  const auto rows = [&](const Tensor& t, int first, int count) {
    return t.narrow(0, first * n, count * n);
  };
  const auto bias = [&](int first, int count) {
    return layout.bias ? OptionalTensor(rows(*layer.b_hh, first, count)) : OptionalTensor();
  };
  const Tensor rz = times(h, rows(layer.w_hh, 0, 2), bias(0, 2));
  const Tensor r = at::sigmoid(at::add(input_gates.narrow(1, 0, n), rz.narrow(1, 0, n)));
  const Tensor reset = at::mul(r, h);
  const Tensor u_n = rows(layer.w_hh, 2, 1);
  const Tensor hidden_gates = at::cat({rz, times(reset, u_n, bias(2, 1))}, 1);
  operands.push_back(x);
  add(reset);
  Tensor jacobian;
  if (!diagonal) {
    const Tensor slope = at::sigmoid_backward(h, r).unsqueeze(2);  // h' r (1 - r)
    const Tensor d_reset = at::mul(slope, rows(layer.w_hh, 0, 1)).add_(at::diag_embed(r));
    jacobian = at::matmul(u_n, d_reset).contiguous();
  }
  return {input_gates, hidden_gates, at::cat(operands, 1), jacobian};
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

// Takes the columns apart; h' is the last of an operand that has x, the first of one that has not.
template <class real>
bool split(const Layout& layout, const real* columns, RtrlGradients& out, real) {
  const long inputs = layout.input, hidden = layout.hidden;
  const auto data = [](const OptionalTensor& t) -> real* {
    return t ? t->mutable_data_ptr<real>() : nullptr;
  };
  real *w_ih = data(out.w_ih), *w_hh = data(out.w_hh), *b_ih = data(out.b_ih),
       *b_hh = data(out.b_hh);
  for (int k = 0; k < layout.nets; k++) {
    const Net& net = layout.net[k];
    const auto [ih, hh] = layout.rows[k];
    for (long unit = 0; unit < hidden; unit++) {
      const real* row = columns + net.column + unit * net.length;
      const real* h = ih == kNone ? row : row + net.length - hidden;
      const real* bias = ih == kNone ? row + hidden : row + inputs;
      if (ih != kNone) {
        std::copy(row, row + inputs, w_ih + (ih * hidden + unit) * inputs);
        if (b_ih) b_ih[ih * hidden + unit] = *bias;
      }
      if (hh != kNone) {
        std::copy(h, h + hidden, w_hh + (hh * hidden + unit) * hidden);
        if (b_hh) b_hh[hh * hidden + unit] = *bias;
      }
    }
  }
  return true;
}

}  // namespace

Tensor rtrl_influence(const RtrlLayer& layer, long batch, bool diagonal) {
  const Layout layout(layer);
  const Tensor influence = at::empty(
      influence_shape(layout, batch, diagonal, layer.w_hh.scalar_type()), layer.w_hh.options());
  advise_huge_pages(influence.mutable_data_ptr(), influence.nbytes());
  return influence.zero_();
}

std::tuple<Tensor, OptionalTensor, bool> rtrl_step(const RtrlLayer& given, const Tensor& x,
                                                   const Tensor& h, const OptionalTensor& c,
                                                   const Tensor& influence, bool diagonal) {
  at::NoGradGuard no_grad;
  const RtrlLayer layer = contiguous(given);
  const Layout layout(layer);
  const long batch = x.size(0), hidden = layout.hidden;
  const at::ScalarType dtype = layer.w_hh.scalar_type();
  check("weight_hh", layer.w_hh, layer.w_hh, {layout.gates * hidden, hidden});
  check("x", x, layer.w_hh, {batch, layout.input});
  check("h", h, layer.w_hh, {batch, hidden});
  TORCH_CHECK(c.has_value() == (layout.states == 2), "RTRL: c belongs to the LSTM alone");
  check("influence", influence, layer.w_hh, influence_shape(layout, batch, diagonal, dtype));
  TORCH_CHECK(influence.is_contiguous(), "RTRL: the influence must be contiguous");
  TORCH_CHECK(!diagonal || layout.kind != CellKind::kGruResetBefore,
              "RTRL: SnAp-1 does not exist for the GRU with the reset before the product");

  const Terms terms = terms_of(layout, layer, x, h.contiguous(), diagonal);
  const Tensor h_prev = h.contiguous(), h_new = at::empty({batch, hidden}, h.options());
  OptionalTensor c_prev, c_new;
  if (c) {
    check("c", *c, layer.w_hh, {batch, hidden});
    c_prev = c->contiguous();
    c_new = at::empty({batch, hidden}, h.options());
  }
  const bool finite = with_kernels(dtype, [&](const auto& kernels, auto zero) {
    using real = decltype(zero);
    RtrlArgs<real> args;
    describe(layout, batch, diagonal, args);
    args.input_gates = terms.input_gates.const_data_ptr<real>();
    args.hidden_gates = terms.hidden_gates.const_data_ptr<real>();
    args.operands = terms.operands.const_data_ptr<real>();
    args.operand_width = terms.operands.size(1);
    args.w_hh = layer.w_hh.const_data_ptr<real>();
    args.reset_jacobian =
        terms.reset_jacobian.defined() ? terms.reset_jacobian.const_data_ptr<real>() : nullptr;
    args.h_prev = h_prev.const_data_ptr<real>();
    args.c_prev = c ? c_prev->const_data_ptr<real>() : nullptr;
    args.h = h_new.mutable_data_ptr<real>();
    args.c = c ? c_new->mutable_data_ptr<real>() : nullptr;
    args.influence = influence.mutable_data_ptr<real>();
    const double per_column = diagonal ? 4. : 2. * layout.states * hidden * hidden;
    args.threads = threads_for(per_column * layout.columns * batch);
    return kernels.step(layout.kind, args);
  });
  return {h_new, c_new, finite};
}

RtrlGradients rtrl_gradient(const RtrlLayer& layer, const Tensor& d_h, const Tensor& influence,
                            bool diagonal) {
  at::NoGradGuard no_grad;
  const Layout layout(layer);
  const long batch = influence.size(0), hidden = layout.hidden;
  const at::ScalarType dtype = layer.w_hh.scalar_type();
  check("dL_dh", d_h, layer.w_hh, {batch, hidden});
  check("influence", influence, layer.w_hh, influence_shape(layout, batch, diagonal, dtype));
  const Tensor d = d_h.contiguous();
  const long room = diagonal ? layout.columns : influence.size(1) * influence.size(4);
  const Tensor all = at::empty({room}, d.options());
  with_kernels(dtype, [&](const auto& kernels, auto zero) {
    using real = decltype(zero);
    RtrlGradientArgs<real> args;
    describe(layout, batch, diagonal, args);
    args.states = layout.states;
    args.d_h = d.const_data_ptr<real>();
    args.influence = influence.const_data_ptr<real>();
    args.gradient = all.mutable_data_ptr<real>();
    args.threads = threads_for(2. * layout.columns * batch * (diagonal ? 1 : hidden));
    kernels.gradient(args);
    return true;
  });

  RtrlGradients out;
  out.w_ih = at::empty_like(layer.w_ih, at::MemoryFormat::Contiguous);
  out.w_hh = at::empty_like(layer.w_hh, at::MemoryFormat::Contiguous);
  if (layout.bias) {
    out.b_ih = at::empty_like(*layer.b_ih);
    out.b_hh = at::empty_like(*layer.b_hh);
  }
  with_kernels(dtype, [&](const auto&, auto zero) {
    using real = decltype(zero);
    const real* all_data = all.const_data_ptr<real>();
    out.finite = finite(all_data, layout.columns);
    return split(layout, all_data, out, zero);
  });
  return out;
}

}  // namespace rnn_ext
