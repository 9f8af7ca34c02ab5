// One matrix from features to loss and gradient: prepare, then sweeps over the pairs.
//
//   statistics   what the normalization divides by          (none: no sweep)
//   losses       the loss, and c of the backward            (c known beforehand: no sweep)
//   gradients    W = dA * dphi in place of the student's values, and the products with it
//
// The algorithms, `dense` and `tiled`, differ in where the pairs come from (pairs.h); the stages
// are the same. A softmax over both axes treats the columns as it does the rows (`Lines`); both
// losses share one W.
#pragma once

#include "pairs.h"

namespace affkd::AFFKD_NAMESPACE {

template <typename T>
class Pipeline {
 public:
  Pipeline(const Settings& settings, Matrix<T>& matrix, Parallel parallel)
      : settings_(settings),
        matrix_(matrix),
        pairs_(settings, matrix, parallel),
        self_(matrix.self),
        columns_too_(matrix.columns_too),
        softmax_(settings.normalization == Normalization::softmax),
        centered_(settings.normalization == Normalization::frobenius_centered &&
                  !centers_features(settings)),
        wants_gradient_(matrix.query_gradient != nullptr || matrix.key_gradient != nullptr ||
                        matrix.scale_gradient_wanted),
        correction_(wants_gradient_ ? cheapest_correction() : Correction::swept) {}

  void run() {
    prepare();
    if (centered_) {
      sweep_affinity_means();
    }
    if (sums_are_linear()) {
      find_linear_sums();
    } else if (settings_.normalization != Normalization::none) {
      sweep([this](const Tile<T>& tile) { add_statistics(tile); },
            [this](const Tile<T>& tile) { add_column_statistics(tile); });
    }
    if (centers_features(settings_)) {
      student_square_ = square_before_centering(pairs_.student);
      teacher_square_ = square_before_centering(pairs_.teacher);
    }
    finish_statistics();
    if (correction_ == Correction::swept) {
      sweep([this](const Tile<T>& tile) { add_losses(tile); },
            [this](const Tile<T>& tile) { add_column_losses(tile); });
      finish_corrections();
    }
    if (wants_gradient_) {
      if (centered_ && !gradient_is_centered()) {
        gradient_means_ = sweep_gradient_means();
      }
      sweep_gradients();
      if (guess_failed()) {
        sweep_again();
      } else if (correction_ == Correction::late) {
        add_late_corrections();
      }
      finish_gradients();
    }
    finish_loss();
  }

 private:
  void prepare() {
    rows_ = empty_lines(matrix_.queries);
    for (int64_t i = 0; i < matrix_.queries; ++i) {
      rows_.terms.weight[i] = static_cast<T>(matrix_.loss_scale * row_weight(i));
    }
    if (columns_too_) {
      columns_ = empty_lines(matrix_.keys);
      for (int64_t j = 0; j < matrix_.keys; ++j) {
        columns_.terms.weight[j] = static_cast<T>(matrix_.column_loss_scale);
      }
    }
  }

  Lines<T> empty_lines(int64_t n) const {
    const RowState state = empty_state(settings_.normalization);
    return {take_filled<RowState>(n, state),
            take_filled<RowState>(n, state),
            take_filled<RowSums>(n, RowSums{}),
            {scaling_arrays(n), scaling_arrays(n), zeros(n), zeros(n)}};
  }

  static T* zeros(int64_t n) { return take_filled<T>(padded<T>(n), 0); }

  static ScalingArrays<T> scaling_arrays(int64_t n) {
    return {zeros(n), zeros(n), zeros(n), zeros(n), zeros(n)};
  }

  double row_weight(int64_t i) const {
    return matrix_.row_weight == nullptr ? 1.0 : matrix_.row_weight[source_row(i)];
  }

  int64_t source_row(int64_t i) const {
    return matrix_.query_index == nullptr ? i : matrix_.query_index[i];
  }

  struct Row {
    const T* student;
    const T* teacher;
    const MaskLane<T>* mask;
  };

  struct Buffers {
    T* student;
    T* teacher;
    T* gradient;
    MaskLane<T>* mask;
    MaskLane<T>* mirror_mask;
    explicit Buffers(int64_t columns)
        : student(take<T>(padded<T>(columns))),
          teacher(take<T>(padded<T>(columns))),
          gradient(take<T>(padded<T>(columns))),
          mask(take<MaskLane<T>>(padded<T>(columns))),
          mirror_mask(take<MaskLane<T>>(padded<T>(columns))) {}
  };

