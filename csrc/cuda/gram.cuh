// Phase gram: a block computes one tile of one side's pairs from the features, and whatever else
// its items tell on the way: their lengths, whether they are finite, the tile's part of the
// statistic.
#pragma once

#include "tile_items.cuh"

namespace affkd::cuda {

template <typename T, Precision P>
class GramTile {
 public:
  struct Shared {
    typename TileItems<T>::Shared items;
    State states[kWarps];
  };

  AFFKD_DEVICE GramTile(const Params& p, const TileTask& task, Shared& shared)
      : p_(p), shared_(shared), task_(task), items_(p, task, shared.items) {}

  AFFKD_DEVICE void run() {
    reset_arrivals();
    accumulate();
    items_.finish();
    finish_pairs();
  }

 private:
  AFFKD_DEVICE void reset_arrivals() const {
    if (p_.task.resets && blockIdx.x == 0) {
      for (int64_t i = threadIdx.x; i <= p_.matrices; i += kThreads) {
        p_.work.arrivals[i] = 0;
      }
      const int64_t queues = is_centered_on_the_way(p_) ? kJoint * p_.matrices : 0;
      for (int64_t i = threadIdx.x; i < queues; i += kThreads) {
        p_.work.queues[i] = {0, 0};
      }
    }
  }

  AFFKD_DEVICE void accumulate() {
    const int64_t chunks = divide_up(items_.dim(), int64_t{kDepth});
    items_.begin();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const T* queries = items_.take(chunk);
      // into what the last chunk, which all threads are done with, has occupied
      items_.start_next(chunk);
      product_.add(queries, queries + kEdge * kChunkPitch<T>);
      items_.land_next(chunk);
    }
    items_.end();
    product_.store(shared_.items.chunks);
  }

  AFFKD_DEVICE void finish_pairs() {
    const PairStage<T> stage(p_);
    const T scale = scale_of<T>(p_, task_.student);
    State state = empty_state(p_.settings.normalization);
    const bool has_mirror = p_.columns || (is_mirrored(p_) && task_.row != task_.column);
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
    const bool transposed = p_.columns && mirrored, turned = mirrored && !transposed;
    const int64_t i = turned ? task_.column + column : task_.row + row;
    const int64_t j = turned ? task_.row + row : task_.column + column;
    if (i >= p_.task.panel.row_begin + p_.task.panel.rows || j >= p_.keys) {
      return;
    }
    const bool own = is_own(p_, i, j);
    const T value = (own ? own_pair(held) : held) + part_of_key(mirrored ? row : kEdge + column);
    const int64_t at =
        transposed ? transposed_index(p_, task_.matrix, i, j) : pair_index(p_, task_.matrix, i, j);
    static_cast<T*>(task_.student ? p_.work.student : p_.work.teacher)[at] = value;
    if (gram_has_states(p_) && takes_part(p_, task_.matrix, i, j)) {
      add_to_state(p_.settings.normalization, stage.affinity(value, scale, own), own,
                   i * p_.keys + j, state);
    }
  }

  AFFKD_DEVICE T pair(int row, int column) const {
    constexpr int groups = RowProduct<T, P>::kGroups;
    T product = sum_of_groups<groups, kEdge + 1>(shared_.items.chunks, row, column);
    T query = shared_.items.norms[row], key = shared_.items.norms[kEdge + column];
    if (p_.settings.unit) {
      product *= query * key;
      // a single feature leaves its sign, and opposite items must not be at almost -1
      product = items_.dim() == 1 ? sign(product) : product;
      query = query > T{0} ? T{1} : T{0};
      key = key > T{0} ? T{1} : T{0};
    }
    return is_distance(p_.settings.pair)
               ? pair_value<PairFunction::squared_distance>(product, query, key, T{1}, T{0}, T{0})
               : product;
  }

  // What is known of an item and itself: their distance is 0, and their cosine, unless the item
  // counts as nothing or is not finite, is 1.
  AFFKD_DEVICE T own_pair(T held) const {
    if (is_distance(p_.settings.pair)) {
      return T{0};
    }
    return p_.self && p_.settings.unit && held > T{0} ? T{1} : held;
  }

  // of a pair whose row has lost a constant
  AFFKD_DEVICE T part_of_key(int item) const {
    return items_.drops_row_constants() ? shared_.items.norms[item] : T{0};
  }

  AFFKD_DEVICE void write_state(State state) {
    const Normalization kind = p_.settings.normalization;
    state = block_fold(state, shared_.states,
                       [=](State a, State b) { return join_states(kind, a, b); });
    if (threadIdx.x == 0) {
      add_to_slot(p_, task_, state);
    }
  }

  const Params& p_;
  Shared& shared_;
  const TileTask& task_;
  TileItems<T> items_;
  RowProduct<T, P> product_;
};

// What a block does lies in shared memory, as the registers are those of the product.
template <typename T, Precision P>
class GramBlock {
 public:
  struct Shared {
    typename GramTile<T, P>::Shared tile;
    TileTask task;
  };

  AFFKD_DEVICE GramBlock(const Params& p, Shared& shared) : p_(p), shared_(shared) {}

  AFFKD_DEVICE void run() {
    bool last = false;
#pragma unroll 1
    for (int round = 0; !last; ++round) {
      if (threadIdx.x == 0) {
        shared_.task = find_tile(p_, round);
      }
      __syncthreads();
      GramTile<T, P>(p_, shared_.task, shared_.tile).run();
      last = shared_.task.last;
      __syncthreads();
    }
  }

 private:
  const Params& p_;
  Shared& shared_;
};

}  // namespace affkd::cuda
