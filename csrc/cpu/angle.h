// RKD's angle loss and its derivative by the squared distances, over triples (i, j, k) of items.
//
// With h half a squared distance and r one over a distance, the cosine of the angle at vertex j is
//
//   psi = (h_ij + h_kj - h_ik) r_ij r_kj,
//
// the same for (i, k) and (k, i), and 1 or 0 for i = k. So a sweep takes the pairs i < k and for
// each all vertices, a vector of them at a time: of what it reads only h_ik lies outside the rows i
// and k of the distances, of what it adds to only the derivative by h_ik lies outside the rows i
// and k of the result. Threads that hold different rows never meet, and sum in a fixed order.
#pragma once

#include "angle_panels.h"

namespace affkd::AFFKD_NAMESPACE {

constexpr int64_t kAngleBlock = 32;  // items whose rows a thread holds, twice

// The derivative w of smooth L1, which itself is w error - beta w^2 / 2. NaN passes through.
template <bool kLinear, typename V>
AFFKD_INLINE V loss_slope(V error, V sharpness) {
  if constexpr (kLinear) {
    return sign(error);
  }
  const V one = splat<V>(1), scaled = error * sharpness;
  const V raised = -one > scaled ? -one : scaled;
  return one < raised ? one : raised;
}

AFFKD_INLINE DoubleVector fold_to_double(DoubleVector x) {
  return x;
}

AFFKD_INLINE DoubleVector fold_to_double(FloatVector x) {
  float lanes[kLanes<float>];
  __builtin_memcpy(lanes, &x, sizeof(x));
  return widen(lanes) + widen(lanes + kLanes<double>);
}

template <typename T, bool kGradient, bool kLinear>
class AngleSweep {
 public:
  AngleSweep(AngleMatrix<T>& matrix, Parallel parallel)
      : matrix_(matrix),
        parallel_(parallel),
        panels_(matrix.items),
        blocks_(count_blocks(matrix.items, kAngleBlock)),
        losses_(take<double>(blocks_)),
        half_beta_(kLinear ? 0 : 0.5 * matrix.beta),
        sharpness_(kLinear ? 0 : 1 / matrix.beta) {}

  void run() {
    for_each_task(parallel_, blocks_, [this](int64_t block) { prepare(block); });
    for_each_task(parallel_, blocks_, [this](int64_t block) { sweep(block, block); });
    // every two blocks meet in one of the rounds, and no block is in two pairs of a round, as in a
    // tournament: one stays in its place, which no one takes if their number is odd, and the others
    // turn around it
    const int64_t turning = blocks_ - 1 + blocks_ % 2;
    for (int64_t round = 0; round < turning; ++round) {
      for_each_task(parallel_, (turning + 1) / 2, [&](int64_t match) {
        const int64_t one = (round + match) % turning;
        const int64_t other = match == 0 ? turning : (round + turning - match) % turning;
        if (other < blocks_) {
          sweep(one, other);
        }
      });
    }
    matrix_.loss = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      matrix_.loss += losses_[block];
    }
  }

 private:
  using V = Vector<T>;

  // What a pair of blocks adds to.
  struct Sums {
    T slopes[2 * kAngleBlock][kVertexPanel];  // by the edges to the vertices of a panel
    DoubleVector opposite[kAngleBlock][kAngleBlock];
    DoubleVector loss;
  };

  // Two blocks, or the same one twice for the pairs within it.
  struct BlockPair {
    Range rows;
    Range columns;
    bool same;
  };

  void prepare(int64_t block) {
    const Range rows = block_range(matrix_.items, kAngleBlock, block);
    double differing = 0;
    for (int64_t i = rows.begin; i < round_up(rows.begin + rows.size, 2); ++i) {
      differing += panels_.pack_row(matrix_, i);
    }
    // the triples with i = k: their error is -1, 0 or 1
    const double slope = kLinear || sharpness_ > 1 ? 1 : sharpness_;
    losses_[block] = differing * slope * (1 - half_beta_ * slope);
    if constexpr (kGradient) {
      double* slopes = matrix_.slope + rows.begin * matrix_.items;
      __builtin_memset(slopes, 0, sizeof(double) * static_cast<size_t>(rows.size * matrix_.items));
    }
  }

  void sweep(int64_t row_block, int64_t column_block) {
    const BlockPair pair{block_range(matrix_.items, kAngleBlock, row_block),
                         block_range(matrix_.items, kAngleBlock, column_block),
                         row_block == column_block};
    const Scratch scratch;
    Sums& sums = *take<Sums>(1);
    __builtin_memset(&sums, 0, sizeof(Sums));
    for (int64_t panel = 0; panel < panels_.count(); ++panel) {
      sweep_panel(pair, panel, sums);
      if constexpr (kGradient) {
        move_slopes(pair.rows, panel, sums.slopes);
        if (!pair.same) {
          move_slopes(pair.columns, panel, sums.slopes + kAngleBlock);
        }
      }
    }
    if constexpr (kGradient) {
      add_opposite(pair, sums);
    }
    losses_[row_block] += 2 * sum_lanes<double>(sums.loss);
  }

  void sweep_panel(const BlockPair& pair, int64_t panel, Sums& sums) {
    for (int64_t row = 0; row < pair.rows.size; row += 2) {
      if (pair.same) {
        tile<1>(pair, panel, row, row + 1, sums);
      }
      for (int64_t column = pair.same ? row + 2 : 0; column < pair.columns.size; column += 2) {
        tile<2>(pair, panel, row, column, sums);
      }
    }
  }

