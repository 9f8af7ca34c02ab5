// Stages 4 and 5 along one row of affinities: losses and gradients. The choice of stage is made
// once a row; inside, every loop is straight.
#pragma once

#include "statistics.h"

namespace affkd::AFFKD_NAMESPACE {

// a value as a type, for choosing a template inside a switch
template <auto value>
struct Constant {
  static constexpr auto get = value;
};

// What the stages need to know of the row that an entry is normalized by.
template <typename V>
struct RowTerms {
  Scaling<V> student;
  Scaling<V> teacher;
  V weight;      // d loss / d row loss
  V correction;  // c: what flows back through the statistic
};

// The same for all rows, as padded arrays.
template <typename T>
struct ScalingArrays {
  T* multiplier;
  T* divisor;
  T* peak;
  T* log_sum;
};

template <typename T>
struct RowArrays {
  ScalingArrays<T> student;
  ScalingArrays<T> teacher;
  T* weight;
  T* correction;
};

// Terms of the row itself, the same in every lane...
template <typename T>
struct OwnRow {
  using V = Vector<T>;
  RowTerms<V> terms;
  OwnRow(const RowArrays<T>& rows, int64_t i)
      : terms{scaling(rows.student, i), scaling(rows.teacher, i), splat<V>(rows.weight[i]),
              splat<V>(rows.correction[i])} {}

 private:
  static Scaling<V> scaling(const ScalingArrays<T>& side, int64_t i) {
    return {splat<V>(side.multiplier[i]), splat<V>(side.divisor[i]), splat<V>(side.peak[i]),
            splat<V>(side.log_sum[i])};
  }
};

// ... or, as A_ij = A_ji in a self-affinity, of the rows that have this row as their column.
template <typename T>
struct MirrorRows {
  using V = Vector<T>;
  RowArrays<T> rows;
  int64_t first;
  AFFKD_INLINE RowTerms<V> at(int64_t j) const {
    return {scaling(rows.student, first + j), scaling(rows.teacher, first + j),
            load(rows.weight + first + j), load(rows.correction + first + j)};
  }

