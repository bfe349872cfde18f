// The forward time loop over weights of fewer bits (as forward.h: a chunk of the input projection,
// then step by step the recurrent products and the cell on their results). Threads own panels of
// hidden units, with a barrier after each phase.
#pragma once
#include "quantized_product.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class Cell>
class QuantizedForward {
  using Gates = typename Cell::Gates;
  using First = typename Cell::First;
  static constexpr int lanes = kLanes<float>, parts = kStrip / lanes;
  static constexpr long kChunkRows = 240;  // of the input projection

 public:
  explicit QuantizedForward(const QuantizedArgs& args)
      : a_(args),
        hidden_(args.sizes.hidden),
        output_(args.sizes.output),
        input_{args.ih, hidden_, args.sizes.input},
        first_{args.hh, hidden_, output_},
        second_{args.second, args.projected ? output_ : hidden_, hidden_},
        width_(input_.count() * input_.width) {}

  void run() {
    Arena sizes;
    lay_out(sizes);
    Scratch scratch(sizes.used());
    Arena arena(scratch.data());
    lay_out(arena);
    pack_bias();
    run_team(a_.threads, [this](const Member& member) { work(member); });
  }

  // As in Forward, for a loop outside over calls of one step.
  void lay_out(Arena& arena) {
    bias_ = arena.take<float>(width_);
    hidden_bias_ = arena.take<float>(width_ / Cell::gates);
    gates_ = arena.take<float>(chunk_steps() * a_.steps.batch * width_);
    if (Cell::keeps_middle) middle_ = arena.take<float>(a_.steps.batch * hidden_);
    if (uses_digits()) {
      const long deepest = hidden_ > a_.sizes.input ? hidden_ : a_.sizes.input;
      digit_bytes_ = Digits::bytes(deepest);
      digits_ = arena.take<int8_t>(a_.threads * 2 * kDigitRows * digit_bytes_);
    }
  }

  // bias_: b_ih + b_hh, [blocks of kLanes][gates][kLanes]; a cell with split_bias keeps b_hh of its
  // last gate apart.
  void pack_bias() {
    for (long i = 0; i < width_; i++) bias_[i] = 0;
    for (long i = 0; i < width_ / Cell::gates; i++) hidden_bias_[i] = 0;
    if (!a_.b_ih) return;
    for (long block = 0; block * lanes < hidden_; block++) {
      const long unit = block * lanes, left = hidden_ - unit, n = left < lanes ? left : lanes;
      for (int g = 0; g < Cell::gates; g++) {
        const bool apart = Cell::split_bias && g == Cell::gates - 1;
        const float *ih = a_.b_ih + g * hidden_ + unit, *hh = a_.b_hh + g * hidden_ + unit;
        float* to = bias_ + (block * Cell::gates + g) * lanes;
        for (long l = 0; l < n; l++) to[l] = ih[l] + (apart ? 0.f : hh[l]);
        if (apart)
          for (long l = 0; l < n; l++) hidden_bias_[unit + l] = hh[l];
      }
    }
  }

  float* gates() const { return gates_; }
  long gates_width() const { return width_; }
  long gates_begin(const Member& m) const { return m.begin(input_.count()) * input_.width; }
  long gates_end(const Member& m) const { return m.end(input_.count()) * input_.width; }
  void pack_weights(const Member&) const {}  // they are packed
  void project(const Member& member) const {
    Digits own = digits_of(member);
    project(member, 0, 1, uses_digits() ? &own : nullptr);
  }
  void step(const Member& member) const {
    Digits own = digits_of(member);
    step(member, 0, 0, uses_digits() ? &own : nullptr);
  }

 private:
  bool uses_digits() const {
    const Sizes& s = a_.sizes;
    return kHasDigits && a_.vnni && a_.ih.scales && s.input <= kMaxDigitDepth &&
           s.hidden <= kMaxDigitDepth;
  }

  long chunk_steps() const {
    const long steps = kChunkRows / (a_.steps.batch ? a_.steps.batch : 1);
    return steps < 1 ? 1 : steps > a_.steps.count ? a_.steps.count : steps;
  }

  Digits digits_of(const Member& member) const {
    Digits own;
    own.row_bytes = digit_bytes_;
    own.planes = digits_ + member.id * 2 * kDigitRows * digit_bytes_;
    return own;
  }

