// The operators on CUDA tensors, on the LibTorch stable ABI. Schemas are defined in
// affkd_kernels/kernels/extension.py, checks are done in Python. This file packs tensors into what
// the kernels read (params.cuh); launches are in launch.cu. Nothing here waits for the GPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../options.h"
#include "device.h"
#include "launch.h"
#include "schedule.cuh"
#include "tensors.h"

namespace affkd::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What the CUDA kernels are asked for beyond `Options`.
constexpr size_t kWorkspace = kChoices;
constexpr size_t kColumns = kChoices + 1;
constexpr size_t kPrecision = kChoices + 2;

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    default:
      STD_TORCH_CHECK(false, "features must be float16, bfloat16, float32 or float64");
  }
}

// [N, items, dim], or [items, dim] of a single matrix
FeatureView features_of(const Tensor& x) {
  const int64_t matrix_stride = x.dim() == 2 ? 0 : x.stride(0);
  return {x.const_data_ptr(), storage_of(x), x.size(-1), matrix_stride, x.stride(-2), x.stride(-1)};
}

MaskView mask_of(const OptionalTensor& mask) {
  if (!mask) {
    return {};
  }
  return {static_cast<const uint8_t*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)};
}

PairMaskView pair_mask_of(const OptionalTensor& mask) {
  if (!mask) {
    return {};
  }
  return {static_cast<const uint8_t*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1),
          mask->stride(2)};
}

WeightView weight_of(const OptionalTensor& weight) {
  if (!weight) {
    return {};
  }
  return {weight->const_data_ptr(), storage_of(*weight), weight->stride(0), weight->stride(1)};
}

ScalarView scalar_of(const OptionalTensor& scalar) {
  return scalar ? ScalarView{scalar->const_data_ptr(), storage_of(*scalar)} : ScalarView{};
}

struct Arguments {
  Tensor student;
  Tensor teacher;
  OptionalTensor student_keys;
  OptionalTensor teacher_keys;
  OptionalTensor mask;
  OptionalTensor key_mask;
  OptionalTensor pair_mask;
  OptionalTensor row_weight;
  OptionalTensor student_scale;
  OptionalTensor teacher_scale;
};

struct Outputs {
  Tensor loss;
  OptionalTensor query_gradient;
  OptionalTensor key_gradient;
  OptionalTensor scale_gradient;
  OptionalTensor row_losses;
};

bool computes_in_double(const Arguments& a) {
  const auto is_double = [](const Tensor& x) { return x.scalar_type() == ScalarType::Double; };
  return is_double(a.student) || is_double(a.teacher) ||
         (a.student_keys && (is_double(*a.student_keys) || is_double(*a.teacher_keys)));
}

Outputs make_outputs(const Arguments& a, const Options& options, bool wants_rows, int32_t dtype) {
  const auto shaped = [&](const Tensor& x) {
    const auto sizes = x.sizes();
    return empty(a.student, {sizes.begin(), sizes.end()}, dtype);
  };
  Outputs outputs{empty(a.student, {}, dtype)};
  if (options.wants_queries) {
    outputs.query_gradient = shaped(a.student);
  }
  if (options.wants_keys && a.student_keys) {
    outputs.key_gradient = shaped(*a.student_keys);
  }
  if (options.wants_scale) {
    outputs.scale_gradient = empty(a.student, {}, dtype);
  }
  if (wants_rows) {
    outputs.row_losses = empty(a.student, {a.student.size(0), a.student.size(1)}, dtype);
  }
  return outputs;
}