 private:
  AFFKD_INLINE static Scaling<V> scaling(const ScalingArrays<T>& side, int64_t j) {
    return {load(side.multiplier + j), load(side.divisor + j), load(side.peak + j),
            load(side.log_sum + j)};
  }
};

// choose(Constant<loss>, Constant<softmax>)
template <typename Choose>
inline void with_loss(const Settings& settings, Choose choose) {
  const bool softmax = settings.normalization == Normalization::softmax;
  const auto pick = [&](auto loss) {
    if (softmax) {
      choose(loss, Constant<true>{});
    } else if constexpr (loss.get != Loss::cross_entropy) {
      choose(loss, Constant<false>{});
    }
  };
  switch (settings.loss) {
    case Loss::mse:
      return pick(Constant<Loss::mse>{});
    case Loss::l1:
      return pick(Constant<Loss::l1>{});
    case Loss::smooth_l1:
      return pick(Constant<Loss::smooth_l1>{});
    case Loss::kl_forward:
      return pick(Constant<Loss::kl_forward>{});
    case Loss::kl_reverse:
      return pick(Constant<Loss::kl_reverse>{});
    case Loss::kl_symmetric:
      return pick(Constant<Loss::kl_symmetric>{});
    case Loss::cross_entropy:
      return pick(Constant<Loss::cross_entropy>{});
  }
}

// choose(Constant<normalization>) of the kinds that differ in the slope of their statistic
template <typename Choose>
inline void with_statistic_slope(Normalization normalization, Choose choose) {
  switch (normalization) {
    case Normalization::none:
    case Normalization::max_detached:
      return;
    case Normalization::row_l2:
    case Normalization::frobenius:
    case Normalization::frobenius_centered:
      return choose(Constant<Normalization::row_l2>{});
    case Normalization::row_l1:
      return choose(Constant<Normalization::row_l1>{});
    case Normalization::softmax:
      return choose(Constant<Normalization::softmax>{});
    case Normalization::mean_positive:
      return choose(Constant<Normalization::mean_positive>{});
    case Normalization::max:
      return choose(Constant<Normalization::max>{});
    case Normalization::row_sum:
    case Normalization::mean_all:
    case Normalization::mean_offdiag:
      return choose(Constant<Normalization::row_sum>{});
  }
}

template <typename V>
inline Guards<V> guards_of(const Settings& settings) {
  return {splat<V>(settings.beta), splat<V>(settings.log_eps)};
}

// Sums of one row: its loss, and sum_j dl/ds * s, from which c follows. Both without the weight.
struct RowSums {
  double loss;
  double correction;
};

template <typename T>
inline RowSums row_loss(const Settings& settings, const T* student, const T* teacher, int64_t n,
                        const MaskLane<T>* mask, const OwnRow<T>& row) {
  using V = Vector<T>;
  const Guards<V> guards = guards_of<V>(settings);
  RowSums sums{0, 0};
  with_loss(settings, [&](auto loss, auto softmax) {
    constexpr Loss L = loss.get;
    constexpr bool S = softmax.get;
    V total = {}, correction = {};
    const RowTerms<V> terms = row.terms;
    const bool nothing = terms.student.multiplier[0] == 0 || terms.teacher.multiplier[0] == 0;
    const V balanced = splat<V>(nothing ? 0 : 1);
    for_lanes<T>(n, mask, [&](int64_t j, auto lanes) {
      const auto s = normalize<L, S>(load(student + j), terms.student);
      const auto t = normalize<L, S>(load(teacher + j), terms.teacher);
      total += keep(lanes, loss_value<L, S>(s, t, guards, balanced));
      const V slope = loss_slope<L, S>(s, t, guards);
      correction += keep(lanes, S ? slope : slope * s.p);
    });
    sums = {sum_lanes<T>(total), sum_lanes<T>(correction)};
  });
  return sums;
}

// A row of affinities with the rows its entries are normalized by: its own, and in a self-affinity,
// as A_ij = A_ji, also those that have it as their column.
template <typename T>
struct GradientRow {
  const T* student;
  const T* teacher;
  int64_t n;
  OwnRow<T> own;
  MirrorRows<T> mirror;
  const MaskLane<T>* own_mask;
  const MaskLane<T>* mirror_mask;
  T maximum;
};

// out_j (+)= term(j, terms of the row) over the row's own terms and, where `mirrored`, its columns'
template <bool mirrored, bool add, typename T, typename Term>
AFFKD_INLINE void map_gradient(const GradientRow<T>& row, T* out, Term term) {
  for_lanes<T>(row.n, row.own_mask, [&](int64_t j, auto lanes) {
    Vector<T> sum = keep(lanes, term(j, row.own.terms));
    if constexpr (mirrored) {
      if (row.mirror_mask != nullptr) {
        sum += keep(load_mask<T>(row.mirror_mask + j), term(j, row.mirror.at(j)));
      } else {
        sum += keep(lanes, term(j, row.mirror.at(j)));
      }
    }
    store(out + j, add ? load(out + j) + sum : sum);
  });
}

// out_j = d loss / dA_ij
template <bool mirrored, typename T>
inline void row_gradient(const Settings& settings, const GradientRow<T>& row, T* out) {
  using V = Vector<T>;
  const Guards<V> guards = guards_of<V>(settings);
  with_loss(settings, [&](auto loss, auto softmax) {
    constexpr Loss L = loss.get;
    constexpr bool S = softmax.get;
    map_gradient<mirrored, false>(row, out, [&](int64_t j, const RowTerms<V>& terms) {
      const auto s = normalize<L, S>(load(row.student + j), terms.student);
      const auto t = normalize<L, S>(load(row.teacher + j), terms.teacher);
      return terms.weight * loss_slope<L, S>(s, t, guards) * terms.student.multiplier;
    });
  });
  with_statistic_slope(settings.normalization, [&](auto normalization) {
    constexpr Normalization N = normalization.get;
    const V maximum = splat<V>(row.maximum);
    map_gradient<mirrored, true>(row, out, [&](int64_t j, const RowTerms<V>& terms) {
      const V slope = statistic_slope<N>(load(row.student + j), terms.student, maximum);
      return -terms.correction * slope * terms.student.multiplier;
    });
  });
}

}  // namespace affkd::AFFKD_NAMESPACE
