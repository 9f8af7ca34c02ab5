// Phase rows: from a row of pairs of both sides to its loss, to what flows back through its
// statistic, and to W, which takes the place of the pairs.
#pragma once

#include "finish.cuh"

namespace affkd::cuda {

template <typename T>
class RowBlock {
 public:
  struct Shared {
    FinishShared finish;
    State states[kWarps];
    double sums[kWarps];
    RowTotals totals[kWarps];
  };

  AFFKD_DEVICE RowBlock(const Params& p, Shared& shared)
      : p_(p),
        shared_(shared),
        kind_(p.settings.normalization),
        task_(find_row(p)),
        row_(p, task_),
        pairs_(p),
        student_scale_(scale_of<T>(p, true)),
        teacher_scale_(scale_of<T>(p, false)),
        stage_(p.settings),
        weight_(task_.present ? row_weight(p, task_.matrix, task_.row) : 0) {}

  AFFKD_DEVICE void run() {
    prepare_matrix();
    prepare_row();
    const bool scales = p_.task.writes_losses && p_.scale_gradient != nullptr;
    const bool known = correction_is_known(), pairs = p_.task.writes_pairs || scales;
#pragma unroll 1
    for (int round = known ? 1 : 0; round < 2; ++round) {
      // with an unknown c the losses come first, and tell it
      const bool losses = known || round == 0;
      if (losses || pairs) {
        sweep(losses, round == 1 && p_.task.writes_pairs, round == 1 && scales);
      }
      correction_ = known ? correction_ : warp_sum(static_cast<double>(sums_.correction));
    }
    if (p_.task.writes_losses) {
      write_totals();
    }
    if (p_.task.finishes) {
      finish_rows<T>(p_, shared_.finish);
    }
  }

  // Phase statistics: one slot of the state of each side.
  AFFKD_DEVICE void write_states() {
    prepare_centering();
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool student = side == 0;
      State state = empty_state(kind_);
      row_.each_pair([&](int64_t j) { add_to(state, affinity(student, j), student, j); });
      write_state(student, state);
    }
  }

 private:
  struct Sums {
    T loss = 0;
    T correction = 0;
    T scale_first = 0;
    T scale_second = 0;
    int64_t pairs = 0;
  };

  AFFKD_DEVICE T affinity(bool student, int64_t j) const {
    const T scale = student ? student_scale_ : teacher_scale_;
    return pairs_.affinity(row_.held(student, j), scale, row_.own(j));
  }

  AFFKD_DEVICE T centered(T a, bool student, int64_t j) const {
    if (!is_centered(p_)) {
      return a;
    }
    return student ? student_means_.centered(a, task_.row, j)
                   : teacher_means_.centered(a, task_.row, j);
  }

  AFFKD_DEVICE void add_to(State& state, T before, bool student, int64_t j) const {
    if (is_centered(p_)) {
      const double after = centered(before, student, j), a = before;
      state = {state.first + after * after, state.second + a * a, 0};
    } else {
      add_to_state(kind_, before, row_.own(j), task_.row * p_.keys + j, state);
    }
  }

  AFFKD_DEVICE void write_state(bool student, State state) {
    const Normalization kind = kind_;
    __syncthreads();
    state = block_fold(state, shared_.states,
                       [=](State a, State b) { return join_states(kind, a, b); });
    if (threadIdx.x == 0) {
      states_of(p_, student, task_.matrix)[task_.block] = state;
    }
  }

  AFFKD_DEVICE void prepare_centering() {
    if (is_centered(p_)) {
      student_means_.find(p_, Summed::student, task_.matrix, shared_.sums);
      __syncthreads();
      teacher_means_.find(p_, Summed::teacher, task_.matrix, shared_.sums);
    }
  }

  // What all rows of the matrix share.
  AFFKD_DEVICE void prepare_matrix() {
    prepare_centering();
    if (is_global(kind_)) {
      const State state = block_state(p_, true, task_.matrix, shared_.states);
      __syncthreads();
      const State other = block_state(p_, false, task_.matrix, shared_.states);
      s_ = matrix_scaling(true, state);
      t_ = matrix_scaling(false, other);
      slope_scale_ = static_cast<T>(statistic_of<T>(kind_, state).slope_scale);
      maximum_ = static_cast<T>(state.first);
    } else {
      s_ = t_ = scaling_of<T>(1, 0);
    }
    __syncthreads();
    poison_ = block_sum(matrix_poison(), shared_.sums);
  }