  // What double centering subtracts, padded: row mean - grand mean, and column mean.
  struct Means {
    T* of_rows = nullptr;
    T* of_columns = nullptr;
  };

  const T* affinities(const T* values, T scale, const Means& means, const Tile<T>& tile, int64_t i,
                      T* buffer) const {
    if (stores_affinity(settings_) && means.of_rows == nullptr) {
      return values;
    }
    affinities_of_values(settings_, scale, values, tile.columns, buffer);
    const int64_t d = pairs_.rules.diagonal_in(tile.row + i, tile.column, tile.columns);
    if (settings_.diagonal == Diagonal::zero && d >= 0) {
      buffer[d] = 0;
    }
    if (means.of_rows != nullptr) {
      subtract_means(means, tile, i, buffer);
    }
    return buffer;
  }

  void subtract_means(const Means& means, const Tile<T>& tile, int64_t i, T* row) const {
    const Vector<T> row_mean = splat<Vector<T>>(means.of_rows[tile.row + i]);
    for (int64_t j = 0; j < tile.columns; j += kLanes<T>) {
      store(row + j, load(row + j) - row_mean - load(means.of_columns + tile.column + j));
    }
  }

  Row row_of(const Tile<T>& tile, int64_t i, const Buffers& buffers) const {
    const int64_t at = i * tile.stride;
    return {
        affinities(tile.student + at, pairs_.student.scale, student_means_, tile, i,
                   buffers.student),
        affinities(tile.teacher + at, pairs_.teacher.scale, teacher_means_, tile, i,
                   buffers.teacher),
        pairs_.rules.row_mask(tile.row + i, tile.column, tile.columns, false, false, buffers.mask)};
  }

  // Of every pair the row is visited and, where that counts, the column.
  template <typename VisitRows, typename VisitColumns>
  void sweep(VisitRows visit_rows, VisitColumns visit_columns) {
    if (!columns_too_) {
      pairs_.sweep(pairs_.parallel, visit_rows);
    } else if (pairs_.dense()) {
      pairs_.sweep(pairs_.parallel, visit_rows);
      pairs_.sweep_columns(visit_columns);
    } else {
      pairs_.sweep(pairs_.parallel, [&](const Tile<T>& tile) {
        visit_rows(tile);
        visit_columns(tile);
      });
    }
  }

  void add_statistics(const Tile<T>& tile) {
    const Scratch scratch;
    const Buffers buffers(tile.columns);
    const Normalization kind = settings_.normalization;
    const T student_scale = static_cast<T>(1 / settings_.student_tau);
    const T teacher_scale = static_cast<T>(1 / settings_.teacher_tau);
    for (int64_t i = 0; i < tile.rows; ++i) {
      Row row = row_of(tile, i, buffers);
      if (follows_from_sums()) {
        RowSums& sums = rows_.sums[tile.row + i];
        sums.correction += dot_row(row.student, row.teacher, tile.columns, row.mask);
        sums.square += dot_row(row.student, row.student, tile.columns, row.mask);
      }
      if (kind == Normalization::mean_offdiag) {
        row.mask = pairs_.rules.row_mask(tile.row + i, tile.column, tile.columns, false, true,
                                         buffers.mask);
      }
      const int64_t n = tile.columns;
      add_statistic(kind, row.student, n, row.mask, student_scale,
                    rows_.student_states[tile.row + i]);
      add_statistic(kind, row.teacher, n, row.mask, teacher_scale,
                    rows_.teacher_states[tile.row + i]);
    }
  }

  Tile<T> columns_of(const Tile<T>& tile) const;
  void add_column_statistics(const Tile<T>& tile);
  void add_column_losses(const Tile<T>& tile);
  void finish_column_corrections();
  void finish_column_losses();

  // sum_j (scale q.k_j + offset) needs the sum of the keys, and no sweep
  bool sums_are_linear() const {
    const Normalization kind = settings_.normalization;
    return (kind == Normalization::row_sum || kind == Normalization::mean_all) &&
           settings_.pair == PairFunction::linear && !clamps_affinities(settings_) &&
           pairs_.rules.all_pairs() && settings_.diagonal == Diagonal::keep;
  }
  void find_linear_sums();
  void find_linear_sums_of(const PreparedSide<T>& side, RowState* states) const;

