#define AFFKD_NAMESPACE baseline
#define AFFKD_VECTOR_BYTES 16
#if defined(__aarch64__)
#define AFFKD_GROUP_ROWS 12
#else
#define AFFKD_GROUP_ROWS 6
#endif

#include "kernels.h"

namespace affkd {

extern const Kernels baseline_kernels;
const Kernels baseline_kernels{0,
                               "baseline",
                               baseline::run<float>,
                               baseline::run<double>,
                               baseline::run_angle<float>,
                               baseline::run_angle<double>,
                               baseline::exponential_of,
                               baseline::log_ratio_of};

}  // namespace affkd
