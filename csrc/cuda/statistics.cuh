// Phase statistics: the statistic of a matrix that its tiles could not tell, of either side one
// part for every block of rows.
#pragma once

#include "sides.cuh"

namespace affkd::cuda {

template <typename T, bool kCentered>
class StatisticsBlock {
 public:
  struct Shared {
    State states[kWarps];
    double sums[kWarps];
    typename Sides<T, kCentered>::Means means;
  };

  AFFKD_DEVICE StatisticsBlock(const Params& p, const RowTask& task, Shared& shared)
      : p_(p), shared_(shared), task_(task), sides_(p, task_, shared.means) {}

  AFFKD_DEVICE void run() {
    sides_.find_means(shared_.sums);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool student = side == 0;
      State state = empty_state(p_.settings.normalization);
      sides_.row().each_pair([&](int64_t j) { add_entry(student, j, state); });
      write(student, state);
    }
  }

 private:
  AFFKD_DEVICE void add_entry(bool student, int64_t j, State& state) const {
    const T before = sides_.affinity(student, j);
    if (kCentered) {
      const Summed side = student ? Summed::student : Summed::teacher;
      const double after = sides_.centered(before, side, j), a = before;
      state = {state.first + after * after, state.second + a * a, 0};
    } else {
      const int64_t place = task_.row * p_.keys + j;
      add_to_state(p_.settings.normalization, before, sides_.row().own(j), place, state);
    }
  }

  AFFKD_DEVICE void write(bool student, State state) {
    const Normalization kind = p_.settings.normalization;
    __syncthreads();
    state = block_fold(state, shared_.states,
                       [=](State a, State b) { return join_states(kind, a, b); });
    if (threadIdx.x == 0) {
      states_of(p_, student, task_.matrix)[task_.block] = state;
    }
  }

  const Params& p_;
  Shared& shared_;
  const RowTask task_;
  Sides<T, kCentered> sides_;
};

// Phase statistics of a panel.
template <typename T>
union StatisticsShared {
  typename StatisticsBlock<T, false>::Shared plain;
  typename StatisticsBlock<T, true>::Shared centered;
};

template <typename T>
AFFKD_DEVICE void run_statistics(const Params& p, StatisticsShared<T>& shared) {
  if (is_centered(p)) {
    StatisticsBlock<T, true>(p, find_row(p), shared.centered).run();
  } else {
    StatisticsBlock<T, false>(p, find_row(p), shared.plain).run();
  }
}

}  // namespace affkd::cuda
