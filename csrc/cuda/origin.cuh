// The common point that the features of a tile lose before they are multiplied: where the loss is
// the same without it, and would lose digits with it.
#pragma once

#include "multiply.cuh"
#include "tiles.cuh"

namespace affkd::cuda {

// A softmax does not see what all pairs of a row have in common. With queries q_i = a_i + m and
// keys k_j = b_j + m
//   q_i.k_j = a_i.b_j + m.b_j + q_i.m
// loses the last term: a_i.b_j is still the same for both sides of a self-affinity. Features of
// half precision stay what they are, which tensor cores multiply exactly.
AFFKD_DEVICE bool drops_row_constants(const Params& p) {
  const Settings& settings = p.settings;
  return settings.normalization == Normalization::softmax &&
         settings.pair == PairFunction::linear && !settings.unit && !settings.clamped &&
         settings.diagonal != Diagonal::zero && !has_exact_tf32(p);
}

// A distance may lose any point, and takes the mean of the tile's own items, which is at hand and
// leaves less of a cluster's offset than that of all items would. Where tiles have to agree, and
// equal pairs have to tie for the maximum, it is the mean of eight samples, valid keys from as many
// parts of the matrix; and 0 where they are on both sides of it, as pairs of x and of -x have to
// tie, too, which any other point would round apart.
template <typename T>
class TileOrigin {
 public:
  struct Shared {
    T points[2][kDepth];  // of a chunk and of the next
  };

  AFFKD_DEVICE TileOrigin(const Params& p, const TileTask& task, Shared& shared)
      : shared_(shared),
        // double needs neither of these two, and is to know it when it is compiled
        centered_(sizeof(T) == sizeof(float) && has_centered_origin(p)),
        drops_constants_(sizeof(T) == sizeof(float) && drops_row_constants(p)),
        ties_(has_ties(p) && moves_distances(p)),
        of_matrix_(centered_ || drops_constants_ || ties_),
        of_tile_(!of_matrix_ && moves_distances(p)),
        sample_(task.student ? p.student_keys : p.teacher_keys, p.key_mask, task.matrix,
                of_matrix_ ? find_sample(p, task.matrix) : 0, p.keys) {}

  AFFKD_DEVICE bool is_centered() const { return centered_; }
  AFFKD_DEVICE bool drops_constants() const { return drops_constants_; }

  // By all threads, before the first chunk; `present`: this thread's item of the tile is.
  AFFKD_DEVICE void find(bool present) {
    if (of_tile_) {
      count_ = __syncthreads_count(present) / 4;
    }
    if (of_matrix_) {
      count_ = fold(sample_.present ? 1 : 0, [](int a, int b) { return a + b; });
      publish(0, feature_of_sample(0));
      __syncthreads();
    }
  }

  // Takes the origin out of this thread's run, which begins at feature `first` of the chunk, and
  // returns the inner product of the two. `rows`: all items of the tile, which the threads have
  // written their runs of.
  AFFKD_DEVICE T subtract(int64_t chunk, const T* rows, T* run, int first) {
    if (!of_tile_ && !of_matrix_) {
      return T{0};
    }
    if (of_tile_) {
      __syncthreads();
      write(chunk, mean_of(fold(sum_of_items(rows), [](T a, T b) { return a + b; })));
      __syncthreads();
    }
    // on its way while there is something else to do
    const T next = of_matrix_ ? feature_of_sample(chunk + 1) : T{0};
    T product = 0;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const T point = shared_.points[chunk % 2][first + k];
      run[k] -= point;
      product += point * run[k];
    }
    if (of_matrix_) {
      // the last but one chunk's place, which nobody reads any more
      publish(chunk + 1, next);
    }
    return product;
  }

 private:
  AFFKD_DEVICE static bool moves_distances(const Params& p) {
    return is_distance(p.settings.pair) && !p.settings.unit;
  }
  AFFKD_DEVICE static bool has_ties(const Params& p) {
    return is_maximum(p.settings.normalization);
  }

  // A thread is about one feature of a chunk, and one of eight samples or parts of the tile.
  AFFKD_DEVICE static int own_feature() { return static_cast<int>(threadIdx.x) / 8; }
  AFFKD_DEVICE static int own_part() { return static_cast<int>(threadIdx.x) % 8; }

  template <typename X, typename Combine>
  AFFKD_DEVICE static X fold(X x, Combine combine) {
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
      x = combine(x, from_lane_at(x, distance));
    }
    return x;
  }

  AFFKD_DEVICE T mean_of(T sum) const { return count_ > 0 ? sum / static_cast<T>(count_) : T{0}; }

  // The first valid key of a part, from an even or an odd one on, as items may alternate.
  AFFKD_DEVICE static int64_t find_sample(const Params& p, int64_t n) {
    int64_t i = p.keys * own_part() / 8;
    const int64_t end = p.keys * (own_part() + 1) / 8;
    i += end - i > 1 ? (i + own_part()) % 2 : 0;
    while (i < end && !is_valid(p.key_mask, n, i)) {
      ++i;
    }
    return i < end ? i : p.keys;
  }

  AFFKD_DEVICE T feature_of_sample(int64_t chunk) const {
    const FeatureView& view = sample_.view;
    const int64_t feature = chunk * kDepth + own_feature();
    const bool inside = sample_.present && feature < view.dim;
    const int64_t at = sample_.begin + feature * view.feature;
    return inside ? read_number<T>(view.data, view.storage, at) : T{0};
  }

  AFFKD_DEVICE static T sum_of_items(const T* rows) {
    T sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * kEdge; i += 8) {
      sum += rows[(own_part() + i) * kChunkPitch<T> + own_feature()];
    }
    return sum;
  }

  // Samples that differ by more than they have in common have no common point, and one that is far
  // off, as tokens that collect attention are, must not move all items. What is centered later may
  // lose any point.
  AFFKD_DEVICE void publish(int64_t chunk, T x) const {
    const T infinity = static_cast<T>(INFINITY);
    const T low = fold(sample_.present ? x : infinity, [](T a, T b) { return b < a ? b : a; });
    const T high = fold(sample_.present ? x : -infinity, [](T a, T b) { return a < b ? b : a; });
    const T sum = fold(x, [](T a, T b) { return a + b; });
    const T common = centered_ ? inner_mean(sum, low, high, count_) : mean_of(sum);
    const bool apart = (drops_constants_ && high - low > absolute(common)) ||
                       (ties_ && low <= T{0} && high >= T{0});
    write(chunk, apart ? T{0} : common);
  }

  AFFKD_DEVICE void write(int64_t chunk, T point) const {
    if (own_part() == 0) {
      shared_.points[chunk % 2][own_feature()] = point;
    }
  }

  Shared& shared_;
  const bool centered_;         // a matrix that is centered later
  const bool drops_constants_;  // a softmax
  const bool ties_;             // distances of which the smallest or the largest may be many
  const bool of_matrix_;        // one origin for all tiles
  const bool of_tile_;
  const Item sample_;
  int count_ = 0;  // items that an origin is the mean of
};

}  // namespace affkd::cuda