  AFFKD_DEVICE Scaling<T> matrix_scaling(bool student, const State& state) const {
    const double eps = p_.settings.statistic_eps;
    if (!is_maximum(kind_)) {
      return scaling_of<T>(statistic_of<T>(kind_, state).value, eps);
    }
    const double maximum = exact_maximum<T>(p_, student, task_.matrix, state, shared_.sums);
    Scaling<T> scaling = scaling_of<T>(maximum, eps);
    if (scaling.divisor - scaling.divisor == T{0}) {
      // what the largest entry is itself, which makes it exactly 1
      scaling.divisor = static_cast<T>(state.first);
    }
    return scaling;
  }

  // NaN where an item that the panel has to do with is inf or NaN, else 0
  AFFKD_DEVICE double matrix_poison() const {
    const Panel& panel = p_.task.panel;
    const int64_t begin = panel.row_begin / kTile;
    const int64_t end = divide_up(panel.row_begin + panel.rows, kTile);
    double poison = list_poison(0, begin, end) + list_poison(2, begin, end);
    if (!is_mirrored(p_)) {
      const int64_t blocks = divide_up(p_.keys, kTile);
      poison += list_poison(1, 0, blocks) + list_poison(3, 0, blocks);
    }
    return poison;
  }

  AFFKD_DEVICE double list_poison(int64_t kind, int64_t begin, int64_t end) const {
    const T* list = static_cast<const T*>(p_.work.poison) +
                    (kind * p_.matrices + task_.matrix) * p_.item_blocks * 4;
    double poison = 0;
    for (int64_t at = 4 * begin + threadIdx.x; at < 4 * end; at += kThreads) {
      poison += list[at];
    }
    return poison;
  }

