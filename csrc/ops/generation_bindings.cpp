// The part of rnn_ext._C that generates tokens.
#include <ATen/ops/from_blob.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"
#include "generate.h"

namespace rnn_ext {
namespace {

namespace py = pybind11;
using at::Tensor;

std::unique_ptr<TokenChoice> make_choice(int64_t batch, int64_t tokens, int64_t steps,
                                         double temperature, int64_t top_k, double top_p,
                                         int64_t eos, bool log_probs, int64_t beams,
                                         double length_penalty,
                                         std::optional<at::Generator> generator) {
  const ChoiceOptions options{batch, tokens, steps,     temperature, top_k,
                              top_p, eos,    log_probs, beams,       length_penalty};
  return beams > 1 ? make_beam_search(options) : make_sampler(options, std::move(generator));
}

// (tokens [rows], parents [rows] or None), or None when it is over.
py::object choose(TokenChoice& choice, const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2 && logits.size(0) == choice.rows() &&
                  logits.size(1) == choice.options().tokens,
              "generate: the head gave logits of shape ", logits.sizes(), ", expected [",
              choice.rows(), ", ", choice.options().tokens, "]");
  const Tensor plain =
      logits.to(at::kCPU, logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)
          .contiguous();
  const bool more = plain.scalar_type() == at::kDouble
                        ? choice.choose(plain.const_data_ptr<double>(), plain.size(1))
                        : choice.choose(plain.const_data_ptr<float>(), plain.size(1));
  choice.check();
  if (!more) return py::none();
  const auto as_tensor = [&](const int64_t* values) {
    return at::from_blob(const_cast<int64_t*>(values), {choice.rows()}, at::kLong).clone();
  };
  const int64_t* parents = choice.parents();
  return py::make_tuple(as_tensor(choice.tokens()),
                        parents ? py::cast(as_tensor(parents)) : py::object(py::none()));
}

py::tuple chosen(const TokenChoice& choice) {
  const Chosen c = choice.chosen();
  return py::make_tuple(c.tokens, c.lengths, c.log_probs);
}

void generate_tokens(const std::string& cell, const Tensor& embedding,
                     const std::vector<std::vector<OptionalTensor>>& layers, const Tensor& head,
                     const OptionalTensor& head_bias, TokenChoice& choice, const Tensor& h,
                     const OptionalTensor& c, const OptionalTensor& first) {
  LanguageModel model{cell, embedding, {}, {}, head, head_bias};
  for (const std::vector<OptionalTensor>& t : layers) {
    TORCH_CHECK(t.size() == 5 || t.size() == 8, "generate: a layer has 5 tensors, or 8 quantized");
    if (t.size() == 5)
      model.layers.push_back({t[0], t[1], t[2], t[3], t[4]});
    else
      model.quantized.push_back({t[0].value(), t[1].value(), t[2], t[3], t[4], t[5], t[6], t[7]});
  }
  choice.poll = [] {
    py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals()) throw py::error_already_set();
  };
  py::gil_scoped_release release;
  generate(model, choice, h, c, first);
}

}  // namespace

void define_generation(py::module_& m) {
  py::class_<TokenChoice>(m, "TokenChoice", py::module_local())
      .def(py::init(&make_choice))
      .def("choose", &choose)
      .def("chosen", &chosen);
  m.def("generate", &generate_tokens);
}

}  // namespace rnn_ext
