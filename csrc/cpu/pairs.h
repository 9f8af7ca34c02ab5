// All pairs of one matrix, held (`dense`) or computed tile by tile (`tiled`), and the sweeps over
// them.
//
// `tiled` takes the tiles in rounds such that no two tiles of a round share a block of rows or of
// columns: threads need no locks, and every sum has one order, whatever the number of threads. Of a
// self-affinity only the tiles on and above the diagonal are computed.
#pragma once

#include "tile.h"

namespace affkd::AFFKD_NAMESPACE {

template <typename T>
class Pairs {
 public:
  Pairs(const Settings& settings, const Matrix<T>& matrix, Parallel parallel)
      : rules(settings, matrix),
        parallel(is_small(matrix) ? run_serially : parallel),
        settings_(settings),
        matrix_(matrix),
        self_(matrix.self),
        dense_(settings.algorithm == Algorithm::dense),
        long_(dense_ && are_long(matrix)),
        block_(block_size(matrix, dense_)),
        row_block_(row_block_size(matrix, block_)),
        strip_(strip_size(matrix.queries)) {
    student = prepare_side(matrix.student, settings.student_scale);
    teacher = prepare_side(matrix.teacher, settings.teacher_scale);
    if (dense_) {
      build_matrix();
    }
  }

  const PairRules<T> rules;
  const Parallel parallel;
  PreparedSide<T> student;
  PreparedSide<T> teacher;
  T poison = 0;  // NaN where a feature is inf or NaN, else 0

  bool dense() const { return dense_; }

  // of a self-affinity whose matrix is held
  bool has_long_items() const { return long_; }

  // the matrix that is held
  Tile<T> whole() const { return stored({0, matrix_.queries}, {0, matrix_.keys}); }

  // visit(tile) for tiles that cover every pair once, in row order within a block of rows
  template <typename Visit>
  void sweep(Parallel threads, Visit visit) {
    if (dense_) {
      for_each_task(threads, count_blocks(matrix_.queries, strip_), [&](int64_t task) {
        const Range rows = block_range(matrix_.queries, strip_, task);
        visit(stored(rows, {0, matrix_.keys}));
      });
      return;
    }
    sweep_tiles(threads, [&](const Tile<T>& tile) {
      visit(tile);
      if (is_mirrored(tile)) {
        visit_transposed(tile, visit);
      }
    });
  }

  template <typename Visit>
  void visit_transposed(const Tile<T>& tile, Visit visit) {
    const Scratch scratch;
    const int64_t stride = round_up(block_, kPanel<T>);
    visit(transposed_tile(tile, take<T>(block_ * stride), take<T>(block_ * stride), stride));
  }

  bool is_mirrored(const Tile<T>& tile) const { return self_ && tile.row != tile.column; }

  // visit(tile) for every tile; of a self-affinity, for one of each mirrored couple
  template <typename Visit>
  void sweep_tiles(Parallel threads, Visit visit) {
    const int64_t row_blocks = count_blocks(matrix_.queries, row_block_);
    const int64_t column_blocks = count_blocks(matrix_.keys, block_);
    const int64_t rounds = row_blocks > column_blocks ? row_blocks : column_blocks;
    const Scratch scratch;
    int64_t* taken = take<int64_t>(row_blocks);  // the block rows of a round's tiles
    for (int64_t round = 0; round < rounds; ++round) {
      const auto column_of = [=](int64_t row) { return (round - row + rounds) % rounds; };
      int64_t tiles = 0;
      for (int64_t row = 0; row < row_blocks; ++row) {
        const int64_t column = column_of(row);
        if (column < column_blocks && !(self_ && column < row)) {
          taken[tiles++] = row;
        }
      }
      for_each_task(threads, tiles, [&](int64_t task) {
        visit_computed(taken[task], column_of(taken[task]), visit);
      });
    }
  }

  // visit(tile) for every block of columns of the matrix that is held, all rows at once
  template <typename Visit>
  void sweep_columns(Visit visit) {
    for_each_task(parallel, count_blocks(matrix_.keys, block_), [&](int64_t task) {
      visit(stored({0, matrix_.queries}, block_range(matrix_.keys, block_, task)));
    });
  }

 private:
  static constexpr int64_t kLongSlices = 8;

