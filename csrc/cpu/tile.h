// Stages 2 and 3: rectangles of pair values of both sides, and what is particular about single
// pairs: the diagonal, pair masks, clamps.
#pragma once

#include "features.h"
#include "rows.h"

namespace affkd::AFFKD_NAMESPACE {

// A rectangle of pairs. The values are those of `pair_value`, student and teacher side by side.
template <typename T>
struct Tile {
  int64_t row;
  int64_t rows;
  int64_t column;
  int64_t columns;
  T* student;
  T* teacher;
  int64_t stride;
};

// choose(Constant<pair function>)
template <typename Choose>
inline void with_pair_function(PairFunction function, Choose choose) {
  switch (function) {
    case PairFunction::linear:
      return choose(Constant<PairFunction::linear>{});
    case PairFunction::squared_distance:
      return choose(Constant<PairFunction::squared_distance>{});
    case PairFunction::distance:
      return choose(Constant<PairFunction::distance>{});
    case PairFunction::gaussian:
      return choose(Constant<PairFunction::gaussian>{});
    case PairFunction::taylor:
      return choose(Constant<PairFunction::taylor>{});
    case PairFunction::power:
      return choose(Constant<PairFunction::power>{});
  }
}

// Whether a stored value is the affinity itself.
inline bool stores_affinity(const Settings& settings) {
  return !clamps_affinities(settings) && settings.pair != PairFunction::taylor &&
         settings.pair != PairFunction::power;
}

// Queries and keys of one side, and the constants of its pair function.
template <typename T>
struct PreparedSide {
  Items<T> queries;
  Items<T> keys;  // the queries again for a self-affinity
  T scale;
};

// What is true of a pair whatever its value, for one matrix.
template <typename T>
class PairRules {
 public:
  PairRules(const Settings& settings, const Matrix<T>& matrix)
      : settings_(settings), matrix_(matrix) {}

  // the key on row i's diagonal, or -1
  int64_t diagonal(int64_t i) const {
    return matrix_.diagonal == nullptr ? -1 : matrix_.diagonal[i];
  }

  // its position among `columns` from `column` on, or -1
  int64_t diagonal_in(int64_t i, int64_t column, int64_t columns) const {
    const int64_t j = diagonal(i) - column;
    return j >= 0 && j < columns ? j : -1;
  }

  bool is_self() const { return matrix_.self; }

  bool all_pairs() const {
    return matrix_.pair_mask == nullptr && settings_.diagonal != Diagonal::exclude;
  }

  bool takes_part(int64_t i, int64_t j) const {
    if (settings_.diagonal == Diagonal::exclude && diagonal(i) == j) {
      return false;
    }
    if (matrix_.pair_mask == nullptr) {
      return true;
    }
    const int64_t row = matrix_.query_index == nullptr ? i : matrix_.query_index[i];
    const int64_t column = matrix_.key_index == nullptr ? j : matrix_.key_index[j];
    return matrix_.pair_mask[row * matrix_.pair_stride + column] != 0;
  }

  // Which pairs (i, column + j) take part, or (column + j, i) where mirrored; null: all do.
  const MaskLane<T>* row_mask(int64_t i, int64_t column, int64_t columns, bool mirrored,
                              bool without_diagonal, MaskLane<T>* buffer) const {
    if (all_pairs() && !without_diagonal) {
      return nullptr;
    }
    for (int64_t j = 0; j < columns; ++j) {
      const bool chosen = mirrored ? takes_part(column + j, i) : takes_part(i, column + j);
      buffer[j] = chosen ? -1 : 0;
    }
    for (int64_t j = columns; j < padded<T>(columns); ++j) {
      buffer[j] = 0;
    }
    const int64_t d = diagonal_in(i, column, columns);
    if (without_diagonal && d >= 0) {
      buffer[d] = 0;
    }
    return buffer;
  }

 private:
  const Settings& settings_;
  const Matrix<T>& matrix_;
};

// g becomes the stored value, along one row
template <typename T>
inline void apply_pair_function(const Settings& settings, const PreparedSide<T>& side, int64_t i,
                                int64_t column, int64_t columns, T* values) {
  using V = Vector<T>;
  if (settings.pair == PairFunction::linear && side.scale == 1 && settings.offset == 0 &&
      !clamps_rounding(settings)) {
    return;
  }
  const V scale = splat<V>(side.scale), offset = splat<V>(settings.offset);
  const V eps = splat<V>(settings.affinity_eps);
  with_pair_function(settings.pair, [&](auto function) {
    constexpr PairFunction P = function.get;
    if constexpr (is_distance(P)) {
      const V norm = splat<V>(side.queries.squared_norms[i]);
      const V rest = splat<V>(side.queries.norm_rests[i]);
      const T* key_norms = side.keys.squared_norms + column;
      const T* key_rests = side.keys.norm_rests + column;
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        const V squared = squared_distance(load(values + j), norm, load(key_norms + j));
        const V rests = rest + load(key_rests + j);
        store(values + j, value_at_distance<P>(squared + rests, scale, eps));
      }
    } else {
      const V low = splat<V>(clamps_rounding(settings) ? settings.clamp_min : -kInfinity);
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        const V value = pair_value<P>(load(values + j), V{}, V{}, scale, offset, eps);
        store(values + j, at_least(value, low));
      }
    }
  });
}

