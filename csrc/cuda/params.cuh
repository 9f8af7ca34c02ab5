// What the CUDA kernels are given: views of the tensors, the settings, the workspace, and what one
// launch is about. Plain C++ without CUDA or torch: the host packs it, the kernels read it, and the
// tests run both on a CPU.
#pragma once

#include <cstdint>

#include "../settings.h"

#if defined(__CUDACC__)
#define AFFKD_BOTH __host__ __device__
#else
#define AFFKD_BOTH
#endif

namespace affkd::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;
constexpr int64_t kTile = 32;   // pairs along either side of a tile
constexpr int64_t kSlice = 64;  // features of one block of a product
// parts of a matrix's statistic, of which every block of phase rows reads all
constexpr int64_t kMostSlots = 4096;
constexpr int64_t kColumns = 8;  // of one block that sums columns

// How a tensor's numbers are stored; they are computed with in float, or double if any is double.
enum class Storage : int64_t { float32, float64, bfloat16, float16 };

// How exact products of float numbers are: on the floating-point units, or on tensor cores.
enum class Precision : int64_t { ieee, tf32x3, tf32 };

// Strides are in elements. A null `data` is an argument that was not given.
struct FeatureView {  // [N, items, dim]
  const void* data;
  Storage storage;
  int64_t dim;
  int64_t matrix;  // strides
  int64_t item;
  int64_t feature;
};

struct MaskView {  // [N, items] bool
  const uint8_t* data;
  int64_t matrix;
  int64_t item;
};

struct PairMaskView {  // [N, Q, K] bool
  const uint8_t* data;
  int64_t matrix;
  int64_t query;
  int64_t key;
};

struct WeightView {  // [N, Q]
  const void* data;
  Storage storage;
  int64_t matrix;
  int64_t item;
};

struct ScalarView {  // []
  const void* data;
  Storage storage;
};

// Of one block of rows: what the loss, the corrections and the scale's gradient are summed from.
struct RowTotals {
  double loss;         // without the loss scale
  double correction;   // c of a statistic of the whole matrix
  double scale_first;  // sum of W1 g and of W2 g
  double scale_second;
  int64_t pairs;
  int64_t rows;  // that have a pair
};

// Of one block of rows of A_s and A_t before centering, of features with a common origin
// (GramTile).
struct CenteredTotals {
  double student_square;  // sum of A^2
  double teacher_square;
  double cross;         // sum of A_s A_t
  double student_rows;  // sum over the rows of (sum of A)^2
  double teacher_rows;
  double cross_rows;
  double student_sum;
  double teacher_sum;
};

// Of the rows of one matrix, or of its columns: what the scalars of a call are summed from.
struct MatrixTotals {
  double loss;   // without the loss scale
  double scale;  // sum of dA g
  int64_t pairs;
  int64_t rows;
};

// Linear kernel alignment of one matrix: dA = student A_s + teacher A_t with both centered.
struct Alignment {
  double student;
  double teacher;
};

// What a matrix's statistic is made from; what the fields mean depends on the normalization.
struct State {
  double first;   // a sum, or the maximum
  double second;  // a count, or the sum of squares before centering
  int64_t place;  // of the maximum: row * keys + column
};

// Work of a matrix that the blocks of a launch share out among them (queue.cuh): how many units of
// it are taken, and how many are done.
struct Queue {
  unsigned taken;
  unsigned done;
};

// Lists of sums of a matrix (centering.cuh).
constexpr int64_t kSummed = 4;

// What is shared out: the sums of A and then its squares in phase rows, those of dA in product.
enum class Joint : int64_t { sums, squares, gradient };
constexpr int64_t kJoint = 3;

