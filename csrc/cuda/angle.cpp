// The operator of the angle loss on CUDA tensors. Its schema is in
// affkd_kernels/kernels/extension.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "device.h"
#include "launch.h"
#include "tensors.h"

namespace affkd::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

AngleView view_of(const Tensor& squared, const Tensor& inverse) {
  return {static_cast<const double*>(squared.const_data_ptr()), inverse.const_data_ptr()};
}

std::tuple<Tensor, Tensor> angle(Tensor student_squared, Tensor student_inverse,
                                 Tensor teacher_squared, Tensor teacher_inverse, double beta,
                                 bool need_slope) {
  const CurrentStream stream(student_squared.get_device_index());
  const int64_t matrices = student_squared.size(0), items = student_squared.size(1);
  const int32_t float64 = aoti_torch_dtype_float64();
  const Tensor sum = empty(student_squared, {}, float64);
  const Tensor slope = need_slope ? empty(student_squared, {matrices, items, items}, float64)
                                  : empty(student_squared, {0}, float64);
  AngleParams params{view_of(student_squared, student_inverse),
                     view_of(teacher_squared, teacher_inverse), matrices, items, beta};
  params.wide = student_inverse.scalar_type() == ScalarType::Double;
  params.slope = need_slope ? static_cast<double*>(slope.mutable_data_ptr()) : nullptr;
  params.loss = static_cast<double*>(sum.mutable_data_ptr());
  const Tensor workspace = empty(student_squared, {angle_blocks(params)}, float64);
  params.block_losses = static_cast<double*>(workspace.mutable_data_ptr());
  check_launch(launch_angle(params, stream.handle()));
  return {sum, slope};
}

}  // namespace
}  // namespace affkd::cuda

STABLE_TORCH_LIBRARY_IMPL(affkd_kernels, AFFKD_OPERATOR_KEY, m) {
  m.impl("cuda_angle", TORCH_BOX(&affkd::cuda::angle));
}
