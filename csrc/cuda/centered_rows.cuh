// Phase rows of what is centered: on the way it is so first, by all blocks of a matrix together.
#pragma once

#include "queue.cuh"
#include "row_losses.cuh"
#include "statistics.cuh"
#include "sums.cuh"

namespace affkd::cuda {

template <typename T>
class CenteredRows {
 public:
  struct Shared {
    union {
      typename SumsBlock<T>::Shared sums;
      typename StatisticsBlock<T, true>::Shared statistics;
      typename RowBlock<T, true>::Shared rows;
    };
    unsigned unit;
  };

  AFFKD_DEVICE CenteredRows(const Params& p, Shared& shared) : p_(p), shared_(shared) {}

  AFFKD_DEVICE void run() {
    if (is_centered_on_the_way(p_)) {
      center();
    }
    RowBlock<T, true>(p_, shared_.rows).run();
  }

 private:
  // The sums, and with the means that they give the squares: as exact as in launches of their own.
  AFFKD_DEVICE void center() {
    const int64_t n = find_matrix(p_);
    share_out(queue_of(p_, Joint::sums, n), sums_blocks(p_), &shared_.unit,
              [&](int64_t part) { SumsBlock<T>(p_, false, shared_.sums).run(n, part); });
    share_out(queue_of(p_, Joint::squares, n), p_.row_blocks, &shared_.unit, [&](int64_t block) {
      StatisticsBlock<T, true>(p_, find_row(p_, n, block), shared_.statistics).run();
    });
  }

  const Params& p_;
  Shared& shared_;
};

}  // namespace affkd::cuda
