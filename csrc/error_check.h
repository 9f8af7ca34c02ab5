// STABLE_TORCH_ERROR_CODE_CHECK under every torch: throws where a function of torch's C interface
// reports an error.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

// older headers have only what says where, not what
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
