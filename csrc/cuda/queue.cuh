// Work of a matrix that the blocks of one launch share out among them before they go on with what
// takes its result. Whoever is free takes the next unit, and nobody waits before all are taken:
// what is waited for is in the hands of blocks that run, and comes to an end however few blocks a
// GPU has room for. A unit's result does not depend on who computes it.
#pragma once

#include "collectives.cuh"

namespace affkd::cuda {

AFFKD_DEVICE Queue& queue_of(const Params& p, Joint what, int64_t n) {
  return p.work.queues[static_cast<int64_t>(what) * p.matrices + n];
}

// work(unit) for every unit, by all blocks that call this with the same queue, which all see what
// came of all of them. `scratch` is shared memory, free again afterwards.
template <typename Work>
AFFKD_DEVICE void share_out(Queue& queue, int64_t units, unsigned* scratch, Work work) {
  const unsigned count = static_cast<unsigned>(units);
#pragma unroll 1
  for (;;) {
    if (threadIdx.x == 0) {
      *scratch = take(&queue.taken);
    }
    __syncthreads();
    const unsigned unit = *scratch;
    if (unit >= count) {
      break;
    }
    work(static_cast<int64_t>(unit));
    __syncthreads();
    if (threadIdx.x == 0) {
      arrive(&queue.done);
    }
  }
  if (threadIdx.x == 0) {
    wait_for(&queue.done, count);
  }
  __syncthreads();
}

}  // namespace affkd::cuda