  // Below this many multiplications a second thread costs more than it brings.
  static bool is_small(const Matrix<T>& matrix) {
    const int64_t dims = matrix.student.dim + matrix.teacher.dim;
    return matrix.queries * matrix.keys * dims <= (int64_t{1} << 20);
  }

  // Few items of many features, the maps of a network: reading the features is what takes the time,
  // so that none are copied; and the tiles are too few for the threads, so that the features of one
  // are shared out.
  static bool are_long(const Matrix<T>& matrix) {
    const auto is_long = [&](const Side<T>& side) { return side.dim >= 16 * matrix.queries; };
    return matrix.self && matrix.queries <= 128 && is_long(matrix.student) &&
           is_long(matrix.teacher);
  }

  // Rows and columns of a block: whole panels, and whole groups of the micro-kernel where that is
  // not too coarse to share a small matrix among threads. `tiled` prepares the items of a tile for
  // it alone, the cheaper the larger the tile.
  static int64_t block_size(const Matrix<T>& matrix, bool dense) {
    const int64_t n = matrix.queries > matrix.keys ? matrix.queries : matrix.keys;
    if (dense) {
      return n <= 128 ? 32 : n <= 256 ? 64 : 96;
    }
    return n <= 384 ? 96 : n <= 1024 ? 128 : 192;
  }

  // A multiple of four strips of one size, so that no thread waits for the last of another.
  static int64_t strip_size(int64_t rows) {
    const int64_t wanted = rows <= 256 ? 32 : rows <= 768 ? 48 : 96;
    const int64_t strips = 4 * count_blocks(rows, 4 * wanted);
    const int64_t even = count_blocks(rows, strips > 0 ? strips : 1);
    return even > 16 ? even : 16;
  }

  // Few rows facing many columns are shared out evenly: `tiled` has one tile for each block of rows
  // to give to the threads.
  static int64_t row_block_size(const Matrix<T>& matrix, int64_t block) {
    if (matrix.self) {
      return block;
    }
    const int64_t blocks = count_blocks(matrix.queries, block);
    const int64_t rows = count_blocks(matrix.queries, blocks < 2 ? 2 : blocks);
    return rows < 32 ? 32 : rows;
  }

  PreparedSide<T> prepare_side(const Side<T>& side, double scale) {
    const Preparation how = preparation_of(settings_, self_);
    const T* keys = self_ ? side.queries : side.keys;
    // a distance takes any common point, the centering of a matrix the means of either side
    const T* key_mean = nullptr;
    if (how.centered) {
      key_mean = mean_item(keys, matrix_.key_index, matrix_.keys, side.dim, parallel);
    }
    const T* query_mean = key_mean;
    if (!self_ && centers_features(settings_)) {
      query_mean =
          mean_item(side.queries, matrix_.query_index, matrix_.queries, side.dim, parallel);
    }
    PreparedSide<T> prepared;
    prepared.scale = static_cast<T>(scale);
    prepared.queries = prepare_items(how, side.queries, matrix_.query_index, matrix_.queries,
                                     side.dim, query_mean, dense_ && !long_, parallel);
    prepared.keys = self_ ? prepared.queries
                          : prepare_items(how, side.keys, matrix_.key_index, matrix_.keys, side.dim,
                                          key_mean, dense_, parallel);
    prepared.keys.packed = dense_ && !long_ ? pack_items(prepared.keys, parallel) : nullptr;
    poison += prepared.queries.poison + prepared.keys.poison;
    return prepared;
  }

