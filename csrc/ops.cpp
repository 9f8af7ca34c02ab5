// The operators, on the LibTorch stable ABI: one binary serves every torch from 2.10 on. Schemas
// are defined in affkd_kernels/kernels/extension.py, checks and conversions are done in Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/batch.h"
#include "error_check.h"
#include "options.h"
#include "runtime.h"

namespace affkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
const T* data_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// What the CPU kernels are asked for beyond `Options`: a softmax over both axes in one call.
constexpr size_t kColumnsToo = kChoices;

// Features [N, Q, D]; of a single matrix also [Q, D].
struct Features {
  const Tensor& student;
  const Tensor& teacher;
  const OptionalTensor& student_keys;
  const OptionalTensor& teacher_keys;
};

struct Outputs {
  Tensor loss;
  OptionalTensor query_gradient;
  OptionalTensor key_gradient;
  OptionalTensor scale_gradient;
  OptionalTensor row_losses;
};

// Uninitialized and contiguous, in the dtype of `like`. By way of the C shim: a trip through the
// dispatcher would cost a tenth of a small call.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t axis = sizes.size(); axis-- > 1;) {
    strides[axis - 1] = strides[axis] * (sizes[axis] > 0 ? sizes[axis] : 1);
  }
  int32_t dtype = 0;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()),
                                                         sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes) {
  Tensor tensor = empty(like, sizes);
  // the pointer of an empty tensor is null, which memset must not get even for no bytes
  if (tensor.numel() > 0) {
    std::memset(tensor.mutable_data_ptr(), 0,
                static_cast<size_t>(tensor.numel()) * tensor.element_size());
  }
  return tensor;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

void run_kernels(const Kernels& selected, const Settings& settings, Matrix<float>& matrix,
                 Parallel parallel) {
  selected.run_float(settings, matrix, parallel);
}

void run_kernels(const Kernels& selected, const Settings& settings, Matrix<double>& matrix,
                 Parallel parallel) {
  selected.run_double(settings, matrix, parallel);
}

template <typename T>
T* at_matrix(const OptionalTensor& tensor, int64_t n, int64_t matrices) {
  if (!tensor) {
    return nullptr;
  }
  return static_cast<T*>(tensor->mutable_data_ptr()) + n * (tensor->numel() / matrices);
}

const int64_t* pointer_or_null(const std::vector<int64_t>& list) {
  return list.empty() ? nullptr : list.data();
}

template <typename T>
Side<T> side_of(const Tensor& queries, const OptionalTensor& keys, int64_t n) {
  const int64_t dim = queries.size(-1);
  const T* query_data = static_cast<const T*>(queries.const_data_ptr());
  const T* key_data = data_of<T>(keys);
  return {query_data + n * queries.size(-2) * dim,
          keys ? key_data + n * keys->size(-2) * dim : nullptr, dim};
}

template <typename T>
std::vector<Matrix<T>> matrices_of(const Features& features, const Shape& shape, const Masks& masks,
                                   const OptionalTensor& row_weight, const Options& options,
                                   bool columns_too, const std::vector<Selection>& selections,
                                   Outputs& outputs) {
  // the mean of the row loss and the column loss, or the row loss alone
  const double weight = columns_too ? options.weight / 2 : options.weight;
  const double scale = weight / divisor_of(options.reduction, selections);
  const double column_scale = weight / column_divisor_of(options.reduction, selections);
  std::vector<Matrix<T>> matrices;
  matrices.reserve(selections.size());
  for (int64_t n = 0; n < shape.matrices; ++n) {
    const Selection& selection = selections[static_cast<size_t>(n)];
    Matrix<T> matrix{};
    matrix.student = side_of<T>(features.student, features.student_keys, n);
    matrix.teacher = side_of<T>(features.teacher, features.teacher_keys, n);
    matrix.self = shape.self;
    matrix.queries = selection.query_count;
    matrix.keys = selection.key_count;
    matrix.query_index = pointer_or_null(selection.queries);
    matrix.key_index = pointer_or_null(selection.keys);
    matrix.diagonal = pointer_or_null(selection.diagonal);
    matrix.pair_mask =
        masks.pairs == nullptr ? nullptr : masks.pairs + n * shape.queries * shape.keys;
    matrix.pair_stride = shape.keys;
    matrix.pairs = selection.pairs.data();
    matrix.row_weight = row_weight ? data_of<T>(row_weight) + n * shape.queries : nullptr;
    matrix.loss_scale = scale;
    matrix.columns_too = columns_too;
    matrix.column_loss_scale = column_scale;
    matrix.row_losses = at_matrix<T>(outputs.row_losses, n, shape.matrices);
    matrix.query_gradient = at_matrix<T>(outputs.query_gradient, n, shape.matrices);
    matrix.key_gradient = at_matrix<T>(outputs.key_gradient, n, shape.matrices);
    matrix.scale_gradient_wanted = options.wants_scale;
    matrices.push_back(matrix);
  }
  return matrices;
}

// Where no pair takes part the outputs stay 0, whatever the features hold.
template <typename T>
bool has_pairs(const Matrix<T>& matrix) {
  return std::any_of(matrix.pairs, matrix.pairs + matrix.queries,
                     [](int64_t pairs) { return pairs > 0; });
}

template <typename T>
void compute(const Features& features, const Shape& shape, const Masks& masks,
             const OptionalTensor& row_weight, const Options& options, bool columns_too,
             Outputs& outputs) {
  const bool excluded = options.settings.diagonal == Diagonal::exclude;
  const std::vector<Selection> selections =
      select_items(shape, masks, {options.has_diagonal, options.diagonal_offset, excluded});
  std::vector<Matrix<T>> matrices =
      matrices_of<T>(features, shape, masks, row_weight, options, columns_too, selections, outputs);
  const Kernels& selected = kernels();
  for_each_matrix(shape.matrices, [&](int64_t n, Parallel parallel) {
    Matrix<T>& matrix = matrices[static_cast<size_t>(n)];
    if (has_pairs(matrix)) {
      run_kernels(selected, options.settings, matrix, parallel);
    }
  });
  double loss = 0, scale_gradient = 0;
  for (const Matrix<T>& matrix : matrices) {
    loss += matrix.loss;
    scale_gradient += matrix.scale_gradient;
  }
  *static_cast<T*>(outputs.loss.mutable_data_ptr()) = static_cast<T>(loss);
  if (outputs.scale_gradient) {
    *static_cast<T*>(outputs.scale_gradient->mutable_data_ptr()) = static_cast<T>(scale_gradient);
  }
}

Outputs run(const Features& features, const OptionalTensor& mask, const OptionalTensor& key_mask,
            const OptionalTensor& pair_mask, const OptionalTensor& row_weight,
            const std::vector<int64_t>& choices, const std::vector<double>& numbers,
            bool wants_rows) {
  const Options options = read_options(choices, numbers);
  STD_TORCH_CHECK(choices.size() == kColumnsToo + 1, "malformed options");
  const bool columns_too = choices[kColumnsToo] != 0;
  const Tensor& student = features.student;
  const bool self = !features.student_keys.has_value();
  const int64_t queries = student.size(-2);
  const Shape shape{student.dim() == 2 ? 1 : student.size(0), queries,
                    self ? queries : features.student_keys->size(-2), self};
  const Masks masks{data_of<uint8_t>(mask), data_of<uint8_t>(key_mask),
                    data_of<uint8_t>(pair_mask)};
  Outputs outputs;
  outputs.loss = empty(student, {});
  if (options.wants_queries) {
    outputs.query_gradient = zeros(student, sizes_of(student));
  }
  if (options.wants_keys && !self) {
    outputs.key_gradient = zeros(student, sizes_of(*features.student_keys));
  }
  if (options.wants_scale) {
    outputs.scale_gradient = empty(student, {});
  }
  if (wants_rows) {
    outputs.row_losses = zeros(student, {shape.matrices, shape.queries});
  }
  if (student.scalar_type() == ScalarType::Double) {
    compute<double>(features, shape, masks, row_weight, options, columns_too, outputs);
  } else {
    compute<float>(features, shape, masks, row_weight, options, columns_too, outputs);
  }
  return outputs;
}

std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor> loss_and_grad(
    Tensor student, Tensor teacher, OptionalTensor student_keys, OptionalTensor teacher_keys,
    OptionalTensor mask, OptionalTensor key_mask, OptionalTensor pair_mask,
    OptionalTensor row_weight, std::vector<int64_t> choices, std::vector<double> numbers) {
  Outputs outputs = run({student, teacher, student_keys, teacher_keys}, mask, key_mask, pair_mask,
                        row_weight, choices, numbers, false);
  return {outputs.loss, outputs.query_gradient, outputs.key_gradient, outputs.scale_gradient};
}

Tensor row_losses(Tensor student, Tensor teacher, OptionalTensor student_keys,
                  OptionalTensor teacher_keys, OptionalTensor mask, OptionalTensor key_mask,
                  OptionalTensor pair_mask, OptionalTensor row_weight, std::vector<int64_t> choices,
                  std::vector<double> numbers) {
  Outputs outputs = run({student, teacher, student_keys, teacher_keys}, mask, key_mask, pair_mask,
                        row_weight, choices, numbers, true);
  return *outputs.row_losses;
}

// how good the best usable kernels are: 0 is the baseline
int64_t capability_index() {
  const char* error = nullptr;
  return select_kernels(nullptr, &error)->index;
}

Tensor exponential(Tensor x) {
  Tensor y = torch::stable::empty_like(x);
  kernels().exponential(x.numel(), x.const_data_ptr(), y.mutable_data_ptr(),
                        x.scalar_type() == ScalarType::Double);
  return y;
}

Tensor log_ratio(Tensor a, Tensor b) {
  Tensor y = torch::stable::empty_like(a);
  kernels().log_ratio(a.numel(), a.const_data_ptr(), b.const_data_ptr(), y.mutable_data_ptr(),
                      a.scalar_type() == ScalarType::Double);
  return y;
}

}  // namespace
}  // namespace affkd

STABLE_TORCH_LIBRARY_IMPL(affkd_kernels, CPU, m) {
  m.impl("cpu_loss_and_grad", TORCH_BOX(&affkd::loss_and_grad));
  m.impl("cpu_row_losses", TORCH_BOX(&affkd::row_losses));
  m.impl("cpu_exponential", TORCH_BOX(&affkd::exponential));
  m.impl("cpu_log_ratio", TORCH_BOX(&affkd::log_ratio));
}

STABLE_TORCH_LIBRARY_IMPL(affkd_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability_index", TORCH_BOX(&affkd::capability_index));
}
