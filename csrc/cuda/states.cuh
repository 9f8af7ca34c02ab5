// What the statistic of a whole matrix is made from: the sums of a tile, of a row, of all of them.
#pragma once

#include "affinity.cuh"
#include "collectives.cuh"

namespace affkd::cuda {

template <typename T>
constexpr double kEpsilon = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;

AFFKD_DEVICE double square(double x) {
  return x * x;
}

AFFKD_DEVICE State empty_state(Normalization kind) {
  return {is_maximum(kind) ? -static_cast<double>(INFINITY) : 0.0, 0.0, 0};
}

// A maximum counts its ties and knows the first of them, and NaN is one that stays.
AFFKD_DEVICE State join_states(Normalization kind, State a, State b) {
  if (!is_maximum(kind)) {
    return {a.first + b.first, a.second + b.second, 0};
  }
  const double largest = b.first > a.first || b.first != b.first ? b.first : a.first;
  const double ties = (a.first == largest ? a.second : 0) + (b.first == largest ? b.second : 0);
  const bool of_b = b.first == largest && (a.first != largest || b.place < a.place);
  return {largest, ties, of_b ? b.place : a.place};
}

// One more entry of A, which lies at `place`. Of a mean that leaves the diagonal out, `own` entries
// do not count.
AFFKD_DEVICE void add_to_state(Normalization kind, double a, bool own, int64_t place,
                               State& state) {
  switch (kind) {
    case Normalization::frobenius:
      state.first += a * a;
      return;
    case Normalization::mean_positive:
      // not `a > 0`, which NaN fails: a matrix of NaN would count as nothing
      if (!(a <= 0)) {
        state = {state.first + a, state.second + 1, 0};
      }
      return;
    case Normalization::mean_offdiag:
      if (own) {
        return;
      }
      [[fallthrough]];
    case Normalization::mean_all:
      state = {state.first + a, state.second + 1, 0};
      return;
    default:
      state = join_states(kind, state, {a, 1, place});
  }
}

// The statistic of one side of one matrix.
struct Statistic {
  double value;
  double slope_scale;  // what `statistic_slope` lacks: 1 / count of a mean, 1 / ties of a maximum
};

template <typename T>
AFFKD_DEVICE Statistic statistic_of(Normalization kind, State state) {
  if (kind == Normalization::frobenius) {
    return {square_root(state.first), 1};
  }
  if (kind == Normalization::frobenius_centered) {
    // what is left of a constant matrix is rounding
    const double norm = square_root(state.first), before = square_root(state.second);
    return {norm <= 8 * kEpsilon<T> * before ? 0 : norm, 1};
  }
  const double share = state.second > 0 ? 1 / state.second : 0;
  // nothing takes part: the maximum of nothing counts as nothing, too
  return {is_maximum(kind) ? state.first : state.first * share, share};
}

AFFKD_DEVICE State* states_of(const Params& p, bool student, int64_t n) {
  return p.work.states + ((student ? 0 : p.matrices) + n) * p.state_slots;
}

// The joint state of all slots, by all threads of a block.
AFFKD_DEVICE State block_state(const Params& p, Normalization kind, bool student, int64_t n,
                               State* scratch) {
  const State* slots = states_of(p, student, n);
  State state = empty_state(kind);
  for (int64_t slot = threadIdx.x; slot < p.state_slots; slot += kThreads) {
    state = join_states(kind, state, slots[slot]);
  }
  return block_fold(state, scratch, [=](State a, State b) { return join_states(kind, a, b); });
}

}  // namespace affkd::cuda
