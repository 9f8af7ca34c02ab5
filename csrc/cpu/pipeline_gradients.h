// Pipeline: the sweep that turns pairs into V = dA dphi (+ its transpose), the products of V with
// the features, and the way back through stage 1.
#pragma once

#include "pipeline.h"

namespace affkd::AFFKD_NAMESPACE {

// d loss / dA along row i of the tile; of a self-affinity, of A_ij and A_ji together. Returns the
// losses where those go along with the gradient.
template <typename T>
RowSums Pipeline<T>::affinity_gradient(const Tile<T>& tile, int64_t i,
                                       const Buffers& buffers) const {
  const int64_t n = tile.columns, at = tile.row + i;
  const Row values = row_of(tile, i, buffers);
  const bool mirrored = columns_too_ || (self_ && !rows_are_alike());
  const auto* mirror_mask =
      mirrored ? pairs_.rules.row_mask(at, tile.column, n, true, false, buffers.mirror_mask)
               : nullptr;
  const GradientRow<T> row{values.student,
                           values.teacher,
                           n,
                           OwnRow<T>(rows_.terms, at),
                           {columns_too_ ? columns_.terms : rows_.terms, tile.column},
                           values.mask,
                           mirror_mask,
                           maximum_};
  T* out = buffers.gradient;
  const auto gradient = [&](auto mirror) {
    return correction_ == Correction::swept ? row_gradient<mirror.get, false>(settings_, row, out)
                                            : row_gradient<mirror.get, true>(settings_, row, out);
  };
  const RowSums sums = columns_too_ ? gradient(Constant<Mirror::columns>{})
                       : mirrored   ? gradient(Constant<Mirror::rows>{})
                                    : gradient(Constant<Mirror::none>{});
  if (self_ && !mirrored) {
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      store(out + j, load(out + j) + load(out + j));
    }
  }
  const int64_t d = pairs_.rules.diagonal_in(at, tile.column, n);
  if (settings_.normalization == Normalization::mean_offdiag && d >= 0 &&
      pairs_.rules.takes_part(at, tile.column + d)) {
    // the diagonal is no part of the statistic
    out[d] += (self_ ? 2 : 1) * rows_.terms.correction[at] * rows_.terms.student.multiplier[at];
  }
  return sums;
}

template <typename T>
typename Pipeline<T>::Means Pipeline<T>::sweep_gradient_means() {
  MeanSums sums = empty_sums();
  pairs_.sweep(self_ ? pairs_.parallel : run_serially, [&](const Tile<T>& tile) {
    const Scratch scratch;
    const Buffers buffers(tile.columns);
    for (int64_t i = 0; i < tile.rows; ++i) {
      affinity_gradient(tile, i, buffers);
      add_to_sums(buffers.gradient, tile.columns, sums.rows + tile.row + i,
                  sums.columns_from(tile.column));
    }
  });
  return means_of(sums.rows, sums.columns);
}

// The tile's student values become V; its losses are added where they go along.
template <typename T>
void Pipeline<T>::add_row_gradients(const Tile<T>& tile) {
  const Scratch scratch;
  const Buffers buffers(tile.columns);
  const bool distance = is_distance(settings_.pair);
  const bool flat_diagonal = distance || settings_.diagonal == Diagonal::zero;
  const bool constant_slope =
      !clamps_affinities(settings_) &&
      (settings_.pair == PairFunction::linear || settings_.pair == PairFunction::squared_distance);
  for (int64_t i = 0; i < tile.rows; ++i) {
    T* values = tile.student + i * tile.stride;
    const RowSums losses = affinity_gradient(tile, i, buffers);
    rows_.sums[tile.row + i].loss += losses.loss;
    rows_.sums[tile.row + i].correction += losses.correction;
    rows_.sums[tile.row + i].beyond += losses.beyond;
    rows_.sums[tile.row + i].column_losses += losses.column_losses;
    if (gradient_means_.of_rows != nullptr) {
      subtract_means(gradient_means_, tile, i, buffers.gradient);
    }
    if (!constant_slope) {
      through_pair_function(settings_, pairs_.student.scale, values, tile.columns,
                            buffers.gradient);
    }
    const int64_t d = pairs_.rules.diagonal_in(tile.row + i, tile.column, tile.columns);
    if (flat_diagonal && d >= 0) {
      buffers.gradient[d] = 0;
    }
    __builtin_memcpy(values, buffers.gradient, sizeof(T) * static_cast<size_t>(tile.columns));
    if (distance) {
      query_sums_[tile.row + i] +=
          static_cast<T>(sum_row<T>(values, tile.columns, nullptr, [](Vector<T> x) { return x; }));
    }
  }
}

