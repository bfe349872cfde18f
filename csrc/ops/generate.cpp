#include "generate.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cpu/generate_problem.h"

namespace rnn_ext {
namespace {

using at::Tensor;

// As choose_plan: below this many flops in a step a team does not pay for its barriers.
constexpr double kMinFlopsForTeam = 100e3;
// As choose_plan: copying the weights pays for more rows in all than this.
constexpr int64_t kMinRowsToPack = 8;
constexpr long kUnitsPerColumn = 16;
// What is kept of the first layer's projections takes this much memory at most.
constexpr int64_t kMaxProjectionBytes = int64_t(16) << 20;

template <class value>
struct Dtypes;
template <>
struct Dtypes<float> {
  using element = float;
  static constexpr at::ScalarType values = at::kFloat, reals = at::kFloat;
};
template <>
struct Dtypes<double> {
  using element = double;
  static constexpr at::ScalarType values = at::kDouble, reals = at::kDouble;
};
template <>
struct Dtypes<BFloat16> {
  using element = at::BFloat16;
  static constexpr at::ScalarType values = at::kBFloat16, reals = at::kFloat;
};

void run(const Kernels& k, CellKind cell, const GenerateArgs<float>& args) {
  k.generate_float(cell, args);
}
void run(const Kernels& k, CellKind cell, const GenerateArgs<double>& args) {
  k.generate_double(cell, args);
}
void run(const Kernels& k, CellKind cell, const GenerateArgs<BFloat16>& args) {
  k.bfloat16->generate(cell, args);
}

void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK(t.is_cpu() && t.layout() == at::kStrided, "generate: ", name,
              " must be a plain tensor on the CPU");
  TORCH_CHECK(t.sizes() == shape, "generate: ", name, " must have shape ", shape, ", got ",
              t.sizes());
}

// The model as the kernels read it.
template <class value>
class Generator {
  using real = Real<value>;
  using Dtype = Dtypes<value>;

 public:
  Generator(const LanguageModel& model, TokenChoice& choice, const Tensor& h,
            const OptionalTensor& c, const OptionalTensor& first)
      : kind_(cell_kind(model.cell)), gates_(cell_gates(kind_)) {
    const ChoiceOptions& options = choice.options();
    args_.rows = choice.rows();
    args_.layers = std::max(model.layers.size(), model.quantized.size());
    read_sizes(model, h, c);
    offsets_[1] = args_.rows;
    args_.offsets = offsets_;
    if (model.quantized.empty())
      read_layers(model);
    else
      read_quantized(model);
    args_.vocabulary = model.embedding.size(0);
    args_.logits = model.head.size(0);
    TORCH_CHECK(args_.logits == options.tokens && args_.logits <= args_.vocabulary,
                "generate: the head gives ", args_.logits, " logits, expected ", options.tokens,
                " of at most ", args_.vocabulary, " tokens");
    args_.embedding = read(model.embedding, "embedding", {args_.vocabulary, args_.sizes.input});
    args_.head = read(model.head, "head.weight", {args_.logits, args_.sizes.output});
    if (model.head_bias) args_.head_bias = read_real(*model.head_bias, "head.bias", {args_.logits});
    if (first) args_.first = read_tokens(*first);

    const int64_t width = gates_ * args_.sizes.hidden + 256;  // with padding
    const int64_t most = kMaxProjectionBytes / (width * int64_t(sizeof(real)));
    const int64_t seen = options.steps < most ? args_.rows * (options.steps + 1) : most;
    args_.kept_projections = std::max(args_.rows, std::min({most, seen, args_.vocabulary}));
    args_.plan = plan(options.steps);
    args_.vnni = cpu_has_vnni();
    args_.chooser = &choice;
  }

  void run() const { rnn_ext::run(active_kernels(), kind_, args_); }

 private:
  void read_sizes(const LanguageModel& model, const Tensor& h, const OptionalTensor& c) {
    const bool lstm = kind_ == CellKind::kLstm;
    TORCH_CHECK(args_.layers > 0 && h.dim() == 3 && lstm == c.has_value() &&
                    (!c || c->dim() == 3) && model.embedding.dim() == 2 && model.head.dim() == 2,
                "generate: the model or its state has the wrong form");
    args_.sizes = {model.embedding.size(1), lstm ? c->size(2) : h.size(2), h.size(2)};
    check_shape("h", h, {args_.layers, args_.rows, args_.sizes.output});
    h_ = h.to(Dtype::values, false, /*copy=*/true).contiguous();
    args_.h = reinterpret_cast<value*>(h_.mutable_data_ptr<typename Dtype::element>());
    if (!c) return;
    check_shape("c", *c, {args_.layers, args_.rows, args_.sizes.hidden});
    c_ = c->to(Dtype::reals, false, /*copy=*/true).contiguous();
    args_.c = c_.template mutable_data_ptr<real>();
  }

