// What one call asks of the CPU kernels. Plain data: it is shared by code that is compiled for
// different instruction sets, so nothing here may have a body the linker could merge.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../settings.h"

namespace affkd {

template <typename T>
struct Side {
  const T* queries;  // [Q, dim]
  const T* keys;     // [K, dim]; not for a self-affinity
  int64_t dim;
};

// One matrix of the batch. The indices list the valid items, which alone take part: a mask costs
// the kernels nothing but the gather.
template <typename T>
struct Matrix {
  Side<T> student;
  Side<T> teacher;
  bool self;                   // the keys are the queries
  int64_t queries;             // how many take part
  int64_t keys;                // the same as queries for a self-affinity
  const int64_t* query_index;  // [queries] into the tensors' rows; null where all take part
  const int64_t* key_index;    // [keys]
  const int64_t* diagonal;     // [queries] the key on the diagonal or -1; null: there is none
  const uint8_t* pair_mask;    // [Q, K] of the tensors; null where all pairs take part
  int64_t pair_stride;         // K of the tensors
  const int64_t* pairs;        // [queries] how many pairs of a row take part
  const T* row_weight;         // [Q] or null
  double loss_scale;           // multiplies every row: weight / count
  bool columns_too;            // the columns are normalized and compared as the rows are
  double column_loss_scale;    // the same of the columns
  T* row_losses;               // [Q] of the tensors, or null
  T* query_gradient;           // [Q, student.dim], or null; zero on entry
  T* key_gradient;             // [K, student.dim], or null; zero on entry
  bool scale_gradient_wanted;
  double loss;            // out: sum of the row losses
  double scale_gradient;  // out: d loss / d student_scale
};

template <typename T>
struct AngleSide {
  const double* squared;  // [L, L] distances, none above 1
  const T* inverse;       // [L, L] distances; 0 where two items coincide or one is masked
};

// One matrix of the angle loss.
template <typename T>
struct AngleMatrix {
  AngleSide<T> student;
  AngleSide<T> teacher;
  int64_t items;
  double beta;
  double* slope;  // out: [L, L] or null; slope_ij + slope_ji is d loss / d squared_ij
  double loss;    // out
};

// Calls body(begin, end, context) on disjoint ranges that cover [0, tasks).
using TaskBody = void (*)(int64_t begin, int64_t end, void* context);
using Parallel = void (*)(int64_t tasks, TaskBody body, void* context);

void run_serially(int64_t tasks, TaskBody body, void* context);

// The kernels of one instruction set.
struct Kernels {
  int64_t index;  // the better the higher
  const char* name;
  void (*run_float)(const Settings&, Matrix<float>&, Parallel);
  void (*run_double)(const Settings&, Matrix<double>&, Parallel);
  void (*angle_float)(AngleMatrix<float>&, Parallel);
  void (*angle_double)(AngleMatrix<double>&, Parallel);
  // test access to the polynomial functions: y = exp(x), y = log(a / b)
  void (*exponential)(int64_t n, const void* x, void* y, bool is_double);
  void (*log_ratio)(int64_t n, const void* a, const void* b, void* y, bool is_double);
};

// The best of what was built and this processor has, or what AFFKD_CPU_CAPABILITY names.
// `error` says why that is impossible.
const Kernels* select_kernels(const char* requested, const char** error);

}  // namespace affkd
