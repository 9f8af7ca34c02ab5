// What the operators on CUDA tensors share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../error_check.h"

// a test registers the same operators for CPU tensors
#ifndef AFFKD_OPERATOR_KEY
#define AFFKD_OPERATOR_KEY CUDA
#endif

namespace affkd::cuda {

// Uninitialized, contiguous, on the device of `like`. By way of the C shim: a trip through the
// dispatcher would cost a tenth of a small call.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like,
                                   const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * (sizes[axis] > 0 ? sizes[axis] : 1);
  }
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               dtype, device_type, like.get_device_index(), &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace affkd::cuda
