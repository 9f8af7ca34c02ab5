// Pipeline: from the sums of a sweep to statistics, the constants of the backward, and the loss.
#pragma once

#include "largest.h"
#include "pipeline.h"

namespace affkd::AFFKD_NAMESPACE {

// Divides row i by `statistic`: by infinity where it counts as nothing, by NaN where it overflowed,
// as the quotient must not pass for 0.
template <typename T>
inline void divide_row(const ScalingArrays<T>& side, int64_t i, double statistic, double eps) {
  const double divisor = statistic <= eps ? kInfinity : (statistic - statistic) + statistic;
  side.divisor[i] = static_cast<T>(divisor);
  split_number(1 / divisor, side.multiplier + i, side.rest + i);
}

template <typename T>
inline double exact_multiplier(const ScalingArrays<T>& side, int64_t i) {
  return static_cast<double>(side.multiplier[i]) + side.rest[i];
}

template <typename T>
void Pipeline<T>::find_linear_sums() {
  find_linear_sums_of(pairs_.student, rows_.student_states);
  find_linear_sums_of(pairs_.teacher, rows_.teacher_states);
}

template <typename T>
void Pipeline<T>::find_linear_sums_of(const PreparedSide<T>& side, RowState* states) const {
  const int64_t dim = side.keys.dim;
  const Scratch scratch;
  const double* key_sum = sum_of_items(side.keys, nullptr, pairs_.parallel);
  const Parallel threads = parallel_for_elements(pairs_.parallel, side.keys.count * dim);
  const double offsets = settings_.offset * static_cast<double>(side.keys.count);
  for_each_task(threads, side.queries.count, [&](int64_t i) {
    const Scratch buffers;
    const T* query = side.queries.values(i, take<T>(dim));
    states[i].first = side.scale * dot(query, key_sum, dim) + offsets;
  });
}

template <typename T>
void Pipeline<T>::finish_statistics() {
  const Normalization kind = settings_.normalization;
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    if (softmax_) {
      finish_softmax(rows_, i);
    } else if (kind == Normalization::none) {
      divide_row(rows_.terms.student, i, 1.0, 0.0);
      divide_row(rows_.terms.teacher, i, 1.0, 0.0);
    } else {
      finish_row(i);
    }
  }
  if (rows_of_one_statistic()) {
    finish_matrix();
  }
  for (int64_t j = 0; columns_too_ && j < matrix_.keys; ++j) {
    finish_softmax(columns_, j);
  }
  if (correction_ != Correction::swept) {
    finish_known_corrections();
  }
}

template <typename T>
void Pipeline<T>::finish_row(int64_t i) {
  const bool root = settings_.normalization == Normalization::row_l2;
  const auto statistic = [&](const RowState& state) {
    return root ? __builtin_sqrt(state.first) : state.first;
  };
  divide_row(rows_.terms.student, i, statistic(rows_.student_states[i]), settings_.statistic_eps);
  divide_row(rows_.terms.teacher, i, statistic(rows_.teacher_states[i]), settings_.statistic_eps);
}

template <typename T>
void Pipeline<T>::finish_softmax(const Lines<T>& lines, int64_t i) const {
  const auto finish = [i](const ScalingArrays<T>& side, const RowState& state, double tau) {
    side.multiplier[i] = static_cast<T>(1 / tau);
    // a row without pairs has neither maximum nor sum
    const bool nothing = state.second == 0;
    side.peak[i] = nothing ? T{0} : static_cast<T>(state.first);
    side.log_sum[i] = nothing ? T{0} : static_cast<T>(__builtin_log(state.second));
  };
  finish(lines.terms.student, lines.student_states[i], settings_.student_tau);
  finish(lines.terms.teacher, lines.teacher_states[i], settings_.teacher_tau);
}

