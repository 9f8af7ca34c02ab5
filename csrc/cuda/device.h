// Where a call runs: on the tensors' device, and on the stream that is current there. All that the
// operators need of libtorch_cuda is behind this header, so that a test can stand in for it.
#pragma once

#include <cstdint>

namespace affkd::cuda {

// Makes a device current for as long as it lives.
class CurrentStream {
 public:
  explicit CurrentStream(int32_t device);
  ~CurrentStream();
  CurrentStream(const CurrentStream&) = delete;
  CurrentStream& operator=(const CurrentStream&) = delete;

  void* handle() const { return handle_; }  // a cudaStream_t

 private:
  void* guard_ = nullptr;
  void* handle_ = nullptr;
};

// Throws, with torch's text, where `error`, a cudaError_t, is one. Waits for nothing.
void check_launch(int32_t error);

}  // namespace affkd::cuda
