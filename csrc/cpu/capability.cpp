// Picks the kernels for this processor.
#include <cstring>

#include "call.h"

namespace affkd {

extern const Kernels baseline_kernels;
#ifdef AFFKD_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool usable;
};

}  // namespace

void run_serially(int64_t tasks, TaskBody body, void* context) {
  body(0, tasks, context);
}

const Kernels* select_kernels(const char* requested, const char** error) {
  // best first
  const Candidate candidates[] = {
#ifdef AFFKD_X86
      {&avx512_kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw")},
      {&avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&baseline_kernels, true},
  };
  for (const Candidate& candidate : candidates) {
    const bool named = requested != nullptr && std::strcmp(requested, candidate.kernels->name) == 0;
    if (candidate.usable && (named || requested == nullptr)) {
      return candidate.kernels;
    }
    if (named) {
      *error = "this processor lacks the instructions that AFFKD_CPU_CAPABILITY names";
      return nullptr;
    }
  }
  *error = "AFFKD_CPU_CAPABILITY must be baseline, avx2 or avx512, as far as they were built";
  return nullptr;
}

}  // namespace affkd
