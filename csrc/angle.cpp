// The operator of the angle loss. Its schema is in affkd_kernels/kernels/extension.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "runtime.h"

namespace affkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Distances {
  const Tensor& squared;
  const Tensor& inverse;

  template <typename T>
  AngleSide<T> matrix(int64_t n) const {
    const int64_t entries = squared.size(1) * squared.size(2);
    return {static_cast<const double*>(squared.const_data_ptr()) + n * entries,
            static_cast<const T*>(inverse.const_data_ptr()) + n * entries};
  }
};

void run_kernels(const Kernels& selected, AngleMatrix<float>& matrix, Parallel parallel) {
  selected.angle_float(matrix, parallel);
}

void run_kernels(const Kernels& selected, AngleMatrix<double>& matrix, Parallel parallel) {
  selected.angle_double(matrix, parallel);
}

template <typename T>
double sum_of_matrices(const Distances& student, const Distances& teacher, double beta,
                       double* slope) {
  const int64_t matrices = student.squared.size(0), items = student.squared.size(1);
  const Kernels& selected = kernels();
  std::vector<double> losses(static_cast<size_t>(matrices));
  for_each_matrix(matrices, [&](int64_t n, Parallel parallel) {
    AngleMatrix<T> matrix{student.matrix<T>(n), teacher.matrix<T>(n), items, beta, nullptr, 0};
    matrix.slope = slope == nullptr ? nullptr : slope + n * items * items;
    run_kernels(selected, matrix, parallel);
    losses[static_cast<size_t>(n)] = matrix.loss;
  });
  double sum = 0;
  for (const double loss : losses) {
    sum += loss;
  }
  return sum;
}

std::tuple<Tensor, Tensor> angle(Tensor student_squared, Tensor student_inverse,
                                 Tensor teacher_squared, Tensor teacher_inverse, double beta,
                                 bool need_slope) {
  const Distances student{student_squared, student_inverse};
  const Distances teacher{teacher_squared, teacher_inverse};
  Tensor sum = torch::stable::new_empty(student_squared, {});
  Tensor slope = need_slope ? torch::stable::empty_like(student_squared)
                            : torch::stable::new_empty(student_squared, {0});
  double* to = need_slope ? static_cast<double*>(slope.mutable_data_ptr()) : nullptr;
  const bool is_double = student_inverse.scalar_type() == ScalarType::Double;
  *static_cast<double*>(sum.mutable_data_ptr()) =
      is_double ? sum_of_matrices<double>(student, teacher, beta, to)
                : sum_of_matrices<float>(student, teacher, beta, to);
  return {sum, slope};
}

}  // namespace
}  // namespace affkd

STABLE_TORCH_LIBRARY_IMPL(affkd_kernels, CPU, m) {
  m.impl("cpu_angle", TORCH_BOX(&affkd::angle));
}
