// Matrix products from one micro-kernel: a group of rows times a panel of columns, all sums held
// in registers. The order of every sum depends on the shapes alone, never on the threads.
#pragma once

#include "vector.h"

// AFFKD_GROUP_ROWS (rows of the micro-kernel) is set by the translation unit, as many as the
// vector registers allow beside one panel row and a broadcast.

namespace affkd::AFFKD_NAMESPACE {

template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// Steps of a sum taken at a time, so that the slice of the panel stays in the first-level cache.
constexpr int64_t kDepth = 256;

// Steps summed in registers before they join the rest of the sum. The rounding of a sum taken in
// order grows with its length; of sums of short sums it hardly does.
constexpr int64_t kRun = 64;

// The left factor, by strides: a transposed matrix is one with its strides exchanged.
template <typename T>
struct Factor {
  const T* data;
  int64_t row;
  int64_t step;
};

template <typename T>
struct Output {
  T* data;
  int64_t stride;
};

template <typename T>
inline void write_panel_row(T* out, Vector<T> low, Vector<T> high, int64_t columns, bool add) {
  if (columns == kPanel<T>) {
    store(out, add ? load(out) + low : low);
    store(out + kLanes<T>, add ? load(out + kLanes<T>) + high : high);
    return;
  }
  T sums[kPanel<T>];
  store(sums, low);
  store(sums + kLanes<T>, high);
  for (int64_t j = 0; j < columns; ++j) {
    out[j] = add ? out[j] + sums[j] : sums[j];
  }
}

// out[r, :columns] (+)= sum_k a[r, k] * panel[k, :] for `rows` rows, the sums in registers
template <typename T, int rows>
inline void multiply_run(int64_t depth, Factor<T> a, const T* panel, Output<T> out, int64_t columns,
                         bool add) {
  Vector<T> low[rows] = {};
  Vector<T> high[rows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> left = load(panel + k * kPanel<T>);
    const Vector<T> right = load(panel + k * kPanel<T> + kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const T x = a.data[r * a.row + k * a.step];
      low[r] += x * left;
      high[r] += x * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    write_panel_row(out.data + r * out.stride, low[r], high[r], columns, add);
  }
}

template <typename T, int rows>
inline void multiply_group(int64_t depth, Factor<T> a, const T* panel, Output<T> out,
                           int64_t columns, bool add) {
  for (int64_t k = 0; k < depth; k += kRun) {
    const int64_t steps = depth - k < kRun ? depth - k : kRun;
    multiply_run<T, rows>(steps, {a.data + k * a.step, a.row, a.step}, panel + k * kPanel<T>, out,
                          columns, add || k > 0);
  }
}

template <typename T, int rows = AFFKD_GROUP_ROWS>
inline void multiply_rest(int64_t count, int64_t depth, Factor<T> a, const T* panel, Output<T> out,
                          int64_t columns, bool add) {
  if (count == rows) {
    multiply_group<T, rows>(depth, a, panel, out, columns, add);
  } else if constexpr (rows > 1) {
    multiply_rest<T, rows - 1>(count, depth, a, panel, out, columns, add);
  }
}

template <typename T>
inline void multiply_panel(int64_t rows, int64_t depth, Factor<T> a, const T* panel, Output<T> out,
                           int64_t columns, bool add) {
  constexpr int group = AFFKD_GROUP_ROWS;
  int64_t r = 0;
  for (; r + group <= rows; r += group) {
    const Factor<T> rows_of_a{a.data + r * a.row, a.row, a.step};
    multiply_group<T, group>(depth, rows_of_a, panel, {out.data + r * out.stride, out.stride},
                             columns, add);
  }
  if (r < rows) {
    const Factor<T> rows_of_a{a.data + r * a.row, a.row, a.step};
    multiply_rest<T>(rows - r, depth, rows_of_a, panel, {out.data + r * out.stride, out.stride},
                     columns, add);
  }
}

// The change that is none: change(i, j, x) of x = from[i, j], or of a vector along the row.
struct Unchanged {
  template <typename X>
  AFFKD_INLINE X operator()(int64_t, int64_t, X x) const {
    return x;
  }
};

// to [columns, rows] = change(from)' for from [rows, columns]
template <typename T, typename Change = Unchanged>
inline void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_stride, T* to,
                      int64_t to_stride, Change change = {}) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < rows; i += lanes) {
    for (int64_t j = 0; j < columns; j += lanes) {
      const T* source = from + i * from_stride + j;
      T* target = to + j * to_stride + i;
      if (i + lanes <= rows && j + lanes <= columns) {
        Vector<T> square[lanes];
        for (int64_t r = 0; r < lanes; ++r) {
          square[r] = change(i + r, j, load(source + r * from_stride));
        }
        transpose_square<T>(square);
        for (int64_t c = 0; c < lanes; ++c) {
          store(target + c * to_stride, square[c]);
        }
        continue;
      }
      for (int64_t c = 0; c < lanes && j + c < columns; ++c) {
        for (int64_t r = 0; r < lanes && i + r < rows; ++r) {
          target[c * to_stride + r] = change(i + r, j + c, source[r * from_stride + c]);
        }
      }
    }
  }
}

// Rows [count, depth] as one panel [depth][kPanel], columns beyond them zero.
template <typename T, typename Change = Unchanged>
inline void pack_panel(const T* x, int64_t stride, int64_t count, int64_t depth, T* packed,
                       Change change = {}) {
  if (count < kPanel<T>) {
    __builtin_memset(packed, 0, sizeof(T) * static_cast<std::size_t>(depth * kPanel<T>));
  }
  transpose(count, depth, x, stride, packed, kPanel<T>, change);
}

// whole panels of a product without terms
template <typename T>
inline void clear_product(int64_t rows, int64_t columns, Output<T> out) {
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_memset(out.data + i * out.stride, 0, sizeof(T) * round_up(columns, kPanel<T>));
  }
}

// out[i, j] = a_i . x_j for the packed x; whole panels are written
template <typename T>
inline void dot_products(int64_t rows, int64_t columns, int64_t depth, const T* a, const T* packed,
                         Output<T> out) {
  if (depth == 0) {
    clear_product(rows, columns, out);
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t steps = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t j = 0; j < columns; j += kPanel<T>) {
      const T* panel = packed + j * depth + k * kPanel<T>;
      multiply_panel<T>(rows, steps, {a + k, depth, 1}, panel, {out.data + j, out.stride},
                        kPanel<T>, k > 0);
    }
  }
}

// out [rows, columns] += a [rows, depth] x [depth, columns]. Slices of x are copied together: rows
// that lie a power of two apart would throw each other out of the cache. `copy(k, steps, j, width,
// slice)` writes x[k : k + steps, j : j + width] to rows of kPanel.
template <typename T, typename Copy>
inline void add_product(int64_t rows, int64_t depth, int64_t columns, Factor<T> a, Copy copy,
                        Output<T> out) {
  alignas(64) T slice[kDepth * kPanel<T>];
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t steps = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t j = 0; j < columns; j += kPanel<T>) {
      const int64_t width = columns - j < kPanel<T> ? columns - j : kPanel<T>;
      copy(k, steps, j, width, static_cast<T*>(slice));
      multiply_panel<T>(rows, steps, {a.data + k * a.step, a.row, a.step}, slice,
                        {out.data + j, out.stride}, width, true);
    }
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
