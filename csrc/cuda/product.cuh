// Phase product: gradients from V = a (W1 + W1') + b (W2 + W2') and the features. With
//   dX_i = sum_j V_ij x_j + s_i x_i
// a function of g has s = 0, one of the distance s_i = -sum_j V_ij (of V less its sign), and one of
// unit items s_i = -sum_j V_ij u_i.u_j, which takes out what would change the length.
#pragma once

#include "gradient_pairs.cuh"
#include "multiply.cuh"
#include "queue.cuh"
#include "sums.cuh"

namespace affkd::cuda {

template <typename T, Precision P>
class ProductTile {
 public:
  struct Shared {
    union {
      struct {
        T v[kEdge * kChunkPitch<T>];
        T x[kDepth * kSlicePitch<T>];
        T mirror[kEdge][kEdge + 1];
        T cosines[kEdge][kEdge + 1];
      } tile;
      T partial[SliceProduct<T, P>::kGroups * kEdge * (kWidth + 1)];
      typename GradientPairs<T>::Scratch scratch;
      typename SumsBlock<T>::Shared sums;
    };
    typename GradientPairs<T>::Means means;
    T origin[kWidth];
    T own_sums[kEdge];
    unsigned unit;
  };
  static_assert(sizeof(Shared::scratch) <= sizeof(Shared::tile.v),
                "of the tile, x is written while others may still read the scratch");

  AFFKD_DEVICE ProductTile(const Params& p, Shared& shared)
      : p_(p),
        shared_(shared),
        keys_(p.task.keys || (p.task.also_keys && blockIdx.x >= query_blocks(p))),
        block_(blockIdx.x - (p.task.also_keys && keys_ ? query_blocks(p) : 0)),
        features_(keys_ ? p.student_keys : p.student),
        matrix_(p.task.panel.matrix_begin + unit() / tiles()),
        slice_(block_ % slices() * kSlice),
        item_(unit() % tiles() * kTile + (keys_ ? 0 : p.task.panel.row_begin)),
        end_(keys_ ? p.keys : end_of_panel()),
        other_begin_(keys_ ? p.task.panel.row_begin : 0),
        other_end_(keys_ ? end_of_panel() : p.keys),
        pairs_(p, matrix_, keys_, shared.means) {}

  AFFKD_DEVICE void run() {
    if (centers_gradient_on_the_way(p_) && has_own_columns(p_, true)) {
      sum_columns();
    }
    // what takes part in nothing shows nowhere, even if it is NaN
    const bool any = pairs_.prepare(shared_.scratch, shared_.means);
    if (any) {
      prepare_origin();
      accumulate();
    }
    write(any);
  }

 private:
  static constexpr int kPairs = kEdge / kWarps;  // of one tile, for every thread

  AFFKD_DEVICE int64_t slices() const { return divide_up(p_.student.dim, kSlice); }
  AFFKD_DEVICE int64_t tiles() const {
    return divide_up(keys_ ? p_.keys : p_.task.panel.rows, kTile);
  }
  AFFKD_DEVICE int64_t unit() const { return block_ / slices(); }
  AFFKD_DEVICE int64_t end_of_panel() const { return p_.task.panel.row_begin + p_.task.panel.rows; }

  // of dA, by all blocks of the matrix together; those of its rows are known
  AFFKD_DEVICE void sum_columns() {
    share_out(
        queue_of(p_, Joint::gradient, matrix_), divide_up(p_.keys, kColumns), &shared_.unit,
        [&](int64_t part) { SumsBlock<T>(p_, true, shared_.sums).sum_columns(matrix_, part); });
  }

