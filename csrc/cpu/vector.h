// Short vectors in the compiler's own vector extension (GCC, Clang): operators work lane by lane,
// comparisons give integer masks, ?: selects by lane. No intrinsics, hence no per-processor code.
#pragma once

#include "../numeric.h"

// AFFKD_VECTOR_BYTES (16, 32 or 64) is set by the translation unit.

namespace affkd::AFFKD_NAMESPACE {

typedef float FloatVector __attribute__((vector_size(AFFKD_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(AFFKD_VECTOR_BYTES)));
typedef int32_t Int32Vector __attribute__((vector_size(AFFKD_VECTOR_BYTES)));
typedef int64_t Int64Vector __attribute__((vector_size(AFFKD_VECTOR_BYTES)));

template <>
struct Number<FloatVector> {
  using scalar = float;
  using integer = Int32Vector;
  AFFKD_INLINE static FloatVector from_integer(Int32Vector x) {
    return __builtin_convertvector(x, FloatVector);
  }
};

template <>
struct Number<DoubleVector> {
  using scalar = double;
  using integer = Int64Vector;
  AFFKD_INLINE static DoubleVector from_integer(Int64Vector x) {
    return __builtin_convertvector(x, DoubleVector);
  }
};

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};

template <typename T>
using Vector = typename VectorOf<T>::type;
// one integer a lane: all bits set where the lane takes part
template <typename T>
using Mask = typename Number<Vector<T>>::integer;
template <typename T>
using MaskLane = typename Number<T>::integer;

template <typename T>
constexpr int64_t kLanes = AFFKD_VECTOR_BYTES / sizeof(T);

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// a length padded so that every vector load and store stays inside
template <typename T>
constexpr int64_t padded(int64_t n) {
  return round_up(n, 64 / static_cast<int64_t>(sizeof(T)));
}

template <typename T>
AFFKD_INLINE Vector<T> load(const T* from) {
  Vector<T> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
AFFKD_INLINE Mask<T> load_mask(const MaskLane<T>* from) {
  Mask<T> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
AFFKD_INLINE void store(T* to, Vector<T> x) {
  __builtin_memcpy(to, &x, sizeof(x));
}

// kLanes<double> numbers as doubles, for sums that must not lose digits
AFFKD_INLINE DoubleVector widen(const double* from) {
  return load(from);
}

AFFKD_INLINE DoubleVector widen(const float* from) {
  typedef float Half __attribute__((vector_size(AFFKD_VECTOR_BYTES / 2)));
  Half half;
  __builtin_memcpy(&half, from, sizeof(half));
  return __builtin_convertvector(half, DoubleVector);
}

AFFKD_INLINE DoubleVector wide_product(DoubleVector a, DoubleVector b) {
  return a * b;
}

// the products of both halves, added
AFFKD_INLINE DoubleVector wide_product(FloatVector a, FloatVector b) {
  constexpr int64_t half = kLanes<double>;
  float left[2 * half], right[2 * half];
  __builtin_memcpy(left, &a, sizeof(a));
  __builtin_memcpy(right, &b, sizeof(b));
  return widen(left) * widen(right) + widen(left + half) * widen(right + half);
}

AFFKD_INLINE FloatVector square_root(FloatVector x) {
  FloatVector root;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    root[lane] = __builtin_sqrtf(x[lane]);
  }
  return root;
}

AFFKD_INLINE DoubleVector square_root(DoubleVector x) {
  DoubleVector root;
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) {
    root[lane] = __builtin_sqrt(x[lane]);
  }
  return root;
}

template <typename V>
AFFKD_INLINE V product_rest_of_lanes(V a, V b, V product) {
  V rest;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(a[0]); ++lane) {
    rest[lane] = product_rest(a[lane], b[lane], product[lane]);
  }
  return rest;
}

AFFKD_INLINE FloatVector product_rest(FloatVector a, FloatVector b, FloatVector product) {
  return product_rest_of_lanes(a, b, product);
}

AFFKD_INLINE DoubleVector product_rest(DoubleVector a, DoubleVector b, DoubleVector product) {
  return product_rest_of_lanes(a, b, product);
}

// the sum of all lanes, always in the same order
template <typename T>
AFFKD_INLINE T sum_lanes(Vector<T> x) {
  T lanes[kLanes<T>];
  __builtin_memcpy(lanes, &x, sizeof(x));
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

template <typename T>
AFFKD_INLINE T max_lanes(Vector<T> x) {
  T largest = x[0];
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) {
    largest = largest < x[lane] ? x[lane] : largest;
  }
  return largest;
}

