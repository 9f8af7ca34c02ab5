// Stage 1, prepare: gather the valid items, make them unit or centered, pack the keys for the
// micro-kernel; and the chain rule back through it.
#pragma once

#include "matmul.h"
#include "parallel.h"

namespace affkd::AFFKD_NAMESPACE {

// The prepared items of one tensor.
template <typename T>
struct Items {
  const T* rows;         // [count, dim]
  const T* mean;         // [dim] what was subtracted, or null
  const int64_t* index;  // [count] into the tensor's rows, or null
  int64_t count;
  int64_t dim;
  T* squared_norms;    // [padded(count)], distances only
  T* inverse_lengths;  // [count], unit features only; 0 for a zero item
  T* packed;           // panels, keys only
  T poison;            // NaN where an item is inf or NaN, else 0
};

struct Preparation {
  bool unit;
  bool centered;
  bool norms;
  double eps;
};

inline bool is_distance(PairFunction function) {
  return function == PairFunction::squared_distance || function == PairFunction::distance ||
         function == PairFunction::gaussian;
}

// Centering the features centers a matrix of inner products, without its cancellation.
inline bool centers_features(const Settings& settings) {
  return settings.normalization == Normalization::frobenius_centered && !settings.clamped &&
         settings.pair == PairFunction::linear && !settings.unit && settings.offset == 0 &&
         settings.diagonal == Diagonal::keep;
}

inline Preparation preparation_of(const Settings& settings) {
  const bool distance = is_distance(settings.pair);
  return {settings.unit, (distance && !settings.unit) || centers_features(settings), distance,
          settings.affinity_eps};
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

template <typename T>
inline const T* item(const T* source, const int64_t* index, int64_t i, int64_t dim) {
  return source + (index == nullptr ? i : index[i]) * dim;
}

// The mean of the items, summed in double precision: what it leaves behind stays in every pair.
template <typename T>
inline T* mean_item(const T* source, const int64_t* index, int64_t count, int64_t dim,
                    Parallel parallel) {
  constexpr int64_t block = 64;
  T* mean = take<T>(dim);
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
inline T inverse_length(const T* x, int64_t dim, double eps) {
  const double length = __builtin_sqrt(dot(x, x, dim));
  return length <= eps ? T{0} : static_cast<T>((length - length) + 1 / length);
}

template <typename T>
inline void prepare_row(const Preparation& how, const T* from, const T* mean, int64_t dim, T* to,
                        T* inverse) {
  if (how.unit) {
    const T scale = inverse_length(from, dim, how.eps);
    for (int64_t d = 0; d < dim; ++d) {
      to[d] = scale == 0 ? T{0} : from[d] * scale;
    }
    *inverse = scale;
  } else if (how.centered) {
    for (int64_t d = 0; d < dim; ++d) {
      to[d] = from[d] - mean[d];
    }
  } else {
    __builtin_memcpy(to, from, sizeof(T) * static_cast<size_t>(dim));
  }
}

// `mean` is what centered features subtract.
template <typename T>
inline Items<T> prepare_items(const Preparation& how, const T* source, const int64_t* index,
                              int64_t count, int64_t dim, const T* mean, Parallel parallel) {
  Items<T> items{source, mean, index, count, dim, nullptr, nullptr, nullptr, T{0}};
  const bool copied = how.unit || how.centered || index != nullptr;
  T* rows = copied ? take<T>(count * dim) : nullptr;
  T* poison = take<T>(count);
  items.rows = copied ? rows : source;
  items.inverse_lengths = how.unit ? take<T>(count) : nullptr;
  items.squared_norms = how.norms ? take_filled<T>(padded<T>(count), 0) : nullptr;
  constexpr int64_t block = 32;
  for_each_task(
      parallel_for_elements(parallel, count * dim), count_blocks(count, block), [=](int64_t task) {
        const Range range = block_range(count, block, task);
        for (int64_t i = range.begin; i < range.begin + range.size; ++i) {
          const T* x = item(source, index, i, dim);
          poison[i] = poison_of(x, dim);
          if (copied) {
            T* inverse = items.inverse_lengths == nullptr ? nullptr : items.inverse_lengths + i;
            prepare_row(how, x, mean, dim, rows + i * dim, inverse);
          }
          if (how.norms) {
            const T* row = items.rows + i * dim;
            items.squared_norms[i] = static_cast<T>(dot(row, row, dim));
          }
        }
      });
  for (int64_t i = 0; i < count; ++i) {
    items.poison += poison[i];
  }
  return items;
}

template <typename T>
inline T* pack_items(const Items<T>& items, Parallel parallel) {
  const int64_t dim = items.dim;
  T* packed = take<T>(round_up(items.count, kPanel<T>) * dim);
  const Parallel threads = parallel_for_elements(parallel, items.count * dim);
  for_each_task(threads, count_blocks(items.count, kPanel<T>), [=](int64_t task) {
    const Range range = block_range(items.count, kPanel<T>, task);
    pack_panel(items.rows + range.begin * dim, range.size, dim, packed + range.begin * dim);
  });
  return packed;
}

// Through u = x / |x|: du becomes dx = (du - (u . du) u) / |x|, in place.
template <typename T>
inline void through_unit_length(const T* unit, T inverse, int64_t dim, T* gradient) {
  const T projection = static_cast<T>(dot(unit, gradient, dim));
  for (int64_t d = 0; d < dim; ++d) {
    gradient[d] = inverse == 0 ? T{0} : (gradient[d] - projection * unit[d]) * inverse;
  }
}

// Through x - mean(x): the gradient loses its own mean, in place.
template <typename T>
inline void through_centering(const Items<T>& items, T* gradient, Parallel parallel) {
  const T* mean =
      mean_item(static_cast<const T*>(gradient), items.index, items.count, items.dim, parallel);
  const Parallel threads = parallel_for_elements(parallel, items.count * items.dim);
  for_each_task(threads, items.count, [=](int64_t i) {
    T* row = gradient + (items.index == nullptr ? i : items.index[i]) * items.dim;
    for (int64_t d = 0; d < items.dim; ++d) {
      row[d] -= mean[d];
    }
  });
}

}  // namespace affkd::AFFKD_NAMESPACE