// All launches of a call share it. What a kernel writes only later ones read, but for `first` and
// `second`: a row of them may take the place of the pairs it is made from.
struct Workspace {
  unsigned* arrivals;    // [N + 1] blocks of a matrix that are done, and matrices; 0 again after
                         // every sweep
  Queue* queues;         // [kJoint, N] 0 before
  double* loss_scale;    // [axes] weight / count, where only the masks tell the count
  MatrixTotals* totals;  // [axes, N]
  RowTotals* rows;       // [N, line_blocks] of the rows, then of the columns
  CenteredTotals* centered;  // [N, row_blocks]
  Alignment* alignments;     // [N]
  State* states;             // [2, N, state_slots] of student and teacher
  double* row_sums;          // [kSummed, N, Q]
  double* column_sums;       // [kSummed, N, K]
  void* poison;              // T [4, N, 4 item_blocks]: NaN where an item is inf or NaN, else 0
  double* squares;           // [4, N, 4 item_blocks] sums of |x|^2, of the same eight items
  void* inverse_lengths;     // T [2, N, max(Q, K)]: 1 / |x| of the student's queries and keys
  void* student;             // T [axes, panel]: g, or the squared distance, of every pair; with two
                             // axes the second is the transpose [N, K, Q] of the first
  void* teacher;             // T [axes, panel]
  void* first;               // T [panel]: W1 of V = a (W1 + W1') + b (W2 + W2')
  void* second;              // T [panel]: W2, what flows back through a statistic of the matrix
  void* slopes;              // T [panel]: d A / d g, where `first` is dA before it is centered
};

// The pairs that the workspace holds: rows [row_begin, row_begin + rows) of some matrices.
struct Panel {
  int64_t matrix_begin;
  int64_t matrices;
  int64_t row_begin;
  int64_t rows;
};

// What one launch is about, of a phase that is launched in several ways.
struct Task {
  Panel panel;
  bool resets;         // gram: the first launch of a call
  bool writes_losses;  // rows: losses and corrections; the last block also the call's scalars
  bool writes_pairs;   // rows: W1 and W2
  bool of_gradient;    // means: of dA, not of A_s and A_t
  bool keys;           // product: the gradient of the keys, from W'; else of the queries, from W
  bool also_keys;      // product: of the queries, and by more blocks of the keys
  bool both_sides;     // product: from W + W'
  bool accumulates;    // product: adds to the gradient
};

struct Params {
  Settings settings;
  Precision precision;
  bool wide;  // computed in double, not float
  bool self;  // the views of the keys are those of the queries
  bool has_diagonal;
  bool columns;  // the loss of the columns is added, which are normalized as the rows are
  int64_t diagonal_offset;
  Reduction reduction;
  double weight;
  int64_t matrices;
  int64_t queries;
  int64_t keys;
  FeatureView student;
  FeatureView teacher;
  FeatureView student_keys;
  FeatureView teacher_keys;
  MaskView mask;
  MaskView key_mask;
  PairMaskView pair_mask;
  WeightView row_weight;
  ScalarView student_scale;  // in place of the settings' number
  ScalarView teacher_scale;

  // contiguous, float or double; null where not wanted
  void* loss;            // []
  void* query_gradient;  // [N, Q, Ds]
  void* key_gradient;    // [N, K, Ds]
  void* scale_gradient;  // []
  void* row_losses;      // [N, Q]

  // derived from the above (layout.cuh)
  bool counts;           // only the masks tell the count: see Workspace::loss_scale
  double loss_scale;     // weight / count otherwise
  double column_scale;   // and that of the columns
  double taylor_factor;  // exp(-scale)
  int64_t item_blocks;
  int64_t row_blocks;
  int64_t line_blocks;  // of rows and, where they count, of columns
  int64_t state_slots;
  Panel largest;  // no panel has more matrices or rows
  Workspace work;
  Task task;
};

AFFKD_BOTH constexpr int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// The launches; all have blocks of kThreads threads. `schedule.cuh` puts them in order.
enum class Phase {
  gram,        // pairs of both sides from features; states of a matrix
  means,       // sums over rows and columns of A, or of dA
  statistics,  // states of a matrix from its rows
  count,       // pairs and rows that take part
  rows,        // losses, corrections, W1 and W2 from pairs
  center,      // W1 from dA and its means
  product,     // gradients from W1, W2 and features
};

}  // namespace affkd::cuda
