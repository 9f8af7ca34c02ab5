// Phase means: sums over the rows and columns of A, or of dA. Linear kernel alignment takes its
// loss from them as well.
#pragma once

#include "alignment.cuh"
#include "sums.cuh"

namespace affkd::cuda {

template <typename T>
class MeansBlock {
 public:
  union Shared {
    typename SumsBlock<T>::Shared sums;
    typename AlignmentBlock<T>::Shared alignment;
  };

  AFFKD_DEVICE MeansBlock(const Params& p, Shared& shared) : p_(p), shared_(shared) {}

  AFFKD_DEVICE void run() {
    const int64_t blocks = sums_blocks(p_), n = p_.task.panel.matrix_begin + blockIdx.x / blocks;
    const int64_t part = blockIdx.x % blocks;
    if (is_closed(p_)) {
      AlignmentBlock<T>(p_, find_row(p_, n, part), shared_.alignment).run();
    } else {
      SumsBlock<T>(p_, p_.task.of_gradient, shared_.sums).run(n, part);
    }
  }

 private:
  const Params& p_;
  Shared& shared_;
};

}  // namespace affkd::cuda
