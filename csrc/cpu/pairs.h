// All pairs of one matrix, held (`dense`) or computed tile by tile (`tiled`), and the sweeps over
// them.
//
// `tiled` takes the tiles in rounds such that no two tiles of a round share a block of rows or of
// columns: threads need no locks, and every sum has one order, whatever the number of threads. Of a
// self-affinity only the tiles on and above the diagonal are computed.
#pragma once

#include "blocks.h"
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
        blocks_(blocks_of(matrix, dense_)) {
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

  // Whether the products are shared out by features, and not by rows.
  bool goes_by_features() const { return blocks_.by_features; }

  // the matrix that is held
  Tile<T> whole() const { return stored({0, matrix_.queries}, {0, matrix_.keys}); }

  // visit(tile) for tiles that cover every pair once, in row order within a block of rows
  template <typename Visit>
  void sweep(Parallel threads, Visit visit) {
    if (dense_) {
      for_each_task(threads, count_blocks(matrix_.queries, blocks_.strip), [&](int64_t task) {
        const Range rows = block_range(matrix_.queries, blocks_.strip, task);
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
    const int64_t stride = round_up(blocks_.columns, kPanel<T>);
    const int64_t size = blocks_.columns * stride;
    visit(transposed_tile(tile, take<T>(size), take<T>(size), stride));
  }

  bool is_mirrored(const Tile<T>& tile) const { return self_ && tile.row != tile.column; }

  // visit(tile) for every tile; of a self-affinity, for one of each mirrored couple
  template <typename Visit>
  void sweep_tiles(Parallel threads, Visit visit) {
    const int64_t row_blocks = count_blocks(matrix_.queries, blocks_.rows);
    const int64_t column_blocks = count_blocks(matrix_.keys, blocks_.columns);
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
    for_each_task(parallel, count_blocks(matrix_.keys, blocks_.columns), [&](int64_t task) {
      visit(stored({0, matrix_.queries}, block_range(matrix_.keys, blocks_.columns, task)));
    });
  }

 private:
  static constexpr int64_t kLongSlices = 8;

  PreparedSide<T> prepare_side(const Side<T>& side, double scale) {
    const Preparation how = preparation_of(settings_, self_);
    const bool packs = dense_ && blocks_.packs();
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
                                     side.dim, query_mean, dense_ && !blocks_.long_items, parallel);
    prepared.keys = self_ ? prepared.queries
                          : prepare_items(how, side.keys, matrix_.key_index, matrix_.keys, side.dim,
                                          key_mean, packs, parallel);
    prepared.keys.packed = packs ? pack_items(prepared.keys, parallel) : nullptr;
    poison += prepared.queries.poison + prepared.keys.poison;
    return prepared;
  }

  void build_matrix() {
    stride_ = round_up(matrix_.keys, kPanel<T>);
    // rows a multiple of a page apart would fall into the same few lines of the cache
    stride_ += stride_ * sizeof(T) % 4096 == 0 ? kPanel<T> : 0;
    student_values_ = take<T>(matrix_.queries * stride_);
    teacher_values_ = take<T>(matrix_.queries * stride_);
    const int64_t blocks = count_blocks(matrix_.queries, blocks_.rows);
    if (!self_) {
      // few rows may face many columns: only both together are work for all threads
      const int64_t column_blocks = count_blocks(matrix_.keys, blocks_.columns);
      for_each_task(parallel, blocks * column_blocks, [&](int64_t task) {
        const Range rows = block_range(matrix_.queries, blocks_.rows, task % blocks);
        const Range columns = block_range(matrix_.keys, blocks_.columns, task / blocks);
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
        couples[2 * tiles] = block_range(matrix_.queries, blocks_.columns, row);
        couples[2 * tiles + 1] = block_range(matrix_.queries, blocks_.columns, column);
        ++tiles;
      }
    }
    if (blocks_.long_items) {
      add_up_products(student, couples, tiles, &Tile<T>::student);
      add_up_products(teacher, couples, tiles, &Tile<T>::teacher);
    }
    for_each_task(parallel, tiles, [&](int64_t task) {
      const Range rows = couples[2 * task], columns = couples[2 * task + 1];
      const Tile<T> tile = stored(rows, columns);
      if (blocks_.long_items) {
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
    const int64_t stride = round_up(blocks_.columns, kPanel<T>);
    const Scratch scratch;
    T* sums = take<T>(tiles * slices * blocks_.columns * stride);
    for_each_task(parallel, tiles * slices, [&](int64_t task) {
      const Range *rows = couples + 2 * (task % tiles), *columns = rows + 1;
      dot_products<T>(side.queries, *rows, side.keys, *columns,
                      block_range(dim, length, task / tiles),
                      {sums + task * blocks_.columns * stride, stride});
    });
    for_each_task(parallel, tiles, [&](int64_t task) {
      const Tile<T> tile = stored(couples[2 * task], couples[2 * task + 1]);
      for (int64_t i = 0; i < tile.rows; ++i) {
        T* row = tile.*values + i * tile.stride;
        for (int64_t j = 0; j < tile.columns; ++j) {
          T sum = 0;
          for (int64_t slice = 0; slice < slices; ++slice) {
            sum += sums[((slice * tiles + task) * blocks_.columns + i) * stride + j];
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
    const int64_t stride = round_up(blocks_.columns, kPanel<T>);
    const Range rows = block_range(matrix_.queries, blocks_.rows, row);
    const Range columns = block_range(matrix_.keys, blocks_.columns, column);
    const Tile<T> tile{rows.begin,
                       rows.size,
                       columns.begin,
                       columns.size,
                       take<T>(blocks_.rows * stride),
                       take<T>(blocks_.rows * stride),
                       stride};
    fill_tile(settings_, rules, student, teacher, tile);
    visit(tile);
  }

  const Settings& settings_;
  const Matrix<T>& matrix_;
  const bool self_;
  const bool dense_;
  const Blocks blocks_;
  int64_t stride_ = 0;
  T* student_values_ = nullptr;
  T* teacher_values_ = nullptr;
};

}  // namespace affkd::AFFKD_NAMESPACE
