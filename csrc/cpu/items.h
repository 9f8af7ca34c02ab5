// Prepared items and their products. `dense` holds the items, packed for the micro-kernel; `tiled`
// keeps what it takes to prepare any part of them, and does so tile by tile: for a tile of n rows
// that is one operation in n.
#pragma once

#include "matmul.h"
#include "parallel.h"

namespace affkd::AFFKD_NAMESPACE {

template <typename T>
inline const T* item(const T* source, const int64_t* index, int64_t i, int64_t dim) {
  return source + (index == nullptr ? i : index[i]) * dim;
}

// The prepared items of one tensor.
template <typename T>
struct Items {
  const T* source;       // the tensor
  const T* rows;         // [count, dim] prepared; null where they are not held
  const T* mean;         // [dim, padded to panels] what is subtracted, or null
  const int64_t* index;  // [count] into the tensor's rows, or null
  int64_t count;
  int64_t dim;
  // What is rounded here is rounded alike in every pair of an item, and no sum over pairs averages
  // it out: so what a number lost to rounding is kept beside it.
  T* squared_norms;    // [padded(count)], of distances and of a self-affinity
  T* norm_rests;       // [padded(count)], of distances
  T* inverse_lengths;  // [count], unit features only; 0 for a zero item
  T* inverse_rests;    // [count]
  T* packed;           // panels, keys only; null where they are not held
  T poison;            // NaN where an item is inf or NaN, else 0

  // x_i . x_i, to the last bit or so
  T own_product(int64_t i) const {
    if (squared_norms != nullptr) {
      return squared_norms[i];
    }
    return inverse_lengths[i] == 0 ? T{0} : T{1};
  }

  // where item i lies, prepared or, if those are not held, in the tensor
  const T* stored(int64_t i) const {
    return rows != nullptr ? rows + i * dim : item(source, index, i, dim);
  }

  // Calls use(change), where change(i, j, x) prepares the stored x of item first + i and feature
  // `feature` + j; x may be a vector along the features.
  template <typename Use>
  AFFKD_INLINE void with_change(int64_t first, int64_t feature, Use use) const {
    if (rows == nullptr && inverse_lengths != nullptr && dim == 1) {
      use(Signed{inverse_lengths + first});
    } else if (rows == nullptr && inverse_lengths != nullptr) {
      use(Scaled{inverse_lengths + first, inverse_rests + first});
    } else if (rows == nullptr && mean != nullptr) {
      use(Centered{mean + feature});
    } else {
      use(Unchanged{});
    }
  }

  void prepare(int64_t i, Range dims, T* to) const {
    const T* from = stored(i) + dims.begin;
    with_change(i, dims.begin, [=](auto change) {
      for (int64_t d = 0; d < dims.size; ++d) {
        to[d] = change(0, d, from[d]);
      }
    });
  }

  // features `dims` of prepared item i, in `buffer` where they are not held
  const T* values(int64_t i, Range dims, T* buffer) const {
    if (rows != nullptr) {
      return rows + i * dim + dims.begin;
    }
    prepare(i, dims, buffer);
    return buffer;
  }

  const T* values(int64_t i, T* buffer) const { return values(i, {0, dim}, buffer); }

  // the same of several items; `buffer` has room for all
  Factor<T> values(Range items, Range dims, T* buffer) const {
    if (rows != nullptr) {
      return {rows + items.begin * dim + dims.begin, dim, 1};
    }
    for (int64_t i = 0; i < items.size; ++i) {
      prepare(items.begin + i, dims, buffer + i * dims.size);
    }
    return {buffer, dims.size, 1};
  }

 private:
  // by 1 / |x|, or by 0 where x counts as nothing
  struct Scaled {
    const T* scales;
    const T* rests;
    template <typename X>
    AFFKD_INLINE X operator()(int64_t i, int64_t, X x) const {
      return x * scales[i] + x * rests[i];
    }
  };

  // The same of a single feature, of which only the sign is left: 1 / |x| rounds, and opposite
  // items would be at a cosine of almost -1, which a shifted cosine tells from -1.
  struct Signed {
    const T* scales;
    template <typename X>
    AFFKD_INLINE X operator()(int64_t i, int64_t, X x) const {
      return sign(x * scales[i]);
    }
  };

