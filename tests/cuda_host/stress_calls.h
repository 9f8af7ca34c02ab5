// Calls of the kernels for a sanitizer to watch: small ones, of every kind.
#pragma once

#include <cstdlib>
#include <vector>

#include "call.h"

namespace stress {

using namespace affkd;
using cuda::FeatureView;
using cuda::Params;
using cuda::Precision;
using cuda::Storage;

constexpr int64_t kQueries = 41, kStudent = 36, kTeacher = 13;
constexpr int64_t kNoBudget = INT64_MAX;

struct Variant {
  int64_t matrices;
  int64_t keys;  // 0: a self-affinity
  bool masked;
  bool weighted;
  int64_t budget;
  Precision precision;
  bool rows = false;  // and a gradient of the scale
  bool columns = false;
};

struct Result {
  std::vector<float> numbers;  // loss and gradients
  bool finite() const {
    for (const float x : numbers) {
      if (!std::isfinite(x)) {
        return false;
      }
    }
    return true;
  }
  // to the last bit
  bool operator==(const Result& other) const {
    return numbers.size() == other.numbers.size() &&
           std::memcmp(numbers.data(), other.numbers.data(), numbers.size() * sizeof(float)) == 0;
  }
};

// Positive features: of a random angle, but with affinities that are no less than 0.
inline std::vector<float> random_features(int64_t count, unsigned seed) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& number : x) {
    seed = seed * 1664525u + 1013904223u;
    number = static_cast<float>(seed >> 8) * 0x1p-24f;
  }
  return x;
}

inline FeatureView view_of(const std::vector<float>& x, int64_t items, int64_t dim) {
  return {x.data(), Storage::float32, dim, items * dim, dim, 1};
}

inline Settings settings_of(PairFunction pair, Normalization normalization, Loss loss) {
  Settings settings{};
  settings.pair = pair;
  settings.unit = pair == PairFunction::taylor || pair == PairFunction::gaussian;
  settings.order = 2;
  settings.normalization = normalization;
  settings.loss = loss;
  settings.student_scale = settings.teacher_scale = 0.4;
  settings.offset = 0.1;
  settings.affinity_eps = settings.statistic_eps = 1e-12;
  settings.student_tau = settings.teacher_tau = 1;
  settings.beta = 1;
  settings.log_eps = 1e-7;
  return settings;
}

inline Result run(const Settings& settings, const Variant& variant) {
  const bool self = variant.keys == 0;
  const int64_t n = variant.matrices, keys = self ? kQueries : variant.keys;
  const auto student = random_features(n * kQueries * kStudent, 1);
  const auto teacher = random_features(n * kQueries * kTeacher, 2);
  const auto student_keys = random_features(n * keys * kStudent, 3);
  const auto teacher_keys = random_features(n * keys * kTeacher, 4);
  const auto weights = random_features(n * kQueries, 5);
  std::vector<uint8_t> mask(static_cast<size_t>(n * keys + n * kQueries));
  for (size_t i = 0; i < mask.size(); ++i) {
    mask[i] = i % 5 != 3;
  }
  Result result;
  result.numbers.resize(static_cast<size_t>(2 + n * (kQueries * (kStudent + 1) + keys * kStudent)));
  float* out = result.numbers.data();

  Params p{};
  p.settings = settings;
  p.precision = variant.precision;
  p.self = p.has_diagonal = self;
  p.columns = variant.columns;
  p.reduction = variant.rows ? Reduction::sum : Reduction::mean;
  p.weight = 1;
  p.matrices = n;
  p.queries = kQueries;
  p.keys = keys;
  p.student = view_of(student, kQueries, kStudent);
  p.teacher = view_of(teacher, kQueries, kTeacher);
  p.student_keys = self ? p.student : view_of(student_keys, keys, kStudent);
  p.teacher_keys = self ? p.teacher : view_of(teacher_keys, keys, kTeacher);
  if (variant.masked) {
    p.mask = {mask.data(), kQueries, 1};
    p.key_mask = self ? p.mask : cuda::MaskView{mask.data(), keys, 1};
  }
  if (variant.weighted) {
    p.row_weight = {weights.data(), Storage::float32, kQueries, 1};
  }
  p.loss = out++;
  p.scale_gradient = variant.rows ? out : nullptr;
  p.query_gradient = ++out;
  out += n * kQueries * kStudent;
  p.key_gradient = self ? nullptr : out;
  out += n * keys * kStudent;
  p.row_losses = variant.rows ? out : nullptr;
  cuda::complete(p, variant.budget);
  if (cuda::gram_has_states(p)) {
    // fewer than tiles, so that a block has one after the other
    p.state_slots = 2;
  }
  std::vector<unsigned char> workspace(static_cast<size_t>(cuda::lay_out(p, nullptr)) + 256, 0xff);
  const uintptr_t base = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;
  host::call(p, reinterpret_cast<void*>(base), [](cuda::Phase) {});
  return result;
}

// The angle loss of distances that no items need have.
inline Result run_angle() {
  constexpr int64_t items = 35;
  std::vector<double> student(items * items), teacher, slope(items * items);
  const std::vector<float> inverse(items * items, 1.5f);
  const auto numbers = random_features(items * items, 6);
  for (size_t i = 0; i < student.size(); ++i) {
    student[i] = numbers[i];
  }
  teacher.assign(student.rbegin(), student.rend());
  double loss = 0;
  cuda::AngleParams p{{student.data(), inverse.data()},
                      {teacher.data(), inverse.data()},
                      1,
                      items,
                      1,
                      false,
                      slope.data(),
                      nullptr,
                      &loss};
  std::vector<double> blocks(static_cast<size_t>(cuda::angle_blocks(p)));
  p.block_losses = blocks.data();
  host::call_angle(p);
  Result result;
  result.numbers.assign(slope.begin(), slope.end());
  result.numbers.push_back(static_cast<float>(loss));
  return result;
}

// Together they reach every barrier there is.
inline Result run_case(int number) {
  using enum PairFunction;
  using enum Loss;
  constexpr auto ieee = Precision::ieee, tf32x3 = Precision::tf32x3;
  switch (number) {
    case 0:
      return run(settings_of(squared_distance, Normalization::row_l2, mse),
                 {1, 0, false, false, kNoBudget, ieee});
    case 1:
      return run(settings_of(linear, Normalization::softmax, kl_forward),
                 {1, 43, true, false, kNoBudget, tf32x3});
    case 2:
      return run(settings_of(gaussian, Normalization::max, l1),
                 {1, 0, true, true, kNoBudget, ieee});
    case 3:
      return run(settings_of(linear, Normalization::frobenius_centered, mse),
                 {2, 0, true, false, kNoBudget, tf32x3});
    case 4:
      return run(settings_of(power, Normalization::frobenius_centered, smooth_l1),
                 {2, 43, true, true, kNoBudget, ieee, true});
    case 5:
      return run(settings_of(distance, Normalization::mean_positive, smooth_l1),
                 {2, 43, true, false, 1, ieee, true});
    case 6:
      return run_angle();
    case 7:
      return run(settings_of(gaussian, Normalization::softmax, kl_reverse),
                 {2, 43, true, false, kNoBudget, tf32x3, false, true});
    case 8:
      return run(settings_of(linear, Normalization::frobenius_centered, smooth_l1),
                 {1, 0, true, true, kNoBudget, ieee});
    default:
      std::fprintf(stderr, "there is no case %d\n", number);
      std::exit(2);
  }
}

constexpr int kCases = 9;

}  // namespace stress
