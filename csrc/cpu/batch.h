// The masks of a batch of matrices: which items are valid, where the diagonal is, how many pairs
// take part, and what a reduction divides by.
#pragma once

#include <cstddef>
#include <vector>

#include "call.h"

namespace affkd {

struct Shape {
  int64_t matrices;
  int64_t queries;
  int64_t keys;
  bool self;
};

struct Masks {
  const uint8_t* queries;  // [N, Q] or null
  const uint8_t* keys;     // [N, K] or null; unused for a self-affinity
  const uint8_t* pairs;    // [N, Q, K] or null
};

struct DiagonalRule {
  bool present;
  int64_t offset;
  bool excluded;
};

// The items of one matrix that take part.
struct Selection {
  std::vector<int64_t> queries;  // empty where all take part
  std::vector<int64_t> keys;
  std::vector<int64_t> diagonal;  // empty where there is none
  std::vector<int64_t> pairs;
  int64_t query_count;
  int64_t key_count;
};

std::vector<Selection> select_items(const Shape& shape, const Masks& masks,
                                    const DiagonalRule& diagonal);

// What the sum of all row losses is divided by; 1 where that would be 0.
double divisor_of(Reduction reduction, const std::vector<Selection>& selections);
// The same for the losses of the columns, where nothing masks single pairs.
double column_divisor_of(Reduction reduction, const std::vector<Selection>& selections);

}  // namespace affkd
