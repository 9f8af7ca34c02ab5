// The options of a call, as affkd_kernels/kernels/options.py lists them: choices and numbers, read
// by position.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "settings.h"

namespace affkd {

constexpr size_t kChoices = 14;
constexpr size_t kNumbers = 11;

struct Options {
  Settings settings;
  bool has_diagonal;
  int64_t diagonal_offset;
  Reduction reduction;
  bool wants_queries;
  bool wants_keys;
  bool wants_scale;
  double weight;
};

inline Settings read_settings(const std::vector<int64_t>& choices,
                              const std::vector<double>& numbers) {
  Settings settings{};
  settings.pair = static_cast<PairFunction>(choices[0]);
  settings.unit = choices[1] != 0;
  settings.order = choices[2];
  settings.clamped = choices[3] != 0;
  settings.normalization = static_cast<Normalization>(choices[4]);
  settings.loss = static_cast<Loss>(choices[5]);
  settings.diagonal = static_cast<Diagonal>(choices[6]);
  settings.algorithm = static_cast<Algorithm>(choices[10]);
  settings.student_scale = numbers[0];
  settings.teacher_scale = numbers[1];
  settings.offset = numbers[2];
  settings.affinity_eps = numbers[3];
  settings.clamp_min = numbers[4];
  settings.statistic_eps = numbers[5];
  settings.student_tau = numbers[6];
  settings.teacher_tau = numbers[7];
  settings.beta = numbers[8];
  settings.log_eps = numbers[9];
  return settings;
}

// A backend's own choices may follow these.
inline Options read_options(const std::vector<int64_t>& choices,
                            const std::vector<double>& numbers) {
  STD_TORCH_CHECK(choices.size() >= kChoices && numbers.size() == kNumbers, "malformed options");
  Options options{};
  options.settings = read_settings(choices, numbers);
  options.has_diagonal = choices[7] != 0;
  options.diagonal_offset = choices[8];
  options.reduction = static_cast<Reduction>(choices[9]);
  options.wants_queries = choices[11] != 0;
  options.wants_keys = choices[12] != 0;
  options.wants_scale = choices[13] != 0;
  options.weight = numbers[10];
  return options;
}

}  // namespace affkd
