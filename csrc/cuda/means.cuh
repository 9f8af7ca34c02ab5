// Phase means: sums over the rows and columns of A, or of dA, that double centering is made from.
// Linear kernel alignment takes its loss from the sums as well.
#pragma once

#include "alignment.cuh"
#include "centering.cuh"

namespace affkd::cuda {

template <typename T>
class MeansBlock {
 public:
  struct Shared {
    FinishShared finish;
    CenteredTotals centered[kWarps];
    RowTotals totals[kWarps];
    double columns[kWarps][32];
  };

  AFFKD_DEVICE MeansBlock(const Params& p, Shared& shared)
      : p_(p),
        shared_(shared),
        pairs_(p),
        student_scale_(scale_of<T>(p, true)),
        teacher_scale_(scale_of<T>(p, false)) {}

  AFFKD_DEVICE void run() {
    const Panel& panel = p_.task.panel;
    const int64_t row_blocks = panel.matrices * divide_up(panel.rows, kWarps);
    if (static_cast<int64_t>(blockIdx.x) < row_blocks) {
      sum_rows();
    } else {
      sum_columns(static_cast<int64_t>(blockIdx.x) - row_blocks);
    }
  }

 private:
  struct RowSums {
    double student = 0;
    double teacher = 0;
    double student_square = 0;
    double teacher_square = 0;
    double cross = 0;
    int64_t pairs = 0;
  };

  // A of one side or, in its place, dA
  AFFKD_DEVICE T value(bool student, int64_t i, int64_t j, int64_t at) const {
    if (p_.task.of_gradient) {
      return student ? static_cast<const T*>(p_.work.first)[at] : T{0};
    }
    const T held = static_cast<const T*>(student ? p_.work.student : p_.work.teacher)[at];
    return pairs_.affinity(held, student ? student_scale_ : teacher_scale_, is_own(p_, i, j));
  }

  AFFKD_DEVICE void sum_rows() {
    const RowTask task = find_row(p_);
    RowSums sums;
    PairRow<T>(p_, task).each_pair([&](int64_t j) {
      const int64_t at = pair_index(p_, task.matrix, task.row, j);
      // one after the other, so that there is one copy of the code
      double t = 0, s = 0;
#pragma unroll 1
      for (int side = 0; side < 2; ++side) {
        t = s;
        s = value(side == 1, task.row, j, at);
      }
      sums.student += s;
      sums.teacher += t;
      sums.student_square += s * s;
      sums.teacher_square += t * t;
      sums.cross += s * t;
      sums.pairs += 1;
    });
    sums.student = warp_sum(sums.student);
    sums.teacher = warp_sum(sums.teacher);
    const Panel& panel = p_.task.panel;
    if (lane_index() == 0 && task.row < panel.row_begin + panel.rows) {
      const Summed what = p_.task.of_gradient ? Summed::gradient : Summed::student;
      row_sums_of(p_, what, task.matrix)[task.row] = sums.student;
      if (!p_.task.of_gradient) {
        row_sums_of(p_, Summed::teacher, task.matrix)[task.row] = sums.teacher;
      }
    }
    if (is_closed(p_)) {
      write_totals(task, sums);
      finish_alignment<T>(p_, task.matrix, shared_.centered, shared_.finish);
    }
  }

  AFFKD_DEVICE void write_totals(const RowTask& task, const RowSums& sums) {
    CenteredTotals centered{warp_sum(sums.student_square),
                            warp_sum(sums.teacher_square),
                            warp_sum(sums.cross),
                            sums.student * sums.student,
                            sums.teacher * sums.teacher,
                            sums.student * sums.teacher,
                            sums.student,
                            sums.teacher};
    RowTotals totals{};
    totals.pairs = warp_sum(sums.pairs);
    totals.rows = totals.pairs > 0 ? 1 : 0;
    if (lane_index() == 0) {
      shared_.centered[warp_index()] = centered;
      shared_.totals[warp_index()] = totals;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kWarps; ++warp) {
        centered = join_totals(centered, shared_.centered[warp]);
        totals = join_totals(totals, shared_.totals[warp]);
      }
      p_.work.centered[task.matrix * p_.row_blocks + task.block] = centered;
      totals_of(p_, task.matrix)[task.block] = totals;
    }
  }

  // 32 columns, the rows of the panel shared out among the warps
  AFFKD_DEVICE void sum_columns(int64_t unit) {
    const Panel& panel = p_.task.panel;
    const int64_t blocks = divide_up(p_.keys, 32);
    const int64_t n = panel.matrix_begin + unit / blocks, j = unit % blocks * 32 + lane_index();
#pragma unroll 1
    for (int side = 0; side < (p_.task.of_gradient ? 1 : 2); ++side) {
      double sum = 0;
      for (int64_t row = warp_index(); row < panel.rows && j < p_.keys; row += kWarps) {
        const int64_t i = panel.row_begin + row;
        if (takes_part(p_, n, i, j)) {
          sum += value(side == 0, i, j, pair_index(p_, n, i, j));
        }
      }
      const Summed what = p_.task.of_gradient ? Summed::gradient
                          : side == 0         ? Summed::student
                                              : Summed::teacher;
      write_columns(sum, what, n, j);
    }
  }

  AFFKD_DEVICE void write_columns(double sum, Summed what, int64_t n, int64_t j) {
    __syncthreads();
    shared_.columns[warp_index()][lane_index()] = sum;
    __syncthreads();
    if (warp_index() == 0 && j < p_.keys) {
      for (int warp = 1; warp < kWarps; ++warp) {
        sum += shared_.columns[warp][lane_index()];
      }
      double& total = column_sums_of(p_, what, n)[j];
      total = p_.task.panel.row_begin == 0 ? sum : total + sum;
    }
  }

  const Params& p_;
  Shared& shared_;
  const PairStage<T> pairs_;
  const T student_scale_;
  const T teacher_scale_;
};

}  // namespace affkd::cuda
