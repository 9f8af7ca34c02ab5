// What the kernels of the angle loss are given. Plain C++, as params.cuh.
#pragma once

#include "params.cuh"

namespace affkd::cuda {

constexpr int kAngleEdge = 16;  // pairs along either side of a block

struct AngleView {
  const double* squared;  // [N, L, L] distances, none above 1
  const void* inverse;    // T [N, L, L] distances; 0 where two items coincide or one is masked
};

struct AngleParams {
  AngleView student;
  AngleView teacher;
  int64_t matrices;
  int64_t items;
  double beta;
  bool wide;             // in double, not float
  double* slope;         // [N, L, L] or null: slope_ij + slope_ji is d loss / d squared_ij
  double* block_losses;  // [blocks] workspace
  double* loss;          // []
};

AFFKD_BOTH constexpr int64_t angle_blocks(const AngleParams& p) {
  const int64_t edge = divide_up(p.items, kAngleEdge);
  return p.matrices * edge * edge;
}

}  // namespace affkd::cuda
