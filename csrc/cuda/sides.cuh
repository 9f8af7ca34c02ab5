// One row of A_s and A_t as phases statistics and rows see it: centered, where the normalization
// is.
#pragma once

#include "centering.cuh"
#include "rows.cuh"

namespace affkd::cuda {

template <typename T>
class RowSides {
 public:
  // In shared memory: what is centered has more of them than registers.
  struct Means {
    Centering<T> student;
    Centering<T> teacher;
    double student_lost;  // of the sum of squares, by centering
    double teacher_lost;
  };

  AFFKD_DEVICE RowSides(const Params& p, const RowTask& task, Means& means)
      : p_(p),
        task_(task),
        row_(p, task),
        pairs_(p),
        student_scale_(scale_of<T>(p, true)),
        teacher_scale_(scale_of<T>(p, false)),
        means_(means) {}

  // By all threads of a block; `folded` is of both sides, and not there where nothing is.
  AFFKD_DEVICE void find_means(double* scratch, FoldedSums* folded = nullptr) {
    if (!is_centered(p_)) {
      return;
    }
    // one after the other, so that there is one copy of the code
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool student = side == 0;
      Centering<T> means;
      double lost = 0;
      if (sizeof(T) == sizeof(float) && folded != nullptr && is_folded(p_)) {
        lost = means.fold(p_, student, task_.matrix, folded[side], scratch);
      } else {
        means.find(p_, student ? Summed::student : Summed::teacher, task_.matrix, scratch);
      }
      if (threadIdx.x == 0) {
        (student ? means_.student : means_.teacher) = means;
        (student ? means_.student_lost : means_.teacher_lost) = lost;
      }
    }
    __syncthreads();
  }

  AFFKD_DEVICE const PairRow<T>& row() const { return row_; }

  // What the tiles know of the matrix becomes what phase statistics would.
  AFFKD_DEVICE State centered_state(State state, bool student) const {
    if (is_folded(p_)) {
      const double square = state.second - (student ? means_.student_lost : means_.teacher_lost);
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
    return (student ? means_.student : means_.teacher).centered(a, task_.row, j);
  }

 private:
  const Params& p_;
  const RowTask task_;  // not references: to a neighbor, one would keep both out of registers
  const PairRow<T> row_;
  const PairStage<T> pairs_;
  const T student_scale_;
  const T teacher_scale_;
  Means& means_;
};

}  // namespace affkd::cuda
