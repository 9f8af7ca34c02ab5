// Which tile of which matrix a block of phase gram computes.
#pragma once

#include "states.cuh"

namespace affkd::cuda {

// One tile of the panel of one matrix.
struct TileTask {
  bool student;
  int64_t matrix;
  int64_t slot;  // which tile of the matrix
  int64_t row;   // of the first pair
  int64_t column;
};

// Tiles of the upper triangle column by column: (0, 0), (0, 1), (1, 1), (0, 2), ...
AFFKD_DEVICE void find_triangular(int64_t slot, int64_t& row, int64_t& column) {
  column = static_cast<int64_t>(square_root(2.0f * static_cast<float>(slot)));
  while (column * (column + 1) / 2 > slot) {
    --column;
  }
  while ((column + 1) * (column + 2) / 2 <= slot) {
    ++column;
  }
  row = slot - column * (column + 1) / 2;
}

AFFKD_DEVICE TileTask find_tile(const Params& p) {
  const Panel& panel = p.task.panel;
  const int64_t rows = divide_up(panel.rows, kTile), columns = divide_up(p.keys, kTile);
  const int64_t tiles = is_mirrored(p) ? rows * (rows + 1) / 2 : rows * columns;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) / 2;
  TileTask task{blockIdx.x % 2 == 0, panel.matrix_begin + unit / tiles, unit % tiles, 0, 0};
  if (is_mirrored(p)) {
    find_triangular(task.slot, task.row, task.column);
  } else {
    task.row = task.slot / columns;
    task.column = task.slot % columns;
  }
  task.row = panel.row_begin + task.row * kTile;
  task.column *= kTile;
  return task;
}

}  // namespace affkd::cuda
