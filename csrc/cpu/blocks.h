// How one matrix is cut: what lies in memory, and the sizes of the pieces that threads share. All
// of it depends on the shape alone, so that no sum depends on the threads.
#pragma once

#include "features.h"

namespace affkd::AFFKD_NAMESPACE {

// Below this many multiplications a second thread costs more than it brings.
template <typename T>
inline bool is_small(const Matrix<T>& matrix) {
  const int64_t dims = matrix.student.dim + matrix.teacher.dim;
  return matrix.queries * matrix.keys * dims <= (int64_t{1} << 20);
}

// Few items of many features, the maps of a network: reading the features is what takes the time,
// so that none are copied; and the tiles are too few for the threads, so that the features of one
// are shared out.
template <typename T>
inline bool are_long(const Matrix<T>& matrix) {
  const auto is_long = [&](const Side<T>& side) { return side.dim >= 16 * matrix.queries; };
  return matrix.self && matrix.queries <= 128 && is_long(matrix.student) && is_long(matrix.teacher);
}

// Few queries facing many keys, a bank: as no key meets more than one block of rows, packing it
// once for all would be a copy that nobody reads a second time.
template <typename T>
inline bool is_wide(const Matrix<T>& matrix) {
  return !matrix.self && matrix.queries <= 128 && matrix.keys >= 8 * matrix.queries &&
         matrix.student.dim >= 2 * kPanel<T>;
}

// Rows and columns of a block: whole panels, and whole groups of the micro-kernel where that is
// not too coarse to share a small matrix among threads. `tiled` prepares the items of a tile for
// it alone, the cheaper the larger the tile.
template <typename T>
inline int64_t block_size(const Matrix<T>& matrix, bool dense) {
  const int64_t n = matrix.queries > matrix.keys ? matrix.queries : matrix.keys;
  if (dense) {
    return n <= 128 ? 32 : n <= 256 ? 64 : 96;
  }
  return n <= 384 ? 96 : n <= 1024 ? 128 : 192;
}

// Few rows facing many columns are shared out evenly: `tiled` has one tile for each block of rows
// to give to the threads.
template <typename T>
inline int64_t row_block_size(const Matrix<T>& matrix, int64_t block) {
  if (matrix.self) {
    return block;
  }
  const int64_t blocks = count_blocks(matrix.queries, block);
  const int64_t rows = count_blocks(matrix.queries, blocks < 2 ? 2 : blocks);
  return rows < 32 ? 32 : rows;
}

// A multiple of four strips of one size, so that no thread waits for the last of another.
inline int64_t strip_size(int64_t rows) {
  const int64_t wanted = rows <= 256 ? 32 : rows <= 768 ? 48 : 96;
  const int64_t strips = 4 * count_blocks(rows, 4 * wanted);
  const int64_t even = count_blocks(rows, strips > 0 ? strips : 1);
  return even > 16 ? even : 16;
}

// Whether a thread makes some features of all products, not all features of some: the keys are then
// read once, not once for each strip of rows, where that is the larger part of the reading.
template <typename T>
inline bool are_features_shared(const Matrix<T>& matrix) {
  return matrix.queries <= 128 || matrix.student.dim >= matrix.queries;
}

// The features of one such piece.
template <typename T>
inline int64_t feature_block_size(int64_t dim) {
  const int64_t block = round_up(count_blocks(dim, 8), kPanel<T>);
  return block < 512 ? block : 512;
}

struct Blocks {
  bool long_items;  // see are_long
  bool wide;        // see is_wide
  int64_t columns;  // of a tile
  int64_t rows;     // and rows, as many in a self-affinity
  int64_t strip;    // rows of a sweep over the matrix that is held
  bool by_features;

  // Whether the prepared keys are packed, once for all tiles.
  bool packs() const { return !long_items && !wide; }
};

template <typename T>
inline Blocks blocks_of(const Matrix<T>& matrix, bool dense) {
  const bool wide = dense && is_wide(matrix);
  const int64_t block = block_size(matrix, dense);
  const int64_t rows = wide ? matrix.queries : row_block_size(matrix, block);
  const bool by_features = dense && are_features_shared(matrix);
  return {dense && are_long(matrix), wide, block, rows, strip_size(matrix.queries), by_features};
}

}  // namespace affkd::AFFKD_NAMESPACE
