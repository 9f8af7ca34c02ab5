#define AFFKD_NAMESPACE avx2
#define AFFKD_VECTOR_BYTES 32
#define AFFKD_GROUP_ROWS 6

#include "kernels.h"

namespace affkd {

extern const Kernels avx2_kernels;
const Kernels avx2_kernels{1,
                           "avx2",
                           avx2::run<float>,
                           avx2::run<double>,
                           avx2::run_angle<float>,
                           avx2::run_angle<double>,
                           avx2::exponential_of,
                           avx2::log_ratio_of};

}  // namespace affkd