  void build_matrix() {
    stride_ = round_up(matrix_.keys, kPanel<T>);
    // rows a multiple of a page apart would fall into the same few lines of the cache
    stride_ += stride_ * sizeof(T) % 4096 == 0 ? kPanel<T> : 0;
    student_values_ = take<T>(matrix_.queries * stride_);
    teacher_values_ = take<T>(matrix_.queries * stride_);
    const int64_t blocks = count_blocks(matrix_.queries, row_block_);
    if (!self_) {
      // few rows may face many columns: only both together are work for all threads
      for_each_task(parallel, blocks * count_blocks(matrix_.keys, block_), [&](int64_t task) {
        const Range rows = block_range(matrix_.queries, row_block_, task % blocks);
        const Range columns = block_range(matrix_.keys, block_, task / blocks);
        fill_tile(settings_, rules, student, teacher, stored(rows, columns));
      });
      return;
    }
    // the tiles of the upper triangle, each with its mirror image
    const Scratch scratch;
    Range* couples = take<Range>(blocks * (blocks + 1));
    int64_t tiles = 0;
    for (int64_t row = 0; row < blocks; ++row) {
      for (int64_t column = row; column < blocks; ++column) {
        couples[2 * tiles] = block_range(matrix_.queries, block_, row);
        couples[2 * tiles + 1] = block_range(matrix_.queries, block_, column);
        ++tiles;
      }
    }
    if (long_) {
      add_up_products(student, couples, tiles, &Tile<T>::student);
      add_up_products(teacher, couples, tiles, &Tile<T>::teacher);
    }
    for_each_task(parallel, tiles, [&](int64_t task) {
      const Range rows = couples[2 * task], columns = couples[2 * task + 1];
      const Tile<T> tile = stored(rows, columns);
      if (long_) {
        finish_values(settings_, rules, student, tile, tile.student);
        finish_values(settings_, rules, teacher, tile, tile.teacher);
      } else {
        fill_tile(settings_, rules, student, teacher, tile);
      }
      if (rows.begin != columns.begin) {
        const Tile<T> mirror = stored(columns, rows);
        transposed_tile(tile, mirror.student, mirror.teacher, stride_);
      }
    });
  }

  // The inner products of long items: the sums over a slice of the features each, then theirs. How
  // many slices there are depends on the shape alone, and so does every sum.
  void add_up_products(const PreparedSide<T>& side, const Range* couples, int64_t tiles,
                       T* Tile<T>::*values) {
    const int64_t dim = side.keys.dim;
    const int64_t length = round_up(count_blocks(dim, kLongSlices), kDepth);
    const int64_t slices = count_blocks(dim, length);
    const int64_t stride = round_up(block_, kPanel<T>);
    const Scratch scratch;
    T* sums = take<T>(tiles * slices * block_ * stride);
    for_each_task(parallel, tiles * slices, [&](int64_t task) {
      const Range *rows = couples + 2 * (task % tiles), *columns = rows + 1;
      dot_products<T>(side.queries, *rows, side.keys, *columns,
                      block_range(dim, length, task / tiles),
                      {sums + task * block_ * stride, stride});
    });
    for_each_task(parallel, tiles, [&](int64_t task) {
      const Tile<T> tile = stored(couples[2 * task], couples[2 * task + 1]);
      for (int64_t i = 0; i < tile.rows; ++i) {
        T* row = tile.*values + i * tile.stride;
        for (int64_t j = 0; j < tile.columns; ++j) {
          T sum = 0;
          for (int64_t slice = 0; slice < slices; ++slice) {
            sum += sums[((slice * tiles + task) * block_ + i) * stride + j];
          }
          row[j] = sum;
        }
      }
    });
  }

  Tile<T> stored(Range rows, Range columns) const {
    const int64_t offset = rows.begin * stride_ + columns.begin;
    return {rows.begin,
            rows.size,
            columns.begin,
            columns.size,
            student_values_ + offset,
            teacher_values_ + offset,
            stride_};
  }

  template <typename Visit>
  void visit_computed(int64_t row, int64_t column, Visit& visit) {
    const Scratch scratch;
    const int64_t stride = round_up(block_, kPanel<T>);
    const Range rows = block_range(matrix_.queries, row_block_, row);
    const Range columns = block_range(matrix_.keys, block_, column);
    const Tile<T> tile{rows.begin,
                       rows.size,
                       columns.begin,
                       columns.size,
                       take<T>(row_block_ * stride),
                       take<T>(row_block_ * stride),
                       stride};
    fill_tile(settings_, rules, student, teacher, tile);
    visit(tile);
  }

  const Settings& settings_;
  const Matrix<T>& matrix_;
  const bool self_;
  const bool dense_;
  const bool long_;
  const int64_t block_;      // columns of a tile
  const int64_t row_block_;  // and rows, as many in a self-affinity
  const int64_t strip_;      // rows of a sweep over the matrix that is held
  int64_t stride_ = 0;
  T* student_values_ = nullptr;
  T* teacher_values_ = nullptr;
};

}  // namespace affkd::AFFKD_NAMESPACE
