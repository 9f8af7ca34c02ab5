// Sums over rows and columns of A, or of dA, that double centering is made from.
#pragma once

#include "centering.cuh"
#include "rows.cuh"

namespace affkd::cuda {

template <typename T>
class SumsBlock {
 public:
  struct Shared {
    double columns[kWarps][kColumns];
  };

  AFFKD_DEVICE SumsBlock(const Params& p, bool of_gradient, Shared& shared)
      : p_(p),
        shared_(shared),
        of_gradient_(of_gradient),
        pairs_(p),
        student_scale_(scale_of<T>(p, true)),
        teacher_scale_(scale_of<T>(p, false)) {}

  // A part of the panel of matrix n: kWarps rows or, after all of those, kColumns columns.
  AFFKD_DEVICE void run(int64_t n, int64_t part) {
    const int64_t row_parts = divide_up(p_.task.panel.rows, kWarps);
    if (part < row_parts) {
      sum_rows(find_row(p_, n, part));
    } else {
      sum_columns(n, part - row_parts);
    }
  }

  // A warp takes kColumns numbers of four rows at a time: memory is read in sectors of 32 bytes.
  AFFKD_DEVICE void sum_columns(int64_t n, int64_t part) {
    const Panel& panel = p_.task.panel;
    const int64_t j = part * kColumns + threadIdx.x % kColumns;
    each_list([&](Summed what) {
      double sum = 0;
      const int64_t rows = j < p_.keys ? panel.rows : 0;
#pragma unroll 4
      for (int64_t row = threadIdx.x / kColumns; row < rows; row += kThreads / kColumns) {
        const int64_t i = panel.row_begin + row;
        // dA is 0 where nothing takes part
        if (of_gradient_ || takes_part(p_, n, i, j)) {
          sum += value(what, pair_index(p_, n, i, j), is_own(p_, i, j));
        }
      }
      sum += from_lane_at(sum, 8);
      sum += from_lane_at(sum, 16);
      write_columns(sum, what, n, j);
    });
  }

 private:
  AFFKD_DEVICE void sum_rows(const RowTask& task) const {
    const PairRow<T> row(p_, task);
    each_list([&](Summed what) {
      double sum = 0;
      row.each_pair([&](int64_t j) { sum += value(what, row.index(j), row.own(j)); });
      sum = warp_sum(sum);
      if (lane_index() == 0 && task.exists) {
        row_sums_of(p_, what, task.matrix)[task.row] = sum;
      }
    });
  }

  AFFKD_DEVICE void write_columns(double sum, Summed what, int64_t n, int64_t j) {
    __syncthreads();
    if (lane_index() < kColumns) {
      shared_.columns[warp_index()][lane_index()] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kColumns && j < p_.keys) {
      for (int warp = 1; warp < kWarps; ++warp) {
        sum += shared_.columns[warp][lane_index()];
      }
      double& total = column_sums_of(p_, what, n)[j];
      total = p_.task.panel.row_begin == 0 ? sum : total + sum;
    }
  }

  // one after the other, so that there is one copy of the code
  template <typename Visit>
  AFFKD_DEVICE void each_list(Visit visit) const {
    if (of_gradient_) {
      visit(Summed::gradient);
      return;
    }
#pragma unroll 1
    for (int list = 0; list < (centers_scale(p_) ? 3 : 2); ++list) {
      visit(static_cast<Summed>(list));
    }
  }

  AFFKD_DEVICE T value(Summed what, int64_t at, bool own) const {
    if (of_gradient_) {
      return static_cast<const T*>(p_.work.first)[at];
    }
    const bool student = what != Summed::teacher;
    const T held = static_cast<const T*>(student ? p_.work.student : p_.work.teacher)[at];
    const PairTerms<T> terms = pairs_.terms(held, student ? student_scale_ : teacher_scale_, own);
    return what == Summed::by_scale ? terms.by_scale(held) : terms.affinity;
  }

  const Params& p_;
  Shared& shared_;
  const bool of_gradient_;
  const PairStage<T> pairs_;
  const T student_scale_;
  const T teacher_scale_;
};

}  // namespace affkd::cuda
