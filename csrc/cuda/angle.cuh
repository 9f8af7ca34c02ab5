// RKD's angle loss and its derivative by the squared distances, over triples (i, j, k) of items:
// csrc/cpu/angle.h says what is computed. Here every thread has a pair (i, m) of its own and goes
// through all third items t, for two angles: the one at m between i and t, whose first edge the
// pair is, and the one at t between i and m, whose opposite edge it is. So no two threads ever add
// to the same number, at the price of every angle being computed twice by either end.
#pragma once

#include "../stages.h"
#include "angle_params.cuh"
#include "collectives.cuh"

namespace affkd::cuda {

// third items in shared memory
template <typename T>
constexpr int kAngleChunk = sizeof(T) == sizeof(float) ? 32 : 16;

// Half a squared distance in two parts, as multiples of 2^-24 up to 1/2 are added and subtracted in
// float without rounding, and the inverse distance.
template <typename T>
struct AngleEdge {
  T half;
  T rest;
  T inverse;

  AFFKD_DEVICE static AngleEdge load(const AngleView& view, int64_t at) {
    const double half = 0.5 * view.squared[at];
    const T inverse = static_cast<const T*>(view.inverse)[at];
    if constexpr (sizeof(T) == sizeof(double)) {
      return {half, T{0}, inverse};
    } else {
      constexpr double rounder = 0x1.8p28;  // adding it rounds to a multiple of 2^-24
      const double rounded = (half + rounder) - rounder;
      return {static_cast<T>(rounded), static_cast<T>(half - rounded), inverse};
    }
  }
};

// The cosine of the angle between two edges, and what their lengths divide by.
template <typename T>
struct Angle {
  T cosine;
  T reach;

  AFFKD_DEVICE Angle(const AngleEdge<T>& a, const AngleEdge<T>& b, const AngleEdge<T>& opposite)
      : reach(a.inverse * b.inverse) {
    const T sum = (a.half + b.half) - opposite.half, rest = (a.rest + b.rest) - opposite.rest;
    cosine = (sum + rest) * reach;
  }
};

template <typename T>
class AngleBlock {
 public:
  struct Shared {
    // rows of the pairs' first and second items
    AngleEdge<T> student[2 * kAngleEdge][kAngleChunk<T> + 1];
    AngleEdge<T> teacher[2 * kAngleEdge][kAngleChunk<T> + 1];
    double sums[kWarps];
  };

  AFFKD_DEVICE AngleBlock(const AngleParams& p, Shared& shared)
      : p_(p),
        shared_(shared),
        row_(static_cast<int>(threadIdx.x) / kAngleEdge),
        column_(static_cast<int>(threadIdx.x) % kAngleEdge),
        half_beta_(static_cast<T>(0.5 * p.beta)),
        sharpness_(static_cast<T>(1 / p.beta)),
        // so small a beta that its inverse overflows is none
        linear_(!(sharpness_ <= static_cast<T>(sizeof(T) == 4 ? 3.4e38 : 1.7e308))) {
    const int64_t edge = divide_up(p.items, kAngleEdge), unit = blockIdx.x;
    matrix_ = unit / (edge * edge);
    first_ = unit / edge % edge * kAngleEdge;
    second_ = unit % edge * kAngleEdge;
  }

  AFFKD_DEVICE void run() {
    const int64_t i = first_ + row_, m = second_ + column_;
    const bool inside = i < p_.items && m < p_.items;
    if (inside) {
      student_ = AngleEdge<T>::load(p_.student, at(i, m));
      teacher_ = AngleEdge<T>::load(p_.teacher, at(i, m));
    }
    double slope = 0;
    for (int64_t begin = 0; begin < p_.items; begin += kAngleChunk<T>) {
      __syncthreads();
      load(begin);
      __syncthreads();
      const int64_t left = p_.items - begin;
      const int count = left < kAngleChunk<T> ? static_cast<int>(left) : kAngleChunk<T>;
      slope += inside ? visit(begin, count) : 0;
    }
    if (inside && p_.slope != nullptr) {
      p_.slope[at(i, m)] = slope;
    }
    const double loss = block_sum(loss_, shared_.sums);
    if (threadIdx.x == 0) {
      p_.block_losses[blockIdx.x] = loss;
    }
  }

 private:
  AFFKD_DEVICE int64_t at(int64_t i, int64_t j) const {
    return (matrix_ * p_.items + i) * p_.items + j;
  }

  AFFKD_DEVICE void load(int64_t begin) {
    for (int e = static_cast<int>(threadIdx.x); e < 2 * kAngleEdge * kAngleChunk<T>;
         e += kThreads) {
      const int row = e / kAngleChunk<T>, column = e % kAngleChunk<T>;
      const int64_t i = (row < kAngleEdge ? first_ : second_ - kAngleEdge) + row;
      const int64_t t = begin + column;
      if (i < p_.items && t < p_.items) {
        shared_.student[row][column] = AngleEdge<T>::load(p_.student, at(i, t));
        shared_.teacher[row][column] = AngleEdge<T>::load(p_.teacher, at(i, t));
      }
    }
  }

  // The derivative of smooth L1, which itself is w error - beta w^2 / 2. NaN passes through.
  AFFKD_DEVICE T weight_of(T error) const {
    if (linear_) {
      return portable::sign(error);
    }
    const T one = 1, scaled = error * sharpness_;
    const T raised = -one > scaled ? -one : scaled;
    return one < raised ? one : raised;
  }

  // The loss of the angles at m, and the slope of all, for a chunk of third items.
  AFFKD_DEVICE double visit(int64_t begin, int count) {
    T slope = 0, loss = 0;
    const T square = student_.inverse * student_.inverse;
    for (int t = 0; t < count; ++t) {
      const AngleEdge<T> near = shared_.student[row_][t];
      const AngleEdge<T> far = shared_.student[kAngleEdge + column_][t];
      const AngleEdge<T> other_near = shared_.teacher[row_][t];
      const AngleEdge<T> other_far = shared_.teacher[kAngleEdge + column_][t];
      const Angle<T> at_m(student_, far, near), at_t(near, far, student_);
      const Angle<T> other_at_m(teacher_, other_far, other_near);
      const Angle<T> other_at_t(other_near, other_far, teacher_);
      // an angle between an edge and itself is a constant
      const bool same = begin + t == first_ + row_;
      const T error = same ? portable::sign(student_.inverse) - portable::sign(teacher_.inverse)
                           : at_m.cosine - other_at_m.cosine;
      const T weight = weight_of(error);
      loss += weight * (error - half_beta_ * weight);
      slope += same ? T{0} : weight * (at_m.reach - at_m.cosine * square);
      // by both of the pair's threads
      slope -= T{0.5} * weight_of(at_t.cosine - other_at_t.cosine) * at_t.reach;
    }
    loss_ += loss;
    return slope;
  }

  const AngleParams& p_;
  Shared& shared_;
  const int row_;
  const int column_;
  const T half_beta_;
  const T sharpness_;
  const bool linear_;
  int64_t matrix_;
  int64_t first_;
  int64_t second_;
  AngleEdge<T> student_{};
  AngleEdge<T> teacher_{};
  double loss_ = 0;
};

// One block adds up what the others have left.
AFFKD_DEVICE void finish_angle(const AngleParams& p, double* scratch) {
  double loss = 0;
  for (int64_t block = threadIdx.x; block < angle_blocks(p); block += kThreads) {
    loss += p.block_losses[block];
  }
  loss = block_sum(loss, scratch);
  if (threadIdx.x == 0) {
    *p.loss = loss;
  }
}

}  // namespace affkd::cuda
