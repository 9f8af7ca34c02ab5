#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../error_check.h"

namespace affkd::cuda {

CurrentStream::CurrentStream(int32_t device) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle_));
  CUDAGuardHandle guard = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard));
  guard_ = guard;
}

// what cannot be undone cannot be reported from here either
CurrentStream::~CurrentStream() {
  aoti_torch_delete_cuda_guard(static_cast<CUDAGuardHandle>(guard_));
}

void check_launch(int32_t error) {
  if (error == 0) {
    return;
  }
  char* text = nullptr;
  torch_c10_cuda_check_msg(error, __FILE__, __func__, __LINE__, true, &text);
  const std::string message = text != nullptr ? text : "a CUDA launch failed";
  torch_c10_cuda_free_error_msg(text);
  throw std::runtime_error(message);
}

namespace {

// of which there is machine code here, as compute capability times 10
std::vector<int64_t> architectures() {
  return {AFFKD_CUDA_ARCHITECTURES};
}

// the major version of the toolkit
int64_t major_version() {
  return AFFKD_CUDA_MAJOR;
}

}  // namespace
}  // namespace affkd::cuda

STABLE_TORCH_LIBRARY_IMPL(affkd_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&affkd::cuda::architectures));
  m.impl("cuda_major", TORCH_BOX(&affkd::cuda::major_version));
}