// The stored values of one side over a rectangle, from its inner products, in place.
template <typename T>
inline void finish_values(const Settings& settings, const PairRules<T>& rules,
                          const PreparedSide<T>& side, const Tile<T>& tile, T* values) {
  const bool zeroed = settings.diagonal == Diagonal::zero && stores_affinity(settings);
  const bool patched = is_distance(settings.pair) || zeroed;
  // of a pair at distance 0
  const T same = settings.pair == PairFunction::gaussian ? T{1} : T{0};
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* row = values + i * tile.stride;
    const int64_t d = rules.diagonal_in(tile.row + i, tile.column, tile.columns);
    if (rules.is_self() && d >= 0) {
      row[d] = side.queries.own_product(tile.row + i);
    }
    apply_pair_function(settings, side, tile.row + i, tile.column, tile.columns, row);
    if (patched && d >= 0) {
      row[d] = zeroed ? T{0} : same;
    }
  }
}

// `column` must start a panel.
template <typename T>
inline void fill_values(const Settings& settings, const PairRules<T>& rules,
                        const PreparedSide<T>& side, const Tile<T>& tile, T* values) {
  const int64_t dim = side.queries.dim;
  if (side.keys.packed != nullptr) {
    dot_products(tile.rows, tile.columns, dim, side.queries.rows + tile.row * dim,
                 side.keys.packed + tile.column * dim, {values, tile.stride});
  } else {
    dot_products<T>(side.queries, {tile.row, tile.rows}, side.keys, {tile.column, tile.columns},
                    {0, dim}, {values, tile.stride});
  }
  finish_values(settings, rules, side, tile, values);
}

template <typename T>
inline void fill_tile(const Settings& settings, const PairRules<T>& rules,
                      const PreparedSide<T>& student, const PreparedSide<T>& teacher,
                      const Tile<T>& tile) {
  fill_values(settings, rules, student, tile, tile.student);
  fill_values(settings, rules, teacher, tile, tile.teacher);
}

template <typename T>
inline Tile<T> transposed_tile(const Tile<T>& tile, T* student, T* teacher, int64_t stride) {
  transpose(tile.rows, tile.columns, tile.student, tile.stride, student, stride);
  transpose(tile.rows, tile.columns, tile.teacher, tile.stride, teacher, stride);
  return {tile.column, tile.columns, tile.row, tile.rows, student, teacher, stride};
}

// A from stored values: taylor or power, and the clamp
template <typename T>
inline void affinities_of_values(const Settings& settings, T scale, const T* values, int64_t n,
                                 T* out) {
  using V = Vector<T>;
  const V factor = splat<V>(__builtin_exp(-static_cast<double>(scale)));
  const V low = splat<V>(settings.clamped ? settings.clamp_min : -kInfinity);
  with_pair_function(settings.pair, [&](auto function) {
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const V a = affinity_of<function.get>(load(values + j), settings.order, factor);
      store(out + j, at_least(a, low));
    }
  });
}

// d loss / dA becomes d loss / dg (or dsq), up to a constant; 0 where A was clamped
template <typename T>
inline void through_pair_function(const Settings& settings, T scale, const T* values, int64_t n,
                                  T* gradient) {
  using V = Vector<T>;
  const V factor = splat<V>(__builtin_exp(-static_cast<double>(scale)));
  const V low = splat<V>(settings.clamped ? settings.clamp_min : -kInfinity);
  const V root_eps = splat<V>(__builtin_sqrt(settings.affinity_eps));
  with_pair_function(settings.pair, [&](auto function) {
    constexpr PairFunction P = function.get;
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      const V value = load(values + j);
      const V slope = affinity_slope<P>(value, settings.order, root_eps);
      const V a = affinity_of<P>(value, settings.order, factor);
      store(gradient + j, a < low ? V{} : load(gradient + j) * slope);
    }
  });
}

// The constant left out of `through_pair_function`: dg = factor * gradient, and for a distance
// dx_i = factor * sum_j gradient_ij (x_i - x_j).
template <typename T>
inline T slope_factor(const Settings& settings, T scale) {
  switch (settings.pair) {
    case PairFunction::linear:
    case PairFunction::power:
      return scale;
    case PairFunction::squared_distance:
      return 2;
    case PairFunction::distance:
      return 1;
    case PairFunction::gaussian:
      return -2 * scale;
    case PairFunction::taylor:
      return scale * static_cast<T>(__builtin_exp(-static_cast<double>(scale)));
  }
  return 0;
}

}  // namespace affkd::AFFKD_NAMESPACE
