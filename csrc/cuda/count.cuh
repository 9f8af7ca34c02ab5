// Phase count: what the masks leave, where a gradient is due before all rows have been seen.
#pragma once

#include "finish.cuh"

namespace affkd::cuda {

template <typename T>
class CountBlock {
 public:
  struct Shared {
    FinishShared finish;
    RowTotals totals[kWarps];
  };

  AFFKD_DEVICE CountBlock(const Params& p, Shared& shared) : p_(p), shared_(shared) {}

  AFFKD_DEVICE void run() {
    const RowTask task = find_row(p_);
    RowTotals totals{};
    PairRow<T>(p_, task).each_pair([&](int64_t) { totals.pairs += 1; });
    totals.pairs = warp_sum(totals.pairs);
    totals.rows = totals.pairs > 0 ? 1 : 0;
    if (lane_index() > 0) {
      totals = {};
    }
    totals = block_fold(totals, shared_.totals,
                        [](RowTotals a, RowTotals b) { return join_totals(a, b); });
    if (threadIdx.x == 0) {
      totals_of(p_, task.matrix)[task.block] = totals;
    }
    if (is_last_of_matrix(p_, task.matrix, shared_.finish)) {
      const RowTotals rows =
          block_totals(totals_of(p_, task.matrix), p_.row_blocks, shared_.finish.totals);
      finish_call<T>(p_, task.matrix, {0, 0, rows.pairs, rows.rows}, shared_.finish);
    }
  }

 private:
  const Params& p_;
  Shared& shared_;
};

}  // namespace affkd::cuda
