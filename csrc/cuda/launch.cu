#include <limits>

#include "kernels.cuh"
#include "launch.h"
#include "schedule.cuh"

namespace affkd::cuda {
namespace {

// `kernel`: a function of `params`, and the shared memory that it takes.
template <typename AnyKernel, typename AnyParams>
cudaError_t launch_kernel(const AnyKernel& kernel, const AnyParams& params, int64_t blocks,
                          void* stream) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidConfiguration;
  }
  void* arguments[] = {const_cast<AnyParams*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel.function),
                          dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                          kernel.shared_bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace

int32_t launch(const Params& params, void* stream) {
  cudaError_t error = cudaSuccess;
  run_schedule(params, [&](Phase phase, const Params& p, int64_t blocks) {
    // features of length 0 have a gradient of no blocks
    if (error == cudaSuccess && blocks > 0) {
      error = launch_kernel(find_kernel(phase, p), p, blocks, stream);
    }
  });
  return error;
}

int32_t launch_angle(const AngleParams& params, void* stream) {
  if (angle_blocks(params) > 0) {
    const cudaError_t error =
        launch_kernel(find_angle_kernel(params), params, angle_blocks(params), stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch_kernel(find_angle_sum_kernel(), params, 1, stream);
}

}  // namespace affkd::cuda
