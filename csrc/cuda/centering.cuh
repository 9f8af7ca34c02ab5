// Double centering: what A loses is the mean of its row and of its column, and it gets back the
// mean of all. Counts and means are those of the valid items.
#pragma once

#include "losses.cuh"

namespace affkd::cuda {

// What phase `means` has summed up.
enum class Summed : int64_t { student, teacher, gradient };

AFFKD_DEVICE double* row_sums_of(const Params& p, Summed what, int64_t n) {
  return p.work.row_sums + (static_cast<int64_t>(what) * p.matrices + n) * p.queries;
}

// A self-affinity is symmetric, its gradient, with weights on the rows, is not.
AFFKD_DEVICE double* column_sums_of(const Params& p, Summed what, int64_t n) {
  if (p.self && what != Summed::gradient) {
    return row_sums_of(p, what, n);
  }
  return p.work.column_sums + (static_cast<int64_t>(what) * p.matrices + n) * p.keys;
}

// Sums of rows by tiles of columns or, of a cross-affinity, of columns by tiles of rows.
AFFKD_DEVICE double* tile_sums_of(const Params& p, bool student, int64_t n, bool columns) {
  const int64_t list = (student ? 0 : p.largest.matrices) + n - p.task.panel.matrix_begin;
  double* sums = p.work.tile_sums + list * tile_sums(p);
  return sums + (columns && !p.self ? divide_up(p.keys, kTile) * p.queries : 0);
}

// Of one side of one matrix, from its tiles.
struct FoldedSums {
  double rows[kMostFolded];
  double columns[kMostFolded];
};

AFFKD_DEVICE double block_count_valid(const MaskView& mask, int64_t n, int64_t items,
                                      double* scratch) {
  if (mask.data == nullptr) {
    return static_cast<double>(items);
  }
  double count = 0;
  for (int64_t i = threadIdx.x; i < items; i += kThreads) {
    count += is_valid(mask, n, i) ? 1 : 0;
  }
  __syncthreads();
  return block_sum(count, scratch);
}

// The means of one matrix.
template <typename T>
class Centering {
 public:
  // by all threads of a block
  AFFKD_DEVICE void find(const Params& p, Summed what, int64_t n, double* scratch) {
    find(p, row_sums_of(p, what, n), column_sums_of(p, what, n), n, scratch);
  }

  // The same from the sums of tiles. Returns the sum of squares that centering takes away.
  AFFKD_DEVICE double fold(const Params& p, bool student, int64_t n, FoldedSums& folded,
                           double* scratch) {
    const double of_columns = add_up(tile_sums_of(p, student, n, true), divide_up(p.queries, kTile),
                                     p.keys, folded.columns);
    const double of_rows = p.self ? of_columns
                                  : add_up(tile_sums_of(p, student, n, false),
                                           divide_up(p.keys, kTile), p.queries, folded.rows);
    const double total = find(p, p.self ? folded.columns : folded.rows, folded.columns, n, scratch);
    __syncthreads();
    const double squares =
        block_sum(of_rows * share_of_row_ + of_columns * share_of_column_, scratch);
    return squares - total * grand_mean_;
  }

  // Entry (i, j) of the centered matrix. What rounding took from a mean would be the same in a
  // whole column, and not cancel in the gradient.
  AFFKD_DEVICE T centered(T a, int64_t i, int64_t j) const {
    const double row_mean = row_sums_[i] * share_of_row_ - grand_mean_;
    return static_cast<T>(a - row_mean - column_sums_[j] * share_of_column_);
  }

 private:
  // Returns the sum of all entries.
  AFFKD_DEVICE double find(const Params& p, const double* rows, const double* columns, int64_t n,
                           double* scratch) {
    row_sums_ = rows;
    column_sums_ = columns;
    const double queries = block_count_valid(p.mask, n, p.queries, scratch);
    const double keys = block_count_valid(p.key_mask, n, p.keys, scratch);
    double total = 0;
    for (int64_t i = threadIdx.x; i < p.queries; i += kThreads) {
      total += row_sums_[i];
    }
    __syncthreads();
    total = block_sum(total, scratch);
    share_of_row_ = keys > 0 ? 1 / keys : 0;
    share_of_column_ = queries > 0 ? 1 / queries : 0;
    grand_mean_ = total * share_of_row_ * share_of_column_;
    return total;
  }

  // Of `count` lines the sums of all their tiles; returns this thread's share of the squares.
  AFFKD_DEVICE static double add_up(const double* tiles, int64_t number, int64_t count,
                                    double* sums) {
    double squares = 0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      double sum = 0;
      for (int64_t tile = 0; tile < number; ++tile) {
        sum += tiles[tile * count + i];
      }
      sums[i] = sum;
      squares += sum * sum;
    }
    return squares;
  }

  const double* row_sums_ = nullptr;
  const double* column_sums_ = nullptr;
  double share_of_row_ = 0;
  double share_of_column_ = 0;
  double grand_mean_ = 0;
};

}  // namespace affkd::cuda
