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
// items along either side of a matrix that is centered without launches of its own
constexpr int64_t kMostFolded = 512;

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

// All launches of a call share it. What a kernel writes only later ones read, but for `first` and
// `second`: a row of them may take the place of the pairs it is made from.
struct Workspace {
  unsigned* arrivals;    // [N + 1] blocks of a matrix that are done, and matrices; 0 again after
                         // every sweep
  double* loss_scale;    // [axes] weight / count, where only the masks tell the count
  MatrixTotals* totals;  // [axes, N]
  RowTotals* rows;       // [N, line_blocks] of the rows, then of the columns
  CenteredTotals* centered;  // [N, row_blocks]
  Alignment* alignments;     // [N]
  State* states;             // [2, N, state_slots] of student and teacher
  double* row_sums;          // [3, N, Q] of A_s, A_t and dA
  double* column_sums;       // [3, N, K]
  double* tile_sums;         // [2, N, tile_sums(p)] of A_s and A_t
  double* block_sums;        // [N, row_blocks, K] of the columns of dA
  void* poison;              // T [4, N, 4 item_blocks]: NaN where an item is inf or NaN, else 0
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
  bool writes_losses;  // rows: losses and corrections
  bool writes_pairs;   // rows: W1 and W2
  bool finishes;       // rows, center: the last block of the sweep writes the call's scalars
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

AFFKD_BOTH constexpr bool is_distance(PairFunction pair) {
  return pair == PairFunction::squared_distance || pair == PairFunction::distance ||
         pair == PairFunction::gaussian;
}

AFFKD_BOTH constexpr bool is_maximum(Normalization kind) {
  return kind == Normalization::max || kind == Normalization::max_detached;
}

AFFKD_BOTH constexpr bool is_mean(Normalization kind) {
  return kind == Normalization::mean_positive || kind == Normalization::mean_all ||
         kind == Normalization::mean_offdiag;
}

// one statistic for the whole matrix
AFFKD_BOTH constexpr bool is_global(Normalization kind) {
  return kind == Normalization::frobenius || kind == Normalization::frobenius_centered ||
         is_mean(kind) || is_maximum(kind);
}

AFFKD_BOTH constexpr bool is_centered(const Params& p) {
  return p.settings.normalization == Normalization::frobenius_centered;
}

// the gradient has a part that follows from the statistic of the whole matrix
AFFKD_BOTH constexpr bool has_second(const Params& p) {
  return is_global(p.settings.normalization) &&
         p.settings.normalization != Normalization::max_detached;
}

AFFKD_BOTH constexpr bool wants_gradient(const Params& p) {
  return p.query_gradient != nullptr || p.key_gradient != nullptr || p.scale_gradient != nullptr;
}

AFFKD_BOTH constexpr bool is_half(const FeatureView& features) {
  return features.storage == Storage::bfloat16 || features.storage == Storage::float16;
}

// The tiles of phase gram multiply the features as they are, in half precision: tf32 has all their
// digits.
AFFKD_BOTH constexpr bool has_exact_tf32(const Params& p) {
  const bool moved = is_centered(p) || (is_distance(p.settings.pair) && !p.settings.unit);
  return !moved && is_half(p.student) && is_half(p.teacher) && is_half(p.student_keys) &&
         is_half(p.teacher_keys);
}

// One product serves both sides, and only one tile of every mirrored couple is computed: where a
// panel is whole matrices of a self-affinity.
AFFKD_BOTH constexpr bool is_mirrored(const Params& p) {
  return p.self && p.largest.rows == p.queries;
}

AFFKD_BOTH constexpr bool is_masked(const Params& p) {
  return p.mask.data != nullptr || p.key_mask.data != nullptr || p.pair_mask.data != nullptr;
}

// mse makes dA a combination of two centered matrices already
AFFKD_BOTH constexpr bool centers_gradient(const Params& p) {
  return is_centered(p) && (p.settings.loss != Loss::mse || p.row_weight.data != nullptr);
}

// Linear kernel alignment, the everyday centered loss: sums over uncentered rows give it, and three
// launches are enough. They cancel, which sums of double survive for numbers of float, and those
// of features without their common offset.
AFFKD_BOTH constexpr bool is_closed(const Params& p) {
  return is_centered(p) && !centers_gradient(p) && is_mirrored(p) && !p.wide &&
         p.settings.pair == PairFunction::linear && !p.settings.unit && !p.settings.clamped &&
         p.settings.diagonal == Diagonal::keep && p.row_losses == nullptr &&
         p.scale_gradient == nullptr;
}

// Small matrices of float are centered on the way: tiles leave sums of their rows and columns,
// which every block of phase rows adds up for itself, and so on with dA and phase product. Norms
// from sums cancel, which double survives for numbers of float.
AFFKD_BOTH constexpr bool may_fold(const Params& p) {
  return is_centered(p) && !p.wide && p.queries <= kMostFolded && p.keys <= kMostFolded &&
         (p.scale_gradient == nullptr || !centers_gradient(p));
}
AFFKD_BOTH constexpr bool is_folded(const Params& p) {
  return may_fold(p) && p.largest.rows == p.queries && !is_closed(p);
}
AFFKD_BOTH constexpr bool folds_gradient(const Params& p) {
  return is_folded(p) && centers_gradient(p);
}

// The states come out of the tiles, unless a centered matrix is not known there or the tiles of a
// matrix are computed more than once.
AFFKD_BOTH constexpr bool gram_has_states(const Params& p) {
  return is_global(p.settings.normalization) && (!is_centered(p) || is_folded(p)) &&
         p.largest.rows == p.queries;
}

// Of one side of one matrix: for every tile of columns a sum of each row, then the same of columns,
// which a self-affinity's rows are.
AFFKD_BOTH constexpr int64_t tile_sums(const Params& p) {
  return divide_up(p.keys, kTile) * p.queries + (p.self ? 0 : divide_up(p.queries, kTile) * p.keys);
}

AFFKD_BOTH constexpr int64_t gram_tiles(const Params& p, const Panel& panel) {
  const int64_t rows = divide_up(panel.rows, kTile), columns = divide_up(p.keys, kTile);
  return is_mirrored(p) ? rows * (rows + 1) / 2 : rows * columns;
}

// Blocks that share the tiles of one side of a matrix out among them.
AFFKD_BOTH constexpr int64_t gram_blocks(const Params& p, const Panel& panel) {
  return gram_has_states(p) ? p.state_slots : gram_tiles(p, panel);
}

// Blocks of phase rows for each matrix of a panel.
AFFKD_BOTH constexpr int64_t line_blocks(const Params& p) {
  return divide_up(p.task.panel.rows, kWarps) + (p.columns ? divide_up(p.keys, kWarps) : 0);
}

// Blocks of phase product, for either gradient of a panel.
AFFKD_BOTH constexpr int64_t query_blocks(const Params& p) {
  return p.task.panel.matrices * divide_up(p.task.panel.rows, kTile) *
         divide_up(p.student.dim, kSlice);
}
AFFKD_BOTH constexpr int64_t key_blocks(const Params& p) {
  return p.task.panel.matrices * divide_up(p.keys, kTile) * divide_up(p.student.dim, kSlice);
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
