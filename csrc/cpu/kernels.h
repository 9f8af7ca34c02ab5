// The body of a translation unit for one instruction set, which defines beforehand:
//   AFFKD_NAMESPACE, AFFKD_VECTOR_BYTES, AFFKD_GROUP_ROWS
#pragma once

#include "angle.h"
#include "pipeline.h"

namespace affkd::AFFKD_NAMESPACE {

template <typename T>
void run(const Settings& settings, Matrix<T>& matrix, Parallel parallel) {
  const Scratch scratch;
  Pipeline<T>(settings, matrix, parallel).run();
}

template <typename T, typename Function>
void map_vectors(int64_t n, const T* a, const T* b, T* y, Function function) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(n - i < kLanes<T> ? n - i : kLanes<T>);
    Vector<T> left = {}, right = {};
    __builtin_memcpy(&left, a + i, bytes);
    __builtin_memcpy(&right, b + i, bytes);
    const Vector<T> result = function(left, right);
    __builtin_memcpy(y + i, &result, bytes);
  }
}

template <typename T>
void map_exponential(int64_t n, const void* x, void* y) {
  const T* from = static_cast<const T*>(x);
  map_vectors<T>(n, from, from, static_cast<T*>(y),
                 [](Vector<T> left, Vector<T>) { return exponential(left); });
}

template <typename T>
void map_log_ratio(int64_t n, const void* a, const void* b, void* y) {
  map_vectors<T>(n, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(y),
                 [](Vector<T> left, Vector<T> right) { return log_ratio(left, right); });
}

inline void exponential_of(int64_t n, const void* x, void* y, bool is_double) {
  is_double ? map_exponential<double>(n, x, y) : map_exponential<float>(n, x, y);
}

inline void log_ratio_of(int64_t n, const void* a, const void* b, void* y, bool is_double) {
  is_double ? map_log_ratio<double>(n, a, b, y) : map_log_ratio<float>(n, a, b, y);
}

}  // namespace affkd::AFFKD_NAMESPACE