  void work(const Member& member) const {
    Digits own = digits_of(member);
    Digits* digits = uses_digits() ? &own : nullptr;
    const long steps = chunk_steps();
    for (long i = 0; i < a_.steps.count; i += steps) {
      const long end = i + steps < a_.steps.count ? i + steps : a_.steps.count;
      const long low = a_.steps.reverse ? a_.steps.at(end - 1) : a_.steps.at(i);
      project(member, low, low + (end - i), digits);
      for (long j = i; j < end; j++) step(member, a_.steps.at(j), low, digits);
    }
  }

  // gates_ = x W for the steps [low, high), this member's units
  void project(const Member& member, long low, long high, Digits* digits) const {
    const long begin = a_.steps.begin(low), inputs = a_.sizes.input;
    input_.multiply(
        member.begin(input_.count()), member.end(input_.count()), false,
        a_.steps.begin(high) - begin, a_.x + begin * inputs, inputs, digits,
        [&](long p, long first, int count, const float* products) {
          for (int i = 0; i < count; i++)
            for (int v = 0; v < Gates::vectors; v++)
              for (int part = 0; part < parts; part++) {
                const long block = (p * Gates::blocks + v / Gates::gates) * parts + part;
                store(gates_ + (first + i) * width_ +
                          (block * Gates::gates + v % Gates::gates) * lanes,
                      load(products + (i * Gates::vectors + v) * kStrip + part * lanes));
              }
        });
  }

  void step(const Member& member, long t, long low, Digits* digits) const {
    const Steps& steps = a_.steps;
    const long rows = steps.rows(t), carried = steps.carried(t);
    ForwardView<float> v{};
    v.hidden = hidden_;
    v.output = output_;
    v.gates_width = width_;
    v.gates = gates_ + (steps.begin(t) - steps.begin(low)) * width_;
    v.bias = bias_;
    v.hidden_bias = hidden_bias_;
    v.h = a_.out + steps.begin(t) * output_;
    v.middle = middle_;
    v.c = a_.c;
    v.c_prev = a_.c;
    ForwardView<float> fresh = v;  // rows whose sequence begins here
    v.h_prev = a_.out + (carried ? steps.begin(steps.previous(t)) : 0) * output_;
    fresh.h_prev = a_.h0;
    phase<0>(member, t, first_, v, v.h_prev, output_, 0, carried, digits);
    phase<0>(member, t, first_, fresh, fresh.h_prev, output_, carried, rows, digits);
    member.wait();
    if constexpr (Cell::phases == 2) {
      phase<1>(member, t, second_, v, middle_, hidden_, 0, carried, digits);
      phase<1>(member, t, second_, fresh, middle_, hidden_, carried, rows, digits);
      member.wait();
    }
  }

  // Rows [r0, r1) of operand times this member's panels, and the cell on the result
  template <int phase_index, class Shape>
  void phase(const Member& member, long t, const QuantizedPanels<Shape>& panels,
             const ForwardView<float>& view, const float* operand, long operand_width, long r0,
             long r1, Digits* digits) const {
    panels.multiply(
        member.begin(panels.count()), member.end(panels.count()), t % 2, r1 - r0,
        operand + r0 * operand_width, operand_width, digits,
        [&](long p, long first, int count, const float* products) {
          for (int i = 0; i < count; i++)
            for (int b = 0; b < Shape::blocks; b++)
              for (int part = 0; part < parts; part++) {
                const long block = (p * Shape::blocks + b) * parts + part;
                const long left = panels.units - block * lanes;
                if (left <= 0) continue;
                const float* own =
                    products + (i * Shape::vectors + b * Shape::gates) * kStrip + part * lanes;
                Vec<float> product[Shape::gates];
                RNN_EXT_UNROLL
                for (int g = 0; g < Shape::gates; g++) product[g] = load(own + g * kStrip);
                Cell::template forward<phase_index, false>(
                    view, r0 + first + i, block, left < lanes ? int(left) : lanes, product);
              }
        });
  }

  const QuantizedArgs& a_;
  const long hidden_, output_;
  const QuantizedPanels<Gates> input_;
  const QuantizedPanels<First> first_;
  const QuantizedPanels<PlainPanel> second_;
  const long width_;
  long digit_bytes_ = 0;
  float *bias_ = nullptr, *hidden_bias_ = nullptr, *gates_ = nullptr, *middle_ = nullptr;
  int8_t* digits_ = nullptr;
};

}  // namespace rnn_ext::RNN_EXT_TARGET