template <typename T>
void Pipeline<T>::add_products(const Tile<T>& tile, Range dims) {
  if (query_products_ != nullptr) {
    add_product<T>(tile.rows, {tile.student, tile.stride, 1}, pairs_.student.keys,
                   {tile.column, tile.columns}, dims,
                   query_products_ + tile.row * pairs_.student.keys.dim);
  }
}

// The same of the transposed tile: what its columns receive from its rows.
template <typename T>
void Pipeline<T>::add_mirror_products(const Tile<T>& tile, T* products, T* sums) {
  const Items<T>& items = pairs_.student.queries;
  const Scratch scratch;
  // in rows, as the product reads it: down a column every number would cost a line of the cache
  const int64_t stride = round_up(tile.rows, kPanel<T>) + kLanes<T>;
  T* mirror = take<T>(tile.columns * stride);
  transpose(tile.rows, tile.columns, tile.student, tile.stride, mirror, stride);
  add_product<T>(tile.columns, {mirror, stride, 1}, items, {tile.row, tile.rows}, {0, items.dim},
                 products + tile.column * items.dim);
  if (is_distance(settings_.pair)) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t j = 0; j < tile.columns; ++j) {
        sums[tile.column + j] += tile.student[i * tile.stride + j];
      }
    }
  }
}

// The correction was guessed, and wrongly: now with the true one.
template <typename T>
void Pipeline<T>::sweep_again() {
  correction_ = Correction::swept;
  const auto clear = [](T* products, int64_t count) {
    if (products != nullptr) {
      __builtin_memset(products, 0, sizeof(T) * static_cast<size_t>(count));
    }
  };
  clear(query_products_, matrix_.queries * pairs_.student.queries.dim);
  clear(matrix_.key_gradient, matrix_.keys * pairs_.student.keys.dim);
  forget_losses();
  pairs_.sweep(pairs_.parallel, [this](const Tile<T>& tile) { add_losses(tile); });
  finish_corrections();
  sweep_gradients();
}

// Row i of W lacks the same number for every key.
template <typename T>
void Pipeline<T>::add_late_corrections() {
  const Scratch scratch;
  double* rests = take<double>(matrix_.queries);
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    const double correction = matrix_.loss_scale * row_weight(i) * rows_.sums[i].correction;
    rests[i] = (rows_.terms.correction[i] - correction) * rows_.terms.student.multiplier[i];
  }
  const PreparedSide<T>& side = pairs_.student;
  const double* of_keys = sum_of_items(side.keys, nullptr, pairs_.parallel);
  const double* of_queries = sum_of_items(side.queries, rests, pairs_.parallel);
  const auto add = [&](T* products, int64_t count, const double* factors, const double* sum,
                       const double* mirror) {
    const Parallel threads = parallel_for_elements(pairs_.parallel, count * side.keys.dim);
    for_each_task(threads, count, [=, &side](int64_t i) {
      for (int64_t d = 0; d < side.keys.dim; ++d) {
        const double own = factors == nullptr ? 0.0 : factors[i] * sum[d];
        products[i * side.keys.dim + d] +=
            static_cast<T>(own + (mirror == nullptr ? 0.0 : mirror[d]));
      }
    });
  };
  if (query_products_ != nullptr) {
    add(query_products_, matrix_.queries, rests, of_keys, self_ ? of_queries : nullptr);
  }
  if (matrix_.key_gradient != nullptr) {
    add(matrix_.key_gradient, matrix_.keys, nullptr, nullptr, of_queries);
  }
}

