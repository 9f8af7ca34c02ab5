// Phase center: dA loses its means, and becomes W1.
#pragma once

#include "centering.cuh"
#include "finish.cuh"

namespace affkd::cuda {

template <typename T>
class CenterBlock {
 public:
  struct Shared {
    FinishShared finish;
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
    double scale_sum = 0;
    row.each_pair([&](int64_t j) {
      const T slope = means.centered(row.first(j), task.row, j), held = row.held(true, j);
      const PairTerms<T> terms = pairs.terms(held, scale, row.own(j));
      scale_sum += terms.flows ? static_cast<double>(slope) * held : 0;
      row.first(j) = slope * terms.slope;
    });
    __syncthreads();
    scale_sum = block_sum(scale_sum, shared_.sums);
    if (threadIdx.x == 0) {
      totals_of(p_, task.matrix)[task.block].scale_first = scale_sum;
    }
    if (is_last_of_matrix(p_, task.matrix, shared_.finish)) {
      // no mask of pairs hides an item
      finish_matrix<T>(p_, task.matrix, 0, shared_.finish);
    }
  }

 private:
  const Params& p_;
  Shared& shared_;
};

}  // namespace affkd::cuda
