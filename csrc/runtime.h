// What the operators share: the kernels of this processor, and torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdlib>

#include "cpu/call.h"

namespace affkd {

inline const Kernels& kernels() {
  const char* error = nullptr;
  const Kernels* selected = select_kernels(std::getenv("AFFKD_CPU_CAPABILITY"), &error);
  STD_TORCH_CHECK(selected != nullptr, error);
  return *selected;
}

inline void run_in_parallel(int64_t tasks, TaskBody body, void* context) {
  torch::stable::parallel_for(0, tasks, 1,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

// body(n, parallel) for every matrix of a batch. Many matrices go to the threads whole; few are
// worked on by all threads, one after the other.
template <typename Body>
void for_each_matrix(int64_t matrices, Body body) {
  if (matrices < 2 * static_cast<int64_t>(torch::stable::get_num_threads())) {
    for (int64_t n = 0; n < matrices; ++n) {
      body(n, run_in_parallel);
    }
    return;
  }
  torch::stable::parallel_for(0, matrices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      body(n, run_serially);
    }
  });
}

}  // namespace affkd
