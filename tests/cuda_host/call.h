// A call of the kernels on fibers, as csrc/cuda/launch.cu makes it on a GPU.
#pragma once

#include "kernels.cuh"
#include "launches.h"
#include "schedule.cuh"

namespace host {

// visit(phase) for every launch, in order; `workspace` is what `complete` and `lay_out` ask for.
template <typename Visit>
void call(affkd::cuda::Params params, void* workspace, Visit visit) {
  namespace cuda = affkd::cuda;
  cuda::lay_out(params, workspace);
  Stream stream;
  cuda::run_schedule(params, [&](cuda::Phase phase, const cuda::Params& p, int64_t blocks) {
    const cuda::Kernel kernel = cuda::find_kernel(phase, p);
    stream.launch({static_cast<unsigned>(blocks), cuda::kThreads, kernel.shared_bytes,
                   [kernel, p] { kernel.function(p); }});
    visit(phase);
  });
  stream.wait();
}

// The same of the angle loss.
inline void call_angle(const affkd::cuda::AngleParams& params) {
  namespace cuda = affkd::cuda;
  const cuda::AngleKernel angle = cuda::find_angle_kernel(params);
  const cuda::AngleKernel sum = cuda::find_angle_sum_kernel();
  const auto blocks = static_cast<unsigned>(cuda::angle_blocks(params));
  Stream stream;
  stream.launch({blocks, cuda::kThreads, angle.shared_bytes, [=] { angle.function(params); }});
  stream.launch({1, cuda::kThreads, sum.shared_bytes, [=] { sum.function(params); }});
  stream.wait();
}

}  // namespace host