template <typename T>
void Pipeline<T>::sweep_gradients() {
  query_products_ = matrix_.query_gradient;
  if (query_products_ == nullptr && matrix_.scale_gradient_wanted) {
    query_products_ = take_filled<T>(matrix_.queries * pairs_.student.queries.dim, 0);
  }
  query_sums_ = take_filled<T>(matrix_.queries, 0);
  const bool keys = matrix_.key_gradient != nullptr;
  key_products_ = keys ? matrix_.key_gradient : query_products_;
  key_sums_ = keys ? take_filled<T>(matrix_.keys, 0) : query_sums_;
  const int64_t dim = pairs_.student.keys.dim;
  const auto visit = [this, dim](const Tile<T>& tile) {
    add_row_gradients(tile);
    add_products(tile, {0, dim});
  };
  if (!pairs_.dense()) {
    pairs_.sweep_tiles(pairs_.parallel, [&](const Tile<T>& tile) {
      if (correction_ != Correction::swept && pairs_.is_mirrored(tile)) {
        pairs_.visit_transposed(tile, [this](const Tile<T>& mirror) { add_losses(mirror); });
      }
      visit(tile);
      if (keys || pairs_.is_mirrored(tile)) {
        add_mirror_products(tile, key_products_, key_sums_);
      }
    });
    return;
  }
  if (pairs_.goes_by_features()) {
    pairs_.sweep(pairs_.parallel, [this](const Tile<T>& tile) { add_row_gradients(tile); });
    const int64_t block = feature_block_size<T>(dim);
    for_each_task(pairs_.parallel, count_blocks(dim, block), [&](int64_t task) {
      add_products(pairs_.whole(), block_range(dim, block, task));
    });
  } else {
    pairs_.sweep(pairs_.parallel, visit);
  }
  if (keys) {
    pairs_.sweep_columns(
        [this](const Tile<T>& tile) { add_mirror_products(tile, key_products_, key_sums_); });
  }
}

// Stage 1 backwards: from sums over pairs to the gradient of the items, in place, and then to where
// they came from.
template <typename T>
void Pipeline<T>::finish_items(const Items<T>& items, const T* sums, T* products) {
  const T factor = slope_factor(settings_, pairs_.student.scale);
  const bool distance = is_distance(settings_.pair);
  const bool changes = distance || settings_.unit || factor != 1;
  constexpr int64_t block = 32;
  const Parallel threads = parallel_for_elements(pairs_.parallel, items.count * items.dim);
  for_each_task(threads, changes ? count_blocks(items.count, block) : 0, [&](int64_t task) {
    const Scratch scratch;
    T* buffer = take<T>(items.dim);
    const Range range = block_range(items.count, block, task);
    for (int64_t i = range.begin; i < range.begin + range.size; ++i) {
      const T* x = items.values(i, buffer);
      T* gradient = products + i * items.dim;
      for (int64_t d = 0; d < items.dim; ++d) {
        gradient[d] = factor * (distance ? sums[i] * x[d] - gradient[d] : gradient[d]);
      }
      if (settings_.unit) {
        through_unit_length(x, items.inverse_lengths[i], items.dim, gradient);
      }
    }
  });
  if (centers_features(settings_)) {
    through_centering(items, products, pairs_.parallel);
  }
  scatter_rows(items, products);
}

template <typename T>
void Pipeline<T>::finish_gradients() {
  if (matrix_.scale_gradient_wanted) {
    // A = scale * g: d loss / d scale = sum_ij dA_ij g_ij, and a self-affinity's V holds dA twice
    const Items<T>& queries = pairs_.student.queries;
    const Scratch scratch;
    T* buffer = take<T>(queries.dim);
    double sum = 0;
    for (int64_t i = 0; i < matrix_.queries; ++i) {
      sum += dot(query_products_ + i * queries.dim, queries.values(i, buffer), queries.dim);
    }
    matrix_.scale_gradient = self_ ? sum / 2 : sum;
  }
  if (matrix_.query_gradient != nullptr) {
    finish_items(pairs_.student.queries, query_sums_, matrix_.query_gradient);
  }
  if (matrix_.key_gradient != nullptr) {
    finish_items(pairs_.student.keys, key_sums_, matrix_.key_gradient);
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
