// Items that are inf or NaN. Phase gram leaves a list of them that tells no more than NaN or 0: the
// loss of their matrix is to be NaN, even where no pair of theirs takes part or a stage hides them.
#pragma once

#include "rows.cuh"

namespace affkd::cuda {

// Which items a list is of.
enum class Listed : int64_t { student, student_keys, teacher, teacher_keys };

// A thread's share of the list of matrix n, for the tiles of items from `begin` to `end`.
template <typename T>
AFFKD_DEVICE double list_poison(const Params& p, Listed items, int64_t n, int64_t begin,
                                int64_t end) {
  const T* list = static_cast<const T*>(p.work.poison) +
                  (static_cast<int64_t>(items) * p.matrices + n) * p.item_blocks * 4;
  double poison = 0;
  for (int64_t at = 4 * begin + threadIdx.x; at < 4 * end; at += kThreads) {
    poison += list[at];
  }
  return poison;
}

template <typename T>
AFFKD_DEVICE double query_poison(const Params& p, int64_t n, int64_t begin, int64_t end) {
  return list_poison<T>(p, Listed::student, n, begin, end) +
         list_poison<T>(p, Listed::teacher, n, begin, end);
}

// NaN where an item that the panel has to do with is inf or NaN, else 0. By all threads of a block.
template <typename T>
AFFKD_DEVICE double panel_poison(const Params& p, int64_t n, double* scratch) {
  const Panel& panel = p.task.panel;
  double poison = query_poison<T>(p, n, panel.row_begin / kTile,
                                  divide_up(panel.row_begin + panel.rows, kTile));
  if (!is_mirrored(p)) {
    const int64_t blocks = divide_up(p.keys, kTile);
    poison += list_poison<T>(p, Listed::student_keys, n, 0, blocks) +
              list_poison<T>(p, Listed::teacher_keys, n, 0, blocks);
  }
  __syncthreads();
  return block_sum(poison, scratch);
}

// By a warp.
AFFKD_DEVICE bool has_pair(const Params& p, int64_t n, int64_t i) {
  int pairs = 0;
  for (int64_t first = 0; pairs == 0 && first < p.keys; first += 32) {
    const int64_t j = first + lane_index();
    pairs = warp_sum(j < p.keys && takes_part(p, n, i, j) ? 1 : 0);
  }
  return pairs > 0;
}

// A panel knows of the queries of no other, which a matrix with keys of its own shows nowhere else.
// With all panels done, by all threads of a block: NaN or 0, and NaN for every row loss.
template <typename T>
AFFKD_DEVICE double late_poison(const Params& p, int64_t n, double* scratch) {
  if (p.self || p.largest.rows == p.queries) {
    return 0;
  }
  const double poison = block_sum(query_poison<T>(p, n, 0, divide_up(p.queries, kTile)), scratch);
  if (poison == 0 || p.row_losses == nullptr) {
    return poison;
  }
  for (int64_t i = warp_index(); i < p.queries; i += kWarps) {
    if (has_pair(p, n, i) && lane_index() == 0) {
      static_cast<T*>(p.row_losses)[n * p.queries + i] = static_cast<T>(poison);
    }
  }
  return poison;
}

}  // namespace affkd::cuda
