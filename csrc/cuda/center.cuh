// Phase center: dA loses its means, and becomes W1.
#pragma once

#include "centering.cuh"
#include "rows.cuh"

namespace affkd::cuda {

template <typename T>
class CenterBlock {
 public:
  struct Shared {
    double sums[kWarps];
  };

  AFFKD_DEVICE CenterBlock(const Params& p, Shared& shared) : p_(p), shared_(shared) {}

  AFFKD_DEVICE void run() {
    const RowTask task = find_row(p_);
    Centering<T> means;
    means.find(p_, Summed::gradient, task.matrix, shared_.sums);
    const PairRow<T> row(p_, task);
    const PairStage<T> pairs(p_);
    const T scale = scale_of<T>(p_, true);
    row.each_pair([&](int64_t j) {
      const PairTerms<T> terms = pairs.terms(row.held(true, j), scale, row.own(j));
      row.first(j) = means.centered(row.first(j), task.row, j) * terms.slope;
    });
  }

 private:
  const Params& p_;
  Shared& shared_;
};

}  // namespace affkd::cuda