// The statistic of the whole matrix. `slope_scale` is what the slope of `statistic_slope` lacks.
template <typename T>
double Pipeline<T>::matrix_statistic(const PreparedSide<T>& side, const RowState* states,
                                     double square, double* slope_scale, double* maximum) const {
  const Normalization kind = settings_.normalization;
  const bool largest = kind == Normalization::max || kind == Normalization::max_detached;
  double sum = 0, count = 0;
  *maximum = -kInfinity;
  int64_t row = 0;  // that has it
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    // not the other way round: a NaN must become the maximum
    if (!(states[i].first <= *maximum)) {
      *maximum = states[i].first;
      row = i;
    }
  }
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    sum += states[i].first;
    if (largest) {
      count += states[i].first == *maximum ? states[i].second : 0;
    } else if (kind == Normalization::mean_positive) {
      count += states[i].second;
    } else {
      const int64_t d = pairs_.rules.diagonal(i);
      const bool left_out =
          kind == Normalization::mean_offdiag && d >= 0 && pairs_.rules.takes_part(i, d);
      count += static_cast<double>(matrix_.pairs[i] - (left_out ? 1 : 0));
    }
  }
  *slope_scale = 1;
  if (kind == Normalization::frobenius) {
    return __builtin_sqrt(sum);
  }
  if (kind == Normalization::frobenius_centered) {
    // what is left of a constant matrix is rounding
    const double before = __builtin_sqrt(centered_ ? square : sum + square);
    const double norm = __builtin_sqrt(sum);
    return norm <= 8.0 * kEpsilon<T> * before ? 0.0 : norm;
  }
  *slope_scale = count > 0 ? 1 / count : 0;
  if (!largest) {
    return sum * *slope_scale;
  }
  const bool finite = *maximum - *maximum == 0;
  return finite && !needs_exact_one(settings_.loss)
             ? largest_of_row(settings_, pairs_.rules, side, row)
             : *maximum;
}

template <typename T>
void Pipeline<T>::finish_matrix() {
  double slope_scale, maximum;
  const double teacher = matrix_statistic(pairs_.teacher, rows_.teacher_states, teacher_square_,
                                          &slope_scale, &maximum);
  const double student = matrix_statistic(pairs_.student, rows_.student_states, student_square_,
                                          &slope_scale, &maximum);
  slope_scale_ = slope_scale;
  maximum_ = static_cast<T>(maximum);
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    divide_row(rows_.terms.student, i, student, settings_.statistic_eps);
    divide_row(rows_.terms.teacher, i, teacher, settings_.statistic_eps);
  }
}

// With features x + m, x centered, A = X Y' + X m_y 1' + 1 m_x' Y' + m_x.m_y 11' in orthogonal
// parts: the squared norms of the last three.
template <typename T>
double Pipeline<T>::square_before_centering(const PreparedSide<T>& side) const {
  const int64_t dim = side.keys.dim;
  const Items<T>&queries = side.queries, &keys = side.keys;
  const Scratch scratch;
  const auto square_sum = [&](const Items<T>& items, const T* mean) {
    double* products = take<double>(items.count);
    const Parallel threads = parallel_for_elements(pairs_.parallel, items.count * dim);
    for_each_task(threads, items.count, [&](int64_t i) {
      const Scratch of_task;
      products[i] = dot(items.values(i, take<T>(dim)), mean, dim);
    });
    double sum = 0;
    for (int64_t i = 0; i < items.count; ++i) {
      sum += products[i] * products[i];
    }
    return sum;
  };
  const double of_rows = square_sum(queries, keys.mean);
  const double of_columns = self_ ? of_rows : square_sum(keys, queries.mean);
  const double grand = dot(queries.mean, keys.mean, dim);
  const double rows = static_cast<double>(queries.count), columns = static_cast<double>(keys.count);
  const double scale = side.scale;
  return scale * scale * (columns * of_rows + rows * of_columns + rows * columns * grand * grand);
}

template <typename T>
typename Pipeline<T>::Correction Pipeline<T>::cheapest_correction() const {
  const Normalization kind = settings_.normalization;
  const Loss loss = settings_.loss;
  if (kind == Normalization::none || kind == Normalization::max_detached) {
    return Correction::constant;
  }
  if (softmax_) {
    const bool constant = loss == Loss::kl_forward || loss == Loss::cross_entropy;
    return constant ? Correction::constant : Correction::swept;
  }
  if (sums_are_linear()) {
    const bool late = kind == Normalization::row_sum && loss == Loss::kl_forward;
    return late && !pairs_.dense() ? Correction::late : Correction::swept;
  }
  if (loss == Loss::mse) {
    return Correction::closed;
  }
  // where a sweep is dear it is worth trying, unless beta is so small that it cannot be true
  const bool guess = loss == Loss::smooth_l1 && settings_.beta > kEpsilon<T> && !pairs_.dense();
  return guess ? Correction::guessed : Correction::swept;
}