  // A common offset of the features is no matter where the rows of V sum to 0 or s_i makes up for
  // it.
  AFFKD_DEVICE bool has_origin() const {
    const PairFunction pair = p_.settings.pair;
    const bool centered = is_centered(p_) && pair == PairFunction::linear && !p_.settings.clamped &&
                          p_.settings.diagonal == Diagonal::keep;
    return (centered || is_distance(pair)) && !p_.settings.unit;
  }
  AFFKD_DEVICE bool has_sums() const { return p_.settings.unit || is_distance(p_.settings.pair); }
  AFFKD_DEVICE bool is_present(int64_t item) const {
    return item < end_ && is_valid(keys_ ? p_.key_mask : p_.mask, matrix_, item);
  }

  // Any common point will do: here a mean of the block's own items.
  AFFKD_DEVICE void prepare_origin() {
    if (!has_origin()) {
      return;
    }
    const int row = static_cast<int>(threadIdx.x) / 8, run = static_cast<int>(threadIdx.x) % 8;
    const Item item(features_, keys_ ? p_.key_mask : p_.mask, matrix_, item_ + row, end_);
    T loaded[kRun];
    item.load(slice_ + run * kRun, loaded);
    store_run(shared_.tile.x + row * kSlicePitch<T> + run * kRun, loaded);
    const int count = __syncthreads_count(item.present) / 8;
    if (threadIdx.x < kWidth) {
      T sum = 0, low = static_cast<T>(INFINITY), high = -low;
      for (int i = 0; i < kEdge; ++i) {
        const T x = shared_.tile.x[i * kSlicePitch<T> + static_cast<int>(threadIdx.x)];
        if (is_present(item_ + i)) {
          sum += x;
          low = x < low ? x : low;
          high = x > high ? x : high;
        }
      }
      shared_.origin[threadIdx.x] = inner_mean(sum, low, high, count);
    }
    __syncthreads();
  }

  // What a thread has loaded of the next tile: four of its pairs and a run of features.
  struct Loaded {
    T direct[kPairs];
    T mirror[kPairs];
    T cosines[kPairs];
    T x[kRun];
  };

  AFFKD_DEVICE void accumulate() {
    load(other_begin_);
    for (int64_t other = other_begin_; other < other_end_; other += kTile) {
      __syncthreads();
      store_run(shared_.tile.x + static_cast<int>(threadIdx.x) / 8 * kSlicePitch<T> +
                    static_cast<int>(threadIdx.x) % 8 * kRun,
                loaded_.x);
      if (pairs_.reads_mirror()) {
        store_mirror();
        __syncthreads();
      }
      store_pairs();
      if (other + kTile < other_end_) {
        load(other + kTile);
      }
      __syncthreads();
      product_.add(shared_.tile.v, shared_.tile.x);
    }
    finish_sums();
  }

  AFFKD_DEVICE void load(int64_t other) {
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      const int64_t row = warp_index() + r * kWarps, lane = lane_index();
      const bool unit = p_.settings.unit;
      if (pairs_.reads_direct()) {
        const int64_t item = item_ + row, neighbor = other + lane;
        const bool inside = item < end_ && neighbor < other_end_;
        loaded_.direct[r] = inside ? pairs_.direct(item, neighbor) : T{0};
        if (!keys_) {
          loaded_.cosines[r] = inside && unit ? pairs_.cosine(item, neighbor) : T{0};
        }
      }
      if (pairs_.reads_mirror()) {
        const int64_t neighbor = other + row, item = item_ + lane;
        const bool inside = neighbor < other_end_ && item < end_;
        loaded_.mirror[r] = inside ? pairs_.mirror(item, neighbor) : T{0};
        if (keys_) {
          loaded_.cosines[r] = inside && unit ? pairs_.cosine(neighbor, item) : T{0};
        }
      }
    }
    load_features(other + static_cast<int>(threadIdx.x) / 8);
  }

