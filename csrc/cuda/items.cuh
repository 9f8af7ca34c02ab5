// Loading runs of features: of any dtype and strides, zeros where an item takes no part.
#pragma once

#include "views.cuh"

namespace affkd::cuda {

constexpr int kRun = 8;  // features that a thread loads at a time
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // numbers of one access of 16 bytes

template <typename T>
struct alignas(16) Vector16 {
  T values[kVector<T>];
};

template <typename T>
AFFKD_DEVICE Vector16<T> load_vector(const T* from) {
  return *reinterpret_cast<const Vector16<T>*>(from);
}

template <typename T>
AFFKD_DEVICE void store_vector(T* to, const Vector16<T>& vector) {
  *reinterpret_cast<Vector16<T>*>(to) = vector;
}

// kRun numbers in aligned shared memory
template <typename T>
AFFKD_DEVICE void store_run(T* to, const T (&run)[kRun]) {
#pragma unroll
  for (int k = 0; k < kRun; k += kVector<T>) {
    Vector16<T> vector;
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) {
      vector.values[v] = run[k + v];
    }
    store_vector(to + k, vector);
  }
}

AFFKD_DEVICE bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

AFFKD_DEVICE int64_t storage_size(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

// as numbers of T
template <typename T>
AFFKD_DEVICE T convert(float x, Storage) {
  return static_cast<T>(x);
}
template <typename T>
AFFKD_DEVICE T convert(double x, Storage) {
  return static_cast<T>(x);
}
template <typename T>
AFFKD_DEVICE T convert(uint16_t bits, Storage storage) {
  return storage == Storage::bfloat16 ? bfloat16_to<T>(bits)
                                      : static_cast<T>(half_bits_to_float(bits));
}

// `left` numbers from `from` on and zeros after them
template <typename T, typename Stored>
AFFKD_DEVICE void gather_run(const void* data, int64_t at, int64_t stride, int64_t left,
                             Storage storage, T (&run)[kRun]) {
  const Stored* from = static_cast<const Stored*>(data) + at;
  if (stride == 1 && left >= kRun && is_aligned(from)) {
#pragma unroll
    for (int k = 0; k < kRun; k += kVector<Stored>) {
      const Vector16<Stored> vector = load_vector(from + k);
#pragma unroll
      for (int v = 0; v < kVector<Stored>; ++v) {
        run[k + v] = convert<T>(vector.values[v], storage);
      }
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    run[k] = k < left ? convert<T>(from[k * stride], storage) : T{0};
  }
}

// The mean of `count` numbers. Of more than two the smallest and the largest do not count, as one
// may be far off, and would move what all others have in common.
template <typename T>
AFFKD_DEVICE T inner_mean(T sum, T low, T high, int count) {
  if (count > 2) {
    sum -= low + high;
    count -= 2;
  }
  return count > 0 ? sum / static_cast<T>(count) : T{0};
}

// One item of one matrix; `present`: it exists and is valid.
struct Item {
  const FeatureView& view;
  int64_t begin;
  bool present;

  AFFKD_DEVICE Item(const FeatureView& features, const MaskView& mask, int64_t n, int64_t i,
                    int64_t count)
      : view(features),
        begin(n * features.matrix + i * features.item),
        present(i < count && is_valid(mask, n, i)) {}

  template <typename T>
  AFFKD_DEVICE void load(int64_t feature, T (&run)[kRun]) const {
    const int64_t left = present ? view.dim - feature : 0;
    const int64_t at = begin + feature * view.feature;
    switch (left > 0 ? view.storage : Storage::float32) {
      case Storage::float32:
        return gather_run<T, float>(view.data, at, view.feature, left, view.storage, run);
      case Storage::float64:
        return gather_run<T, double>(view.data, at, view.feature, left, view.storage, run);
      default:
        return gather_run<T, uint16_t>(view.data, at, view.feature, left, view.storage, run);
    }
  }

  // Whether its numbers may be copied as they are, 16 bytes at a time.
  template <typename T>
  AFFKD_DEVICE bool is_plain() const {
    const bool same = view.storage == (sizeof(T) == 8 ? Storage::float64 : Storage::float32);
    return same && view.feature == 1 && view.dim % kVector<T> == 0 &&
           is_aligned(static_cast<const T*>(view.data) + begin);
  }

  // Starts to copy a run; only of a plain item.
  template <typename T>
  AFFKD_DEVICE void copy(int64_t feature, T* shared) const {
#pragma unroll
    for (int k = 0; k < kRun; k += kVector<T>) {
      const bool zeros = !present || feature + k >= view.dim;
      // aligned also where nothing is read
      const T* from = static_cast<const T*>(view.data) + begin + (zeros ? 0 : feature + k);
      copy_async(shared + k, from, zeros);
    }
  }
};

}  // namespace affkd::cuda
