// Reading the arguments of a call: features, masks and weights of any strides and dtypes.
#pragma once

#include "choices.cuh"
#include "port.cuh"

namespace affkd::cuda {

template <typename T>
AFFKD_DEVICE T bfloat16_to(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, sizeof(x));
  return static_cast<T>(x);
}

template <typename T>
AFFKD_DEVICE T read_number(const void* data, Storage storage, int64_t at) {
  switch (storage) {
    case Storage::float32:
      return static_cast<T>(static_cast<const float*>(data)[at]);
    case Storage::float64:
      return static_cast<T>(static_cast<const double*>(data)[at]);
    case Storage::bfloat16:
      return bfloat16_to<T>(static_cast<const uint16_t*>(data)[at]);
    case Storage::float16:
      return static_cast<T>(half_bits_to_float(static_cast<const uint16_t*>(data)[at]));
  }
  return T{0};
}

AFFKD_DEVICE bool is_valid(const MaskView& mask, int64_t n, int64_t i) {
  return mask.data == nullptr || mask.data[n * mask.matrix + i * mask.item] != 0;
}

AFFKD_DEVICE bool is_own(const Params& p, int64_t i, int64_t j) {
  return p.has_diagonal && j == i + p.diagonal_offset;
}

// of two valid items
AFFKD_DEVICE bool pair_takes_part(const Params& p, int64_t n, int64_t i, int64_t j) {
  if (p.settings.diagonal == Diagonal::exclude && is_own(p, i, j)) {
    return false;
  }
  const PairMaskView& mask = p.pair_mask;
  return mask.data == nullptr || mask.data[n * mask.matrix + i * mask.query + j * mask.key] != 0;
}

AFFKD_DEVICE bool takes_part(const Params& p, int64_t n, int64_t i, int64_t j) {
  return is_valid(p.mask, n, i) && is_valid(p.key_mask, n, j) && pair_takes_part(p, n, i, j);
}

AFFKD_DEVICE double row_weight(const Params& p, int64_t n, int64_t i) {
  const WeightView& weight = p.row_weight;
  return weight.data == nullptr ? 1.0
                                : read_number<double>(weight.data, weight.storage,
                                                      n * weight.matrix + i * weight.item);
}

template <typename T>
AFFKD_DEVICE T scale_of(const Params& p, bool student) {
  const ScalarView& scale = student ? p.student_scale : p.teacher_scale;
  if (scale.data != nullptr) {
    return read_number<T>(scale.data, scale.storage, 0);
  }
  return static_cast<T>(student ? p.settings.student_scale : p.settings.teacher_scale);
}

// weight / count, of rows or of columns
AFFKD_DEVICE double loss_scale(const Params& p, bool columns) {
  return p.counts ? p.work.loss_scale[columns ? 1 : 0] : columns ? p.column_scale : p.loss_scale;
}

// where a pair of the panel lies
AFFKD_DEVICE int64_t pair_index(const Params& p, int64_t n, int64_t i, int64_t j) {
  const Panel& panel = p.task.panel;
  return ((n - panel.matrix_begin) * panel.rows + (i - panel.row_begin)) * p.keys + j;
}

// where the mirror image of a pair lies
AFFKD_DEVICE int64_t transposed_index(const Params& p, int64_t n, int64_t i, int64_t j) {
  const Panel& panel = p.task.panel;
  return ((panel.matrices + n - panel.matrix_begin) * p.keys + j) * p.queries + i;
}

}  // namespace affkd::cuda