  AFFKD_DEVICE void load_features(int64_t other) {
    const bool key = !keys_;
    const Item item(key ? p_.student_keys : p_.student, key ? p_.key_mask : p_.mask, matrix_, other,
                    other_end_);
    const int run = static_cast<int>(threadIdx.x) % 8 * kRun;
    item.load(slice_ + run, loaded_.x);
    const T scale = p_.settings.unit && item.present ? pairs_.inverse_length(other, key) : T{1};
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const T origin = has_origin() && item.present ? shared_.origin[run + k] : T{0};
      loaded_.x[k] = (loaded_.x[k] - origin) * scale;
    }
  }

  AFFKD_DEVICE void store_mirror() {
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      const int row = warp_index() + r * kWarps;
      shared_.tile.mirror[row][lane_index()] = loaded_.mirror[r];
      if (keys_) {
        shared_.tile.cosines[row][lane_index()] = loaded_.cosines[r];
      }
    }
  }

  AFFKD_DEVICE void store_pairs() {
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      const int row = warp_index() + r * kWarps, lane = lane_index();
      T value = pairs_.reads_direct() ? loaded_.direct[r] : T{0};
      T cosine = loaded_.cosines[r];
      if (pairs_.reads_mirror()) {
        value += shared_.tile.mirror[lane][row];
        cosine = keys_ ? shared_.tile.cosines[lane][row] : cosine;
      }
      shared_.tile.v[row * kChunkPitch<T> + lane] = value;
      sums_[r] += p_.settings.unit ? value * cosine : value;
    }
  }

  AFFKD_DEVICE void finish_sums() {
#pragma unroll
    for (int r = 0; r < kPairs; ++r) {
      const T sum = warp_sum(sums_[r]);
      if (lane_index() == 0) {
        shared_.own_sums[warp_index() + r * kWarps] = sum;
      }
    }
    __syncthreads();
    product_.store(shared_.partial);
    __syncthreads();
  }

  AFFKD_DEVICE void write(bool any) {
    T* out = static_cast<T*>(keys_ ? p_.key_gradient : p_.query_gradient);
    if (keys_ && p_.self) {
      out = static_cast<T*>(p_.query_gradient);
    }
    const int64_t items = keys_ ? p_.keys : p_.queries;
    for (int e = static_cast<int>(threadIdx.x); e < kEdge * kWidth; e += kThreads) {
      const int row = e / kWidth, column = e % kWidth;
      const int64_t item = item_ + row, feature = slice_ + column;
      if (item < end_ && feature < features_.dim) {
        const T gradient = any && is_present(item) ? gradient_of(row, column) : T{0};
        T& target = out[(matrix_ * items + item) * features_.dim + feature];
        target = p_.task.accumulates ? target + gradient : gradient;
      }
    }
  }

  AFFKD_DEVICE T gradient_of(int row, int column) const {
    constexpr int groups = SliceProduct<T, P>::kGroups;
    const T product = sum_of_groups<groups, kWidth + 1>(shared_.partial, row, column);
    if (!has_sums()) {
      return product;
    }
    const int64_t item = item_ + row;
    const int64_t at =
        matrix_ * features_.matrix + item * features_.item + (slice_ + column) * features_.feature;
    const T x = read_number<T>(features_.data, features_.storage, at);
    const T sum = shared_.own_sums[row];
    if (!p_.settings.unit) {
      return sum * (x - shared_.origin[column]) - product;
    }
    const T inverse = pairs_.inverse_length(item, keys_);
    // of a single feature the direction is a constant
    const bool flows = inverse != T{0} && features_.dim > 1;
    return flows ? inverse * (product - sum * (inverse * x)) : T{0};
  }

  const Params& p_;
  Shared& shared_;
  const bool keys_;              // whose gradient this is, not the queries'
  const int64_t block_;          // among those of the same
  const FeatureView& features_;  // of the items whose gradient this is
  const int64_t matrix_;
  const int64_t slice_;        // the first of the block's features
  const int64_t item_;         // the first of its items
  const int64_t end_;          // of the items
  const int64_t other_begin_;  // the items on the other side of the pairs
  const int64_t other_end_;
  GradientPairs<T> pairs_;
  Loaded loaded_;
  T sums_[kPairs] = {};
  SliceProduct<T, P> product_;
};

}  // namespace affkd::cuda
