// What a sweep over rows of pairs is made of: a warp takes a row, and a block tells the totals of
// its rows.
#pragma once

#include "collectives.cuh"
#include "views.cuh"

namespace affkd::cuda {

// The rows of one block, a row for every warp.
struct RowTask {
  int64_t matrix;
  int64_t block;  // which kWarps rows of the matrix
  int64_t row;    // of this warp
  bool present;   // the row exists and is valid
};

AFFKD_DEVICE RowTask find_row(const Params& p) {
  const Panel& panel = p.task.panel;
  const int64_t blocks = divide_up(panel.rows, kWarps), unit = blockIdx.x;
  const int64_t matrix = panel.matrix_begin + unit / blocks;
  const int64_t block = panel.row_begin / kWarps + unit % blocks;
  const int64_t row = block * kWarps + warp_index();
  const bool exists = row < panel.row_begin + panel.rows;
  return {matrix, block, row, exists && is_valid(p.mask, matrix, row)};
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
        // of a row that does not exist nothing is read
        begin_(task.present ? pair_index(p, task.matrix, task.row, 0) : 0) {}

  AFFKD_DEVICE T held(bool student, int64_t j) const {
    return static_cast<const T*>(student ? p_.work.student : p_.work.teacher)[begin_ + j];
  }
  AFFKD_DEVICE T& first(int64_t j) const { return static_cast<T*>(p_.work.first)[begin_ + j]; }
  AFFKD_DEVICE T& second(int64_t j) const { return static_cast<T*>(p_.work.second)[begin_ + j]; }
  AFFKD_DEVICE bool own(int64_t j) const { return is_own(p_, task_.row, j); }

  // visit(j, whether the pair takes part) for this lane's share of the row
  template <typename Visit>
  AFFKD_DEVICE void each(Visit visit) const {
    if (!task_.present) {
      return;
    }
    for (int64_t j = lane_index(); j < p_.keys; j += 32) {
      visit(j, is_valid(p_.key_mask, task_.matrix, j) &&
                   pair_takes_part(p_, task_.matrix, task_.row, j));
    }
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
  const int64_t begin_;
};

}  // namespace affkd::cuda
