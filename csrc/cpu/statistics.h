// Stage 4 along one row of affinities: the sums that statistics are made from.
#pragma once

#include "../stages.h"
#include "vector.h"

namespace affkd::AFFKD_NAMESPACE {

constexpr double kInfinity = __builtin_inf();
template <typename T>
constexpr double kEpsilon = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;

// What a row's statistic is made from; what the fields mean depends on the normalization.
struct RowState {
  double first;   // a sum, or the maximum
  double second;  // a count, or the sum of exponentials relative to the maximum
};

inline RowState empty_state(Normalization normalization) {
  const bool maximum = normalization == Normalization::max ||
                       normalization == Normalization::max_detached ||
                       normalization == Normalization::softmax;
  return {maximum ? -kInfinity : 0.0, 0.0};
}

// sum over j of term(a_j), term(a_j) being a vector
template <typename T, typename Term>
inline double sum_row(const T* a, int64_t n, const MaskLane<T>* mask, Term term) {
  double total = 0;
  for_runs<T>(n, mask, [&](int64_t first, int64_t count, const MaskLane<T>* part) {
    Vector<T> sum = {};
    for_lanes<T>(count, part,
                 [&](int64_t j, auto lanes) { sum += keep(lanes, term(load(a + first + j))); });
    total += sum_lanes<T>(sum);
  });
  return total;
}

// sum_j a_j b_j in double precision: what follows from such sums are differences in which all but
// the last digits cancel
template <typename T>
inline double dot_row(const T* a, const T* b, int64_t n, const MaskLane<T>* mask) {
  DoubleVector sum = {};
  const int64_t whole = mask == nullptr ? n / kLanes<T> * kLanes<T> : 0;
  for (int64_t j = 0; j < whole; j += kLanes<double>) {
    sum += widen(a + j) * widen(b + j);
  }
  for_lanes<T>(n - whole, mask, [&](int64_t j, auto lanes) {
    sum += wide_product(keep(lanes, load(a + whole + j)), keep(lanes, load(b + whole + j)));
  });
  return sum_lanes<double>(sum);
}

template <typename T>
inline double max_row(const T* a, int64_t n, const MaskLane<T>* mask) {
  const Vector<T> lowest = splat<Vector<T>>(-kInfinity);
  Vector<T> largest = lowest;
  for_lanes<T>(n, mask, [&](int64_t j, auto lanes) {
    const Vector<T> x = keep_or(lanes, load(a + j), lowest);
    largest = largest < x ? x : largest;
  });
  return max_lanes<T>(largest);
}

template <typename T>
inline void add_maximum(const T* a, int64_t n, const MaskLane<T>* mask, RowState& state) {
  using V = Vector<T>;
  const double largest = max_row(a, n, mask);
  if (largest < state.first || largest == -kInfinity) {
    return;
  }
  const V maximum = splat<V>(largest);
  const double ties =
      sum_row(a, n, mask, [=](V x) { return x == maximum ? splat<V>(1) : splat<V>(0); });
  state.second = ties + (largest == state.first ? state.second : 0.0);
  state.first = largest;
}

// `first` is the maximum, `second` the sum of exp((a - maximum) / tau)
template <typename T>
inline void add_exponentials(const T* a, int64_t n, const MaskLane<T>* mask, T inverse_tau,
                             RowState& state) {
  using V = Vector<T>;
  const double largest = max_row(a, n, mask);
  const double maximum = largest > state.first ? largest : state.first;
  if (maximum == -kInfinity) {
    return;
  }
  const V scale = splat<V>(inverse_tau), peak = splat<V>(maximum);
  const double sum = sum_row(a, n, mask, [=](V x) { return exponential((x - peak) * scale); });
  state.second = sum + state.second * __builtin_exp((state.first - maximum) * inverse_tau);
  state.first = maximum;
}

template <typename T>
inline void add_statistic(Normalization normalization, const T* a, int64_t n,
                          const MaskLane<T>* mask, T inverse_tau, RowState& state) {
  using V = Vector<T>;
  switch (normalization) {
    case Normalization::none:
      return;
    case Normalization::row_l2:
    case Normalization::frobenius:
    case Normalization::frobenius_centered:
      state.first += dot_row(a, a, n, mask);
      return;
    case Normalization::row_l1:
      state.first += sum_row(a, n, mask, [](V x) { return absolute(x); });
      return;
    case Normalization::row_sum:
    case Normalization::mean_all:
    case Normalization::mean_offdiag:
      state.first += sum_row(a, n, mask, [](V x) { return x; });
      return;
    case Normalization::mean_positive: {
      const V zero = {};
      state.first += sum_row(a, n, mask, [=](V x) { return x > zero ? x : zero; });
      state.second += sum_row(a, n, mask, [=](V x) { return x > zero ? splat<V>(1) : zero; });
      return;
    }
    case Normalization::max:
    case Normalization::max_detached:
      return add_maximum(a, n, mask, state);
    case Normalization::softmax:
      return add_exponentials(a, n, mask, inverse_tau, state);
  }
}

// Adds a row to the sums of its row and, where wanted, of the columns it crosses.
template <typename T>
inline void add_to_sums(const T* row, int64_t n, double* row_sum, double* column_sums) {
  *row_sum += sum_row<T>(row, n, nullptr, [](Vector<T> x) { return x; });
  if (column_sums != nullptr) {
    for (int64_t j = 0; j < n; ++j) {
      column_sums[j] += row[j];
    }
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