void* data_of(const OptionalTensor& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

Params pack(const Arguments& a, const Options& options, Precision precision,
            const Outputs& outputs) {
  Params p{};
  p.settings = options.settings;
  p.precision = precision;
  p.wide = computes_in_double(a);
  p.self = !a.student_keys.has_value();
  p.has_diagonal = options.has_diagonal;
  p.diagonal_offset = options.diagonal_offset;
  p.reduction = options.reduction;
  p.weight = options.weight;
  p.matrices = a.student.dim() == 2 ? 1 : a.student.size(0);
  p.queries = a.student.size(-2);
  p.student = features_of(a.student);
  p.teacher = features_of(a.teacher);
  p.student_keys = p.self ? p.student : features_of(*a.student_keys);
  p.teacher_keys = p.self ? p.teacher : features_of(*a.teacher_keys);
  p.keys = p.self ? p.queries : a.student_keys->size(-2);
  p.mask = mask_of(a.mask);
  p.key_mask = mask_of(p.self ? a.mask : a.key_mask);
  p.pair_mask = pair_mask_of(a.pair_mask);
  p.row_weight = weight_of(a.row_weight);
  p.student_scale = scalar_of(a.student_scale);
  p.teacher_scale = scalar_of(a.teacher_scale);
  p.loss = outputs.loss.mutable_data_ptr();
  p.query_gradient = data_of(outputs.query_gradient);
  p.key_gradient = data_of(outputs.key_gradient);
  p.scale_gradient = data_of(outputs.scale_gradient);
  p.row_losses = data_of(outputs.row_losses);
  return p;
}

// What a call may hold of the pairs; `dense` was chosen because, or although, all fit.
int64_t budget_of(const Options& options, int64_t workspace) {
  return options.settings.algorithm == Algorithm::dense ? INT64_MAX : workspace;
}

Outputs run(const Arguments& a, const std::vector<int64_t>& choices,
            const std::vector<double>& numbers, bool wants_rows) {
  STD_TORCH_CHECK(choices.size() == kPrecision + 1, "malformed options");
  const Options options = read_options(choices, numbers);
  const CurrentStream stream(a.student.get_device_index());
  const int32_t dtype =
      computes_in_double(a) ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  Outputs outputs = make_outputs(a, options, wants_rows, dtype);
  Params params = pack(a, options, static_cast<Precision>(choices[kPrecision]), outputs);
  params.columns = choices[kColumns] != 0;
  complete(params, budget_of(options, choices[kWorkspace]));
  STD_TORCH_CHECK(!params.columns || may_have_columns(params),
                  "columns count beside rows only in a softmax of a cross-affinity without row "
                  "weights, pair mask and excluded pairs");
  STD_TORCH_CHECK(!params.columns || fits(params), "rows and columns of one call must be held");
  const int64_t bytes = lay_out(params, nullptr);
  // freed at the end, and used again only by what comes later on the same stream
  Tensor workspace = empty(a.student, {bytes}, aoti_torch_dtype_uint8());
  lay_out(params, workspace.mutable_data_ptr());
  check_launch(launch(params, stream.handle()));
  return outputs;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> loss_and_grad(
    Tensor student, Tensor teacher, OptionalTensor student_keys, OptionalTensor teacher_keys,
    OptionalTensor mask, OptionalTensor key_mask, OptionalTensor pair_mask,
    OptionalTensor row_weight, OptionalTensor student_scale, OptionalTensor teacher_scale,
    std::vector<int64_t> choices, std::vector<double> numbers) {
  Outputs outputs = run({student, teacher, student_keys, teacher_keys, mask, key_mask, pair_mask,
                         row_weight, student_scale, teacher_scale},
                        choices, numbers, false);
  return {outputs.loss, outputs.query_gradient, outputs.key_gradient, outputs.scale_gradient};
}

Tensor row_losses(Tensor student, Tensor teacher, OptionalTensor student_keys,
                  OptionalTensor teacher_keys, OptionalTensor mask, OptionalTensor key_mask,
                  OptionalTensor pair_mask, OptionalTensor row_weight, OptionalTensor student_scale,
                  OptionalTensor teacher_scale, std::vector<int64_t> choices,
                  std::vector<double> numbers) {
  Outputs outputs = run({student, teacher, student_keys, teacher_keys, mask, key_mask, pair_mask,
                         row_weight, student_scale, teacher_scale},
                        choices, numbers, true);
  return *outputs.row_losses;
}

}  // namespace
}  // namespace affkd::cuda

STABLE_TORCH_LIBRARY_IMPL(affkd_kernels, AFFKD_OPERATOR_KEY, m) {
  m.impl("cuda_loss_and_grad", TORCH_BOX(&affkd::cuda::loss_and_grad));
  m.impl("cuda_row_losses", TORCH_BOX(&affkd::cuda::row_losses));
}
