// Which tile of which matrix a block of phase gram computes.
#pragma once

#include "states.cuh"

namespace affkd::cuda {

// One tile of one side of a matrix. A block takes one, or where there are more tiles than slots for
// parts of the statistic, every so manieth.
struct TileTask {
  bool student;
  int64_t matrix;
  int64_t slot;
  bool first;  // of the block's tiles
  bool last;
  int64_t row;  // of the first pair
  int64_t column;
};

// Tiles of the upper triangle column by column: (0, 0), (0, 1), (1, 1), (0, 2), ...
AFFKD_DEVICE void find_triangular(int64_t tile, int64_t& row, int64_t& column) {
  column = static_cast<int64_t>(square_root(2.0f * static_cast<float>(tile)));
  while (column * (column + 1) / 2 > tile) {
    --column;
  }
  while ((column + 1) * (column + 2) / 2 <= tile) {
    ++column;
  }
  row = tile - column * (column + 1) / 2;
}

AFFKD_DEVICE TileTask find_tile(const Params& p, int64_t round) {
  const Panel& panel = p.task.panel;
  const int64_t blocks = gram_blocks(p, panel), unit = static_cast<int64_t>(blockIdx.x) / 2;
  const int64_t slot = unit % blocks, tile = slot + round * blocks;
  const int64_t columns = divide_up(p.keys, kTile);
  int64_t row = tile / columns, column = tile % columns;
  if (is_mirrored(p)) {
    find_triangular(tile, row, column);
  }
  TileTask task{blockIdx.x % 2 == 0, panel.matrix_begin + unit / blocks, slot};
  task.first = round == 0;
  task.last = tile + blocks >= gram_tiles(p, panel);
  task.row = panel.row_begin + row * kTile;
  task.column = column * kTile;
  return task;
}

// The joint state of a tile becomes part of its block's, by one thread.
AFFKD_DEVICE void add_to_slot(const Params& p, const TileTask& task, const State& state) {
  State& slot = states_of(p, task.student, task.matrix)[task.slot];
  slot = task.first ? state : join_states(p.settings.normalization, slot, state);
}

}  // namespace affkd::cuda
