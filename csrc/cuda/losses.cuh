// Stages 4 and 5 on a GPU: normalization, loss and slopes of one pair, chosen at run time.
#pragma once

#include "states.cuh"

namespace affkd::cuda {

// Divides by infinity where the statistic counts as nothing, by NaN where it overflowed, as the
// quotient must not pass for 0.
template <typename T>
AFFKD_DEVICE Scaling<T> scaling_of(double statistic, double eps) {
  const double divisor =
      statistic <= eps ? static_cast<double>(INFINITY) : (statistic - statistic) + statistic;
  const T multiplier = static_cast<T>(1 / divisor);
  return {multiplier, static_cast<T>(divisor), T{0}, T{0},
          static_cast<T>(1 / divisor - multiplier)};
}

template <typename T>
struct PairLoss {
  T loss;
  T slope;       // d l / d s; of a softmax s times that
  T correction;  // s times d l / d s
};

template <typename T>
class LossStage {
 public:
  AFFKD_DEVICE LossStage(const Settings& settings, Normalization kind)
      : kind_(kind),
        loss_(settings.loss),
        softmax_(kind == Normalization::softmax),
        guards_{static_cast<T>(settings.beta), static_cast<T>(settings.log_eps)} {}

  AFFKD_DEVICE PairLoss<T> loss(T student, T teacher, const Scaling<T>& s,
                                const Scaling<T>& t) const {
    switch (loss_) {
      case Loss::mse:
        return either<Loss::mse>(student, teacher, s, t);
      case Loss::l1:
        return either<Loss::l1>(student, teacher, s, t);
      case Loss::smooth_l1:
        return either<Loss::smooth_l1>(student, teacher, s, t);
      case Loss::kl_forward:
        return either<Loss::kl_forward>(student, teacher, s, t);
      case Loss::kl_reverse:
        return either<Loss::kl_reverse>(student, teacher, s, t);
      case Loss::kl_symmetric:
        return either<Loss::kl_symmetric>(student, teacher, s, t);
      case Loss::cross_entropy:
        return of<Loss::cross_entropy, true>(student, teacher, s, t);
    }
    return {T{0}, T{0}, T{0}};
  }

  // d statistic / d A, up to the factor Statistic::slope_scale
  AFFKD_DEVICE T statistic_slope(T student, const Scaling<T>& s, T maximum, bool own) const {
    using portable::statistic_slope;
    switch (kind_) {
      case Normalization::none:
      case Normalization::max_detached:
        return T{0};
      case Normalization::row_l2:
      case Normalization::frobenius:
      case Normalization::frobenius_centered:
        return statistic_slope<Normalization::row_l2>(student, s, maximum);
      case Normalization::row_l1:
        return statistic_slope<Normalization::row_l1>(student, s, maximum);
      case Normalization::softmax:
        return statistic_slope<Normalization::softmax>(student, s, maximum);
      case Normalization::mean_positive:
        return statistic_slope<Normalization::mean_positive>(student, s, maximum);
      case Normalization::max:
        return statistic_slope<Normalization::max>(student, s, maximum);
      case Normalization::mean_offdiag:
        return own ? T{0} : T{1};
      case Normalization::row_sum:
      case Normalization::mean_all:
        return T{1};
    }
    return T{0};
  }

 private:
  template <Loss L>
  AFFKD_DEVICE PairLoss<T> either(T student, T teacher, const Scaling<T>& s,
                                  const Scaling<T>& t) const {
    return softmax_ ? of<L, true>(student, teacher, s, t) : of<L, false>(student, teacher, s, t);
  }

  template <Loss L, bool kSoftmax>
  AFFKD_DEVICE PairLoss<T> of(T student, T teacher, const Scaling<T>& s,
                              const Scaling<T>& t) const {
    const Normalized<T> p = normalized<L, kSoftmax>(student, s);
    const Normalized<T> q = normalized<L, kSoftmax>(teacher, t);
    const T balanced = s.multiplier == T{0} || t.multiplier == T{0} ? T{0} : T{1};
    const T slope = loss_slope<L, kSoftmax>(p, q, guards_);
    return {loss_value<L, kSoftmax>(p, q, guards_, balanced), slope,
            kSoftmax ? slope : slope * p.p};
  }

  // The rounding of a statistic is the same for all entries, and would be what is left where s and
  // t nearly agree. Losses of the difference keep it as `rest`. |s - t|, for which A / A must be 1,
  // has it added to a quotient by a mean or a maximum, which the only entry is equal to; other
  // quotients are divisions.
  template <Loss L, bool kSoftmax>
  AFFKD_DEVICE Normalized<T> normalized(T affinity, const Scaling<T>& row) const {
    if (L == Loss::l1 && (is_maximum(kind_) || is_mean(kind_))) {
      Normalized<T> entry = normalize<Loss::smooth_l1, false>(affinity, row);
      entry.p += entry.rest;
      return entry;
    }
    constexpr Loss kExact = kSoftmax || needs_exact_difference(L) ? L : Loss::l1;
    return normalize<kExact, kSoftmax>(affinity, row);
  }

  Normalization kind_;
  Loss loss_;
  bool softmax_;
  Guards<T> guards_;
};

}  // namespace affkd::cuda
