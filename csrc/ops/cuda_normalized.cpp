#include "cuda_normalized.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>

#include <limits>

#include "../cuda/normalized.h"
#include "cuda_step.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// The gates that are normalised together: `count` columns from `first` on.
struct Group {
  int64_t first, count;
};

std::vector<Group> groups_of(CellKind cell, int64_t hidden) {
  const int64_t all = cell_gates(cell) * hidden;
  if (cell_gates(cell) != 3) return {{0, all}};
  return {{0, 2 * hidden}, {2 * hidden, hidden}};
}

// Numbers that are saved of a row of the steps, as rnn_ext/normalized.py has it.
int64_t record_width(CellKind cell, int64_t hidden, bool normalized) {
  const int64_t gates = cell_gates(cell), groups = groups_of(cell, hidden).size();
  const int64_t activations = gates > 1 ? gates * hidden : 0;
  if (!normalized) return activations;
  return activations + 2 * gates * hidden + 2 * groups + (cell == CellKind::kLstm ? 2 : 0);
}

// What is saved: one matrix after the other, each with a row for each row of the steps. Without
// memory to lie in, what only the backward pass reads is not there.
struct Records {
  OptionalTensor gates, x, x_scale, u, u_scale, cell;

  Records(const StepLayer& l, bool normalized, const OptionalTensor& memory) {
    if (!memory) {
      if (!l.elman) gates = at::empty({l.call.batch, l.call.gates * l.hidden}, l.wide);
      return;
    }
    const int64_t all = l.call.gates * l.hidden, groups = groups_of(l.call.kind, l.hidden).size();
    const Tensor flat = memory->view({-1});
    int64_t at = 0;
    const auto next = [&](OptionalTensor& matrix, int64_t columns) {
      matrix = flat.narrow(0, at, l.call.rows * columns).view({l.call.rows, columns});
      at += l.call.rows * columns;
    };
    if (!l.elman) next(gates, all);
    if (!normalized) return;
    next(x, all), next(u, all), next(x_scale, groups), next(u_scale, groups);
    if (l.lstm) next(cell, 2);
  }
};

// What both passes share.
class Layer {
 public:
  Layer(const Call& call, const LayerInputs& in, const ExtraTensors& extras)
      : scope(in.input), l(call, in, {}, resets_of(call, in)), normalized(extras[0].has_value()) {
    const auto read = [this](const OptionalTensor& t) -> const void* {
      return t ? held_.emplace_back(t->contiguous()).const_data_ptr() : nullptr;
    };
    weights = {read(in.b_ih),   read(in.b_hh),   read(extras[0]), read(extras[1]),
               read(extras[2]), read(extras[3]), read(extras[4])};
  }

  cuda::NormalizedGroup group(int64_t rows, size_t k) const {
    const std::vector<Group> groups = groups_of(l.call.kind, l.hidden);
    return {rows,
            l.call.gates * l.hidden,
            groups[k].first,
            groups[k].count,
            static_cast<int>(groups.size()),
            static_cast<int>(k)};
  }
  size_t groups() const { return groups_of(l.call.kind, l.hidden).size(); }

  const DeviceScope scope;
  const StepLayer l;
  const bool normalized;
  cuda::NormalizedWeights weights;

 private:
  static OptionalTensor resets_of(const Call& call, const LayerInputs& in) {
    return in.resets ? OptionalTensor(parted_rows(call, in)) : std::nullopt;
  }
  std::vector<Tensor> held_;
};

// Rows of the record from row `at` on.
class RecordRows {
 public:
  explicit RecordRows(const Records& r)
      : gates_(r.gates), u_(r.u), u_scale_(r.u_scale), cell_(r.cell) {}
  cuda::NormalizedRecord operator[](long at) const {
    return {gates_[at], u_[at], u_scale_[at], cell_[at]};
  }

 private:
  const RowPointer gates_, u_, u_scale_, cell_;
};

class Forward : Layer {
 public:
  Forward(const Call& call, const LayerInputs& in, const ExtraTensors& extras, bool save,
          const PassOptions& options)
      : Layer(call, in, extras), save_(save), keep_(save && options.keep_gates) {
    const long all = call.gates * l.hidden, batch = call.batch;
    if (save) out_.saved.isa = kCuda;
    if (keep_) {
      const int64_t width = record_width(call.kind, l.hidden, normalized);
      out_.saved.gates = at::empty({call.rows, width}, l.wide);
    }
    out_.output = at::empty(call.laid_out(l.output), l.stored);
    h_state_ = fresh(first_rows(in.h0, batch), l.stored);
    if (l.lstm) c_state_ = fresh(first_rows(*in.c0, batch), l.wide);
    if (l.lstm && save) out_.saved.cells = at::empty(call.laid_out(l.hidden), l.wide);
    if (keep_ && normalized) {
      most_rows_ = std::numeric_limits<long>::max();
    } else {
      const long row_bytes = std::max<long>(1, all * c10::elementSize(call.compute));
      most_rows_ = std::max(batch, kProjectionBytes / row_bytes);
    }
  }

