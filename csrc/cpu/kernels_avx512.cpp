#define AFFKD_NAMESPACE avx512
#define AFFKD_VECTOR_BYTES 64
#define AFFKD_GROUP_ROWS 12

#include "kernels.h"

namespace affkd {

extern const Kernels avx512_kernels;
const Kernels avx512_kernels{2,
                             "avx512",
                             avx512::run<float>,
                             avx512::run<double>,
                             avx512::run_angle<float>,
                             avx512::run_angle<double>,
                             avx512::exponential_of,
                             avx512::log_ratio_of};

}  // namespace affkd
