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

}  // namespace host