  // kSize rows times kSize columns from the given ones on, with the vertices of a panel. In plain
  // local arrays: these are what compilers keep in registers.
  template <int kSize>
  void tile(const BlockPair& pair, int64_t panel, int64_t row, int64_t column, Sums& sums) {
    const int64_t i = pair.rows.begin + row, k = pair.columns.begin + column;
    T(*row_slopes)[kVertexPanel] = sums.slopes + row;
    T(*column_slopes)[kVertexPanel] = sums.slopes + (pair.same ? 0 : kAngleBlock) + column;
    Edges<T> student_opposite[kSize][kSize], teacher_opposite[kSize][kSize];
    V opposite_slope[kSize][kSize] = {}, loss = {};
    for (int r = 0; r < kSize; ++r) {
      for (int c = 0; c < kSize; ++c) {
        student_opposite[r][c] = splat_edge(panels_.edge(i + r, k + c));
        teacher_opposite[r][c] = splat_edge(panels_.edge(i + r, k + c) + kSideSize<T>);
      }
    }
    const V half_beta = splat<V>(half_beta_), sharpness = splat<V>(sharpness_);
    const int64_t vertices = block_range(matrix_.items, kVertexPanel, panel).size;
    for (int64_t j = 0; j < vertices; j += kLanes<T>) {
      Edges<T> student[kSize], teacher[kSize];
      V square[kSize], row_slope[kSize];
      for (int r = 0; r < kSize; ++r) {
        const T* edges = panels_.row(panel, i + r) + j;
        student[r] = load_edges(edges);
        teacher[r] = load_edges(edges + kSideSize<T>);
        square[r] = student[r].inverse * student[r].inverse;
        row_slope[r] = load(row_slopes[r] + j);
      }
      for (int c = 0; c < kSize; ++c) {
        const T* edges = panels_.row(panel, k + c) + j;
        const Edges<T> student_column = load_edges(edges);
        const Edges<T> teacher_column = load_edges(edges + kSideSize<T>);
        const V column_square = student_column.inverse * student_column.inverse;
        V column_slope = load(column_slopes[c] + j);
        for (int r = 0; r < kSize; ++r) {
          const V reach = student[r].inverse * student_column.inverse;
          const V psi = cosine(student[r], student_column, student_opposite[r][c], reach);
          const V error = psi - cosine(teacher[r], teacher_column, teacher_opposite[r][c],
                                       teacher[r].inverse * teacher_column.inverse);
          const V weight = loss_slope<kLinear>(error, sharpness);
          loss += weight * (error - half_beta * weight);
          // of both orders of i and k, whose 2 cancels the 1/2 in the derivative of psi
          const V push = weight * reach, turn = weight * psi;
          opposite_slope[r][c] -= push;
          row_slope[r] += push - turn * square[r];
          column_slope += push - turn * column_square;
        }
        store_slope(column_slopes[c] + j, column_slope);
      }
      for (int r = 0; r < kSize; ++r) {
        store_slope(row_slopes[r] + j, row_slope[r]);
      }
    }
    sums.loss += fold_to_double(loss);
    for (int r = 0; r < kSize && kGradient; ++r) {
      for (int c = 0; c < kSize; ++c) {
        sums.opposite[row + r][column + c] += fold_to_double(opposite_slope[r][c]);
      }
    }
  }

  AFFKD_INLINE static void store_slope(T* to, V slope) {
    if constexpr (kGradient) {
      store(to, slope);
    }
  }

  AFFKD_INLINE static V cosine(const Edges<T>& a, const Edges<T>& b, const Edges<T>& opposite,
                               V reach) {
    V numerator = (a.half + b.half) - opposite.half;
    if constexpr (kSplit<T>) {
      numerator += (a.rest + b.rest) - opposite.rest;
    }
    return numerator * reach;
  }

  // Sums of T are moved on to sums of double before they grow long.
  void move_slopes(Range rows, int64_t panel, T (*slopes)[kVertexPanel]) {
    const Range vertices = block_range(matrix_.items, kVertexPanel, panel);
    for (int64_t row = 0; row < rows.size; ++row) {
      double* to = matrix_.slope + (rows.begin + row) * matrix_.items + vertices.begin;
      for (int64_t lane = 0; lane < vertices.size; ++lane) {
        to[lane] += slopes[row][lane];
      }
    }
    __builtin_memset(slopes, 0, sizeof(T) * kAngleBlock * kVertexPanel);
  }

  void add_opposite(const BlockPair& pair, const Sums& sums) {
    for (int64_t row = 0; row < pair.rows.size; ++row) {
      double* to = matrix_.slope + (pair.rows.begin + row) * matrix_.items + pair.columns.begin;
      for (int64_t column = 0; column < pair.columns.size; ++column) {
        to[column] += sum_lanes<double>(sums.opposite[row][column]);
      }
    }
  }

  AngleMatrix<T>& matrix_;
  Parallel parallel_;
  AnglePanels<T> panels_;
  int64_t blocks_;
  double* losses_;  // [blocks_]
  double half_beta_;
  double sharpness_;
};

template <typename T>
void run_angle(AngleMatrix<T>& matrix, Parallel parallel) {
  const Scratch scratch;
  // so small a beta that its inverse overflows is none
  const bool linear = __builtin_isinf(static_cast<T>(1 / matrix.beta));
  if (matrix.slope == nullptr) {
    linear ? AngleSweep<T, false, true>(matrix, parallel).run()
           : AngleSweep<T, false, false>(matrix, parallel).run();
  } else {
    linear ? AngleSweep<T, true, true>(matrix, parallel).run()
           : AngleSweep<T, true, false>(matrix, parallel).run();
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