  LayerOutputs run() {
    const Call& call = l.call;
    const long all = call.gates * l.hidden, batch = call.batch;
    const Records record(l, normalized, out_.saved.gates);
    const Tensor x =
        record.x ? *record.x : at::empty({std::min(call.rows, most_rows_), all}, l.wide);
    const Tensor weights_hh = l.recurrent().t(), weights_ih = l.in.w_ih.t(),
                 rows = l.as_rows(l.in.input);
    const Tensor product = at::empty({batch, weights_hh.size(1)}, l.wide);
    Tensor second_product, second_weights, middle;
    if (l.reset_before) {
      second_product = at::empty({batch, l.hidden}, l.wide);
      second_weights = l.in.w_hh.narrow(0, 2 * l.hidden, l.hidden).t();
      middle = at::empty({batch, l.hidden}, l.stored);
    }
    OptionalTensor h_wide;
    if (call.gates == 3 && call.dtype != call.compute)
      h_wide = fresh(first_rows(l.in.h0, batch), l.wide);
    const Restored restored = l.restored();
    const OptionalTensor restored_product = l.restored_product(restored);

    cuda::NormalizedForward p{};
    p.hidden = l.hidden;
    p.weights = weights;
    p.product = product.const_data_ptr();
    p.restored = {RowPointer(restored.h)[0], RowPointer(restored.c)[0]};
    p.restored_product = RowPointer(restored_product)[0];
    p.h_state = h_state_.mutable_data_ptr();
    p.h_wide = RowPointer(h_wide)[0];
    p.c_state = RowPointer(c_state_)[0];
    if (l.reset_before) {
      p.second_product = second_product.const_data_ptr();
      p.middle = middle.mutable_data_ptr();
    }
    const RowPointer x_rows(x), output_rows(l.as_rows(out_.output)), cell_rows(out_.saved.cells);
    const RecordRows records(record);
    Span span{0, 0, 0};
    for (long i = 0, left = 0; call.rows && i < l.time.count; i++, left--) {
      if (left == 0) {
        span = span_from(l.time, i, most_rows_);
        left = span.steps;
        multiply(first_rows(x, span.rows), rows.narrow(0, span.first, span.rows), weights_ih);
        normalize(x, record.x_scale, span.rows);
      }
      const long t = l.time.at(i), at = l.time.begin(t), count = l.time.rows(t);
      p.rows = l.rows(t, count);
      p.zoneout = l.zoneout(at);
      p.x = x_rows[at - span.first];
      p.record = records[keep_ ? at : 0];
      p.h = output_rows[at];
      p.cells = cell_rows[at];
      multiply(first_rows(product, count), first_rows(h_state_, count), weights_hh);
      cuda::normalized_forward(call.kind, l.storage, 0, p, scope.stream());
      if (!l.reset_before) continue;
      multiply(first_rows(second_product, count), first_rows(middle, count), second_weights);
      cuda::normalized_forward(call.kind, l.storage, 1, p, scope.stream());
    }
    out_.h_n = h_state_;
    if (l.lstm) out_.c_n = c_state_->to(call.dtype);
    if (save_) out_.saved.states = out_.output;
    return std::move(out_);
  }

 private:
  void normalize(const Tensor& x, const OptionalTensor& scales, long rows) const {
    for (size_t k = 0; normalized && k < groups(); k++)
      cuda::normalize_rows(l.storage, {group(rows, k), x.mutable_data_ptr(), RowPointer(scales)[0]},
                           scope.stream());
  }

  const bool save_, keep_;  // every state; records, too
  long most_rows_;
  LayerOutputs out_;
  Tensor h_state_;
  OptionalTensor c_state_;
};

class Backward : Layer {
 public:
  Backward(const Call& call, const LayerInputs& in, const ExtraTensors& extras, const Saved& saved,
           const LayerGradients& d, const NormalizedWanted& wanted, const PassOptions& options)
      : Layer(call, in, extras),
        extras_(extras),
        saved_(saved),
        wanted_(wanted),
        options_(options),
        record_(l, normalized, saved.gates),
        d_output_(contiguous(d.d_output)),
        d_cells_(contiguous(d.d_cells)),
        h0_(in.h0.contiguous()),
        restored_(l.restored()),
        sums_(l.restored_sums(wanted[1], wanted[2])),
        carry_(state_gradient(d.d_h_n, {call.batch, l.output}, l.wide)),
        delta_(at::empty({call.rows, call.gates * l.hidden}, l.wide)),
        delta_u_(at::empty({call.rows, call.gates * l.hidden}, l.stored)) {
    if (l.lstm) {
      c0_ = in.c0->to(call.compute).contiguous();
      dc_ = state_gradient(d.d_c_n, {call.batch, l.hidden}, l.wide);
    }
    if (l.lstm || l.gru) extra_ = at::empty({call.rows, l.hidden}, l.wide);
    if (wanted[4]) previous_ = at::empty({call.rows, l.hidden}, l.stored);
    if (extras[4] && wanted[12]) previous_c_ = at::empty({call.rows, l.hidden}, l.wide);
    if (in.hold_c && (wanted[10] || wanted[12])) made_ = at::empty({call.rows, l.hidden}, l.wide);
  }

