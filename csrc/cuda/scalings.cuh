// Stage 4 on a GPU: what a row of A_s and of A_t is divided by, from the row or from the matrix.
#pragma once

#include "largest.cuh"
#include "sides.cuh"

namespace affkd::cuda {

// Of one row.
template <typename T>
struct RowScalings {
  Scaling<T> student;
  Scaling<T> teacher;
  T slope_scale;  // of the student: what `LossStage::statistic_slope` lacks, and its maximum
  T maximum;
};

template <typename T>
AFFKD_DEVICE Scaling<T> matrix_scaling(const Params& p, Normalization kind, bool student, int64_t n,
                                       const State& state, double* scratch) {
  const double eps = p.settings.statistic_eps;
  if (!is_maximum(kind)) {
    return scaling_of<T>(statistic_of<T>(kind, state).value, eps);
  }
  Scaling<T> scaling = scaling_of<T>(exact_maximum<T>(p, student, n, state, scratch), eps);
  if (scaling.divisor - scaling.divisor == T{0}) {
    // what the largest entry is itself, which makes it exactly 1
    scaling.divisor = static_cast<T>(state.first);
  }
  return scaling;
}

// What all rows of a matrix share, by all threads of a block.
template <typename T>
AFFKD_DEVICE RowScalings<T> matrix_scalings(const Params& p, Normalization kind, int64_t n,
                                            State* scratch, double* sums) {
  if (!is_global(kind)) {
    return {scaling_of<T>(1, 0), scaling_of<T>(1, 0), T{1}, T{0}};
  }
  State student = block_state(p, kind, true, n, scratch);
  __syncthreads();
  State teacher = block_state(p, kind, false, n, scratch);
  if (kind == Normalization::frobenius_centered && sizeof(T) == sizeof(float) &&
      has_centered_origin(p)) {
    student.second = square(largest_norm(p, true, n, sums));
    teacher.second = square(largest_norm(p, false, n, sums));
  }
  return {matrix_scaling<T>(p, kind, true, n, student, sums),
          matrix_scaling<T>(p, kind, false, n, teacher, sums),
          static_cast<T>(statistic_of<T>(kind, student).slope_scale),
          static_cast<T>(student.first)};
}

template <typename T>
AFFKD_DEVICE double row_statistic(Normalization kind, const RowSides<T>& sides, bool student) {
  T sum = 0;
  sides.row().each_pair([&](int64_t j) {
    const T a = sides.affinity(student, j);
    sum += kind == Normalization::row_l2 ? a * a : kind == Normalization::row_l1 ? absolute(a) : a;
  });
  const double total = warp_sum(static_cast<double>(sum));
  return kind == Normalization::row_l2 ? square_root(total) : total;
}

template <typename T>
AFFKD_DEVICE Scaling<T> softmax_scaling(double tau, const RowSides<T>& sides, bool student) {
  const T multiplier = static_cast<T>(1 / tau), lowest = -static_cast<T>(INFINITY);
  T peak = lowest, sum = 0;
  sides.row().each_pair([&](int64_t j) {
    const T a = sides.affinity(student, j);
    peak = peak < a ? a : peak;
  });
  peak = warp_fold(peak, [](T a, T b) { return a < b ? b : a; });
  // a row without pairs has neither maximum nor sum
  if (peak == lowest) {
    return {multiplier, T{0}, T{0}, T{0}};
  }
  sides.row().each_pair(
      [&](int64_t j) { sum += exponential((sides.affinity(student, j) - peak) * multiplier); });
  const double total = warp_sum(static_cast<double>(sum));
  return {multiplier, T{0}, peak, static_cast<T>(log(total))};
}

// The row's own, by its warp.
template <typename T>
AFFKD_DEVICE void find_row_scalings(const Settings& settings, Normalization kind,
                                    const RowSides<T>& sides, RowScalings<T>& scalings) {
  if (is_global(kind) || kind == Normalization::none) {
    return;
  }
  // one after the other, so that there is one copy of the code
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const bool student = side == 0;
    const Scaling<T> scaling =
        kind == Normalization::softmax
            ? softmax_scaling(student ? settings.student_tau : settings.teacher_tau, sides, student)
            : scaling_of<T>(row_statistic(kind, sides, student), settings.statistic_eps);
    if (student) {
      scalings.student = scaling;
    } else {
      scalings.teacher = scaling;
    }
  }
}

}  // namespace affkd::cuda
