// One row of A_s and A_t as phases statistics and rows see it: centered, where the normalization
// is.
#pragma once

#include "centering.cuh"
#include "rows.cuh"

namespace affkd::cuda {

template <typename T>
class RowSides {
 public:
  AFFKD_DEVICE RowSides(const Params& p, const RowTask& task)
      : p_(p),
        task_(task),
        row_(p, task),
        pairs_(p),
        student_scale_(scale_of<T>(p, true)),
        teacher_scale_(scale_of<T>(p, false)) {}

  // By all threads of a block; `folded` is of both sides, and not there where nothing is.
  AFFKD_DEVICE void find_means(double* scratch, FoldedSums* folded = nullptr) {
    if (sizeof(T) == sizeof(float) && is_folded(p_)) {
      // in double, as all else that centering takes away
      student_lost_ = student_means_.fold(p_, true, task_.matrix, folded[0], scratch);
      teacher_lost_ = teacher_means_.fold(p_, false, task_.matrix, folded[1], scratch);
    } else if (is_centered(p_)) {
      student_means_.find(p_, Summed::student, task_.matrix, scratch);
      teacher_means_.find(p_, Summed::teacher, task_.matrix, scratch);
    }
  }

  AFFKD_DEVICE const PairRow<T>& row() const { return row_; }

  // What the tiles know of the matrix becomes what phase statistics would.
  AFFKD_DEVICE State centered_state(State state, bool student) const {
    if (is_folded(p_)) {
      const double square = state.second - (student ? student_lost_ : teacher_lost_);
      state.first = square < 0 ? 0 : square;
    }
    return state;
  }

  AFFKD_DEVICE PairTerms<T> student_terms(int64_t j) const {
    return pairs_.terms(row_.held(true, j), student_scale_, row_.own(j));
  }

  // not centered
  AFFKD_DEVICE T affinity(bool student, int64_t j) const {
    const T scale = student ? student_scale_ : teacher_scale_;
    return pairs_.affinity(row_.held(student, j), scale, row_.own(j));
  }

  AFFKD_DEVICE T centered(T a, bool student, int64_t j) const {
    if (!is_centered(p_)) {
      return a;
    }
    return student ? student_means_.centered(a, task_.row, j)
                   : teacher_means_.centered(a, task_.row, j);
  }

 private:
  const Params& p_;
  const RowTask task_;  // not references: to a neighbor, one would keep both out of registers
  const PairRow<T> row_;
  const PairStage<T> pairs_;
  const T student_scale_;
  const T teacher_scale_;
  Centering<T> student_means_;
  Centering<T> teacher_means_;
  double student_lost_ = 0;
  double teacher_lost_ = 0;
};

}  // namespace affkd::cuda
