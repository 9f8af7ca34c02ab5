// Phase rows: from a row of pairs of both sides to its loss, to what flows back through its
// statistic, and to W, which takes the place of the pairs.
#pragma once

#include "finish.cuh"
#include "poison.cuh"
#include "scalings.cuh"

namespace affkd::cuda {

// What is centered is a kernel of its own: it knows its normalization, and the other does not keep
// registers for means.
template <typename T, bool kCentered>
class RowBlock {
 public:
  struct Shared {
    FinishShared finish;
    State states[kWarps];
    double sums[kWarps];
    RowTotals totals[kWarps];
    typename Sides<T, kCentered>::Means means;
  };

  AFFKD_DEVICE RowBlock(const Params& p, Shared& shared)
      : p_(p),
        shared_(shared),
        task_(find_row(p)),
        sides_(p, task_, shared.means),
        stage_(p.settings, normalization()),
        weight_(task_.present ? row_weight(p, task_.matrix, task_.row) : 0) {}

  AFFKD_DEVICE void run() {
    prepare();
    const bool scales = p_.task.writes_losses && p_.scale_gradient != nullptr;
    const bool known = correction_is_known(), pairs = p_.task.writes_pairs || scales;
#pragma unroll 1
    for (int round = known ? 1 : 0; round < 2; ++round) {
      // with an unknown c the losses come first, and tell it
      const bool losses = known || round == 0;
      if (losses || pairs) {
        sweep(losses, round == 1 && p_.task.writes_pairs, round == 1 && scales);
      }
      correction_ =
          known ? correction_ : static_cast<T>(warp_sum(static_cast<double>(sums_.correction)));
    }
    if (leaves_gradient()) {
      write_gradient_sum();
    }
    if (p_.task.writes_losses) {
      // not before the sweep, as it would take registers all along
      write_totals(panel_poison<T>(p_, task_.matrix, shared_.sums));
    }
    if (p_.task.writes_losses && is_last_of_matrix(p_, task_.matrix, shared_.finish)) {
      const double poison = late_poison<T>(p_, task_.matrix, shared_.sums);
      finish_matrix<T>(p_, task_.matrix, poison, shared_.finish);
    }
  }

 private:
  struct Sums {
    T loss = 0;
    T correction = 0;
    T scale_first = 0;
    T scale_second = 0;
    int64_t pairs = 0;
    double gradient = 0;
  };

  AFFKD_DEVICE Normalization normalization() const {
    return kCentered ? Normalization::frobenius_centered : p_.settings.normalization;
  }
  AFFKD_DEVICE bool has_second() const { return kCentered || cuda::has_second(p_); }

  // dA as it is, which phase product centers
  AFFKD_DEVICE bool leaves_gradient() const {
    return kCentered && p_.task.writes_pairs && centers_gradient_on_the_way(p_);
  }

  AFFKD_DEVICE void prepare() {
    sides_.find_means(shared_.sums);
    scalings_ = matrix_scalings<T>(p_, normalization(), task_.matrix, shared_.states, shared_.sums);
    find_row_scalings(p_.settings, normalization(), sides_, scalings_);
  }

  // c needs no sweep of its own: it is 0, or -sum t = -1, or that of the whole matrix, which W2
  // leaves to phase product
  AFFKD_DEVICE bool correction_is_known() {
    const Normalization kind = normalization();
    if (kind == Normalization::softmax) {
      correction_ = -1;
      return p_.settings.loss == Loss::kl_forward || p_.settings.loss == Loss::cross_entropy;
    }
    return kind == Normalization::none || is_global(kind);
  }

  AFFKD_DEVICE void sweep(bool losses, bool writes, bool scales) {
    sides_.row().each([&](int64_t j, bool part) {
      if (part) {
        visit(j, losses, writes, scales);
      } else if (writes) {
        write(j, T{0}, T{0}, T{0});
      }
    });
    zero_absent_row(writes);
  }

  AFFKD_DEVICE void visit(int64_t j, bool losses, bool writes, bool scales) {
    const PairRow<T>& row = sides_.row();
    const T held = row.held(true, j);
    const PairTerms<T> terms = sides_.student_terms(j);
    const T student = sides_.centered(terms.affinity, Summed::student, j);
    const T teacher = sides_.centered(sides_.affinity(false, j), Summed::teacher, j);
    const Scaling<T>& s = scalings_.student;
    const PairLoss<T> pair = stage_.loss(student, teacher, s, scalings_.teacher);
    if (losses) {
      sums_.loss += pair.loss;
      sums_.correction += pair.correction;
      sums_.pairs += 1;
    }
    if (!writes && !scales) {
      return;
    }
    const T weight = static_cast<T>(weight_);
    const T through = stage_.statistic_slope(student, s, scalings_.maximum, row.own(j));
    const T correction = has_second() ? T{0} : correction_;
    // of a saturated softmax the two nearly cancel
    const T first = weight * ((pair.slope - correction * through) * s.multiplier);
    const T second = through * s.multiplier * scalings_.slope_scale;
    if (scales) {
      const T by_scale = terms.by_scale(held);
      const bool centers = kCentered && centers_scale(p_);
      sums_.scale_first +=
          first * (centers ? sides_.centered(by_scale, Summed::by_scale, j) : by_scale);
      sums_.scale_second += second * by_scale;
    }
    if (writes) {
      if (kCentered) {
        sums_.gradient += first;
      }
      const bool centered_later = kCentered && centers_gradient(p_);
      write(j, centered_later ? first : first * terms.slope, second * terms.slope, terms.slope);
    }
  }

  AFFKD_DEVICE void write(int64_t j, T first, T second, T slope) const {
    sides_.row().first(j) = first;
    if (leaves_gradient()) {
      sides_.row().slope(j) = slope;
    }
    if (has_second()) {
      sides_.row().second(j) = second;
    }
  }

  // A row of an invalid item still is a column's neighbor.
  AFFKD_DEVICE void zero_absent_row(bool writes) const {
    if (writes && task_.exists && !task_.present) {
      sides_.row().each_entry([&](int64_t j) { write(j, T{0}, T{0}, T{0}); });
    }
  }

  AFFKD_DEVICE void write_gradient_sum() const {
    const double sum = warp_sum(sums_.gradient);
    if (lane_index() == 0 && task_.exists) {
      row_sums_of(p_, Summed::gradient, task_.matrix)[task_.row] = sum;
    }
  }

  AFFKD_DEVICE RowTotals row_totals(double poison) const {
    RowTotals totals{};
    totals.pairs = warp_sum(sums_.pairs);
    totals.rows = totals.pairs > 0 ? 1 : 0;
    const double loss = warp_sum(static_cast<double>(sums_.loss)) + poison;
    const double correction = warp_sum(static_cast<double>(sums_.correction));
    totals.loss = totals.pairs > 0 ? weight_ * loss : 0;
    totals.correction = has_second() && totals.pairs > 0 ? weight_ * correction : 0;
    totals.scale_first = warp_sum(static_cast<double>(sums_.scale_first));
    totals.scale_second = warp_sum(static_cast<double>(sums_.scale_second));
    return totals;
  }

  AFFKD_DEVICE void write_totals(double poison) {
    const RowTotals totals = row_totals(poison);
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
  const RowTask task_;
  Sides<T, kCentered> sides_;
  const LossStage<T> stage_;
  const double weight_;
  RowScalings<T> scalings_{};
  T correction_ = 0;  // c, without the row's weight
  Sums sums_;
};

}  // namespace affkd::cuda