  // The row's own statistics.
  AFFKD_DEVICE void prepare_row() {
    if (is_global(kind_) || kind_ == Normalization::none) {
      return;
    }
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      const bool student = side == 0;
      const Scaling<T> scaling =
          kind_ == Normalization::softmax
              ? softmax_scaling(student)
              : scaling_of<T>(row_statistic(student), p_.settings.statistic_eps);
      if (student) {
        s_ = scaling;
      } else {
        t_ = scaling;
      }
    }
  }

  AFFKD_DEVICE double row_statistic(bool student) const {
    T sum = 0;
    row_.each_pair([&](int64_t j) {
      const T a = affinity(student, j);
      sum += kind_ == Normalization::row_l2   ? a * a
             : kind_ == Normalization::row_l1 ? absolute(a)
                                              : a;
    });
    const double total = warp_sum(static_cast<double>(sum));
    return kind_ == Normalization::row_l2 ? square_root(total) : total;
  }

  AFFKD_DEVICE Scaling<T> softmax_scaling(bool student) const {
    const double tau = student ? p_.settings.student_tau : p_.settings.teacher_tau;
    const T multiplier = static_cast<T>(1 / tau), lowest = -static_cast<T>(INFINITY);
    T peak = lowest, sum = 0;
    row_.each_pair([&](int64_t j) {
      const T a = affinity(student, j);
      peak = peak < a ? a : peak;
    });
    peak = warp_fold(peak, [](T a, T b) { return a < b ? b : a; });
    // a row without pairs has neither maximum nor sum
    if (peak == lowest) {
      return {multiplier, T{0}, T{0}, T{0}};
    }
    row_.each_pair(
        [&](int64_t j) { sum += exponential((affinity(student, j) - peak) * multiplier); });
    const double total = warp_sum(static_cast<double>(sum));
    return {multiplier, T{0}, peak, static_cast<T>(log(total))};
  }

  // c needs no sweep of its own: it is 0, or -sum t = -1, or that of the whole matrix, which W2
  // leaves to phase product
  AFFKD_DEVICE bool correction_is_known() {
    if (kind_ == Normalization::softmax) {
      correction_ = -1;
      return p_.settings.loss == Loss::kl_forward || p_.settings.loss == Loss::cross_entropy;
    }
    return kind_ == Normalization::none || is_global(kind_);
  }

  AFFKD_DEVICE void sweep(bool losses, bool writes, bool scales) {
    row_.each([&](int64_t j, bool part) {
      if (part) {
        visit(j, losses, writes, scales);
      } else if (writes) {
        write(j, T{0}, T{0});
      }
    });
    zero_absent_row(writes);
  }

  AFFKD_DEVICE void visit(int64_t j, bool losses, bool writes, bool scales) {
    const bool own = row_.own(j);
    const T held = row_.held(true, j);
    const PairTerms<T> terms = pairs_.terms(held, student_scale_, own);
    const T student = centered(terms.affinity, true, j);
    const T teacher = centered(affinity(false, j), false, j);
    const PairLoss<T> pair = stage_.loss(student, teacher, s_, t_);
    if (losses) {
      sums_.loss += pair.loss;
      sums_.correction += pair.correction;
      sums_.pairs += 1;
    }
    if (!writes && !scales) {
      return;
    }
    const T weight = static_cast<T>(weight_);
    const T through = stage_.statistic_slope(student, s_, maximum_, own);
    const T correction = has_second(p_) ? T{0} : static_cast<T>(correction_);
    // of a saturated softmax the two nearly cancel
    const T first = weight * ((pair.slope - correction * through) * s_.multiplier);
    const T second = through * s_.multiplier * slope_scale_;
    if (scales && terms.flows) {
      sums_.scale_first += first * held;
      sums_.scale_second += second * held;
    }
    if (writes) {
      write(j, centers_gradient(p_) ? first : first * terms.slope, second * terms.slope);
    }
  }

  AFFKD_DEVICE void write(int64_t j, T first, T second) const {
    row_.first(j) = first;
    if (has_second(p_)) {
      row_.second(j) = second;
    }
  }

  // A row of an invalid item still is a column's neighbor.
  AFFKD_DEVICE void zero_absent_row(bool writes) const {
    const Panel& panel = p_.task.panel;
    if (!writes || task_.present || task_.row >= panel.row_begin + panel.rows) {
      return;
    }
    const int64_t begin = pair_index(p_, task_.matrix, task_.row, 0);
    for (int64_t j = lane_index(); j < p_.keys; j += 32) {
      static_cast<T*>(p_.work.first)[begin + j] = 0;
      if (has_second(p_)) {
        static_cast<T*>(p_.work.second)[begin + j] = 0;
      }
    }
  }

  AFFKD_DEVICE RowTotals row_totals() const {
    RowTotals totals{};
    totals.pairs = warp_sum(sums_.pairs);
    totals.rows = totals.pairs > 0 ? 1 : 0;
    const double loss = warp_sum(static_cast<double>(sums_.loss)) + poison_;
    const double correction = warp_sum(static_cast<double>(sums_.correction));
    totals.loss = totals.pairs > 0 ? weight_ * loss : 0;
    totals.correction = has_second(p_) && totals.pairs > 0 ? weight_ * correction : 0;
    totals.scale_first = warp_sum(static_cast<double>(sums_.scale_first));
    totals.scale_second = warp_sum(static_cast<double>(sums_.scale_second));
    return totals;
  }

  AFFKD_DEVICE void write_totals() {
    const RowTotals totals = row_totals();
    if (lane_index() == 0) {
      shared_.totals[warp_index()] = totals;
      if (p_.row_losses != nullptr && task_.row < p_.task.panel.row_begin + p_.task.panel.rows) {
        static_cast<T*>(p_.row_losses)[task_.matrix * p_.queries + task_.row] =
            static_cast<T>(p_.loss_scale * totals.loss);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      RowTotals sum = shared_.totals[0];
      for (int warp = 1; warp < kWarps; ++warp) {
        sum = join_totals(sum, shared_.totals[warp]);
      }
      totals_of(p_, task_.matrix)[task_.block] = sum;
    }
  }

  const Params& p_;
  Shared& shared_;
  const Normalization kind_;
  const RowTask task_;
  const PairRow<T> row_;
  const PairStage<T> pairs_;
  const T student_scale_;
  const T teacher_scale_;
  const LossStage<T> stage_;
  const double weight_;
  Centering<T> student_means_;
  Centering<T> teacher_means_;
  Scaling<T> s_{};
  Scaling<T> t_{};
  T slope_scale_ = 1;
  T maximum_ = 0;
  double poison_ = 0;
  double correction_ = 0;  // c, without the row's weight
  Sums sums_;
};

}  // namespace affkd::cuda
