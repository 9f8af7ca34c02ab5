// What a loss asks of the kernels, whatever the device: which stages, and their constants. Plain
// data.
#pragma once

#include <cstddef>
#include <cstdint>

namespace affkd {

// How A follows from the dot product g of a pair (and from sq, its squared distance).
enum class PairFunction : int64_t {
  linear,            // scale * g + offset: gram, cosine, shifted cosine
  squared_distance,  // sq
  distance,          // sqrt(max(sq, eps))
  gaussian,          // exp(-scale * sq)
  taylor,            // exp(-scale) * sum_{p <= order} (scale * g)^p / p!
  power,             // (scale * g + offset)^order
};

enum class Normalization : int64_t {
  none,
  row_l2,
  row_l1,
  row_sum,
  softmax,
  frobenius,
  frobenius_centered,
  mean_positive,
  mean_all,
  mean_offdiag,
  max,
  max_detached,
};

enum class Loss : int64_t {
  mse,
  l1,
  smooth_l1,
  kl_forward,
  kl_reverse,
  kl_symmetric,
  cross_entropy
};

enum class Diagonal : int64_t { keep, zero, exclude };

enum class Reduction : int64_t { mean, batchmean, matrixmean, sum };

enum class Algorithm : int64_t { dense, tiled };

struct Settings {
  PairFunction pair;
  bool unit;  // of directions x / |x|
  int64_t order;
  bool clamped;
  Normalization normalization;
  Loss loss;
  Diagonal diagonal;
  Algorithm algorithm;
  double student_scale;
  double teacher_scale;
  double offset;
  double affinity_eps;
  double clamp_min;
  double statistic_eps;
  double student_tau;
  double teacher_tau;
  double beta;
  double log_eps;
};

}  // namespace affkd
