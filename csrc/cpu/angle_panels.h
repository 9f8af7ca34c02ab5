// The operands of the angle loss, laid out for its sweep (angle.h).
#pragma once

#include "parallel.h"
#include "vector.h"

namespace affkd::AFFKD_NAMESPACE {

// vertices whose distances to two blocks of items a cache holds
constexpr int64_t kVertexPanel = 64;

// A difference of squares wants more digits than float has; see `pack_edge`.
template <typename T>
constexpr bool kSplit = sizeof(T) == sizeof(float);
template <typename T>
constexpr int64_t kSideSize = (kSplit<T> ? 3 : 2) * kVertexPanel;

// From one item to a vector of vertices.
template <typename T>
struct Edges {
  Vector<T> half;     // of the squared distance
  Vector<T> inverse;  // of the distance
  Vector<T> rest;     // what `half` leaves of half the squared distance
};

template <typename T>
AFFKD_INLINE Edges<T> load_edges(const T* side) {
  Edges<T> edges{load(side), load(side + kVertexPanel), {}};
  if constexpr (kSplit<T>) {
    edges.rest = load(side + 2 * kVertexPanel);
  }
  return edges;
}

// One edge in all lanes, without its inverse.
template <typename T>
AFFKD_INLINE Edges<T> splat_edge(const T* side) {
  const Vector<T> zero = {};
  Edges<T> edge{side[0] - zero, zero, zero};
  if constexpr (kSplit<T>) {
    edge.rest = side[2 * kVertexPanel] - zero;
  }
  return edge;
}

// Multiples of 2^-24 up to 1/2 are added and subtracted in float without rounding. What they leave
// of a number is at most 2^-25, so its own rounding is at most 2^-50.
template <typename T>
AFFKD_INLINE void pack_edge(double half, T inverse, T* to) {
  if constexpr (kSplit<T>) {
    constexpr double rounder = 0x1.8p28;  // adding it rounds to a multiple of 2^-24
    const double rounded = (half + rounder) - rounder;
    to[0] = static_cast<T>(rounded);
    to[2 * kVertexPanel] = static_cast<T>(half - rounded);
  } else {
    to[0] = half;
  }
  to[kVertexPanel] = inverse;
}

// The edges of all items, in panels of vertices: a panel holds the items one after the other, and
// of each item the student's side and the teacher's. Zeros fill the last panel and the last pair of
// items up; an inverse of 0 keeps them out of everything.
template <typename T>
class AnglePanels {
 public:
  explicit AnglePanels(int64_t items)
      : items_(items),
        rows_(round_up(items, 2)),
        panels_(count_blocks(items, kVertexPanel)),
        data_(take<T>(panels_ * rows_ * kRowSize)) {}

  int64_t count() const { return panels_; }
  const T* row(int64_t panel, int64_t i) const { return data_ + (panel * rows_ + i) * kRowSize; }
  // the student's edge (i, k); the teacher's comes kSideSize later
  const T* edge(int64_t i, int64_t k) const { return row(k / kVertexPanel, i) + k % kVertexPanel; }

  // Returns how many items coincide with item i on one side only.
  double pack_row(const AngleMatrix<T>& matrix, int64_t i) {
    double differing = 0;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      T* to = data_ + (panel * rows_ + i) * kRowSize;
      __builtin_memset(to, 0, sizeof(T) * kRowSize);
      if (i < items_) {
        pack_side(matrix.student, i, panel, to);
        pack_side(matrix.teacher, i, panel, to + kSideSize<T>);
      }
      const T* inverse = to + kVertexPanel;
      for (int64_t lane = 0; lane < kVertexPanel; ++lane) {
        const T difference = sign(inverse[lane]) - sign(inverse[kSideSize<T> + lane]);
        differing += difference * difference;
      }
    }
    return differing;
  }

 private:
  static constexpr int64_t kRowSize = 2 * kSideSize<T>;

  void pack_side(const AngleSide<T>& side, int64_t i, int64_t panel, T* to) {
    const Range vertices = block_range(items_, kVertexPanel, panel);
    const double* squared = side.squared + i * items_ + vertices.begin;
    const T* inverse = side.inverse + i * items_ + vertices.begin;
    for (int64_t lane = 0; lane < vertices.size; ++lane) {
      pack_edge(0.5 * squared[lane], inverse[lane], to + lane);
    }
  }

  int64_t items_;
  int64_t rows_;
  int64_t panels_;
  T* data_;
};

}  // namespace affkd::AFFKD_NAMESPACE
