// The items of a tile of phase gram, 32 queries and 32 keys: their features on the way through
// shared memory, and what they tell: their lengths, and whether they are finite.
#pragma once

#include "origin.cuh"
#include "states.cuh"

namespace affkd::cuda {

template <typename T>
class TileItems {
 public:
  // chunks of features that are on their way while one is worked on
  static constexpr int kStages = sizeof(T) == 4 ? 3 : 2;
  static constexpr int kChunk = 2 * kEdge * kChunkPitch<T>;

  struct Shared {
    alignas(16) T chunks[kStages * kChunk];  // the queries of a chunk, then its keys
    T norms[2 * kEdge];  // of every item |x|^2, 1 / |x| if units are asked for, or m.x (origin.cuh)
    typename TileOrigin<T>::Shared origin;
  };

  AFFKD_DEVICE TileItems(const Params& p, const TileTask& task, Shared& shared)
      : p_(p),
        task_(task),
        shared_(shared),
        row_(static_cast<int>(threadIdx.x) / 4),
        run_(static_cast<int>(threadIdx.x) % 4 * kRun),
        item_(own_item()),
        plain_(item_.template is_plain<T>()),
        origin_(p, task, shared.origin) {}

  AFFKD_DEVICE int64_t dim() const { return item_.view.dim; }

  AFFKD_DEVICE void begin() {
    for (int64_t chunk = 0; chunk < kStages - 1; ++chunk) {
      start(chunk);
      land(chunk);
    }
    origin_.find(item_.present);
  }

  // Waits for a chunk, and returns its queries, which its keys follow. All threads are then done
  // with the chunk before.
  AFFKD_DEVICE const T* take(int64_t chunk) {
    wait_for_copies<kStages - 2>();
    const T* rows = shared_.chunks + chunk % kStages * kChunk;
    if (origin_.is_centered()) {
      // the lengths that centering takes away
      add_squares(chunk);
    }
    const T shift = origin_.subtract(chunk, rows, own_run(chunk), run_);
    if (origin_.drops_constants()) {
      norm_ += shift;
    } else if (!origin_.is_centered()) {
      add_squares(chunk);
    }
    __syncthreads();
    return rows;
  }

  // What is to be there kStages - 1 chunks later: it starts before a chunk is worked on, and lands
  // after it.
  AFFKD_DEVICE void start_next(int64_t chunk) { start(chunk + kStages - 1); }
  AFFKD_DEVICE void land_next(int64_t chunk) { land(chunk + kStages - 1); }

  AFFKD_DEVICE void end() const {
    wait_for_copies<0>();
    __syncthreads();
  }

  AFFKD_DEVICE bool drops_row_constants() const { return origin_.drops_constants(); }

  // Lengths, and what later phases need to know of an item.
  AFFKD_DEVICE void finish() {
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
    __syncthreads();
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

  AFFKD_DEVICE void land(int64_t chunk) const {
    if (!plain_) {
      store_run(own_run(chunk), loaded_);
    }
  }

  // In the order of RowProduct, so that the distance of equal items is 0 where products are exact
  // in float, and that of similar ones is what their roundings agree on.
  AFFKD_DEVICE void add_squares(int64_t chunk) {
    const T* run = own_run(chunk);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      norm_ += run[k] * run[k];
    }
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
    const double square =
        origin_.is_centered() ? warp_sum(static_cast<double>(item_.present ? norm : T{0})) / 4 : 0;
    if (lane_index() == 0) {
      const int64_t kind = (task_.student ? 0 : 2) + (query ? 0 : 1);
      const int64_t list = kind * p_.matrices + task_.matrix;
      const int64_t at = list * p_.item_blocks * 4 + first / kEdge * 4 + warp_index() % 4;
      static_cast<T*>(p_.work.poison)[at] = poison;
      if (origin_.is_centered()) {
        p_.work.squares[at] = square;
      }
    }
  }

  const Params& p_;
  const TileTask& task_;
  Shared& shared_;
  const int row_;  // of the items of a chunk, 32 queries and 32 keys
  const int run_;  // the first of this thread's features in a chunk
  const Item item_;
  const bool plain_;
  TileOrigin<T> origin_;
  T norm_ = 0;
  T loaded_[kRun];
};

}  // namespace affkd::cuda
