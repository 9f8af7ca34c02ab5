// Linear kernel alignment: loss and gradient from sums over the rows of matrices that are not
// centered, with the means taken out of the sums.
#pragma once

#include "centering.cuh"
#include "finish.cuh"

namespace affkd::cuda {

struct AlignmentLoss {
  double loss;
  Alignment slopes;
};

AFFKD_DEVICE CenteredTotals join_totals(CenteredTotals a, CenteredTotals b) {
  return {a.student_square + b.student_square,
          a.teacher_square + b.teacher_square,
          a.cross + b.cross,
          a.student_rows + b.student_rows,
          a.teacher_rows + b.teacher_rows,
          a.cross_rows + b.cross_rows,
          a.student_sum + b.student_sum,
          a.teacher_sum + b.teacher_sum};
}

AFFKD_DEVICE CenteredTotals from_lane_at(CenteredTotals x, int distance) {
  return {from_lane_at(x.student_square, distance), from_lane_at(x.teacher_square, distance),
          from_lane_at(x.cross, distance),          from_lane_at(x.student_rows, distance),
          from_lane_at(x.teacher_rows, distance),   from_lane_at(x.cross_rows, distance),
          from_lane_at(x.student_sum, distance),    from_lane_at(x.teacher_sum, distance)};
}

// 1 / |HAH|, 0 where that counts as nothing next to |A|. Where next to nothing is left, A is all
// but constant, and its norm is its trace.
template <typename T>
AFFKD_DEVICE double inverse_norm(double square, double trace, double eps) {
  const double norm = square_root(square < 0 ? 0 : square);
  const Statistic statistic =
      statistic_of<T>(Normalization::frobenius_centered, {norm * norm, trace * trace, 0});
  return 1 / scaling_of<double>(statistic.value, eps).divisor;
}

// |HAH|^2 = |A|^2 - 2 |A 1|^2 / n + (1'A1)^2 / n^2 of a symmetric A, and so for the product of two.
template <typename T>
AFFKD_DEVICE AlignmentLoss alignment_of(const CenteredTotals& sums, double items,
                                        double student_trace, double teacher_trace, double eps) {
  const double share = items > 0 ? 1 / items : 0;
  const auto centered = [=](double whole, double rows, double left, double right) {
    return whole - 2 * share * rows + share * left * share * right;
  };
  const double student =
      centered(sums.student_square, sums.student_rows, sums.student_sum, sums.student_sum);
  const double teacher =
      centered(sums.teacher_square, sums.teacher_rows, sums.teacher_sum, sums.teacher_sum);
  const double cross = centered(sums.cross, sums.cross_rows, sums.student_sum, sums.teacher_sum);
  const double s = inverse_norm<T>(student, student_trace, eps);
  const double t = inverse_norm<T>(teacher, teacher_trace, eps);
  const double agreement = cross * s * t;
  const double loss = student * s * s + teacher * t * t - 2 * agreement;
  return {loss < 0 ? 0 : loss, {2 * agreement * s * s, -2 * s * t}};
}

AFFKD_DEVICE CenteredTotals block_centered_totals(const Params& p, int64_t n,
                                                  CenteredTotals* scratch) {
  CenteredTotals totals{};
  for (int64_t at = threadIdx.x; at < p.row_blocks; at += kThreads) {
    totals = join_totals(totals, p.work.centered[n * p.row_blocks + at]);
  }
  return block_fold(totals, scratch,
                    [](CenteredTotals a, CenteredTotals b) { return join_totals(a, b); });
}

// Phase means: with the totals of a block's rows written.
template <typename T>
AFFKD_DEVICE void finish_alignment(const Params& p, int64_t n, CenteredTotals* scratch,
                                   FinishShared& shared) {
  if (!is_last_of_matrix(p, n, shared)) {
    return;
  }
  const CenteredTotals sums = block_centered_totals(p, n, scratch);
  const RowTotals rows = block_totals(totals_of(p, n), p.row_blocks, shared.totals);
  const double student_trace = largest_norm(p, true, n, shared.sums);
  const double teacher_trace = largest_norm(p, false, n, shared.sums);
  const AlignmentLoss aligned = alignment_of<T>(sums, static_cast<double>(rows.rows), student_trace,
                                                teacher_trace, p.settings.statistic_eps);
  if (threadIdx.x == 0) {
    p.work.alignments[n] = aligned.slopes;
  }
  finish_call<T>(p, n, {aligned.loss, 0, rows.pairs, rows.rows}, shared);
}

// Phase means of the rows of one block.
template <typename T>
class AlignmentBlock {
 public:
  struct Shared {
    FinishShared finish;
    CenteredTotals centered[kWarps];
    RowTotals totals[kWarps];
  };

  AFFKD_DEVICE AlignmentBlock(const Params& p, const RowTask& task, Shared& shared)
      : p_(p), task_(task), shared_(shared) {}

  AFFKD_DEVICE void run() {
    Sums sums = sum_row();
    sums.student = warp_sum(sums.student);
    sums.teacher = warp_sum(sums.teacher);
    if (lane_index() == 0 && task_.exists) {
      row_sums_of(p_, Summed::student, task_.matrix)[task_.row] = sums.student;
      row_sums_of(p_, Summed::teacher, task_.matrix)[task_.row] = sums.teacher;
    }
    write_totals(sums);
    finish_alignment<T>(p_, task_.matrix, shared_.centered, shared_.finish);
  }

 private:
  struct Sums {
    double student = 0;
    double teacher = 0;
    double student_square = 0;
    double teacher_square = 0;
    double cross = 0;
    int64_t pairs = 0;
  };

  // this lane's share
  AFFKD_DEVICE Sums sum_row() const {
    const PairRow<T> row(p_, task_);
    const T student_scale = scale_of<T>(p_, true), teacher_scale = scale_of<T>(p_, false);
    const T offset = static_cast<T>(p_.settings.offset);
    Sums sums;
    row.each_pair([&](int64_t j) {
      // in double from here on: of a student that is almost its teacher the sums nearly cancel
      const double s = student_scale * row.held(true, j) + offset;
      const double t = teacher_scale * row.held(false, j) + offset;
      sums.student += s;
      sums.teacher += t;
      sums.student_square += s * s;
      sums.teacher_square += t * t;
      sums.cross += s * t;
      sums.pairs += 1;
    });
    return sums;
  }

  AFFKD_DEVICE void write_totals(const Sums& sums) {
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
      p_.work.centered[task_.matrix * p_.row_blocks + task_.block] = centered;
      totals_of(p_, task_.matrix)[task_.block] = totals;
    }
  }

  const Params& p_;
  const RowTask task_;
  Shared& shared_;
};

}  // namespace affkd::cuda
