// Products of tiles in shared memory, on the floating-point units or on tensor cores. A block's
// threads form groups that take a part of the inner dimension each; their sums are added at the
// end.
#pragma once

#include "items.cuh"

namespace affkd::cuda {

constexpr int kDepth = 32;  // inner dimension of a chunk
constexpr int kEdge = static_cast<int>(kTile);
constexpr int kWidth = static_cast<int>(kSlice);

// distances between rows that keep 16-byte accesses aligned and threads on different banks
template <typename T>
constexpr int kChunkPitch = kDepth + kVector<T>;
template <typename T>
constexpr int kSlicePitch = kWidth + 2 * kVector<T>;

// A number of float as one or two numbers that tensor cores multiply exactly.
template <bool kSplit>
struct Tf32 {
  uint32_t high;
  uint32_t low;

  AFFKD_DEVICE explicit Tf32(float x) : high(to_tf32(x)), low(0) {
    if constexpr (kSplit) {
      float rounded;
      memcpy(&rounded, &high, sizeof(rounded));
      low = to_tf32(x - rounded);
    }
  }
};

// d += a b with the fragments of multiply_add_tf32. Small products come first.
template <bool kSplit, typename A, typename B>
AFFKD_DEVICE void multiply_fragments(float (&d)[4], A a, B b) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const Tf32<kSplit> number(a(q));
    a_high[q] = number.high;
    a_low[q] = number.low;
  }
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const Tf32<kSplit> number(b(q));
    b_high[q] = number.high;
    b_low[q] = number.low;
  }
  if constexpr (kSplit) {
    multiply_add_tf32(d, a_low, b_high);
    multiply_add_tf32(d, a_high, b_low);
  }
  multiply_add_tf32(d, a_high, b_high);
}

// What tensor cores add to large sums they cut off rather than round: every chunk has sums of its
// own, which are added here.
AFFKD_DEVICE void add_sums(float (&totals)[2][4], const float (&sums)[2][4]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    totals[e / 4][e % 4] += sums[e / 4][e % 4];
  }
}

// sum_k q_ik k_jk of kEdge queries and kEdge keys, both rows of kChunkPitch numbers.
template <typename T, Precision P>
class RowProduct {
 public:
  static constexpr int kGroups = P == Precision::ieee ? 4 : 2;

  AFFKD_DEVICE void add(const T* queries, const T* keys) {
    if constexpr (P == Precision::ieee) {
      add_plain(queries, keys);
    } else {
      add_on_tensor_cores(queries, keys);
    }
  }

  // partial [kGroups, kEdge, kEdge + 1]
  AFFKD_DEVICE void store(T* partial) const {
    if constexpr (P == Precision::ieee) {
      const int group = static_cast<int>(threadIdx.x) / 64, row = row_of_thread();
      const int column = static_cast<int>(threadIdx.x) % 8;
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        partial[(group * kEdge + row + e / 4 * 8) * (kEdge + 1) + column + e % 4 * 8] = sums_[e];
      }
    } else {
      const int group = warp_index() / 4, row = warp_index() % 2 * 16 + lane_index() / 4;
      const int column = warp_index() / 2 % 2 * 16 + lane_index() % 4 * 2;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        partial[(group * kEdge + row + e % 4 / 2 * 8) * (kEdge + 1) + column + e / 4 * 8 + e % 2] =
            tensor_sums_[e / 4][e % 4];
      }
    }
  }

 private:
  AFFKD_DEVICE static int row_of_thread() { return static_cast<int>(threadIdx.x) % 64 / 8; }

  // 4 x 4 pairs a thread
  AFFKD_DEVICE void add_plain(const T* queries, const T* keys) {
    constexpr int part = kDepth / kGroups;
    const int from = static_cast<int>(threadIdx.x) / 64 * part;
    const T* a = queries + row_of_thread() * kChunkPitch<T> + from;
    const T* b = keys + static_cast<int>(threadIdx.x) % 8 * kChunkPitch<T> + from;
#pragma unroll
    for (int k = 0; k < part; k += kVector<T>) {
      Vector16<T> left[4], right[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = load_vector(a + 8 * i * kChunkPitch<T> + k);
        right[i] = load_vector(b + 8 * i * kChunkPitch<T> + k);
      }
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          sums_[e] += left[e / 4].values[v] * right[e % 4].values[v];
        }
      }
    }
  }

  // 16 x 16 pairs a warp
  AFFKD_DEVICE void add_on_tensor_cores(const T* queries, const T* keys) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const int from = warp_index() / 4 * (kDepth / kGroups);
    const T* a = queries + (warp_index() % 2 * 16 + g) * kChunkPitch<T> + from + t;
    const T* b = keys + (warp_index() / 2 % 2 * 16 + g) * kChunkPitch<T> + from + t;
    float sums[2][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth / kGroups; k += 8) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply_fragments<P == Precision::tf32x3>(
            sums[n], [&](int q) { return a[q % 2 * 8 * kChunkPitch<T> + k + q / 2 * 4]; },
            [&](int q) { return b[n * 8 * kChunkPitch<T> + k + q * 4]; });
      }
    }
    add_sums(tensor_sums_, sums);
  }

  T sums_[P == Precision::ieee ? 16 : 1] = {};
  float tensor_sums_[2][4] = {};
};

