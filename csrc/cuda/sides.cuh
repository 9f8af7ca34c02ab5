// One row of A_s and A_t as phases statistics and rows see it: as it is, or centered.
#pragma once

#include <type_traits>

#include "centering.cuh"
#include "rows.cuh"

namespace affkd::cuda {

// as it is
template <typename T>
class RowSides {
 public:
  struct Means {};

  AFFKD_DEVICE RowSides(const Params& p, const RowTask& task)
      : row_(p, task),
        pairs_(p),
        student_scale_(scale_of<T>(p, true)),
        teacher_scale_(scale_of<T>(p, false)) {}
  AFFKD_DEVICE RowSides(const Params& p, const RowTask& task, Means&) : RowSides(p, task) {}

  AFFKD_DEVICE void find_means(double*) {}
  AFFKD_DEVICE T centered(T a, Summed, int64_t) const { return a; }

  AFFKD_DEVICE const PairRow<T>& row() const { return row_; }

  AFFKD_DEVICE PairTerms<T> student_terms(int64_t j) const {
    return pairs_.terms(row_.held(true, j), student_scale_, row_.own(j));
  }

  // not centered
  AFFKD_DEVICE T affinity(bool student, int64_t j) const {
    const T scale = student ? student_scale_ : teacher_scale_;
    return pairs_.affinity(row_.held(student, j), scale, row_.own(j));
  }

 private:
  const PairRow<T> row_;
  const PairStage<T> pairs_;
  const T student_scale_;
  const T teacher_scale_;
};

template <typename T>
class CenteredSides : public RowSides<T> {
 public:
  // in shared memory, as there are more of them than registers
  struct Means {
    Centering<T> of[3];  // as Summed lists them
  };

  AFFKD_DEVICE CenteredSides(const Params& p, const RowTask& task, Means& means)
      : RowSides<T>(p, task), p_(p), task_(task), means_(means) {}

  // By all threads of a block. Others than the first see the last means after the next barrier, of
  // which there is one before anything but the student's are asked for.
  AFFKD_DEVICE void find_means(double* scratch) {
    // one after the other, so that there is one copy of the code
#pragma unroll 1
    for (int list = 0; list < (centers_scale(p_) ? 3 : 2); ++list) {
      Centering<T> means;
      means.find(p_, static_cast<Summed>(list), task_.matrix, scratch);
      if (threadIdx.x == 0) {
        means_.of[list] = means;
      }
    }
  }

  AFFKD_DEVICE T centered(T a, Summed what, int64_t j) const {
    return means_.of[static_cast<int>(what)].centered(a, task_.row, j);
  }

 private:
  const Params& p_;
  const RowTask task_;  // not references: to a neighbor, one would keep both out of registers
  Means& means_;
};

template <typename T, bool kCentered>
using Sides = std::conditional_t<kCentered, CenteredSides<T>, RowSides<T>>;

}  // namespace affkd::cuda
