// What follows from the parameters of a call: which way of several it is computed, and how many
// blocks that takes.
#pragma once

#include "params.cuh"

namespace affkd::cuda {

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

// Whether the loss of the columns can be added: those of a self-affinity are its rows.
AFFKD_BOTH constexpr bool may_have_columns(const Params& p) {
  return !p.self && p.settings.normalization == Normalization::softmax &&
         p.row_weight.data == nullptr && p.pair_mask.data == nullptr &&
         p.settings.diagonal != Diagonal::exclude;
}

AFFKD_BOTH constexpr bool is_masked(const Params& p) {
  return p.mask.data != nullptr || p.key_mask.data != nullptr || p.pair_mask.data != nullptr;
}

// mse makes dA a combination of two centered matrices already
AFFKD_BOTH constexpr bool centers_gradient(const Params& p) {
  return is_centered(p) && (p.settings.loss != Loss::mse || p.row_weight.data != nullptr);
}

// what the scale of a centered matrix gets is the sum of dA times dA / d scale, centered likewise
AFFKD_BOTH constexpr bool centers_scale(const Params& p) {
  return centers_gradient(p) && p.scale_gradient != nullptr;
}

// Centering takes out what all items have in common, m: with q = a + m and k = b + m what is left
// of q.k is that of a.b, without the digits that m would cost.
AFFKD_BOTH constexpr bool has_centered_origin(const Params& p) {
  return is_centered(p) && !p.wide && p.settings.pair == PairFunction::linear && !p.settings.unit &&
         !p.settings.clamped && p.settings.diagonal == Diagonal::keep;
}

// Linear kernel alignment, the everyday centered loss: sums over uncentered rows give it, and three
// launches are enough. They cancel, which sums of double survive for numbers of float, and those
// of features without their common offset.
AFFKD_BOTH constexpr bool is_closed(const Params& p) {
  return has_centered_origin(p) && !centers_gradient(p) && is_mirrored(p) &&
         p.row_losses == nullptr && p.scale_gradient == nullptr;
}

// Where a panel is whole matrices, what is centered is so on the way: the blocks of phase rows
// share out the sums of A and then its squares, those of phase product the sums of dA.
AFFKD_BOTH constexpr bool is_centered_on_the_way(const Params& p) {
  return is_centered(p) && p.largest.rows == p.queries && !is_closed(p);
}
AFFKD_BOTH constexpr bool centers_gradient_on_the_way(const Params& p) {
  return is_centered_on_the_way(p) && centers_gradient(p);
}

// The columns of a symmetric matrix are its rows: not of dA where rows have weights.
AFFKD_BOTH constexpr bool has_own_columns(const Params& p, bool of_gradient) {
  return !p.self || (of_gradient && p.row_weight.data != nullptr);
}

// The states come out of the tiles, unless a centered matrix is not known there or the tiles of a
// matrix are computed more than once.
AFFKD_BOTH constexpr bool gram_has_states(const Params& p) {
  return is_global(p.settings.normalization) && !is_centered(p) && p.largest.rows == p.queries;
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

// Blocks of phase means for each matrix of a panel: those of the rows, then of the columns.
AFFKD_BOTH constexpr int64_t sums_blocks(const Params& p) {
  return divide_up(p.task.panel.rows, kWarps) +
         (has_own_columns(p, p.task.of_gradient) ? divide_up(p.keys, kColumns) : 0);
}

// Blocks of phase product, for either gradient of a panel.
AFFKD_BOTH constexpr int64_t query_blocks(const Params& p) {
  return p.task.panel.matrices * divide_up(p.task.panel.rows, kTile) *
         divide_up(p.student.dim, kSlice);
}
AFFKD_BOTH constexpr int64_t key_blocks(const Params& p) {
  return p.task.panel.matrices * divide_up(p.keys, kTile) * divide_up(p.student.dim, kSlice);
}

}  // namespace affkd::cuda