  struct Centered {
    const T* mean;
    AFFKD_INLINE T operator()(int64_t, int64_t j, T x) const { return x - mean[j]; }
    AFFKD_INLINE Vector<T> operator()(int64_t, int64_t j, Vector<T> x) const {
      return x - load(mean + j);
    }
  };
};

template <typename T>
inline T* pack_items(const Items<T>& items, Parallel parallel) {
  const int64_t dim = items.dim;
  T* packed = take<T>(round_up(items.count, kPanel<T>) * dim);
  const Parallel threads = parallel_for_elements(parallel, items.count * dim);
  for_each_task(threads, count_blocks(items.count, kPanel<T>), [=](int64_t task) {
    const Range range = block_range(items.count, kPanel<T>, task);
    pack_panel(items.rows + range.begin * dim, dim, range.size, dim, packed + range.begin * dim);
  });
  return packed;
}

// Features `dims` of at most kPanel items as one panel.
template <typename T>
inline void pack_items(const Items<T>& items, Range range, Range dims, T* panel) {
  if (items.index != nullptr) {
    alignas(64) T gathered[kPanel<T> * kDepth];
    const Factor<T> values = items.values(range, dims, gathered);
    return pack_panel(values.data, values.row, range.size, dims.size, panel);
  }
  const T* from = items.stored(range.begin) + dims.begin;
  items.with_change(range.begin, dims.begin, [&](auto change) {
    pack_panel(from, items.dim, range.size, dims.size, panel, change);
  });
}

// out[i, j] = q_i . k_j over the features `dims` of items that are not held; whole panels are
// written. A slice of the queries at a time is prepared, and of the keys one panel, which is
// multiplied while the cache has it.
template <typename T>
inline void dot_products(const Items<T>& queries, Range rows, const Items<T>& keys, Range columns,
                         Range dims, Output<T> out) {
  if (dims.size == 0) {
    clear_product(rows.size, columns.size, out);
  }
  const Scratch scratch;
  T* query_slice = take<T>(rows.size * kDepth);
  T* panel = take<T>(kPanel<T> * kDepth);
  for (int64_t k = 0; k < dims.size; k += kDepth) {
    const Range slice{dims.begin + k, dims.size - k < kDepth ? dims.size - k : kDepth};
    const Factor<T> left = queries.values(rows, slice, query_slice);
    for (int64_t j = 0; j < columns.size; j += kPanel<T>) {
      const int64_t width = columns.size - j < kPanel<T> ? columns.size - j : kPanel<T>;
      pack_items(keys, {columns.begin + j, width}, slice, panel);
      multiply_panel<T>(rows.size, slice.size, left, panel, {out.data + j, out.stride}, kPanel<T>,
                        k > 0);
    }
  }
}

// Features `dims` of several items to rows of kPanel; what is beyond the features has no meaning.
template <typename T>
inline void copy_slice(const Items<T>& items, Range range, Range dims, T* slice) {
  constexpr int64_t lanes = kLanes<T>;
  items.with_change(range.begin, dims.begin, [&](auto change) {
    for (int64_t i = 0; i < range.size; ++i) {
      const T* from = items.stored(range.begin + i) + dims.begin;
      T* to = slice + i * kPanel<T>;
      T part[kPanel<T>] = {};
      if (dims.size < kPanel<T>) {
        for (int64_t d = 0; d < dims.size; ++d) {
          part[d] = from[d];
        }
        from = part;
      }
      store(to, change(i, 0, load(from)));
      store(to + lanes, change(i, lanes, load(from + lanes)));
    }
  });
}

// out [rows, dims] += a [rows, range.size] times the features `dims` of the prepared items of
// `range`; the rows of `out` have all features
template <typename T>
inline void add_product(int64_t rows, Factor<T> a, const Items<T>& items, Range range, Range dims,
                        T* out) {
  add_product<T>(
      rows, range.size, dims.size, a,
      [&](int64_t k, int64_t steps, int64_t j, int64_t width, T* slice) {
        copy_slice(items, {range.begin + k, steps}, {dims.begin + j, width}, slice);
      },
      {out + dims.begin, items.dim});
}

}  // namespace affkd::AFFKD_NAMESPACE
