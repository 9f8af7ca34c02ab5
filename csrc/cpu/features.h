// Stage 1, prepare: gather the valid items, make them unit or centered; and the chain rule back
// through it.
#pragma once

#include "items.h"

namespace affkd::AFFKD_NAMESPACE {

struct Preparation {
  bool unit;
  bool centered;
  bool norms;
  bool distances;
  double eps;
};

constexpr bool is_distance(PairFunction function) {
  return function == PairFunction::squared_distance || function == PairFunction::distance ||
         function == PairFunction::gaussian;
}

// Whether the clamp cuts off rounding alone: scale u.v + offset is nowhere below offset - |scale|.
inline bool clamps_rounding(const Settings& settings) {
  const double student = absolute(settings.student_scale);
  const double teacher = absolute(settings.teacher_scale);
  return settings.clamped && settings.pair == PairFunction::linear && settings.unit &&
         settings.offset - (student > teacher ? student : teacher) >= settings.clamp_min;
}

// Whether it cuts off affinities, and their gradients. Otherwise it is applied once, to the values.
inline bool clamps_affinities(const Settings& settings) {
  return settings.clamped && !clamps_rounding(settings);
}

// Centering the features centers a matrix of inner products, without its cancellation.
inline bool centers_features(const Settings& settings) {
  return settings.normalization == Normalization::frobenius_centered && !settings.clamped &&
         settings.pair == PairFunction::linear && !settings.unit && settings.offset == 0 &&
         settings.diagonal == Diagonal::keep;
}

// Of a self-affinity the norms are its diagonal, which is often its largest part.
inline Preparation preparation_of(const Settings& settings, bool self) {
  const bool distance = is_distance(settings.pair);
  return {settings.unit, (distance && !settings.unit) || centers_features(settings),
          distance || (self && !settings.unit), distance, settings.affinity_eps};
}

// the sum of 0 * x: NaN if anything is inf or NaN
template <typename T>
inline T poison_of(const T* x, int64_t n) {
  Vector<T> sum = {};
  int64_t d = 0;
  for (; d + kLanes<T> <= n; d += kLanes<T>) {
    sum += splat<Vector<T>>(0) * load(x + d);
  }
  T poison = sum_lanes<T>(sum);
  for (; d < n; ++d) {
    poison += 0 * x[d];
  }
  return poison;
}

// The mean of the items, summed in double precision: what it leaves behind stays in every pair.
template <typename T>
inline T* mean_item(const T* source, const int64_t* index, int64_t count, int64_t dim,
                    Parallel parallel) {
  constexpr int64_t block = 64;
  T* mean = take_filled<T>(round_up(dim, kPanel<T>), 0);
  for_each_task(parallel_for_elements(parallel, count * dim), count_blocks(dim, block),
                [=](int64_t task) {
                  const Range range = block_range(dim, block, task);
                  double sums[block] = {};
                  for (int64_t i = 0; i < count; ++i) {
                    const T* x = item(source, index, i, dim) + range.begin;
                    for (int64_t d = 0; d < range.size; ++d) {
                      sums[d] += x[d];
                    }
                  }
                  for (int64_t d = 0; d < range.size; ++d) {
                    mean[range.begin + d] = static_cast<T>(sums[d] / static_cast<double>(count));
                  }
                });
  return mean;
}

// 1 / |x|; 0 where |x| <= eps; NaN where |x| is infinite, which must not pass for 0
template <typename T>
inline double inverse_length(const T* x, int64_t dim, double eps) {
  const double length = __builtin_sqrt(dot(x, x, dim));
  return length <= eps ? 0.0 : (length - length) + 1 / length;
}

// x as the sum of two numbers; the second is nothing where the first is not finite
template <typename T>
inline void split_number(double x, T* rounded, T* rest) {
  *rounded = static_cast<T>(x);
  const double lost = x - static_cast<double>(*rounded);
  *rest = lost - lost == 0 ? static_cast<T>(lost) : T{0};
}

// `mean` is what centered features subtract; `held`: the prepared items are stored.
template <typename T>
inline Items<T> prepare_items(const Preparation& how, const T* source, const int64_t* index,
                              int64_t count, int64_t dim, const T* mean, bool held,
                              Parallel parallel) {
  const bool as_given = !how.unit && !how.centered && index == nullptr;
  Items<T> items{source,  nullptr, mean,    index,   count,   dim,
                 nullptr, nullptr, nullptr, nullptr, nullptr, T{0}};
  T* rows = held && !as_given ? take<T>(count * dim) : nullptr;
  T* poison = take<T>(count);
  items.inverse_lengths = how.unit ? take<T>(count) : nullptr;
  items.inverse_rests = how.unit ? take<T>(count) : nullptr;
  items.squared_norms = how.norms ? take_filled<T>(padded<T>(count), 0) : nullptr;
  items.norm_rests = how.distances ? take_filled<T>(padded<T>(count), 0) : nullptr;
  constexpr int64_t block = 32;
  for_each_task(parallel_for_elements(parallel, count * dim), count_blocks(count, block),
                [=](int64_t task) {
                  const Scratch scratch;
                  T* buffer = rows == nullptr && !as_given && how.norms ? take<T>(dim) : nullptr;
                  const Range range = block_range(count, block, task);
                  for (int64_t i = range.begin; i < range.begin + range.size; ++i) {
                    const T* x = item(source, index, i, dim);
                    poison[i] = poison_of(x, dim);
                    if (how.unit) {
                      split_number(inverse_length(x, dim, how.eps), items.inverse_lengths + i,
                                   items.inverse_rests + i);
                    }
                    T* row = rows == nullptr ? buffer : rows + i * dim;
                    if (row != nullptr) {
                      items.prepare(i, {0, dim}, row);
                    }
                    const T* prepared = row == nullptr ? x : row;
                    if (how.distances) {
                      split_number(dot(prepared, prepared, dim), items.squared_norms + i,
                                   items.norm_rests + i);
                    } else if (how.norms) {
                      items.squared_norms[i] = static_cast<T>(square_sum(prepared, dim));
                    }
                  }
                });
  items.rows = as_given ? source : rows;
  for (int64_t i = 0; i < count; ++i) {
    items.poison += poison[i];
  }
  return items;
}

// [dim] sum_i weight_i x_i of the prepared items in double precision; null: all weights are 1
template <typename T>
inline double* sum_of_items(const Items<T>& items, const double* weights, Parallel parallel) {
  constexpr int64_t block = 64;
  double* sum = take_filled<double>(items.dim, 0);
  const Parallel threads = parallel_for_elements(parallel, items.count * items.dim);
  for_each_task(threads, count_blocks(items.dim, block), [=](int64_t task) {
    const Range range = block_range(items.dim, block, task);
    T buffer[block];
    for (int64_t i = 0; i < items.count; ++i) {
      const T* x = items.values(i, range, static_cast<T*>(buffer));
      const double weight = weights == nullptr ? 1.0 : weights[i];
      for (int64_t d = 0; d < range.size; ++d) {
        sum[range.begin + d] += weight * x[d];
      }
    }
  });
  return sum;
}

// Through u = x / |x|: du becomes dx = (du - (u . du) u) / |x|, in place.
template <typename T>
inline void through_unit_length(const T* unit, T inverse, int64_t dim, T* gradient) {
  const T projection = static_cast<T>(dot(unit, gradient, dim));
  for (int64_t d = 0; d < dim; ++d) {
    gradient[d] = inverse == 0 ? T{0} : (gradient[d] - projection * unit[d]) * inverse;
  }
}

// Through x - mean(x): the gradient [count, dim] loses its own mean, in place.
template <typename T>
inline void through_centering(const Items<T>& items, T* gradient, Parallel parallel) {
  const Scratch scratch;
  const T* mean = mean_item<T>(gradient, nullptr, items.count, items.dim, parallel);
  const Parallel threads = parallel_for_elements(parallel, items.count * items.dim);
  for_each_task(threads, items.count, [=](int64_t i) {
    T* row = gradient + i * items.dim;
    for (int64_t d = 0; d < items.dim; ++d) {
      row[d] -= mean[d];
    }
  });
}

// Rows [0, count) to where the items came from, in place, zeros between them. An index never
// descends, so that from the last row on none is overwritten before it is moved.
template <typename T>
inline void scatter_rows(const Items<T>& items, T* rows) {
  const size_t bytes = sizeof(T) * static_cast<size_t>(items.dim);
  for (int64_t i = items.count; items.index != nullptr && i-- > 0;) {
    if (items.index[i] != i) {
      __builtin_memcpy(rows + items.index[i] * items.dim, rows + i * items.dim, bytes);
      __builtin_memset(rows + i * items.dim, 0, bytes);
    }
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