  void read_layers(const LanguageModel& model) {
    const auto [input, hidden, output] = args_.sizes;
    const long all = gates_ * hidden;
    for (size_t l = 0; l < model.layers.size(); l++) {
      const auto& [w_ih, w_hh, b_ih, b_hh, w_hr] = model.layers[l];
      TORCH_CHECK(w_ih && w_hh && b_ih.has_value() == b_hh.has_value() &&
                      (output == hidden || w_hr.has_value()),
                  "generate: layer ", l, " lacks weights");
      Weights<value> w{};
      w.ih = read(*w_ih, "weight_ih", {all, l ? output : input});
      w.hh = read(*w_hh, "weight_hh", {all, output});
      if (b_ih) w.b_ih = read_real(*b_ih, "bias_ih", {all});
      if (b_hh) w.b_hh = read_real(*b_hh, "bias_hh", {all});
      if (w_hr) w.hr = read(*w_hr, "weight_hr", {output, hidden});
      weights_.push_back(w);
    }
    args_.weights = weights_.data();
  }

  void read_quantized(const LanguageModel& model) {
    for (size_t l = 0; l < model.quantized.size(); l++) {
      Sizes sizes = args_.sizes;
      if (l) sizes.input = sizes.output;
      quantized_.push_back(quantized_args(kind_, sizes, model.quantized[l], held_));
    }
    args_.quantized = quantized_.data();
  }

  Plan plan(int64_t steps) const {
    const auto [input, hidden, output] = args_.sizes;
    const double recurrent = 2.0 * gates_ * hidden * output * args_.layers,
                 between = 2.0 * gates_ * hidden * output * (args_.layers - 1),
                 head = 2.0 * args_.logits * output;
    const double flops = (recurrent + between + head) * args_.rows;
    const int most = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int useful = static_cast<int>(std::min(double(most), 1 + flops / kMinFlopsForTeam));
    const int columns = static_cast<int>((hidden + kUnitsPerColumn - 1) / kUnitsPerColumn);
    const int threads = std::max(1, std::min(useful, columns));
    return {threads, Split::kColumns, args_.rows * steps > kMinRowsToPack, "generation", 0};
  }

  const value* read(const Tensor& t, const char* name, at::IntArrayRef shape) {
    check_shape(name, t, shape);
    held_.push_back(t.to(Dtype::values).contiguous());
    return reinterpret_cast<const value*>(held_.back().const_data_ptr<typename Dtype::element>());
  }
  const real* read_real(const Tensor& t, const char* name, at::IntArrayRef shape) {
    check_shape(name, t, shape);
    held_.push_back(t.to(Dtype::reals).contiguous());
    return held_.back().const_data_ptr<real>();
  }
  const int64_t* read_tokens(const Tensor& tokens) {
    check_shape("first", tokens, {args_.rows});
    held_.push_back(tokens.to(at::kLong).contiguous());
    const int64_t* values = held_.back().const_data_ptr<int64_t>();
    for (long r = 0; r < args_.rows; r++)
      TORCH_CHECK_INDEX(values[r] >= 0 && values[r] < args_.vocabulary, "generate: token ",
                        values[r], " is not among the ", args_.vocabulary, " of the embedding");
    return values;
  }

  const CellKind kind_;
  const long gates_;
  GenerateArgs<value> args_{};
  int64_t offsets_[2] = {0, 0};
  Tensor h_, c_;
  std::vector<Tensor> held_;
  std::vector<Weights<value>> weights_;
  std::vector<QuantizedArgs> quantized_;
};

}  // namespace

void generate(const LanguageModel& model, TokenChoice& choice, const Tensor& h,
              const OptionalTensor& c, const OptionalTensor& first) {
  const auto with = [&](auto value) {
    if (choice.rows()) Generator<decltype(value)>(model, choice, h, c, first).run();
    choice.check();
  };
  const at::ScalarType dtype = model.embedding.scalar_type();
  if (dtype == at::kDouble) return with(double{});
  if (dtype == at::kBFloat16 && active_kernels().bfloat16) return with(BFloat16{});
  with(float{});
}

}  // namespace rnn_ext