// c where no sweep over the losses is needed for it
template <typename T>
void Pipeline<T>::finish_known_corrections() {
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    if (follows_from_sums()) {
      const double student = exact_multiplier(rows_.terms.student, i);
      const double teacher = exact_multiplier(rows_.terms.teacher, i);
      const double squares = rows_.sums[i].square * student * student;
      const double slope = settings_.loss == Loss::mse ? 2 : 1 / settings_.beta;
      rows_.sums[i].correction = slope * (squares - rows_.sums[i].correction * student * teacher);
    } else if (softmax_) {
      // sum_j s dl/ds = -sum_j t = -1
      rows_.sums[i].correction = matrix_.pairs[i] > 0 ? -1 : 0;
    } else if (correction_ == Correction::late) {
      // all but -sum_j t eps / (s + eps), and nothing where t is 0
      rows_.sums[i].correction = rows_.terms.teacher.multiplier[i] == 0 ? 0 : -1;
    }
  }
  finish_corrections();
  forget_losses();
}

// What the sweep over the gradients finds anew.
template <typename T>
void Pipeline<T>::forget_losses() {
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    rows_.sums[i] = {};
  }
}

template <typename T>
bool Pipeline<T>::guess_failed() const {
  double beyond = 0;
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    beyond += rows_.sums[i].beyond;
  }
  return correction_ == Correction::guessed && beyond > 0;
}

template <typename T>
void Pipeline<T>::finish_corrections() {
  double total = 0;
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    const double correction = matrix_.loss_scale * row_weight(i) * rows_.sums[i].correction;
    // a softmax multiplies by the weight at the end, once what nearly cancels is subtracted
    rows_.terms.correction[i] = static_cast<T>(softmax_ ? rows_.sums[i].correction : correction);
    total += correction;
  }
  if (rows_of_one_statistic()) {
    for (int64_t i = 0; i < matrix_.queries; ++i) {
      rows_.terms.correction[i] = static_cast<T>(total * slope_scale_);
    }
  }
  if (columns_too_) {
    finish_column_corrections();
  }
}

template <typename T>
void Pipeline<T>::finish_loss() {
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    if (matrix_.pairs[i] == 0) {
      continue;
    }
    const double loss = matrix_.loss_scale * row_weight(i) * (rows_.sums[i].loss + pairs_.poison);
    matrix_.loss += loss;
    if (matrix_.row_losses != nullptr) {
      matrix_.row_losses[source_row(i)] = static_cast<T>(loss);
    }
  }
  if (columns_too_) {
    finish_column_losses();
  }
}

// Row means less the grand mean, and column means, from sums over rows and over columns. Without
// column sums the matrix is symmetric.
template <typename T>
typename Pipeline<T>::Means Pipeline<T>::means_of(const double* row_sums,
                                                  const double* column_sums) const {
  const int64_t rows = matrix_.queries, columns = matrix_.keys;
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    total += row_sums[i];
  }
  const double grand_mean = total / static_cast<double>(rows) / static_cast<double>(columns);
  Means means{take_filled<T>(padded<T>(rows), 0), take_filled<T>(padded<T>(columns), 0)};
  for (int64_t i = 0; i < rows; ++i) {
    means.of_rows[i] = static_cast<T>(row_sums[i] / static_cast<double>(columns) - grand_mean);
  }
  const double* sums = column_sums == nullptr ? row_sums : column_sums;
  for (int64_t j = 0; j < columns; ++j) {
    means.of_columns[j] = static_cast<T>(sums[j] / static_cast<double>(rows));
  }
  return means;
}

template <typename T>
void Pipeline<T>::sweep_affinity_means() {
  MeanSums student = empty_sums(), teacher = empty_sums();
  double* squares = take_filled<double>(2 * matrix_.queries, 0);
  // columns belong to no thread, so those of a cross-affinity are summed by one
  pairs_.sweep(self_ ? pairs_.parallel : run_serially, [&](const Tile<T>& tile) {
    const Scratch scratch;
    const Buffers buffers(tile.columns);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Row row = row_of(tile, i, buffers);
      const int64_t at = tile.row + i;
      add_to_sums(row.student, tile.columns, student.rows + at, student.columns_from(tile.column));
      add_to_sums(row.teacher, tile.columns, teacher.rows + at, teacher.columns_from(tile.column));
      squares[2 * at] += dot_row<T>(row.student, row.student, tile.columns, nullptr);
      squares[2 * at + 1] += dot_row<T>(row.teacher, row.teacher, tile.columns, nullptr);
    }
  });
  for (int64_t i = 0; i < matrix_.queries; ++i) {
    student_square_ += squares[2 * i];
    teacher_square_ += squares[2 * i + 1];
  }
  student_means_ = means_of(student.rows, student.columns);
  teacher_means_ = means_of(teacher.rows, teacher.columns);
}

}  // namespace affkd::AFFKD_NAMESPACE
