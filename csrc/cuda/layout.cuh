// What follows from the arguments of a call before anything is launched: how large its panels are,
// and how its workspace is laid out.
#pragma once

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "choices.cuh"

namespace affkd::cuda {

inline size_t number_size(const Params& p) {
  return p.wide ? sizeof(double) : sizeof(float);
}

// pairs on the diagonal of one matrix
inline int64_t diagonal_pairs(const Params& p) {
  if (!p.has_diagonal) {
    return 0;
  }
  const int64_t offset = p.diagonal_offset;
  const int64_t begin = offset < 0 ? -offset : 0;
  const int64_t end = p.keys - offset < p.queries ? p.keys - offset : p.queries;
  return end > begin ? end - begin : 0;
}

inline bool depends_on_masks(Reduction reduction) {
  return reduction == Reduction::mean || reduction == Reduction::batchmean;
}

// weight / count where nothing is masked, of rows or of columns
inline double known_loss_scale(const Params& p, bool columns) {
  if (p.reduction == Reduction::sum) {
    return p.weight;
  }
  if (p.reduction == Reduction::matrixmean) {
    return p.weight / static_cast<double>(p.matrices > 0 ? p.matrices : 1);
  }
  const bool excluded = p.settings.diagonal == Diagonal::exclude;
  int64_t count = p.queries * p.keys - (excluded ? diagonal_pairs(p) : 0);
  if (p.reduction == Reduction::batchmean) {
    count = columns ? p.keys : p.queries - (excluded && p.keys == 1 ? diagonal_pairs(p) : 0);
  }
  count *= p.matrices;
  return p.weight / static_cast<double>(count > 0 ? count : 1);
}

// for W2, where the student's pairs are wanted after it
inline bool has_third_buffer(const Params& p) {
  return has_second(p) &&
         (p.settings.unit || (centers_gradient(p) && !centers_gradient_on_the_way(p)));
}

// Of the pairs, before it is known whether a panel is whole matrices.
inline int64_t most_buffers(const Params& p) {
  return 2 + (p.columns ? 2 : 0) + (has_second(p) && p.settings.unit ? 1 : 0) +
         (centers_gradient(p) ? 1 : 0);
}

// As many whole matrices as fit the budget, or else rows of one.
inline Panel largest_panel(const Params& p, int64_t budget) {
  const int64_t row = p.keys * most_buffers(p) * static_cast<int64_t>(number_size(p));
  const int64_t rows = row > 0 ? budget / row : p.queries;
  if (rows >= p.queries) {
    const int64_t matrices = p.queries > 0 ? rows / p.queries : p.matrices;
    return {0, matrices < p.matrices ? matrices : p.matrices, 0, p.queries};
  }
  const int64_t whole_tiles = rows / kTile * kTile;
  return {0, 1, 0, whole_tiles > kTile ? whole_tiles : kTile};
}

// Fills in what follows from the arguments. `budget` bounds the bytes of the pairs that are held; a
// call that has columns of its own must hold all of them (`fits`).
inline void complete(Params& p, int64_t budget) {
  p.counts = is_masked(p) && depends_on_masks(p.reduction);
  p.loss_scale = known_loss_scale(p, false);
  p.column_scale = known_loss_scale(p, true);
  p.taylor_factor = std::exp(-p.settings.student_scale);
  const int64_t longest = p.queries > p.keys ? p.queries : p.keys;
  p.item_blocks = divide_up(longest, kTile);
  p.row_blocks = divide_up(p.queries, kWarps);
  p.line_blocks = p.row_blocks + (p.columns ? divide_up(p.keys, kWarps) : 0);
  p.largest = largest_panel(p, budget);
  const int64_t tiles = gram_tiles(p, p.largest);
  p.state_slots = !gram_has_states(p) ? p.row_blocks : tiles < kMostSlots ? tiles : kMostSlots;
}

// Whether the workspace holds the pairs of all matrices.
inline bool fits(const Params& p) {
  return p.largest.rows == p.queries && p.largest.matrices == p.matrices;
}

// Lays the workspace out from `base` on, which must be aligned to 256 bytes, and returns its size
// in bytes. With a null base it only measures.
inline int64_t lay_out(Params& p, void* base) {
  size_t used = 0;
  const auto take = [&](auto*& pointer, int64_t count, size_t size) {
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    pointer =
        base == nullptr ? nullptr : reinterpret_cast<Pointer>(static_cast<char*>(base) + used);
    used += (static_cast<size_t>(count) * size + 255) / 256 * 256;
  };
  Workspace& work = p.work;
  const int64_t n = p.matrices, longest = p.queries > p.keys ? p.queries : p.keys;
  const int64_t axes = p.columns ? 2 : 1;
  const int64_t pairs = axes * p.largest.matrices * p.largest.rows * p.keys;
  const int64_t sums = is_centered(p) ? kSummed * n : 0;
  take(work.arrivals, n + 1, sizeof(unsigned));
  take(work.queues, is_centered_on_the_way(p) ? kJoint * n : 0, sizeof(Queue));
  take(work.loss_scale, axes, sizeof(double));
  take(work.totals, axes * n, sizeof(MatrixTotals));
  take(work.rows, n * p.line_blocks, sizeof(RowTotals));
  take(work.centered, is_closed(p) ? n * p.row_blocks : 0, sizeof(CenteredTotals));
  take(work.alignments, is_closed(p) ? n : 0, sizeof(Alignment));
  take(work.states, is_global(p.settings.normalization) ? 2 * n * p.state_slots : 0, sizeof(State));
  take(work.row_sums, sums * p.queries, sizeof(double));
  take(work.column_sums, sums * p.keys, sizeof(double));
  take(work.poison, 16 * n * p.item_blocks, number_size(p));
  take(work.squares, has_centered_origin(p) ? 16 * n * p.item_blocks : 0, sizeof(double));
  take(work.inverse_lengths, p.settings.unit ? 2 * n * longest : 0, number_size(p));
  take(work.student, pairs, number_size(p));
  take(work.teacher, pairs, number_size(p));
  work.first = work.teacher;
  work.second = work.student;
  if (has_third_buffer(p)) {
    take(work.second, pairs, number_size(p));
  }
  take(work.slopes, centers_gradient_on_the_way(p) ? pairs : 0, number_size(p));
  return static_cast<int64_t>(used);
}

}  // namespace affkd::cuda