// sum_j v_ij x_jd of kEdge rows of kChunkPitch numbers v and kWidth features of kDepth items x.
template <typename T, Precision P>
class SliceProduct {
 public:
  static constexpr int kGroups = P == Precision::ieee ? 2 : 1;

  AFFKD_DEVICE void add(const T* v, const T* x) {
    if constexpr (P == Precision::ieee) {
      add_plain(v, x);
    } else {
      add_on_tensor_cores(v, x);
    }
  }

  // partial [kGroups, kEdge, kWidth + 1]
  AFFKD_DEVICE void store(T* partial) const {
    if constexpr (P == Precision::ieee) {
      const int group = static_cast<int>(threadIdx.x) / 128, row = row_of_thread();
      const int column = static_cast<int>(threadIdx.x) % 16 * 4;
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        partial[(group * kEdge + row + e / 4 * 8) * (kWidth + 1) + column + e % 4] = sums_[e];
      }
    } else {
      const int row = warp_index() % 2 * 16 + lane_index() / 4;
      const int column = warp_index() / 2 * 16 + lane_index() % 4 * 2;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        partial[(row + e % 4 / 2 * 8) * (kWidth + 1) + column + e / 4 * 8 + e % 2] =
            tensor_sums_[e / 4][e % 4];
      }
    }
  }

 private:
  AFFKD_DEVICE static int row_of_thread() { return static_cast<int>(threadIdx.x) % 128 / 16; }

  // 4 rows x 4 features a thread
  AFFKD_DEVICE void add_plain(const T* v, const T* x) {
    constexpr int part = kDepth / kGroups;
    const int from = static_cast<int>(threadIdx.x) / 128 * part;
    const T* a = v + row_of_thread() * kChunkPitch<T> + from;
    const T* b = x + from * kSlicePitch<T> + static_cast<int>(threadIdx.x) % 16 * 4;
#pragma unroll
    for (int k = 0; k < part; k += kVector<T>) {
      Vector16<T> left[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        left[i] = load_vector(a + 8 * i * kChunkPitch<T> + k);
      }
#pragma unroll
      for (int step = 0; step < kVector<T>; ++step) {
        T right[4];
#pragma unroll
        for (int d = 0; d < 4; d += kVector<T>) {
          const Vector16<T> vector = load_vector(b + (k + step) * kSlicePitch<T> + d);
#pragma unroll
          for (int e = 0; e < kVector<T>; ++e) {
            right[d + e] = vector.values[e];
          }
        }
#pragma unroll
        for (int e = 0; e < 16; ++e) {
          sums_[e] += left[e / 4].values[step] * right[e % 4];
        }
      }
    }
  }

  // 16 rows x 16 features a warp
  AFFKD_DEVICE void add_on_tensor_cores(const T* v, const T* x) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const T* a = v + (warp_index() % 2 * 16 + g) * kChunkPitch<T> + t;
    const T* b = x + t * kSlicePitch<T> + warp_index() / 2 * 16 + g;
    float sums[2][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply_fragments<P == Precision::tf32x3>(
            sums[n], [&](int q) { return a[q % 2 * 8 * kChunkPitch<T> + k + q / 2 * 4]; },
            [&](int q) { return b[(k + q * 4) * kSlicePitch<T> + n * 8]; });
      }
    }
    add_sums(tensor_sums_, sums);
  }

  T sums_[P == Precision::ieee ? 16 : 1] = {};
  float tensor_sums_[2][4] = {};
};

// The sum over the groups of entry (row, column), in the order in which a warp folds.
template <int kGroups, int kPitch, typename T>
AFFKD_DEVICE T sum_of_groups(const T* partial, int row, int column) {
  T sums[kGroups];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    sums[group] = partial[(group * kEdge + row) * kPitch + column];
  }
#pragma unroll
  for (int distance = 1; distance < kGroups; distance *= 2) {
#pragma unroll
    for (int group = 0; group + distance < kGroups; group += 2 * distance) {
      sums[group] += sums[group + distance];
    }
  }
  return sums[0];
}

}  // namespace affkd::cuda
