// The launches of a call.
#pragma once

#include "angle_params.cuh"
#include "params.cuh"

namespace affkd::cuda {

// Put all launches of a call on a stream, a cudaStream_t. Return the first cudaError_t, 0 if none.
int32_t launch(const Params& params, void* stream);
int32_t launch_angle(const AngleParams& params, void* stream);

}  // namespace affkd::cuda
