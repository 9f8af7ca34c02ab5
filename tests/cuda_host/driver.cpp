// The kernels as a library that a test calls: the same parameters, the same schedule, on fibers.
#include <vector>

#include "call.h"

using affkd::cuda::AngleParams;
using affkd::cuda::Params;
using affkd::cuda::Phase;

extern "C" {

int64_t params_size() {
  return sizeof(Params);
}

void limit_workers(int64_t workers) {
  host::workers = static_cast<unsigned>(workers);
}

int64_t prepare(Params* params, int64_t budget) {
  affkd::cuda::complete(*params, budget);
  return affkd::cuda::lay_out(*params, nullptr);
}

// Records the phases of up to `room` launches, and returns how many there were.
int64_t run(Params* params, void* workspace, int64_t room, int32_t* phases) {
  int64_t launches = 0;
  host::call(*params, workspace, [&](Phase phase) {
    if (launches < room) {
      phases[launches] = static_cast<int32_t>(phase);
    }
    ++launches;
  });
  return launches;
}

// squared and inverse of the student, then of the teacher
void run_angle(const void* const* views, int64_t matrices, int64_t items, double beta, bool wide,
               double* slope, double* loss) {
  AngleParams params{{static_cast<const double*>(views[0]), views[1]},
                     {static_cast<const double*>(views[2]), views[3]},
                     matrices,
                     items,
                     beta,
                     wide,
                     slope,
                     nullptr,
                     loss};
  std::vector<double> block_losses(static_cast<size_t>(affkd::cuda::angle_blocks(params)));
  params.block_losses = block_losses.data();
  host::call_angle(params);
}
}
