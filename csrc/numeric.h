// Elementary functions on a scalar or a short vector: exp, log of a quotient, sqrt, sign. Branch
// free, so that they vectorize; within 2 ulp; NaN passes through.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define AFFKD_INLINE __host__ __device__ __forceinline__
#define AFFKD_UNROLL _Pragma("unroll")
#else
#define AFFKD_INLINE inline __attribute__((always_inline))
#define AFFKD_UNROLL _Pragma("GCC unroll 16")
#endif

// Every instruction set compiles this header into a namespace of its own: were an instance shared,
// the linker would keep one of them, and an old processor could meet an instruction it lacks.
#ifndef AFFKD_NAMESPACE
#define AFFKD_NAMESPACE portable
#endif

namespace affkd::AFFKD_NAMESPACE {

// Number<V>: the scalar of V, the integer type of the same layout, and conversions.
template <typename V>
struct Number;

template <>
struct Number<float> {
  using scalar = float;
  using integer = int32_t;
  AFFKD_INLINE static float from_integer(int32_t x) { return static_cast<float>(x); }
};

template <>
struct Number<double> {
  using scalar = double;
  using integer = int64_t;
  AFFKD_INLINE static double from_integer(int64_t x) { return static_cast<double>(x); }
};

// x in every lane; x - 0, unlike x + 0, is x for every x, so the subtraction compiles to nothing
template <typename V>
AFFKD_INLINE V splat(double x) {
  return static_cast<typename Number<V>::scalar>(x) - V{};
}

template <typename To, typename From>
AFFKD_INLINE To reinterpret_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// The layout of an IEEE number and what the polynomials need to know of it.
template <typename T>
struct Ieee;

template <>
struct Ieee<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t bias = 127;
  static constexpr int32_t root_half_bits = 0x3f3504f3;  // sqrt(1/2)
  static constexpr float rounder = 12582912.0f;          // 1.5 * 2^23: adding it rounds to integer
  static constexpr float ln2_high = 0.693145751953125f;  // few enough bits for exact multiples
  static constexpr float ln2_low = 1.42860682030941723212e-6f;
  static constexpr float largest = 0x1.fffffep127f;
  static constexpr float exp_low = -87.33654f;  // just above the logarithm of the smallest normal
  static constexpr float exp_high = 89.0f;      // above the logarithm of the largest number
  static constexpr int exp_terms = 7;
  static constexpr int log_terms = 5;
};

template <>
struct Ieee<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t bias = 1023;
  static constexpr int64_t root_half_bits = 0x3fe6a09e667f3bcd;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 0x1.62e42fefa0000p-1;
  static constexpr double ln2_low = 0x1.cf79abc9e3b39p-40;
  static constexpr double largest = 0x1.fffffffffffffp1023;
  static constexpr double exp_low = -708.396;
  static constexpr double exp_high = 710.0;
  static constexpr int exp_terms = 13;
  static constexpr int log_terms = 11;
};

// of a scalar; of vectors in cpu/vector.h
AFFKD_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return ::sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

AFFKD_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return ::sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

// a b as a number of its own, for `product_rest`: nvcc would fuse it with an addition it goes into,
// but not with all of them alike.
template <typename V>
AFFKD_INLINE V rounded_product(V a, V b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == sizeof(float)) {
    return ::__fmul_rn(a, b);
  } else {
    return ::__dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

// a b - product, exactly, for the rounded product: 0 where the hardware cannot tell. Of vectors in
// cpu/vector.h.
AFFKD_INLINE float product_rest(float a, float b, float product) {
#if defined(__CUDA_ARCH__)
  return ::fmaf(a, b, -product);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, -product);
#else
  (void)a, (void)b, (void)product;
  return 0;
#endif
}

AFFKD_INLINE double product_rest(double a, double b, double product) {
#if defined(__CUDA_ARCH__)
  return ::fma(a, b, -product);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, -product);
#else
  (void)a, (void)b, (void)product;
  return 0;
#endif
}

template <typename V>
AFFKD_INLINE V absolute(V x) {
  return x < splat<V>(0) ? -x : x;
}

// -1, 0 or 1; NaN stays NaN
template <typename V>
AFFKD_INLINE V sign(V x) {
  const V one = splat<V>(1);
  return x > splat<V>(0) ? one : (x < splat<V>(0) ? -one : x);
}

// 2^n for integers n within the normal range
template <typename V>
AFFKD_INLINE V power_of_two(typename Number<V>::integer n) {
  using Format = Ieee<typename Number<V>::scalar>;
  return reinterpret_bits<V>((n + Format::bias) << Format::mantissa_bits);
}

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2, where the Taylor series converges fast. What would be
// subnormal is 0: most of a sharp softmax is, and each sum with one costs some processors a hundred
// cycles.
template <typename V>
AFFKD_INLINE V exponential(V x) {
  using Format = Ieee<typename Number<V>::scalar>;
  using Integer = typename Number<V>::integer;
  const V low = splat<V>(Format::exp_low), high = splat<V>(Format::exp_high);
  const V given = x;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V rounder = splat<V>(Format::rounder);
  const V shifted = x * splat<V>(1.44269504088896340736) + rounder;
  const Integer n = reinterpret_bits<Integer>(shifted) - reinterpret_bits<Integer>(rounder);
  const V multiple = shifted - rounder;
  const V r = (x - multiple * splat<V>(Format::ln2_high)) - multiple * splat<V>(Format::ln2_low);
  V series = splat<V>(1);
  AFFKD_UNROLL
  for (int k = Format::exp_terms; k > 0; --k) {
    series = splat<V>(1) + series * r * splat<V>(1.0 / k);
  }
  // in two steps, as 2^n itself may lie outside the range where the result does not
  const Integer half = n >> 1;
  const V result = series * power_of_two<V>(half) * power_of_two<V>(n - half);
  return given < low ? splat<V>(0) : result;
}

// log(a / b) of positive a and b (NaN otherwise) whose quotient is a normal number. It is
// k log 2 + 2 atanh(z), z = (a - c) / (a + c), c = 2^k b, with k such that sqrt(1/2) <= a / c <
// sqrt(2). No quotient is rounded on the way: for a close to b, k = 0 and a - b is exact.
template <typename V>
AFFKD_INLINE V log_ratio(V a, V b) {
  using Format = Ieee<typename Number<V>::scalar>;
  using Integer = typename Number<V>::integer;
  const V ratio = a / b;
  const Integer bits = reinterpret_bits<Integer>(ratio);
  const Integer k = (bits - Format::root_half_bits) >> Format::mantissa_bits;
  const V scaled = b * power_of_two<V>(k);
  const V z = (a - scaled) / (a + scaled);
  const V square = z * z;
  V series = splat<V>(1.0 / (2 * Format::log_terms + 1));
  AFFKD_UNROLL
  for (int term = Format::log_terms - 1; term > 0; --term) {
    series = splat<V>(1.0 / (2 * term + 1)) + series * square;
  }
  const V atanh2 = (z + z) + (z + z) * (square * series);
  const V exponent = Number<V>::from_integer(k);
  const V low = exponent * splat<V>(Format::ln2_low) + atanh2;
  const V result = exponent * splat<V>(Format::ln2_high) + low;
  // ratio - ratio is NaN for an infinite ratio
  return ratio > splat<V>(0) ? result + (ratio - ratio) : splat<V>(__builtin_nan(""));
}

}  // namespace affkd::AFFKD_NAMESPACE
