// Pipeline: the columns of a softmax over both axes. A tile turned around has them as its rows, so
// that everything that is known of rows serves them. Nothing masks single pairs here, nor weighs
// single columns.
#pragma once

#include "pipeline.h"

namespace affkd::AFFKD_NAMESPACE {

// The affinities of the tile, transposed, in scratch memory.
template <typename T>
Tile<T> Pipeline<T>::columns_of(const Tile<T>& tile) const {
  Tile<T> affinities = tile;
  if (!stores_affinity(settings_)) {
    // of stored values the transpose would not do: it has its diagonal elsewhere
    const size_t bytes = sizeof(T) * static_cast<size_t>(tile.columns);
    // the tile may lie in whole rows of the matrix, of which it is a few columns
    affinities.stride = padded<T>(tile.columns);
    affinities.student = take<T>(tile.rows * affinities.stride);
    affinities.teacher = take<T>(tile.rows * affinities.stride);
    const Buffers buffers(tile.columns);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Row row = row_of(tile, i, buffers);
      __builtin_memcpy(affinities.student + i * affinities.stride, row.student, bytes);
      __builtin_memcpy(affinities.teacher + i * affinities.stride, row.teacher, bytes);
    }
  }
  const int64_t stride = padded<T>(tile.rows);
  T* student = take<T>(tile.columns * stride);
  return transposed_tile(affinities, student, take<T>(tile.columns * stride), stride);
}

template <typename T>
void Pipeline<T>::add_column_statistics(const Tile<T>& tile) {
  const Scratch scratch;
  const Tile<T> columns = columns_of(tile);
  const T student_scale = static_cast<T>(1 / settings_.student_tau);
  const T teacher_scale = static_cast<T>(1 / settings_.teacher_tau);
  for (int64_t j = 0; j < columns.rows; ++j) {
    const int64_t at = columns.row + j, offset = j * columns.stride;
    add_exponentials(columns.student + offset, columns.columns, nullptr, student_scale,
                     columns_.student_states[at]);
    add_exponentials(columns.teacher + offset, columns.columns, nullptr, teacher_scale,
                     columns_.teacher_states[at]);
  }
}

template <typename T>
void Pipeline<T>::add_column_losses(const Tile<T>& tile) {
  const Scratch scratch;
  const Tile<T> columns = columns_of(tile);
  for (int64_t j = 0; j < columns.rows; ++j) {
    const int64_t at = columns.row + j, offset = j * columns.stride;
    const RowSums sums = row_loss(settings_, columns.student + offset, columns.teacher + offset,
                                  columns.columns, nullptr, OwnRow<T>(columns_.terms, at));
    columns_.sums[at].loss += sums.loss;
    columns_.sums[at].correction += sums.correction;
  }
}

template <typename T>
void Pipeline<T>::finish_column_corrections() {
  for (int64_t j = 0; j < matrix_.keys; ++j) {
    // sum_i s dl/ds = -sum_i t = -1
    columns_.terms.correction[j] =
        correction_ == Correction::swept ? static_cast<T>(columns_.sums[j].correction) : T{-1};
  }
}

template <typename T>
void Pipeline<T>::finish_column_losses() {
  for (int64_t j = 0; j < matrix_.keys; ++j) {
    matrix_.loss += matrix_.column_loss_scale * columns_.sums[j].loss;
  }
  // those that went along with the gradients
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    matrix_.loss += rows_.sums[i].column_losses;
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
