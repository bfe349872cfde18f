// The loop of a recurrent language model: embedding, layers, head, choice of a token, and again. One
// team runs all of it, with a barrier after each product and around the choice; weights are packed
// and memory is taken once. W x of the first layer depends on the token alone: it is computed when a
// token comes up for the first time, and kept.
#pragma once
#include "forward.h"
#include "generate_problem.h"
#include "quantized.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value>
Steps one_step(const GenerateArgs<value>& a) {
  return {1, a.rows, a.offsets, false};
}

template <class value>
Sizes sizes_of(const GenerateArgs<value>& a, long layer) {
  return {layer ? a.sizes.output : a.sizes.input, a.sizes.hidden, a.sizes.output};
}

// A layer with what it is called with, step after step.
template <class value_, class Cell>
struct DenseLayer {
  using value = value_;
  ForwardArgs<value> args;
  Forward<value, Cell, false> loop;

  DenseLayer(const GenerateArgs<value>& a, long layer)
      : args(arguments(a, layer)), loop(args, /*stepwise=*/true) {}

 private:
  static ForwardArgs<value> arguments(const GenerateArgs<value>& a, long layer) {
    ForwardArgs<value> args{};
    args.steps = one_step(a);
    args.sizes = sizes_of(a, layer);
    args.weights = a.weights[layer];
    args.plan = a.plan;
    return args;
  }
};

template <class Cell>
struct QuantizedLayer {
  using value = float;
  QuantizedArgs args;
  QuantizedForward<Cell> loop;

  QuantizedLayer(const GenerateArgs<float>& a, long layer)
      : args(arguments(a, layer)), loop(args) {}

 private:
  static QuantizedArgs arguments(const GenerateArgs<float>& a, long layer) {
    QuantizedArgs args = a.quantized[layer];
    args.steps = one_step(a);
    args.sizes = sizes_of(a, layer);
    args.threads = a.plan.threads;
    args.vnni = a.vnni;
    return args;
  }
};

template <class Layer>
class Generation {
  using value = typename Layer::value;
  using real = Real<value>;
  static constexpr long head_width = PlainPanel::vectors * kLanes<value>;

 public:
  explicit Generation(const GenerateArgs<value>& args)
      : a_(args),
        head_{args.head, args.logits, args.sizes.output, nullptr},
        stride_(head_.count() * head_width) {}

  void run() {
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    begin();
    run_team(a_.plan.threads, [this](const Member& member) { work(member); });
  }

 private:
  void lay_out(Arena& arena) {
    layers_ = arena.take<Layer>(a_.layers);
    for (long l = 0; l < a_.layers; l++) {
      Layer probe(a_, l);
      Layer& layer = layers_ ? *new (layers_ + l) Layer(a_, l) : probe;
      layer.loop.lay_out(arena);
      width_ = layer.loop.gates_width();
    }
    const Sizes& s = a_.sizes;
    x_ = arena.take<value>(a_.rows * s.input);
    h_ = arena.take<value>(a_.layers * a_.rows * s.output);
    c_ = arena.take<real>(a_.c ? a_.layers * a_.rows * s.hidden : 0);
    logits_ = arena.take<real>(a_.rows * stride_);
    if (a_.plan.pack)
      head_.packed = arena.take<value>(Panels<value, PlainPanel>::size(a_.logits, s.output));
    projections_ = arena.take<real>(a_.kept_projections * width_);
    place_of_ = arena.take<int32_t>(a_.vocabulary);
    places_ = arena.take<int32_t>(a_.rows);
  }

  void begin() {
    const Sizes& s = a_.sizes;
    for (long l = 0; l < a_.layers; l++) {
      auto& args = layers_[l].args;
      args.out = a_.h + l * a_.rows * s.output;  // the newest state
      args.h0 = h_ + l * a_.rows * s.output;
      if (a_.c) args.c = a_.c + l * a_.rows * s.hidden;
      layers_[l].loop.pack_bias();
    }
    forget_projections();
    if (a_.first) feed(a_.first, nullptr);
  }

  void work(const Member& member) {
    for (long l = 0; l < a_.layers; l++) layers_[l].loop.pack_weights(member);
    if (head_.packed) head_.pack(member.begin(head_.count()), member.end(head_.count()));
    member.wait();
    if (a_.first) step(member);
    for (;;) {
      compute_logits(member);
      member.wait();
      if (member.id == 0) {
        over_ = !a_.chooser->choose(logits_, stride_);
        if (!over_) feed(a_.chooser->tokens(), a_.chooser->parents());
      }
      member.wait();
      if (over_) return;
      step(member);
    }
  }

