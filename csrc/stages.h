// The stages of an affinity loss for one pair of items: pair functions, normalization, pointwise
// losses and their derivatives. Written once, templated on the number type `V`: a scalar, or a
// short vector of them (cpu/vector.h). A stage that needs a branch takes it at compile time.
#pragma once

#include "numeric.h"
#include "settings.h"

namespace affkd::AFFKD_NAMESPACE {

// max(x, low) that lets NaN through, as a comparison with NaN is false
template <typename V>
AFFKD_INLINE V at_least(V x, V low) {
  return x < low ? low : x;
}

// 1 + z (1 + z/2 (1 + z/3 (...))), the Taylor series of exp up to z^order
template <typename V>
AFFKD_INLINE V exponential_series(V z, int64_t order) {
  using Scalar = typename Number<V>::scalar;
  V series = splat<V>(1);
  for (int64_t p = order; p > 0; --p) {
    // divided as a scalar of V's own type, as GPUs are slow at double
    series = splat<V>(1) + series * z * splat<V>(Scalar{1} / static_cast<Scalar>(p));
  }
  return series;
}

template <typename V>
AFFKD_INLINE V integer_power(V x, int64_t exponent) {
  V result = splat<V>(1);
  for (int64_t p = 0; p < exponent; ++p) {
    result = result * x;
  }
  return result;
}

// |q - k|^2; of close items the norms lose their leading digits to g exactly.
template <typename V>
AFFKD_INLINE V squared_distance(V g, V query_norm, V key_norm) {
  return (query_norm - g) + (key_norm - g);
}

// What is stored of a pair at a squared distance, which rounding may have left below 0.
template <PairFunction P, typename V>
AFFKD_INLINE V value_at_distance(V squared, V scale, V eps) {
  squared = at_least(squared, splat<V>(0));
  if constexpr (P == PairFunction::squared_distance) {
    return squared;
  } else if constexpr (P == PairFunction::distance) {
    return square_root(at_least(squared, eps));
  } else {
    return exponential(-scale * squared);
  }
}

// What is stored of a pair: the affinity itself, or for `taylor` and `power` their argument, from
// which affinity and slope both follow. Transcendental functions are paid for once.
template <PairFunction P, typename V>
AFFKD_INLINE V pair_value(V g, V query_norm, V key_norm, V scale, V offset, V eps) {
  if constexpr (P == PairFunction::linear || P == PairFunction::power) {
    return scale * g + offset;
  } else if constexpr (P == PairFunction::taylor) {
    return scale * g;
  } else {
    return value_at_distance<P>(squared_distance(g, query_norm, key_norm), scale, eps);
  }
}

// The affinity of a stored value, before any clamp.
template <PairFunction P, typename V>
AFFKD_INLINE V affinity_of(V value, int64_t order, V taylor_factor) {
  if constexpr (P == PairFunction::taylor) {
    return taylor_factor * exponential_series(value, order);
  } else if constexpr (P == PairFunction::power) {
    return integer_power(value, order);
  } else {
    return value;
  }
}

// dA / dg, or dA / dsq for a function of the distance, up to the constant `slope_factor`.
template <PairFunction P, typename V>
AFFKD_INLINE V affinity_slope(V value, int64_t order, V root_eps) {
  if constexpr (P == PairFunction::distance) {
    return value > root_eps ? splat<V>(1) / value : splat<V>(0);
  } else if constexpr (P == PairFunction::gaussian) {
    return value;
  } else if constexpr (P == PairFunction::taylor) {
    return order > 0 ? exponential_series(value, order - 1) : splat<V>(0);
  } else if constexpr (P == PairFunction::power) {
    return splat<V>(static_cast<double>(order)) * integer_power(value, order - 1);
  } else {
    return splat<V>(1);
  }
}

// What normalizing an entry of one side needs to know of the entry's row.
template <typename V>
struct Scaling {
  V multiplier;  // 1 / statistic, or 1 / tau of a softmax
  V divisor;     // the statistic; not of a softmax
  V peak;        // of a softmax, the row's maximum and log sum exp((A - peak) / tau)
  V log_sum;
  V rest;  // what rounding took from the multiplier
};

template <typename V>
struct Normalized {
  V p;
  V log_p;  // softmax only
  V rest;   // what rounding took from p, for losses of the difference s - t
};

// A loss whose slope jumps, or all but jumps, at s = t tells equal from almost equal: A / A must be
// 1 to the last bit.
AFFKD_INLINE constexpr bool needs_exact_one(Loss loss) {
  return loss == Loss::l1 || loss == Loss::smooth_l1;
}

// Where s and t nearly agree, s - t is no larger than what rounding took from either.
AFFKD_INLINE constexpr bool needs_exact_difference(Loss loss) {
  return loss == Loss::mse || loss == Loss::smooth_l1;
}

// The difference comes first: it is exact near the peak, however large the affinities are.
template <typename V>
AFFKD_INLINE V log_softmax(V affinity, Scaling<V> row) {
  return (affinity - row.peak) * row.multiplier - row.log_sum;
}

template <Loss L, bool softmax, typename V>
AFFKD_INLINE Normalized<V> normalize(V affinity, Scaling<V> row) {
  if constexpr (softmax) {
    const V log_p = log_softmax(affinity, row);
    return {exponential(log_p), log_p, V{}};
  } else if constexpr (L == Loss::l1) {
    return {affinity / row.divisor, V{}, V{}};
  } else {
    const V p = rounded_product(affinity, row.multiplier);
    if constexpr (needs_exact_difference(L)) {
      const V rest = product_rest(affinity, row.multiplier, p) + affinity * row.rest;
      if constexpr (needs_exact_one(L)) {
        const auto is_one = affinity == row.divisor;
        return {is_one ? splat<V>(1) : p, V{}, is_one ? V{} : rest};
      } else {
        return {p, V{}, rest};
      }
    } else {
      return {p, V{}, V{}};
    }
  }
}

template <typename V>
struct Guards {
  V beta;
  V log_eps;
};

// 1 / beta, finite also where beta is 0 or subnormal: infinity times a difference of 0 is NaN
template <typename V>
AFFKD_INLINE V inverse_beta(Guards<V> guards) {
  const V inverse = splat<V>(1) / guards.beta;
  const V largest = splat<V>(Ieee<typename Number<V>::scalar>::largest);
  return inverse < largest ? inverse : largest;
}

// log t - log s; outside a softmax both are guarded by eps, and the difference of the logarithms
// is the logarithm of the quotient, which keeps its digits where s and t nearly agree.
template <bool softmax, typename V>
AFFKD_INLINE V log_difference(Normalized<V> s, Normalized<V> t, Guards<V> guards) {
  if constexpr (softmax) {
    return t.log_p - s.log_p;
  } else {
    return log_ratio(t.p + guards.log_eps, s.p + guards.log_eps);
  }
}

template <Loss L, typename V>
AFFKD_INLINE V difference_of(Normalized<V> s, Normalized<V> t) {
  const V difference = s.p - t.p;
  return needs_exact_difference(L) ? difference + (s.rest - t.rest) : difference;
}

// `balanced` is 1 where s and t both sum to 1 along the row, else 0. There a divergence may
// subtract t - s, which sums to 0: it turns every term into one that vanishes to second order, so
// that nothing is left of the rounding of the two normalizations, which for s close to t is larger
// than the loss.
template <Loss L, bool softmax, typename V>
AFFKD_INLINE V loss_value(Normalized<V> s, Normalized<V> t, Guards<V> guards, V balanced) {
  const V difference = difference_of<L>(s, t);
  if constexpr (L == Loss::mse) {
    return difference * difference;
  } else if constexpr (L == Loss::l1) {
    return absolute(difference);
  } else if constexpr (L == Loss::smooth_l1) {
    const V size = absolute(difference);
    const V half = splat<V>(0.5);
    const V quadratic = half * difference * difference * inverse_beta(guards);
    return size < guards.beta ? quadratic : size - half * guards.beta;
  } else if constexpr (L == Loss::cross_entropy) {
    return -t.p * s.log_p;
  } else {
    const V logs = log_difference<softmax>(s, t, guards);
    if constexpr (L == Loss::kl_forward) {
      return t.p * logs + balanced * difference;
    } else if constexpr (L == Loss::kl_reverse) {
      return -s.p * logs - balanced * difference;
    } else {
      return -difference * logs;
    }
  }
}

// dl / ds; for a softmax s * dl / ds, in which no division is left.
template <Loss L, bool softmax, typename V>
AFFKD_INLINE V loss_slope(Normalized<V> s, Normalized<V> t, Guards<V> guards) {
  const V difference = difference_of<L>(s, t);
  const V factor = softmax ? s.p : splat<V>(1);
  if constexpr (L == Loss::mse) {
    return factor * (difference + difference);
  } else if constexpr (L == Loss::l1) {
    return factor * sign(difference);
  } else if constexpr (L == Loss::smooth_l1) {
    const V linear = difference * inverse_beta(guards);
    return factor * (absolute(difference) < guards.beta ? linear : sign(difference));
  } else if constexpr (L == Loss::cross_entropy) {
    return -t.p;
  } else if constexpr (L == Loss::kl_forward) {
    return softmax ? -t.p : -t.p / (s.p + guards.log_eps);
  } else {
    const V logs = log_difference<softmax>(s, t, guards);
    const V reverse = softmax ? s.p * (splat<V>(1) - logs) : s.p / (s.p + guards.log_eps) - logs;
    if constexpr (L == Loss::kl_reverse) {
      return reverse;
    } else {
      return reverse - (softmax ? t.p : t.p / (s.p + guards.log_eps));
    }
  }
}

// u = d statistic / dA up to a constant: what the derivative of the statistic subtracts.
template <Normalization N, typename V>
AFFKD_INLINE V statistic_slope(V affinity, Scaling<V> row, V maximum) {
  const V zero = splat<V>(0), one = splat<V>(1);
  if constexpr (N == Normalization::row_l2) {
    return affinity * row.multiplier;
  } else if constexpr (N == Normalization::softmax) {
    return exponential(log_softmax(affinity, row));
  } else if constexpr (N == Normalization::row_l1) {
    return sign(affinity);
  } else if constexpr (N == Normalization::mean_positive) {
    return affinity > zero ? one : zero;
  } else if constexpr (N == Normalization::max) {
    return affinity == maximum ? one : zero;
  } else {
    return one;
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