// lane l of the result is lane from[l] of a and b put side by side
template <typename V>
AFFKD_INLINE V shuffle(V a, V b, typename Number<V>::integer from) {
#if defined(__clang__)
  constexpr int64_t lanes = sizeof(V) / sizeof(typename Number<V>::scalar);
  V result;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    result[lane] = from[lane] < lanes ? a[from[lane]] : b[from[lane] - lanes];
  }
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes the square of kLanes vectors, by exchanging ever larger blocks off the diagonal.
template <typename T>
AFFKD_INLINE void transpose_square(Vector<T> (&rows)[kLanes<T>]) {
  constexpr int64_t lanes = kLanes<T>;
#pragma GCC unroll 4
  for (int64_t step = 1; step < lanes; step *= 2) {
    Mask<T> upper, lower;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      upper[lane] = static_cast<MaskLane<T>>((lane & step) == 0 ? lane : lanes + lane - step);
      lower[lane] = static_cast<MaskLane<T>>((lane & step) == 0 ? lane + step : lanes + lane);
    }
#pragma GCC unroll 16
    for (int64_t row = 0; row < lanes; ++row) {
      if ((row & step) == 0) {
        const Vector<T> a = rows[row], b = rows[row + step];
        rows[row] = shuffle(a, b, upper);
        rows[row + step] = shuffle(a, b, lower);
      }
    }
  }
}

// sum_d a_d b_d in double precision
template <typename T, typename U>
inline double dot(const T* a, const U* b, int64_t n) {
  constexpr int64_t lanes = kLanes<double>;
  DoubleVector even = {}, odd = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= n; d += 2 * lanes) {
    even += widen(a + d) * widen(b + d);
    odd += widen(a + d + lanes) * widen(b + d + lanes);
  }
  double sum = sum_lanes<double>(even + odd);
  for (; d < n; ++d) {
    sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  }
  return sum;
}

// sum_d x_d^2. Lane by lane the sums are short, and what they round is spread over many lanes.
template <typename T>
inline double square_sum(const T* x, int64_t n) {
  constexpr int64_t lanes = kLanes<T>, width = 4 * lanes, run = 16 * width;
  double total = 0;
  int64_t d = 0;
  while (d + width <= n) {
    const int64_t end = d + run < n ? d + run : n;
    Vector<T> sums[4] = {};
    for (; d + width <= end; d += width) {
      for (int64_t r = 0; r < 4; ++r) {
        const Vector<T> part = load(x + d + r * lanes);
        sums[r] += part * part;
      }
    }
    total += sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  for (; d < n; ++d) {
    total += static_cast<double>(x[d]) * static_cast<double>(x[d]);
  }
  return total;
}

// Which lanes of a step take part: known at compile time to be all of them, or given by a mask.
struct AllLanes {};

template <typename V>
AFFKD_INLINE V keep(AllLanes, V x) {
  return x;
}
template <typename V>
AFFKD_INLINE V keep(typename Number<V>::integer mask, V x) {
  return mask ? x : V{};
}
template <typename V>
AFFKD_INLINE V keep_or(AllLanes, V x, V) {
  return x;
}
template <typename V>
AFFKD_INLINE V keep_or(typename Number<V>::integer mask, V x, V other) {
  return mask ? x : other;
}

template <typename T>
AFFKD_INLINE Mask<T> first_lanes(int64_t count) {
  Mask<T> mask;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    mask[lane] = lane < count ? -1 : 0;
  }
  return mask;
}

// step(j, lanes) over [0, n) in whole vectors. `mask`, where given, is padded with zeros.
template <typename T, typename Step>
AFFKD_INLINE void for_lanes(int64_t n, const MaskLane<T>* mask, Step step) {
  if (mask != nullptr) {
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      step(j, load_mask<T>(mask + j));
    }
    return;
  }
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) {
    step(j, AllLanes{});
  }
  if (j < n) {
    step(j, first_lanes<T>(n - j));
  }
}

// part(first, count, mask) over [0, n) in runs so short that a sum over one may be of precision T
template <typename T, typename Part>
AFFKD_INLINE void for_runs(int64_t n, const MaskLane<T>* mask, Part part) {
  constexpr int64_t run = 32 * kLanes<T>;
  for (int64_t first = 0; first < n; first += run) {
    part(first, n - first < run ? n - first : run, mask == nullptr ? nullptr : mask + first);
  }
}

}  // namespace affkd::AFFKD_NAMESPACE