  NormalizedGradients run() {
    run_steps();
    return gradients();
  }

 private:
  void run_steps() const {
    const long hidden = l.hidden;
    const Tensor product = at::empty({l.call.batch, hidden}, l.wide);
    const Tensor weights_hh = l.recurrent();
    const Tensor of_product = delta_u_.narrow(1, 0, weights_hh.size(0));
    Tensor second_product, second_weights, of_second;
    if (l.reset_before) {
      second_product = at::empty({l.call.batch, hidden}, l.wide);
      second_weights = l.in.w_hh.narrow(0, 2 * hidden, hidden);
      of_second = delta_u_.narrow(1, 2 * hidden, hidden);
    }
    cuda::NormalizedBackward p{};
    p.hidden = hidden;
    p.weights = weights;
    p.product = product.const_data_ptr();
    if (l.reset_before) p.second_product = second_product.const_data_ptr();
    p.h0 = h0_.const_data_ptr();
    p.c0 = RowPointer(c0_)[0];
    p.restored = {RowPointer(restored_.h)[0], RowPointer(restored_.c)[0]};
    p.restored_sums = {RowPointer(sums_.delta)[0], RowPointer(sums_.h)[0], RowPointer(sums_.c)[0]};
    p.carry = carry_.mutable_data_ptr();
    p.dc = RowPointer(dc_)[0];
    p.clip = options_.clip;
    p.limit = options_.limit;
    OptionalTensor norms;
    if (options_.dh_norms.defined()) norms = options_.dh_norms.view({l.call.rows, 1});
    const RowPointer norm_rows(norms);
    const RecordRows records(record_);
    const RowPointer h_rows(l.as_rows(saved_.states)), cell_rows(saved_.cells),
        d_output_rows(d_output_), d_cells_rows(d_cells_), delta_rows(delta_), extra_rows(extra_),
        delta_u_rows(delta_u_), previous_rows(previous_), previous_c_rows(previous_c_),
        x_rows(record_.x), made_rows(made_);
    for (long i = l.time.count - 1; l.call.rows && i >= 0; i--) {
      const long t = l.time.at(i), at = l.time.begin(t), count = l.time.rows(t),
                 before = l.time.previous(t);
      const long before_at = l.time.exists(before) ? l.time.begin(before) : 0;
      p.next = p.rows;  // none at first
      p.rows = l.rows(t, count);
      p.previous_count = l.time.carried(t);
      p.record = records[at];
      p.h = h_rows[at];
      p.cells = cell_rows[at];
      p.h_before = h_rows[before_at];
      p.cells_before = cell_rows[before_at];
      p.d_h = d_output_rows[at];
      p.d_cells = d_cells_rows[at];
      p.delta = delta_rows[at];
      p.extra = extra_rows[at];
      p.delta_u = delta_u_rows[at];
      p.previous = previous_rows[at];
      p.previous_c = previous_c_rows[at];
      p.norms = norm_rows[at];
      p.x = x_rows[at];
      p.made = made_rows[at];
      p.zoneout = l.zoneout(at);
      cuda::normalized_backward(l.call.kind, l.storage, 0, p, scope.stream());
      if (l.reset_before) {
        multiply(first_rows(second_product, count), of_second.narrow(0, at, count), second_weights);
        cuda::normalized_backward(l.call.kind, l.storage, 1, p, scope.stream());
      }
      multiply(first_rows(product, count), of_product.narrow(0, at, count), weights_hh);
    }
    p.next = p.rows;
    p.rows.count = 0;
    if (l.call.rows) cuda::normalized_backward(l.call.kind, l.storage, 0, p, scope.stream());
  }

