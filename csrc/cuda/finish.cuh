// The scalars of a call, by the last block of a sweep over the rows: every sum in one order.
#pragma once

#include "largest.cuh"

namespace affkd::cuda {

struct FinishShared {
  RowTotals totals[kWarps];
  double sums[kWarps];
  bool last;
};

AFFKD_DEVICE RowTotals* totals_of(const Params& p, int64_t n) {
  return p.work.rows + n * p.row_blocks;
}

// The joint totals of some blocks of rows, by all threads of a block.
AFFKD_DEVICE RowTotals block_totals(const RowTotals* rows, int64_t count, RowTotals* scratch) {
  RowTotals totals{};
  for (int64_t at = threadIdx.x; at < count; at += kThreads) {
    totals = join_totals(totals, rows[at]);
  }
  __syncthreads();
  return block_fold(totals, scratch, [](RowTotals a, RowTotals b) { return join_totals(a, b); });
}

// weight / count from the counts of all rows
AFFKD_DEVICE double counted_loss_scale(const Params& p, const RowTotals& totals) {
  if (!p.counts) {
    return p.loss_scale;
  }
  const int64_t count = p.reduction == Reduction::mean ? totals.pairs : totals.rows;
  return p.weight / static_cast<double>(count > 0 ? count : 1);
}

// sum of dA g: W2 enters with minus the c of its own matrix
AFFKD_DEVICE double scale_sum(const Params& p, RowTotals* scratch) {
  double sum = 0;
  for (int64_t n = 0; n < p.matrices; ++n) {
    const RowTotals totals = block_totals(totals_of(p, n), p.row_blocks, scratch);
    sum += totals.scale_first - totals.correction * totals.scale_second;
  }
  return sum;
}

template <typename T>
AFFKD_DEVICE void write_scalar(void* out, double x) {
  if (out != nullptr && threadIdx.x == 0) {
    *static_cast<T*>(out) = static_cast<T>(x);
  }
}

// Phase rows and phase center: with all row totals written.
template <typename T>
AFFKD_DEVICE void finish_rows(const Params& p, FinishShared& shared) {
  const int64_t blocks = p.matrices * p.row_blocks;
  if (!is_last_block(&p.work.arrivals[0], blocks, &shared.last)) {
    return;
  }
  const RowTotals totals = block_totals(p.work.rows, blocks, shared.totals);
  const double scale = counted_loss_scale(p, totals);
  write_scalar<T>(p.loss, scale * totals.loss);
  write_scalar<double>(p.work.loss_scale, scale);
  if (p.scale_gradient != nullptr) {
    write_scalar<T>(p.scale_gradient, scale * scale_sum(p, shared.totals));
  }
}

}  // namespace affkd::cuda
