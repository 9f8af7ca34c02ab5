#include "batch.h"

namespace affkd {
namespace {

std::vector<int64_t> valid_items(const uint8_t* mask, int64_t count) {
  std::vector<int64_t> items;
  for (int64_t i = 0; i < count; ++i) {
    if (mask[i] != 0) {
      items.push_back(i);
    }
  }
  return items;
}

int64_t source_of(const std::vector<int64_t>& items, int64_t i) {
  return items.empty() ? i : items[static_cast<size_t>(i)];
}

// position[j] of key j among those that take part, or -1
std::vector<int64_t> positions_of(const Selection& selection, bool masked, int64_t keys) {
  std::vector<int64_t> position(static_cast<size_t>(keys), -1);
  for (int64_t j = 0; j < selection.key_count; ++j) {
    position[static_cast<size_t>(masked ? selection.keys[static_cast<size_t>(j)] : j)] = j;
  }
  return position;
}

void find_diagonal(Selection& selection, const Shape& shape, bool masked_keys, int64_t offset) {
  const std::vector<int64_t> position = positions_of(selection, masked_keys, shape.keys);
  selection.diagonal.reserve(static_cast<size_t>(selection.query_count));
  for (int64_t i = 0; i < selection.query_count; ++i) {
    const int64_t key = source_of(selection.queries, i) + offset;
    const bool exists = key >= 0 && key < shape.keys;
    selection.diagonal.push_back(exists ? position[static_cast<size_t>(key)] : -1);
  }
}

void count_pairs(Selection& selection, const Shape& shape, const uint8_t* pair_mask,
                 bool excluded) {
  selection.pairs.reserve(static_cast<size_t>(selection.query_count));
  for (int64_t i = 0; i < selection.query_count; ++i) {
    const int64_t diagonal =
        excluded && !selection.diagonal.empty() ? selection.diagonal[static_cast<size_t>(i)] : -1;
    int64_t pairs = selection.key_count - (diagonal >= 0 ? 1 : 0);
    if (pair_mask != nullptr) {
      const uint8_t* row = pair_mask + source_of(selection.queries, i) * shape.keys;
      pairs = 0;
      for (int64_t j = 0; j < selection.key_count; ++j) {
        pairs += j != diagonal && row[source_of(selection.keys, j)] != 0 ? 1 : 0;
      }
    }
    selection.pairs.push_back(pairs);
  }
}

double divisor_of(Reduction reduction, int64_t pairs, int64_t lines, size_t matrices) {
  int64_t count = 1;
  if (reduction == Reduction::mean) {
    count = pairs;
  } else if (reduction == Reduction::batchmean) {
    count = lines;
  } else if (reduction == Reduction::matrixmean) {
    count = static_cast<int64_t>(matrices);
  }
  return count > 0 ? static_cast<double>(count) : 1.0;
}

}  // namespace

std::vector<Selection> select_items(const Shape& shape, const Masks& masks,
                                    const DiagonalRule& diagonal) {
  const uint8_t* key_masks = shape.self ? masks.queries : masks.keys;
  std::vector<Selection> selections(static_cast<size_t>(shape.matrices));
  for (int64_t n = 0; n < shape.matrices; ++n) {
    Selection& selection = selections[static_cast<size_t>(n)];
    selection.query_count = shape.queries;
    selection.key_count = shape.keys;
    if (masks.queries != nullptr) {
      selection.queries = valid_items(masks.queries + n * shape.queries, shape.queries);
      selection.query_count = static_cast<int64_t>(selection.queries.size());
    }
    if (key_masks != nullptr) {
      selection.keys = valid_items(key_masks + n * shape.keys, shape.keys);
      selection.key_count = static_cast<int64_t>(selection.keys.size());
    }
    if (diagonal.present) {
      find_diagonal(selection, shape, key_masks != nullptr, diagonal.offset);
    }
    const uint8_t* pair_mask =
        masks.pairs == nullptr ? nullptr : masks.pairs + n * shape.queries * shape.keys;
    count_pairs(selection, shape, pair_mask, diagonal.excluded);
  }
  return selections;
}

double divisor_of(Reduction reduction, const std::vector<Selection>& selections) {
  int64_t pairs = 0, rows = 0;
  for (const Selection& selection : selections) {
    for (int64_t of_row : selection.pairs) {
      pairs += of_row;
      rows += of_row > 0 ? 1 : 0;
    }
  }
  return divisor_of(reduction, pairs, rows, selections.size());
}

double column_divisor_of(Reduction reduction, const std::vector<Selection>& selections) {
  int64_t pairs = 0, columns = 0;
  for (const Selection& selection : selections) {
    pairs += selection.query_count * selection.key_count;
    columns += selection.query_count > 0 ? selection.key_count : 0;
  }
  return divisor_of(reduction, pairs, columns, selections.size());
}

}  // namespace affkd