  NormalizedGradients gradients() const {
    const long hidden = l.hidden;
    NormalizedGradients out;
    const bool add = !options_.sums.empty();
    const auto give = [&](int i, const auto& gradient) {
      if (!wanted_[i]) return;
      if (add && i >= kFirstWeight)
        out[i] = options_.sums[i - kFirstWeight]->add_(gradient());
      else
        out[i] = add ? gradient() : gradient().to(l.call.dtype);
    };
    give(1, [&] { return l.d_h0(carry_, sums_); });
    if (l.lstm) give(2, [&] { return l.d_c0(*dc_, sums_); });
    if (wanted_[0] || wanted_[3]) {
      const Tensor delta_x = input_side();
      give(0, [&] {
        Tensor dx = at::empty(l.call.laid_out(l.input), l.stored);
        multiply(l.as_rows(dx), delta_x, l.in.w_ih);
        return dx;
      });
      give(3, [&] { return product(delta_x.t(), l.as_rows(l.in.input)); });
    }
    give(4, [&] { return recurrent_weights(); });
    if (l.in.b_ih) give(5, [&] { return over_rows(delta_); });
    const bool hidden_wanted = (l.in.b_hh && wanted_[6]) || wanted_[9];
    const Tensor of_hidden = hidden_wanted ? hidden_side() : Tensor();
    if (l.in.b_hh) give(6, [&] { return over_rows(of_hidden); });
    if (normalized) {
      give(8, [&] { return over_rows(delta_, *record_.x); });
      give(9, [&] { return over_rows(of_hidden, *record_.u); });
    }
    if (extras_[2])
      give(10, [&] {
        const Tensor mean = record_.cell->narrow(1, 0, 1), scale = record_.cell->narrow(1, 1, 1);
        return over_rows(*extra_, at::mul(at::sub(made(), mean), scale));
      });
    if (extras_[3]) give(11, [&] { return over_rows(*extra_); });
    if (extras_[4])
      give(12, [&] {
        const auto gate = [&](long k) { return delta_.narrow(1, k * hidden, hidden); };
        return at::cat({over_rows(gate(0), *previous_c_), over_rows(gate(1), *previous_c_),
                        over_rows(gate(3), made())});
      });
    return out;
  }

  static Tensor over_rows(const Tensor& delta) { return at::sum(delta, at::IntArrayRef{0}); }
  static Tensor over_rows(const Tensor& delta, const Tensor& values) {
    return over_rows(at::mul(delta, values));
  }

  // The LSTM's c, as it was before zoneout.
  Tensor made() const { return made_ ? *made_ : l.as_rows(*saved_.cells); }

  // Not rounded where it is to be added to a sum.
  Tensor product(const Tensor& a, const Tensor& b) const {
    const Tensor out = at::empty({a.size(0), b.size(1)}, options_.sums.empty() ? l.stored : l.wide);
    multiply(out, a, b);
    return out;
  }

  // dL/d(W x)
  Tensor input_side() const {
    if (!normalized) return delta_.to(l.call.dtype);
    const Tensor to = at::empty(delta_.sizes(), l.stored);
    for (size_t k = 0; k < groups(); k++)
      cuda::normalize_rows_backward(
          l.storage,
          {group(l.call.rows, k), delta_.const_data_ptr(), weights.gain_ih,
           record_.x->const_data_ptr(), record_.x_scale->const_data_ptr(), to.mutable_data_ptr()},
          scope.stream());
    return to;
  }
  // dL/d of what is added to W x and its bias.
  Tensor hidden_side() const {
    return l.gru ? at::cat({delta_.narrow(1, 0, 2 * l.hidden), *extra_}, 1) : delta_;
  }
  Tensor recurrent_weights() const {
    if (!l.reset_before) return product(delta_u_.t(), *previous_);
    const long hidden = l.hidden;
    const Tensor reset = record_.gates->narrow(1, 0, hidden);
    const Tensor middle = at::mul(reset, *previous_).to(l.call.dtype);
    return at::cat({product(delta_u_.narrow(1, 0, 2 * hidden).t(), *previous_),
                    product(delta_u_.narrow(1, 2 * hidden, hidden).t(), middle)});
  }

  const ExtraTensors& extras_;
  const Saved& saved_;
  const NormalizedWanted& wanted_;
  const PassOptions& options_;
  const Records record_;
  const OptionalTensor d_output_, d_cells_;
  const Tensor h0_;
  const Restored restored_;
  const RestoredSums sums_;
  const Tensor carry_, delta_, delta_u_;
  OptionalTensor c0_, dc_, extra_, previous_, previous_c_, made_;
};

}  // namespace

LayerOutputs cuda_normalized_forward(const Call& call, const LayerInputs& in,
                                     const ExtraTensors& extras, bool save,
                                     const PassOptions& options) {
  return Forward(call, in, extras, save, options).run();
}

NormalizedGradients cuda_normalized_backward(const Call& call, const LayerInputs& in,
                                             const ExtraTensors& extras, const Saved& saved,
                                             const LayerGradients& d,
                                             const NormalizedWanted& wanted,
                                             const PassOptions& options) {
  TORCH_CHECK(saved.isa == kCuda, "rnn_ext: what '", saved.isa,
              "' saved is not for the CUDA kernels");
  return Backward(call, in, extras, saved, d, wanted, options).run();
}

}  // namespace rnn_ext
