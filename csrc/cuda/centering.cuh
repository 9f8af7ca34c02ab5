// Double centering: what A loses is the mean of its row and of its column, and it gets back the
// mean of all. Counts and means are those of the valid items.
#pragma once

#include "losses.cuh"

namespace affkd::cuda {

// Of what there are sums: of A_s, A_t and dA_s / d scale, and of dA.
enum class Summed : int64_t { student, teacher, by_scale, gradient };

AFFKD_DEVICE double* row_sums_of(const Params& p, Summed what, int64_t n) {
  return p.work.row_sums + (static_cast<int64_t>(what) * p.matrices + n) * p.queries;
}

AFFKD_DEVICE double* column_sums_of(const Params& p, Summed what, int64_t n) {
  if (!has_own_columns(p, what == Summed::gradient)) {
    return row_sums_of(p, what, n);
  }
  return p.work.column_sums + (static_cast<int64_t>(what) * p.matrices + n) * p.keys;
}

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

AFFKD_DEVICE double block_squares(const Params& p, bool student, bool of_keys, int64_t n,
                                  double* scratch) {
  const int64_t list = ((student ? 0 : 2) + (of_keys ? 1 : 0)) * p.matrices + n;
  const double* squares = p.work.squares + list * p.item_blocks * 4;
  const int64_t count = 4 * divide_up(of_keys ? p.keys : p.queries, kTile);
  double sum = 0;
  for (int64_t at = threadIdx.x; at < count; at += kThreads) {
    sum += squares[at];
  }
  __syncthreads();
  return block_sum(sum, scratch);
}

// What |A| is at most with no point but 0 for the origin: |Q| |K|, of a self-affinity its trace. By
// all threads of a block; where has_centered_origin.
AFFKD_DEVICE double largest_norm(const Params& p, bool student, int64_t n, double* scratch) {
  const double queries = block_squares(p, student, false, n, scratch);
  const double keys = is_mirrored(p) ? queries : block_squares(p, student, true, n, scratch);
  return absolute(scale_of<double>(p, student)) * square_root(queries * keys);
}

// The means of one matrix.
template <typename T>
class Centering {
 public:
  // by all threads of a block
  AFFKD_DEVICE void find(const Params& p, Summed what, int64_t n, double* scratch) {
    row_sums_ = row_sums_of(p, what, n);
    column_sums_ = column_sums_of(p, what, n);
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
  }

  // Entry (i, j) of the centered matrix. What rounding took from a mean would be the same in a
  // whole column, and not cancel in the gradient.
  AFFKD_DEVICE T centered(T a, int64_t i, int64_t j) const {
    const double row_mean = row_sums_[i] * share_of_row_ - grand_mean_;
    return static_cast<T>(a - row_mean - column_sums_[j] * share_of_column_);
  }

 private:
  const double* row_sums_ = nullptr;
  const double* column_sums_ = nullptr;
  double share_of_row_ = 0;
  double share_of_column_ = 0;
  double grand_mean_ = 0;
};

}  // namespace affkd::cuda
