// The scalars of a call: the last block of a matrix sums the matrix up, and that of the last matrix
// all of them. So every sum has one order, and none takes longer for the number of matrices.
#pragma once

#include "rows.cuh"

namespace affkd::cuda {

struct FinishShared {
  union {
    RowTotals totals[kWarps];
    MatrixTotals matrices[kWarps];
    double sums[kWarps];
  };
  bool last;
};

AFFKD_DEVICE RowTotals* totals_of(const Params& p, int64_t n) {
  return p.work.rows + n * p.line_blocks;
}

// The joint totals of some blocks of rows, by all threads of a block.
AFFKD_DEVICE RowTotals block_totals(const RowTotals* rows, int64_t count, RowTotals* scratch) {
  RowTotals totals{};
  for (int64_t at = threadIdx.x; at < count; at += kThreads) {
    totals = join_totals(totals, rows[at]);
  }
  return block_fold(totals, scratch, [](RowTotals a, RowTotals b) { return join_totals(a, b); });
}

AFFKD_DEVICE MatrixTotals join_totals(MatrixTotals a, MatrixTotals b) {
  return {a.loss + b.loss, a.scale + b.scale, a.pairs + b.pairs, a.rows + b.rows};
}

AFFKD_DEVICE MatrixTotals from_lane_at(MatrixTotals x, int distance) {
  return {from_lane_at(x.loss, distance), from_lane_at(x.scale, distance),
          from_lane_at(x.pairs, distance), from_lane_at(x.rows, distance)};
}

// weight / count from the counts of all matrices, of rows or of columns
AFFKD_DEVICE double counted_loss_scale(const Params& p, const MatrixTotals& totals, bool columns) {
  if (!p.counts) {
    return columns ? p.column_scale : p.loss_scale;
  }
  const int64_t count = p.reduction == Reduction::mean ? totals.pairs : totals.rows;
  return p.weight / static_cast<double>(count > 0 ? count : 1);
}

template <typename T>
AFFKD_DEVICE void write_scalar(void* out, double x) {
  if (out != nullptr && threadIdx.x == 0) {
    *static_cast<T*>(out) = static_cast<T>(x);
  }
}

// With the totals of a matrix written, by all threads of its last block.
template <typename T>
AFFKD_DEVICE void finish_call(const Params& p, FinishShared& shared) {
  if (!is_last_block(p.work.arrivals + p.matrices, p.matrices, &shared.last)) {
    return;
  }
  double loss = 0, scale_gradient = 0;
#pragma unroll 1
  for (int axis = 0; axis < (p.columns ? 2 : 1); ++axis) {
    MatrixTotals totals{};
    for (int64_t at = threadIdx.x; at < p.matrices; at += kThreads) {
      totals = join_totals(totals, p.work.totals[axis * p.matrices + at]);
    }
    __syncthreads();
    totals = block_fold(totals, shared.matrices,
                        [](MatrixTotals a, MatrixTotals b) { return join_totals(a, b); });
    const double scale = counted_loss_scale(p, totals, axis == 1);
    loss += scale * totals.loss;
    scale_gradient += scale * totals.scale;
    write_scalar<double>(p.work.loss_scale + axis, scale);
  }
  write_scalar<T>(p.loss, loss);
  write_scalar<T>(p.scale_gradient, scale_gradient);
}

// The same with those totals at hand.
template <typename T>
AFFKD_DEVICE void finish_call(const Params& p, int64_t n, const MatrixTotals& totals,
                              FinishShared& shared) {
  if (threadIdx.x == 0) {
    p.work.totals[n] = totals;
  }
  finish_call<T>(p, shared);
}

// The last of the blocks whose rows are those of matrix n, over all panels of it.
AFFKD_DEVICE bool is_last_of_matrix(const Params& p, int64_t n, FinishShared& shared) {
  return is_last_block(p.work.arrivals + n, p.line_blocks, &shared.last);
}

// With the totals of all rows of a matrix written; `poison` is what they do not know of.
template <typename T>
AFFKD_DEVICE void finish_matrix(const Params& p, int64_t n, double poison, FinishShared& shared) {
#pragma unroll 1
  for (int axis = 0; axis < (p.columns ? 2 : 1); ++axis) {
    const int64_t begin = axis == 0 ? 0 : p.row_blocks;
    const int64_t blocks = axis == 0 ? p.row_blocks : p.line_blocks - p.row_blocks;
    __syncthreads();
    const RowTotals rows = block_totals(totals_of(p, n) + begin, blocks, shared.totals);
    const double loss = rows.pairs > 0 ? rows.loss + poison : 0;
    // W2 enters the gradient with minus the c of its own matrix
    const double scale = rows.scale_first - rows.correction * rows.scale_second;
    if (threadIdx.x == 0) {
      p.work.totals[axis * p.matrices + n] = {loss, scale, rows.pairs, rows.rows};
    }
  }
  finish_call<T>(p, shared);
}

}  // namespace affkd::cuda