  // Reads the newest state of the last layer; writes this member's columns of logits_.
  void compute_logits(const Member& member) const {
    const long width = a_.sizes.output, p1 = member.end(head_.count());
    const value* h = layers_[a_.layers - 1].args.out;
    const int most = tile_rows<value, PlainPanel::vectors>(width);
    for (long p = member.begin(head_.count()); p < p1; p++) {
      for_row_blocks(0, a_.rows, most, [&](long first, int count) {
        head_.multiply(p, count, h + first * width, width,
                       logits_ + first * stride_ + p * head_width, stride_, false);
      });
      if (!a_.head_bias) continue;
      const long begin = p * head_width, end = begin + head_width;
      for (long r = 0; r < a_.rows; r++)
        for (long j = begin; j < end && j < a_.logits; j++)
          logits_[r * stride_ + j] += a_.head_bias[j];
    }
  }

  // All layers, from the tokens last fed. Every member; ends with a barrier.
  void step(const Member& member) const {
    project_tokens(member);
    layers_[0].loop.step(member);
    for (long l = 1; l < a_.layers; l++) {
      layers_[l].loop.project(member);
      layers_[l].loop.step(member);
    }
  }

  // Gates of the first layer = W x, this member's columns.
  void project_tokens(const Member& member) const {
    const auto& layer = layers_[0].loop;
    const long begin = layer.gates_begin(member),
               bytes = (layer.gates_end(member) - begin) * sizeof(real);
    if (unknown_) layer.project(member);
    for (long r = 0; r < a_.rows; r++) {
      real* gates = layer.gates() + r * width_ + begin;
      real* kept = projections_ + places_[r] * width_ + begin;
      std::memcpy(unknown_ ? kept : gates, unknown_ ? gates : kept, bytes);
    }
  }

  // Makes the newest states those to start from, in the order of parents, and the embeddings of
  // tokens the input. One member, while the others wait.
  void feed(const int64_t* tokens, const int64_t* parents) {
    const Sizes& s = a_.sizes;
    for (long l = 0; l < a_.layers; l++) {
      auto& args = layers_[l].args;
      value* from = const_cast<value*>(args.h0);
      if (parents) {
        gather(args.out, s.output, parents, from);
        if (a_.c) {
          real* other = args.c == c_of(c_, l) ? c_of(a_.c, l) : c_of(c_, l);
          gather(args.c, s.hidden, parents, other);
          args.c = other;
        }
      } else {
        args.h0 = args.out;
        args.out = from;
      }
      args.x = l ? layers_[l - 1].args.out : x_;
    }
    place(tokens);
    if (!unknown_) return;
    for (long r = 0; r < a_.rows; r++)
      std::memcpy(x_ + r * s.input, a_.embedding + tokens[r] * s.input, s.input * sizeof(value));
  }

  real* c_of(real* all, long layer) const { return all + layer * a_.rows * a_.sizes.hidden; }

  template <class T>
  void gather(const T* from, long width, const int64_t* rows, T* to) const {
    for (long r = 0; r < a_.rows; r++)
      std::memcpy(to + r * width, from + rows[r] * width, width * sizeof(T));
  }

  // places_[r]: where the projection of row r's token is or will be kept; unknown_: one is not yet.
  void place(const int64_t* tokens) {
    long added = 0;
    for (long r = 0; r < a_.rows; r++) added += place_of_[tokens[r]] < 0;
    unknown_ = added > 0;
    if (kept_ + added > a_.kept_projections) {
      forget_projections();
      unknown_ = true;
    }
    for (long r = 0; r < a_.rows; r++) {
      int32_t& place = place_of_[tokens[r]];
      if (place < 0) place = static_cast<int32_t>(kept_++);
      places_[r] = place;
    }
  }

  void forget_projections() {
    for (long v = 0; v < a_.vocabulary; v++) place_of_[v] = -1;
    kept_ = 0;
  }

  const GenerateArgs<value>& a_;
  Layer* layers_ = nullptr;
  Panels<value, PlainPanel> head_;
  const long stride_;  // of logits_
  long width_ = 0;     // of a row of gates
  long kept_ = 0;
  bool unknown_ = false, over_ = false;
  value *x_ = nullptr, *h_ = nullptr;
  real *c_ = nullptr, *logits_ = nullptr, *projections_ = nullptr;
  int32_t *place_of_ = nullptr, *places_ = nullptr;
};

}  // namespace rnn_ext::RNN_EXT_TARGET