  // Where c comes from. All but a sweep let the losses go along with the gradients.
  enum class Correction {
    constant,  // none, or the -1 of a softmax
    closed,    // 2 w sum_j (P - T) P, from sums of squares and products that one sweep finds
    guessed,   // the same of smooth L1, right as long as all differences are below beta
    late,      // -1, and the small rest is a sum over the keys after the sweep that finds it
    swept,     // from a sweep over the losses
  };
  Correction cheapest_correction() const;
  bool follows_from_sums() const {
    return correction_ == Correction::closed || correction_ == Correction::guessed;
  }

  bool rows_of_one_statistic() const {
    const Normalization kind = settings_.normalization;
    return kind != Normalization::none && kind != Normalization::row_l2 &&
           kind != Normalization::row_l1 && kind != Normalization::row_sum && !softmax_;
  }

  // Sums over rows and, unless the matrix is symmetric, over columns.
  struct MeanSums {
    double* rows;
    double* columns;
    double* columns_from(int64_t j) const { return columns == nullptr ? nullptr : columns + j; }
  };
  MeanSums empty_sums() const {
    return {take_filled<double>(matrix_.queries, 0),
            self_ ? nullptr : take_filled<double>(matrix_.keys, 0)};
  }

  void finish_statistics();
  void finish_row(int64_t i);
  void finish_softmax(const Lines<T>& lines, int64_t i) const;
  void finish_matrix();
  void finish_known_corrections();
  double matrix_statistic(const PreparedSide<T>& side, const RowState* states, double square,
                          double* slope_scale, double* maximum) const;
  double square_before_centering(const PreparedSide<T>& side) const;
  void sweep_affinity_means();
  Means means_of(const double* row_sums, const double* column_sums) const;

  void add_losses(const Tile<T>& tile) {
    const Scratch scratch;
    const Buffers buffers(tile.columns);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Row row = row_of(tile, i, buffers);
      const RowSums sums = row_loss(settings_, row.student, row.teacher, tile.columns, row.mask,
                                    OwnRow<T>(rows_.terms, tile.row + i));
      rows_.sums[tile.row + i].loss += sums.loss;
      rows_.sums[tile.row + i].correction += sums.correction;
      rows_.sums[tile.row + i].beyond += sums.beyond;
    }
  }

  void finish_corrections();
  void forget_losses();
  bool guess_failed() const;
  void finish_loss();

  bool gradient_is_centered() const {
    return settings_.loss == Loss::mse && matrix_.row_weight == nullptr;
  }

  bool rows_are_alike() const {
    const bool one = rows_of_one_statistic() || settings_.normalization == Normalization::none;
    return one && matrix_.row_weight == nullptr && matrix_.pair_mask == nullptr;
  }

  Means sweep_gradient_means();
  void sweep_gradients();
  void sweep_again();
  void add_late_corrections();
  void add_row_gradients(const Tile<T>& tile);
  void add_products(const Tile<T>& tile, Range dims);
  void add_mirror_products(const Tile<T>& tile, T* products, T* sums);
  RowSums affinity_gradient(const Tile<T>& tile, int64_t i, const Buffers& buffers) const;
  void finish_gradients();
  void finish_items(const Items<T>& items, const T* sums, T* products);

  const Settings& settings_;
  Matrix<T>& matrix_;
  Pairs<T> pairs_;
  const bool self_;
  const bool columns_too_;
  const bool softmax_;
  const bool centered_;  // by double centering the pairs
  const bool wants_gradient_;
  Correction correction_;

  Lines<T> rows_{};
  Lines<T> columns_{};      // where they have losses too
  T maximum_ = 0;           // of the student's affinities
  double slope_scale_ = 1;  // 1 / count of a mean, 1 / ties of a maximum

  Means student_means_;
  Means teacher_means_;
  Means gradient_means_;
  double student_square_ = 0;  // what centering took out of the sum of A^2, or all of it
  double teacher_square_ = 0;

  // [count, dim] sum_j V_ij k_j and [count] sum_j V_ij; of keys, sums over the queries. The
  // products lie in the gradients' own memory where those are wanted.
  T* query_products_ = nullptr;
  T* query_sums_ = nullptr;
  T* key_products_ = nullptr;
  T* key_sums_ = nullptr;
};

}  // namespace affkd::AFFKD_NAMESPACE

#include "pipeline_columns.h"
#include "pipeline_gradients.h"
#include "pipeline_statistics.h"
