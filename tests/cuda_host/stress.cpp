// Runs the kernels through many calls, for a sanitizer to watch, and one of them with a fault.
//
//   stress every N        every Nth of all calls; all results have to be finite
//   stress FAULT N        one call without and with a fault, at each thread's Nth barrier: 3 if the
//                         results differ
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "call.h"

namespace {

using namespace affkd;
using cuda::FeatureView;
using cuda::Params;
using cuda::Precision;
using cuda::Storage;

constexpr int64_t kQueries = 37, kStudent = 20, kTeacher = 13;

// Positive features: of a random angle, but with affinities that are no less than 0.
std::vector<float> random_features(int64_t count, unsigned seed) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& number : x) {
    seed = seed * 1664525u + 1013904223u;
    number = static_cast<float>(seed >> 8) * 0x1p-24f;
  }
  return x;
}

struct Variant {
  int64_t matrices;
  int64_t keys;  // 0: a self-affinity
  bool masked;
  bool weighted;
  int64_t budget;
  Precision precision;
};

constexpr int64_t kNoBudget = INT64_MAX;
constexpr Variant kVariants[] = {
    {1, 0, false, false, kNoBudget, Precision::ieee},
    {1, 0, true, true, kNoBudget, Precision::tf32x3},
    {2, 0, true, false, 1, Precision::ieee},
    {1, 43, true, false, kNoBudget, Precision::ieee},
    {2, 43, false, true, 1, Precision::tf32x3},
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
};

FeatureView view_of(const std::vector<float>& x, int64_t items, int64_t dim) {
  return {x.data(), Storage::float32, dim, items * dim, dim, 1};
}

Settings settings_of(PairFunction pair, Normalization normalization, Loss loss) {
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

Result run(const Settings& settings, const Variant& variant) {
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
  result.numbers.resize(static_cast<size_t>(1 + n * (kQueries + keys) * kStudent));
  float* out = result.numbers.data();

  Params p{};
  p.settings = settings;
  p.precision = variant.precision;
  p.self = p.has_diagonal = self;
  p.reduction = Reduction::mean;
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
  p.loss = out;
  p.query_gradient = out + 1;
  p.key_gradient = self ? nullptr : out + 1 + n * kQueries * kStudent;
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

int run_every(int step) {
  int call = 0, runs = 0;
  for (const Variant& variant : kVariants) {
    for (int pair = 0; pair <= static_cast<int>(PairFunction::power); ++pair) {
      for (int kind = 0; kind <= static_cast<int>(Normalization::max_detached); ++kind) {
        for (int loss = 0; loss <= static_cast<int>(Loss::cross_entropy); ++loss) {
          const auto normalization = static_cast<Normalization>(kind);
          const bool entropy = static_cast<Loss>(loss) == Loss::cross_entropy;
          // what is centered has entries below 0, and a logarithm wants none
          const bool logarithm = static_cast<Loss>(loss) >= Loss::kl_forward;
          if ((entropy && normalization != Normalization::softmax) ||
              (logarithm && normalization == Normalization::frobenius_centered) ||
              call++ % step != 0) {
            continue;
          }
          const Settings settings =
              settings_of(static_cast<PairFunction>(pair), normalization, static_cast<Loss>(loss));
          if (!run(settings, variant).finite()) {
            std::fprintf(stderr, "not finite: pair function %d, normalization %d, loss %d\n", pair,
                         kind, loss);
            return 3;
          }
          ++runs;
        }
      }
    }
  }
  std::printf("%d calls\n", runs);
  return 0;
}

int run_with_fault(const std::string& name, unsigned at) {
  const char* names[] = {"none",         "missing_barrier", "divergent_barrier",
                         "short_memory", "missing_wait",    "missing_boundary"};
  const Settings settings =
      settings_of(PairFunction::squared_distance, Normalization::row_l2, Loss::mse);
  const Result right = run(settings, kVariants[0]);
  for (int kind = 0; kind < 6; ++kind) {
    if (name == names[kind]) {
      host::fault = static_cast<host::Fault>(kind);
      host::fault_at = at;
      return run(settings, kVariants[0]).numbers == right.numbers ? 0 : 3;
    }
  }
  std::fprintf(stderr, "unknown fault %s\n", name.c_str());
  return 2;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: stress every|FAULT N\n");
    return 2;
  }
  const int number = std::atoi(arguments[2]);
  return arguments[1] == std::string("every") ? run_every(number)
                                              : run_with_fault(arguments[1], number);
}
