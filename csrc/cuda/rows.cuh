// What a sweep over rows of pairs is made of: a warp takes a row, and a block tells the totals of
// its rows. Where the columns of a matrix count as well, they are the rows of its transpose.
#pragma once

#include "collectives.cuh"
#include "views.cuh"

namespace affkd::cuda {

// The rows of one block, a row for every warp.
struct RowTask {
  int64_t matrix;
  int64_t block;  // which kWarps rows of the matrix, or after those, which columns
  int64_t row;    // of this warp
  bool column;    // it is a column
  bool exists;
  bool present;  // it exists and is valid
};

// The rows of a matrix that are a block of the panel's.
AFFKD_DEVICE RowTask find_row(const Params& p, int64_t matrix, int64_t block_of_panel) {
  const Panel& panel = p.task.panel;
  const int64_t block = panel.row_begin / kWarps + block_of_panel;
  const bool column = p.columns && block >= p.row_blocks;
  const int64_t row = (column ? block - p.row_blocks : block) * kWarps + warp_index();
  const bool exists = row < (column ? p.keys : panel.row_begin + panel.rows);
  const MaskView& mask = column ? p.key_mask : p.mask;
  return {matrix, block, row, column, exists, exists && is_valid(mask, matrix, row)};
}

// whose rows this block's are
AFFKD_DEVICE int64_t find_matrix(const Params& p) {
  return p.task.panel.matrix_begin + blockIdx.x / line_blocks(p);
}

AFFKD_DEVICE RowTask find_row(const Params& p) {
  return find_row(p, find_matrix(p), blockIdx.x % line_blocks(p));
}

AFFKD_DEVICE RowTotals join_totals(RowTotals a, RowTotals b) {
  return {a.loss + b.loss,
          a.correction + b.correction,
          a.scale_first + b.scale_first,
          a.scale_second + b.scale_second,
          a.pairs + b.pairs,
          a.rows + b.rows};
}

AFFKD_DEVICE RowTotals from_lane_at(RowTotals x, int distance) {
  return {from_lane_at(x.loss, distance),        from_lane_at(x.correction, distance),
          from_lane_at(x.scale_first, distance), from_lane_at(x.scale_second, distance),
          from_lane_at(x.pairs, distance),       from_lane_at(x.rows, distance)};
}

// One row of pairs. Sides are told apart at run time, so that what is written once is compiled
// once.
template <typename T>
class PairRow {
 public:
  AFFKD_DEVICE PairRow(const Params& p, const RowTask& task)
      : p_(p),
        task_(task),
        length_(task.column ? p.queries : p.keys),
        // of a row that does not exist nothing is read
        begin_(!task.exists  ? 0
               : task.column ? transposed_index(p, task.matrix, 0, task.row)
                             : pair_index(p, task.matrix, task.row, 0)) {}

  AFFKD_DEVICE int64_t index(int64_t j) const { return begin_ + j; }
  AFFKD_DEVICE T held(bool student, int64_t j) const {
    return static_cast<const T*>(student ? p_.work.student : p_.work.teacher)[begin_ + j];
  }
  AFFKD_DEVICE T& first(int64_t j) const { return static_cast<T*>(p_.work.first)[begin_ + j]; }
  AFFKD_DEVICE T& second(int64_t j) const { return static_cast<T*>(p_.work.second)[begin_ + j]; }
  AFFKD_DEVICE T& slope(int64_t j) const { return static_cast<T*>(p_.work.slopes)[begin_ + j]; }
  AFFKD_DEVICE bool own(int64_t j) const {
    return task_.column ? is_own(p_, j, task_.row) : is_own(p_, task_.row, j);
  }

  // visit(j) for this lane's share of the row, whatever takes part
  template <typename Visit>
  AFFKD_DEVICE void each_entry(Visit visit) const {
    for (int64_t j = lane_index(); j < length_; j += 32) {
      visit(j);
    }
  }

  // visit(j, whether the pair takes part) for this lane's share of the row
  template <typename Visit>
  AFFKD_DEVICE void each(Visit visit) const {
    if (!task_.present) {
      return;
    }
    // no pair of two valid items is left out where columns count
    each_entry([&](int64_t j) {
      visit(j, task_.column ? is_valid(p_.mask, task_.matrix, j)
                            : is_valid(p_.key_mask, task_.matrix, j) &&
                                  pair_takes_part(p_, task_.matrix, task_.row, j));
    });
  }

  // visit(j) for those that take part
  template <typename Visit>
  AFFKD_DEVICE void each_pair(Visit visit) const {
    each([&](int64_t j, bool part) {
      if (part) {
        visit(j);
      }
    });
  }

 private:
  const Params& p_;
  const RowTask task_;  // not a reference: to a neighbor, it would keep both out of registers
  const int64_t length_;
  const int64_t begin_;
};

}  // namespace affkd::cuda
