// Zoneout (docs/math.md, section 9), around a cell of cell_steps.h: with z what is held of a unit,
//   h = z h' + (1 - z) h~        c = z c' + (1 - z) c~        h~ and c~ are what the cell makes
//   dL/dh~ = (1 - z) dL/dh       z dL/dh is added to dL/dh', and so for c
#pragma once
#include "cell_steps.h"

namespace rnn_ext::RNN_EXT_TARGET {

template <class value>
RNN_EXT_INLINE Vec<value> held(const Hold& hold, long at, int lanes) {
  return hold.units ? load_flags<value>(hold.units + at, lanes)
                    : Real<value>(hold.share) + Vec<value>{};
}

template <class value>
RNN_EXT_INLINE Vec<value> mixed(Vec<value> z, Vec<value> before, Vec<value> made) {
  return z * before + (1 - z) * made;
}

template <class value, class Cell>
struct Zoned {
  using V = Vec<value>;
  static constexpr int last = Cell::phases - 1;

  template <int phase, bool save>
  RNN_EXT_INLINE static void forward(const ForwardView<value>& v, long row, long block, int lanes,
                                     const V* product) {
    const long unit = block * kLanes<value>;
    if constexpr (Cell::has_cell_state && phase == 0) {
      const long at = row * v.hidden + unit;
      const V before = load(v.c_prev + at, lanes);  // which may lie where c~ comes to lie
      Cell::template forward<phase, save>(v, row, block, lanes, product);
      const V z = held<value>(v.hold_c, at, lanes);
      store(v.c + at, mixed<value>(z, before, load(v.c + at, lanes)), lanes);
    } else {
      Cell::template forward<phase, save>(v, row, block, lanes, product);
    }
    if constexpr (phase == last) {
      const long at = row * v.output + unit;
      const V made = load(v.h + at, lanes), z = held<value>(v.hold_h, at, lanes);
      if constexpr (save && !Cell::keeps_gates)
        if (v.middle) store(v.middle + at, made, lanes);
      store(v.h + at, mixed<value>(z, load(v.h_prev + at, lanes), made), lanes);
    }
  }

  // A unit that is held altogether has no delta, so there it does not matter that v.h is not h~.
  template <int phase>
  RNN_EXT_INLINE static void backward(const BackwardView<value>& v, long row, long block, int lanes,
                                      V product) {
    const long unit = block * kLanes<value>;
    const long of_h = row * v.output + unit, of_c = row * v.hidden + unit;
    BackwardView<value> own = v;
    [[maybe_unused]] V held_h{}, held_c{};
    if constexpr (phase == 0) {
      const V dh = upstream(v, row, unit, lanes, product);
      held_h = held<value>(v.hold_h, of_h, lanes) * dh;
      product = dh - held_h;
      own.add_carry = false;
      own.d_out = nullptr;
      if (!Cell::keeps_gates && v.middle) own.h = v.middle;
    }
    if constexpr (Cell::has_cell_state && phase == last) {
      V dc = load(v.dc + of_c, lanes);
      if (v.d_c) dc += load(v.d_c + of_c, lanes);
      held_c = held<value>(v.hold_c, of_c, lanes) * dc;
      store(v.dc + of_c, dc - held_c, lanes);
      own.d_c = nullptr;
    }
    if constexpr (Cell::has_cell_state)
      Cell::template backward<phase, true>(own, row, block, lanes, product);
    else
      Cell::template backward<phase>(own, row, block, lanes, product);
    if constexpr (phase == 0) {
      if constexpr (Cell::carries) held_h += load(v.carry + of_h, lanes);
      store(v.carry + of_h, held_h, lanes);
    }
    if constexpr (Cell::has_cell_state && phase == last)
      store(v.dc + of_c, load(v.dc + of_c, lanes) + held_c, lanes);
  }
};

}  // namespace rnn_ext::RNN_EXT_TARGET
