// Stands in for the GPU behind csrc/cuda/ops.cpp, which is then registered for CPU tensors: notes
// what the kernels would be given and which launches there would be, a line each, and has the
// kernels run by whoever can (tests/cuda_host).
#include <cstdint>
#include <sstream>
#include <string>
#include <type_traits>

#include "device.h"
#include "launch.h"
#include "schedule.cuh"

// clang-format off
#define OF_SETTINGS(X) X(pair) X(unit) X(order) X(clamped) X(normalization) X(loss) X(diagonal) \
  X(algorithm) X(student_scale) X(teacher_scale) X(offset) X(affinity_eps) X(clamp_min) \
  X(statistic_eps) X(student_tau) X(teacher_tau) X(beta) X(log_eps)
#define OF_CALL(X) X(precision) X(wide) X(self) X(has_diagonal) X(columns) X(diagonal_offset) X(reduction) \
  X(weight) X(matrices) X(queries) X(keys)
#define OF_FEATURES(X) X(data) X(storage) X(dim) X(matrix) X(item) X(feature)
#define OF_MASK(X) X(data) X(matrix) X(item)
#define OF_PAIR_MASK(X) X(data) X(matrix) X(query) X(key)
#define OF_WEIGHT(X) X(data) X(storage) X(matrix) X(item)
#define OF_SCALAR(X) X(data) X(storage)
#define OF_OUTPUTS(X) X(loss) X(query_gradient) X(key_gradient) X(scale_gradient) X(row_losses)
#define OF_WORKSPACE(X) X(arrivals) X(student)
// clang-format on

namespace affkd::cuda {
namespace {

// functions of tests/cuda_host/driver.cpp
using Run = int64_t (*)(Params* params, void* workspace, int64_t room, int32_t* phases);
using RunAngle = void (*)(const void* const* views, int64_t matrices, int64_t items, double beta,
                          bool wide, double* slope, double* loss);

std::string noted;
bool notes = true;
Run run = nullptr;
RunAngle run_angle = nullptr;

template <typename T>
auto plain(T value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<uintptr_t>(value);
  } else if constexpr (std::is_enum_v<T>) {
    return static_cast<int64_t>(value);
  } else {
    return value;
  }
}

std::string describe(const Params& p) {
  std::ostringstream out;
  out.precision(17);
#define NOTE(field) out << prefix << #field << ' ' << plain(from.field) << '\n';
#define NOTE_ALL(fields, name, part) \
  {                                  \
    const char* prefix = name;       \
    const auto& from = part;         \
    fields(NOTE)                     \
  }
  NOTE_ALL(OF_CALL, "", p)
  NOTE_ALL(OF_OUTPUTS, "", p)
  NOTE_ALL(OF_SETTINGS, "settings.", p.settings)
  NOTE_ALL(OF_FEATURES, "student.", p.student)
  NOTE_ALL(OF_FEATURES, "teacher.", p.teacher)
  NOTE_ALL(OF_FEATURES, "student_keys.", p.student_keys)
  NOTE_ALL(OF_FEATURES, "teacher_keys.", p.teacher_keys)
  NOTE_ALL(OF_MASK, "mask.", p.mask)
  NOTE_ALL(OF_MASK, "key_mask.", p.key_mask)
  NOTE_ALL(OF_PAIR_MASK, "pair_mask.", p.pair_mask)
  NOTE_ALL(OF_WEIGHT, "row_weight.", p.row_weight)
  NOTE_ALL(OF_SCALAR, "student_scale.", p.student_scale)
  NOTE_ALL(OF_SCALAR, "teacher_scale.", p.teacher_scale)
  NOTE_ALL(OF_WORKSPACE, "work.", p.work)
  return out.str();
}

}  // namespace

CurrentStream::CurrentStream(int32_t) {}
CurrentStream::~CurrentStream() {}
void check_launch(int32_t) {}

int32_t launch(const Params& params, void*) {
  if (run != nullptr) {
    Params copy = params;
    run(&copy, params.work.arrivals, 0, nullptr);
  }
  if (!notes) {
    return 0;
  }
  std::ostringstream launches;
  run_schedule(params, [&](Phase phase, const Params&, int64_t blocks) {
    launches << "launch " << static_cast<int64_t>(phase) << ' ' << blocks << '\n';
  });
  noted = describe(params) + launches.str();
  return 0;
}

int32_t launch_angle(const AngleParams& p, void*) {
  if (run_angle != nullptr) {
    const void* views[] = {p.student.squared, p.student.inverse, p.teacher.squared,
                           p.teacher.inverse};
    run_angle(views, p.matrices, p.items, p.beta, p.wide, p.slope, p.loss);
  }
  return 0;
}

}  // namespace affkd::cuda

// What was noted of the last call.
extern "C" __attribute__((visibility("default"))) const char* affkd_noted() {
  return affkd::cuda::noted.c_str();
}

// Notes nothing from now on, for measurements.
extern "C" __attribute__((visibility("default"))) void affkd_be_quiet() {
  affkd::cuda::notes = false;
}

// From now on calls are computed by these; null: not at all.
extern "C" __attribute__((visibility("default"))) void affkd_run_by(void* run, void* run_angle) {
  affkd::cuda::run = reinterpret_cast<affkd::cuda::Run>(run);
  affkd::cuda::run_angle = reinterpret_cast<affkd::cuda::RunAngle>(run_angle);
}
