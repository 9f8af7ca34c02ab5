// The largest affinity in double precision. It divides every entry, so that what it loses to
// rounding is lost in all of them alike.
#pragma once

#include "tile.h"

namespace affkd::AFFKD_NAMESPACE {

// term(a_d, b_d) summed over d in double precision
template <typename T, typename Term>
inline double sum_terms(const T* a, const T* b, int64_t n, Term term) {
  constexpr int64_t lanes = kLanes<double>;
  DoubleVector sums = {};
  int64_t d = 0;
  for (; d + lanes <= n; d += lanes) {
    sums += term(widen(a + d), widen(b + d));
  }
  double sum = sum_lanes<double>(sums);
  for (; d < n; ++d) {
    sum += term(static_cast<double>(a[d]), static_cast<double>(b[d]));
  }
  return sum;
}

template <PairFunction P, typename T>
inline double exact_affinity(const Settings& settings, T scale, const T* query, const T* key,
                             int64_t dim) {
  const auto difference = [](auto a, auto b) { return (a - b) * (a - b); };
  const auto product = [](auto a, auto b) { return a * b; };
  double value;
  if constexpr (is_distance(P)) {
    const double squared = sum_terms(query, key, dim, difference);
    value = value_at_distance<P, double>(squared, scale, settings.affinity_eps);
  } else {
    const double g = sum_terms(query, key, dim, product);
    value = pair_value<P, double>(g, 0.0, 0.0, scale, settings.offset, 0.0);
  }
  const double factor = __builtin_exp(-static_cast<double>(scale));
  const double low = settings.clamped ? settings.clamp_min : -kInfinity;
  return at_least(affinity_of<P, double>(value, settings.order, factor), low);
}

// The largest affinity of row i, which has one.
template <typename T>
inline double largest_of_row(const Settings& settings, const PairRules<T>& rules,
                             const PreparedSide<T>& side, int64_t i) {
  const int64_t dim = side.keys.dim;
  const Scratch scratch;
  const T* query = side.queries.values(i, take<T>(dim));
  T* buffer = take<T>(dim);
  double largest = -kInfinity;
  with_pair_function(settings.pair, [&](auto function) {
    constexpr PairFunction P = function.get;
    for (int64_t j = 0; j < side.keys.count; ++j) {
      const bool own = rules.diagonal(i) == j;
      const bool zeroed = own && settings.diagonal == Diagonal::zero;
      if (rules.takes_part(i, j)) {
        const T* key = own && is_distance(P) ? query : side.keys.values(j, buffer);
        const double a = exact_affinity<P>(settings, side.scale, query, key, dim);
        largest = at_least(largest, zeroed ? 0.0 : a);
      }
    }
  });
  return largest;
}

}  // namespace affkd::AFFKD_NAMESPACE
