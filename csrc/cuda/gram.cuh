// Phase gram: a block computes one tile of one side's pairs from the features, and whatever else
// its items tell on the way: their lengths, whether they are finite, the tile's part of the
// statistic.
#pragma once

#include "multiply.cuh"
#include "tiles.cuh"

namespace affkd::cuda {

template <typename T, Precision P>
class GramTile {
 public:
  // chunks of features that are on their way while one is worked on
  static constexpr int kStages = sizeof(T) == 4 ? 3 : 2;
  static constexpr int kChunk = 2 * kEdge * kChunkPitch<T>;

  struct Shared {
    alignas(16) T chunks[kStages * kChunk];  // the queries of a chunk, then its keys
    T column_sums[kWarps][kDepth];
    T norms[2 * kEdge];
    State states[kWarps];
  };

  AFFKD_DEVICE GramTile(const Params& p, Shared& shared)
      : p_(p),
        shared_(shared),
        task_(find_tile(p)),
        row_(static_cast<int>(threadIdx.x) / 4),
        run_(static_cast<int>(threadIdx.x) % 4 * kRun),
        item_(own_item()),
        plain_(item_.template is_plain<T>()),
        // double has no closed form, and is to know it when it is compiled
        closed_(sizeof(T) == sizeof(float) && is_closed(p)),
        centered_(closed_ || (is_distance(p.settings.pair) && !p.settings.unit)) {}

  AFFKD_DEVICE void run() {
    reset_arrivals();
    accumulate();
    finish_items();
    finish_pairs();
  }

 private:
  AFFKD_DEVICE Item own_item() const {
    const int64_t i = row_ % kEdge;
    if (row_ < kEdge) {
      return {task_.student ? p_.student : p_.teacher, p_.mask, task_.matrix, task_.row + i,
              p_.queries};
    }
    return {task_.student ? p_.student_keys : p_.teacher_keys, p_.key_mask, task_.matrix,
            task_.column + i, p_.keys};
  }

  AFFKD_DEVICE void reset_arrivals() const {
    if (p_.task.resets && blockIdx.x == 0 && threadIdx.x < 3) {
      p_.work.arrivals[threadIdx.x] = 0;
    }
  }

  AFFKD_DEVICE T* own_run(int64_t chunk) const {
    return shared_.chunks + chunk % kStages * kChunk + row_ * kChunkPitch<T> + run_;
  }

  // What is not plain passes through registers, so that its way is as long as a chunk's work.
  AFFKD_DEVICE void start(int64_t chunk) {
    if (plain_) {
      item_.copy(chunk * kDepth + run_, own_run(chunk));
    } else {
      item_.load(chunk * kDepth + run_, loaded_);
    }
    commit_copies();
  }

  AFFKD_DEVICE void land(int64_t chunk) {
    if (!plain_) {
      store_run(own_run(chunk), loaded_);
    }
  }

  AFFKD_DEVICE void accumulate() {
    const int64_t chunks = divide_up(item_.view.dim, int64_t{kDepth});
    find_origin();
    for (int64_t chunk = 0; chunk < kStages - 1; ++chunk) {
      start(chunk);
      land(chunk);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      wait_for_copies<kStages - 2>();
      if (closed_) {
        // the lengths that centering takes away
        add_to_norm(chunk);
      }
      if (centered_) {
        __syncthreads();
        center(chunk);
      }
      if (!closed_) {
        add_to_norm(chunk);
      }
      __syncthreads();
      // into what the last chunk, which all threads are done with, has occupied
      start(chunk + kStages - 1);
      const T* rows = shared_.chunks + chunk % kStages * kChunk;
      product_.add(rows, rows + kEdge * kChunkPitch<T>);
      land(chunk + kStages - 1);
    }
    wait_for_copies<0>();
    __syncthreads();
    product_.store(shared_.chunks);
  }

  // Both sides may lose a common point: a distance any, so that the mean of the tile's own items,
  // which is at hand, will do, and leaves less of a cluster's offset than that of all items would.
  // A matrix that is centered later takes the same point in all tiles: the mean of one item a warp,
  // the first valid ones of as many parts of the matrix.
  AFFKD_DEVICE void find_origin() {
    if (!centered_) {
      return;
    }
    if (!closed_) {
      present_ = static_cast<T>(__syncthreads_count(item_.present)) / 4;
      return;
    }
    int64_t i = p_.queries * warp_index() / kWarps;
    const int64_t end = p_.queries * (warp_index() + 1) / kWarps;
    while (i < end && !is_valid(p_.mask, task_.matrix, i)) {
      ++i;
    }
    origin_ = i < end ? i : -1;
    present_ = static_cast<T>(__syncthreads_count(origin_ >= 0) / 32);
  }

