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
  V correction;  // c: what flows back through the statistic; of a softmax without the weight
};

// The same for all rows, as padded arrays.
template <typename T>
struct ScalingArrays {
  T* multiplier;
  T* divisor;
  T* peak;
  T* log_sum;
  T* rest;
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
            splat<V>(side.log_sum[i]), splat<V>(side.rest[i])};
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
            load(side.log_sum + j), load(side.rest + j)};
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

// choose(Constant<normalization>) of the kinds that differ in the slope of their statistic; that of
// a softmax is at hand where the loss is
template <typename Choose>
inline void with_statistic_slope(Normalization normalization, Choose choose) {
  switch (normalization) {
    case Normalization::none:
    case Normalization::max_detached:
    case Normalization::softmax:
      return;
    case Normalization::row_l2:
    case Normalization::frobenius:
    case Normalization::frobenius_centered:
      return choose(Constant<Normalization::row_l2>{});
    case Normalization::row_l1:
      return choose(Constant<Normalization::row_l1>{});
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

// Sums of one row, without the weight: its loss; sum_j dl/ds * s, from which c follows; and what
// stands in for that before the losses are known.
struct RowSums {
  double loss = 0;
  double correction = 0;     // or, from the statistics, sum_j A_s A_t
  double column_losses = 0;  // its entries' part in the losses of their columns, with their weights
  double square = 0;         // sum_j A_s^2
  double beyond = 0;  // how many differences are too large for the quadratic part of smooth L1
};

// What is normalized together: all rows of a matrix, or all its columns.
template <typename T>
struct Lines {
  RowState* student_states;
  RowState* teacher_states;
  RowSums* sums;
  RowArrays<T> terms;
};

// 1 where both sides of the row sum to 1 if they are normalized to, else 0; see `loss_value`
template <typename V>
AFFKD_INLINE V balance_of(const RowTerms<V>& row) {
  const bool nothing = row.student.multiplier[0] == 0 || row.teacher.multiplier[0] == 0;
  return splat<V>(nothing ? 0 : 1);
}

// 1 where a difference is too large for the quadratic part of smooth L1
template <typename V>
AFFKD_INLINE V beyond_beta(const Normalized<V>& s, const Normalized<V>& t, Guards<V> guards) {
  const V size = absolute(difference_of<Loss::smooth_l1>(s, t));
  return size < guards.beta ? splat<V>(0) : splat<V>(1);
}

template <typename T>
inline RowSums row_loss(const Settings& settings, const T* student, const T* teacher, int64_t n,
                        const MaskLane<T>* mask, const OwnRow<T>& row) {
  using V = Vector<T>;
  const Guards<V> guards = guards_of<V>(settings);
  RowSums sums;
  with_loss(settings, [&](auto loss, auto softmax) {
    constexpr Loss L = loss.get;
    constexpr bool S = softmax.get;
    V total = {}, correction = {}, beyond = {};
    const RowTerms<V> terms = row.terms;
    const V balanced = balance_of(terms);
    for_lanes<T>(n, mask, [&](int64_t j, auto lanes) {
      const auto s = normalize<L, S>(load(student + j), terms.student);
      const auto t = normalize<L, S>(load(teacher + j), terms.teacher);
      total += keep(lanes, loss_value<L, S>(s, t, guards, balanced));
      const V slope = loss_slope<L, S>(s, t, guards);
      correction += keep(lanes, S ? slope : slope * s.p);
      if constexpr (L == Loss::smooth_l1) {
        beyond += keep(lanes, beyond_beta(s, t, guards));
      }
    });
    sums.loss = sum_lanes<T>(total);
    sums.correction = sum_lanes<T>(correction);
    sums.beyond = sum_lanes<T>(beyond);
  });
  return sums;
}

// A row of affinities with what its entries are normalized by: their row and, where it counts,
// their column. In a self-affinity, as A_ij = A_ji, the columns are the rows that have this one as
// theirs.
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

// Whether an entry's column has a part in its gradient, and a loss that is not some row's own.
enum class Mirror { none, rows, columns };

// out_j (+)= own(j, lanes) + where `mirrored` mirror(j, lanes, terms of column j)
template <bool mirrored, bool add, typename T, typename Own, typename Column>
AFFKD_INLINE void map_gradient(const GradientRow<T>& row, T* out, Own own, Column column) {
  for_lanes<T>(row.n, row.own_mask, [&](int64_t j, auto lanes) {
    Vector<T> sum = own(j, lanes);
    if constexpr (mirrored) {
      if (row.mirror_mask != nullptr) {
        sum += column(j, load_mask<T>(row.mirror_mask + j), row.mirror.at(j));
      } else {
        sum += column(j, lanes, row.mirror.at(j));
      }
    }
    store(out + j, add ? load(out + j) + sum : sum);
  });
}

// What flows back through the loss, and through a softmax: out_j = dl/ds * ds/dA_ij. Returns what
// goes along where it was asked for: the losses.
template <Mirror mirror, bool with_losses, typename T>
inline RowSums loss_gradient(const Settings& settings, const GradientRow<T>& row, T* out) {
  using V = Vector<T>;
  const Guards<V> guards = guards_of<V>(settings);
  RowSums sums;
  with_loss(settings, [&](auto loss, auto softmax) {
    constexpr Loss L = loss.get;
    constexpr bool S = softmax.get;
    if constexpr (!S && mirror == Mirror::columns) {
      return;  // there is none
    }
    V total = {}, correction = {}, beyond = {}, of_columns = {};
    const auto gradient = [&](int64_t j, const RowTerms<V>& terms, auto visit) {
      const auto s = normalize<L, S>(load(row.student + j), terms.student);
      const auto t = normalize<L, S>(load(row.teacher + j), terms.teacher);
      visit(s, t);
      const V slope = loss_slope<L, S>(s, t, guards);
      // of a saturated softmax the two nearly cancel
      const V rest = S ? slope - terms.correction * s.p : slope;
      return terms.weight * rest * terms.student.multiplier;
    };
    const V balanced = balance_of(row.own.terms);
    const auto own = [&](int64_t j, auto lanes) {
      return keep(lanes, gradient(j, row.own.terms, [&](const auto& s, const auto& t) {
                    if constexpr (with_losses) {
                      total += keep(lanes, loss_value<L, S>(s, t, guards, balanced));
                      if constexpr (L == Loss::kl_forward && !S) {
                        correction += keep(lanes, loss_slope<L, S>(s, t, guards) * s.p);
                      }
                      if constexpr (L == Loss::smooth_l1) {
                        beyond += keep(lanes, beyond_beta(s, t, guards));
                      }
                    }
                  }));
    };
    const auto column = [&](int64_t j, auto lanes, const RowTerms<V>& terms) {
      return keep(lanes, gradient(j, terms, [&](const auto& s, const auto& t) {
                    if constexpr (with_losses && S && mirror == Mirror::columns) {
                      of_columns +=
                          keep(lanes, terms.weight * loss_value<L, S>(s, t, guards, splat<V>(1)));
                    }
                  }));
    };
    map_gradient<mirror != Mirror::none, false>(row, out, own, column);
    sums.loss = sum_lanes<T>(total);
    sums.correction = sum_lanes<T>(correction);
    sums.column_losses = sum_lanes<T>(of_columns);
    sums.beyond = sum_lanes<T>(beyond);
  });
  return sums;
}

// What flows back through any other statistic, added to `out`.
template <bool mirrored, typename T>
inline void add_statistic_gradient(const Settings& settings, const GradientRow<T>& row, T* out) {
  using V = Vector<T>;
  with_statistic_slope(settings.normalization, [&](auto normalization) {
    const V maximum = splat<V>(row.maximum);
    const auto column = [&](int64_t j, auto lanes, const RowTerms<V>& terms) {
      const V slope =
          statistic_slope<normalization.get>(load(row.student + j), terms.student, maximum);
      return keep(lanes, -terms.correction * slope * terms.student.multiplier);
    };
    const auto own = [&](int64_t j, auto lanes) { return column(j, lanes, row.own.terms); };
    map_gradient<mirrored, true>(row, out, own, column);
  });
}

// out_j = d loss / dA_ij; returns the losses as `loss_gradient` does
template <Mirror mirror, bool with_losses, typename T>
inline RowSums row_gradient(const Settings& settings, const GradientRow<T>& row, T* out) {
  const RowSums sums = loss_gradient<mirror, with_losses>(settings, row, out);
  add_statistic_gradient<mirror != Mirror::none>(settings, row, out);
  return sums;
}

}  // namespace affkd::AFFKD_NAMESPACE
