// Linear kernel alignment: loss and gradient from sums over the rows of matrices that are not
// centered, with the means taken out of the sums.
#pragma once

#include "finish.cuh"
#include "losses.cuh"

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

// sum |A_ii| with no point but 0 for the origin, by all threads of a block
AFFKD_DEVICE double block_trace(const Params& p, bool student, int64_t n, double* scratch) {
  double squares = 0;
  for (int64_t at = threadIdx.x; at < p.row_blocks; at += kThreads) {
    squares += states_of(p, student, n)[at].second;
  }
  __syncthreads();
  return absolute(scale_of<double>(p, student)) * block_sum(squares, scratch);
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
  const double student_trace = block_trace(p, true, n, shared.sums);
  const double teacher_trace = block_trace(p, false, n, shared.sums);
  const AlignmentLoss aligned = alignment_of<T>(sums, static_cast<double>(rows.rows), student_trace,
                                                teacher_trace, p.settings.statistic_eps);
  if (threadIdx.x == 0) {
    p.work.alignments[n] = aligned.slopes;
  }
  finish_call<T>(p, n, {aligned.loss, 0, rows.pairs, rows.rows}, shared);
}

}  // namespace affkd::cuda
