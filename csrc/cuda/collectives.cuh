// Sums over the threads of a warp or a block, always in the same order.
#pragma once

#include "choices.cuh"
#include "port.cuh"

namespace affkd::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

AFFKD_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x % 32);
}
AFFKD_DEVICE int warp_index() {
  return static_cast<int>(threadIdx.x / 32);
}

template <typename X>
AFFKD_DEVICE X from_lane_at(X x, int distance) {
  return __shfl_xor_sync(kAllLanes, x, distance);
}

AFFKD_DEVICE State from_lane_at(State x, int distance) {
  return {from_lane_at(x.first, distance), from_lane_at(x.second, distance),
          from_lane_at(x.place, distance)};
}

// Folds x over the lanes of a warp; every lane gets the result.
template <typename X, typename Combine>
AFFKD_DEVICE X warp_fold(X x, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x = combine(x, from_lane_at(x, distance));
  }
  return x;
}

template <typename X>
AFFKD_DEVICE X warp_sum(X x) {
  return warp_fold(x, [](X a, X b) { return a + b; });
}

// Folds x over the threads of a block; every thread gets the result. `scratch` has room for kWarps,
// and may be used again after the next barrier.
template <typename X, typename Combine>
AFFKD_DEVICE X block_fold(X x, X* scratch, Combine combine) {
  x = warp_fold(x, combine);
  if (lane_index() == 0) {
    scratch[warp_index()] = x;
  }
  __syncthreads();
  X total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    total = combine(total, scratch[warp]);
  }
  return total;
}

template <typename X>
AFFKD_DEVICE X block_sum(X x, X* scratch) {
  return block_fold(x, scratch, [](X a, X b) { return a + b; });
}

// Whether this is the last of `blocks` blocks to get here. It sees what the first thread of the
// others has written, and what their other threads have before the last barrier; the scratch was
// last read before that one, too. The counter is left at 0, as it was found.
AFFKD_DEVICE bool is_last_block(unsigned* counter, int64_t blocks, bool* scratch) {
  if (threadIdx.x == 0) {
    *scratch = arrive(counter) + 1 == static_cast<unsigned>(blocks);
    if (*scratch) {
      *counter = 0;
    }
  }
  __syncthreads();
  return *scratch;
}

}  // namespace affkd::cuda