  AFFKD_DEVICE T origin_feature(int64_t chunk) const {
    const int64_t feature = chunk * kDepth + lane_index();
    const FeatureView& view = item_.view;
    const int64_t at = task_.matrix * view.matrix + origin_ * view.item + feature * view.feature;
    const bool inside = origin_ >= 0 && feature < view.dim;
    return inside ? read_number<T>(view.data, view.storage, at) : T{0};
  }

  AFFKD_DEVICE T sum_of_tile(int64_t chunk) const {
    const T* rows = shared_.chunks + chunk % kStages * kChunk;
    T sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * kEdge / kWarps; ++i) {
      sum += rows[(warp_index() * (2 * kEdge / kWarps) + i) * kChunkPitch<T> + lane_index()];
    }
    return sum;
  }

  AFFKD_DEVICE void center(int64_t chunk) {
    shared_.column_sums[warp_index()][lane_index()] =
        closed_ ? origin_feature(chunk) : sum_of_tile(chunk);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      T mean = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        mean += shared_.column_sums[warp][run_ + k];
      }
      own_run(chunk)[k] -= present_ > 0 ? mean / present_ : T{0};
    }
  }

  AFFKD_DEVICE void add_to_norm(int64_t chunk) {
    const T* run = own_run(chunk);
    T sum = 0;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      sum += run[k] * run[k];
    }
    norm_ += sum;
  }

  // Squared lengths, and what later phases need to know of an item.
  AFFKD_DEVICE void finish_items() {
    T norm = norm_;
    norm += __shfl_xor_sync(kAllLanes, norm, 1);
    norm += __shfl_xor_sync(kAllLanes, norm, 2);
    // 0 * norm is NaN if any feature is inf or NaN
    const T poison = item_.present ? 0 * norm : T{0};
    if (p_.settings.unit) {
      norm = inverse_length(norm);
    }
    if (threadIdx.x % 4 == 0) {
      shared_.norms[row_] = norm;
    }
    if (tells_of_items()) {
      write_item(norm, poison);
    }
    if (closed_ && task_.row == task_.column && row_ < kEdge) {
      write_squares(norm);
    }
    __syncthreads();
  }

  // 0 where |x| <= eps; NaN where |x| overflowed, which must not pass for 0
  AFFKD_DEVICE T inverse_length(T norm) const {
    // rounded once, as all pairs of the item share it
    const double length = square_root(static_cast<double>(norm));
    return length <= p_.settings.affinity_eps ? T{0}
                                              : static_cast<T>((length - length) + 1 / length);
  }

  // Of the tiles that an item is in, one tells of it: warps 0-3 of queries, 4-7 of keys.
  AFFKD_DEVICE bool tells_of_items() const {
    if (row_ < kEdge) {
      return is_mirrored(p_) ? task_.row == task_.column : task_.column == 0;
    }
    return !is_mirrored(p_) && task_.row == p_.task.panel.row_begin;
  }

  AFFKD_DEVICE void write_item(T norm, T poison) const {
    const bool query = row_ < kEdge;
    const int64_t first = query ? task_.row : task_.column, item = first + row_ % kEdge;
    const int64_t count = query ? p_.queries : p_.keys;
    const int64_t longest = p_.queries > p_.keys ? p_.queries : p_.keys;
    if (p_.settings.unit && task_.student && threadIdx.x % 4 == 0 && item < count) {
      const int64_t list = (query ? 0 : p_.matrices) + task_.matrix;
      static_cast<T*>(p_.work.inverse_lengths)[list * longest + item] = norm;
    }
    // eight items a warp, each four times
    poison = warp_sum(poison);
    if (lane_index() == 0) {
      const int64_t kind = (task_.student ? 0 : 2) + (query ? 0 : 1);
      const int64_t list = kind * p_.matrices + task_.matrix;
      const int64_t at = list * p_.item_blocks * 4 + first / kEdge * 4 + warp_index() % 4;
      static_cast<T*>(p_.work.poison)[at] = poison;
    }
  }

  // sum |x|^2 of eight items, those of a block of rows
  AFFKD_DEVICE void write_squares(T norm) const {
    const double sum = warp_sum(item_.present ? static_cast<double>(norm) : 0) / 4;
    const int64_t slot = task_.row / kWarps + warp_index();
    if (lane_index() == 0 && slot < p_.state_slots) {
      states_of(p_, task_.student, task_.matrix)[slot] = {0, sum, 0};
    }
  }

  AFFKD_DEVICE void finish_pairs() {
    const PairStage<T> stage(p_);
    const T scale = scale_of<T>(p_, task_.student);
    State state = empty_state(p_.settings.normalization);
    const bool has_mirror = is_mirrored(p_) && task_.row != task_.column;
    // the tile, then its mirror image
#pragma unroll 1
    for (int line = warp_index(); line < (has_mirror ? 2 : 1) * kEdge; line += kWarps) {
      const bool mirrored = line >= kEdge;
      write_pair(mirrored ? lane_index() : line, mirrored ? line - kEdge : lane_index(), mirrored,
                 stage, scale, state);
    }
    if (gram_has_states(p_)) {
      write_state(state);
    }
  }

  // What is held of the pair at (row, column) of the tile, to where it belongs, or where its mirror
  // image does. A diagonal tile is its own mirror image, to the last bit.
  AFFKD_DEVICE void write_pair(int row, int column, bool mirrored, const PairStage<T>& stage,
                               T scale, State& state) {
    const bool swapped = is_mirrored(p_) && task_.row == task_.column && row > column;
    const T held = swapped ? pair(column, row) : pair(row, column);
    const int64_t i = mirrored ? task_.column + column : task_.row + row;
    const int64_t j = mirrored ? task_.row + row : task_.column + column;
    if (i >= p_.task.panel.row_begin + p_.task.panel.rows || j >= p_.keys) {
      return;
    }
    const bool own = is_own(p_, i, j);
    const T value = own ? own_pair(held) : held;
    static_cast<T*>(task_.student ? p_.work.student
                                  : p_.work.teacher)[pair_index(p_, task_.matrix, i, j)] = value;
    if (gram_has_states(p_) && takes_part(p_, task_.matrix, i, j)) {
      add_to_state(p_.settings.normalization, stage.affinity(value, scale, own), own,
                   i * p_.keys + j, state);
    }
  }

  // What is known of an item and itself: their distance is 0, and their cosine, unless the item
  // counts as nothing or is not finite, is 1.
  AFFKD_DEVICE T own_pair(T held) const {
    if (is_distance(p_.settings.pair)) {
      return T{0};
    }
    return p_.self && p_.settings.unit && held > T{0} ? T{1} : held;
  }

  AFFKD_DEVICE T pair(int row, int column) const {
    constexpr int groups = RowProduct<T, P>::kGroups;
    T product = sum_of_groups<groups, kEdge + 1>(shared_.chunks, row, column);
    T query = shared_.norms[row], key = shared_.norms[kEdge + column];
    if (p_.settings.unit) {
      product *= query * key;
      query = query > T{0} ? T{1} : T{0};
      key = key > T{0} ? T{1} : T{0};
    }
    return is_distance(p_.settings.pair)
               ? pair_value<PairFunction::squared_distance>(product, query, key, T{1}, T{0}, T{0})
               : product;
  }

  AFFKD_DEVICE void write_state(State state) {
    const Normalization kind = p_.settings.normalization;
    state = block_fold(state, shared_.states,
                       [=](State a, State b) { return join_states(kind, a, b); });
    if (threadIdx.x == 0) {
      states_of(p_, task_.student, task_.matrix)[task_.slot] = state;
    }
  }

  const Params& p_;
  Shared& shared_;
  const TileTask task_;
  const int row_;  // of the items of a chunk, 32 queries and 32 keys
  const int run_;  // the first of this thread's features in a chunk
  const Item item_;
  const bool plain_;
  const bool closed_;
  const bool centered_;
  int64_t origin_ = -1;  // the item that this warp adds to the common origin
  T present_ = 0;        // items that an origin is the mean of
  T norm_ = 0;
  T loaded_[kRun];
  RowProduct<T, P> product_;
};

}  // namespace affkd::cuda
