// What the gradient of one matrix is a product of: V = a (W1 + W1') + b (W2 + W2'), with the
// coefficients from the totals of all rows, and what units need besides.
#pragma once

#include "centering.cuh"
#include "finish.cuh"

namespace affkd::cuda {

template <typename T>
class GradientPairs {
 public:
  union Scratch {
    RowTotals totals[kWarps];
    double sums[kWarps];
  };
  // Of what `first` and `second` hold where it is centered here only: not worth every call's
  // registers.
  struct Means {
    Centering<T> first;
    Centering<T> second;
  };

  // `keys`: for the gradient of the keys
  AFFKD_DEVICE GradientPairs(const Params& p, int64_t matrix, bool keys, const Means& means)
      : p_(p),
        matrix_(matrix),
        keys_(keys),
        means_(means),
        student_scale_(scale_of<T>(p, true)),
        teacher_scale_(scale_of<T>(p, false)),
        offset_(static_cast<T>(p.settings.offset)) {}

  // By all threads: finds the coefficients, writes `means` and returns whether any pair of the
  // panel takes part.
  AFFKD_DEVICE bool prepare(Scratch& scratch, Means& means) {
    const double twice = p_.task.both_sides && is_symmetric() ? 2 : 1;
    const double scale = twice * loss_scale(p_, false);
    first_ = static_cast<T>(scale);
    if (p_.columns) {
      second_ = static_cast<T>(loss_scale(p_, true));
    }
    if (is_closed(p_)) {
      const Alignment alignment = p_.work.alignments[matrix_];
      first_ = static_cast<T>(scale * alignment.teacher);
      second_ = static_cast<T>(scale * alignment.student);
      means_of(Summed::teacher, scratch, means.first);
      means_of(Summed::student, scratch, means.second);
    } else if (has_second(p_)) {
      const RowTotals totals = block_totals(totals_of(p_, matrix_), p_.row_blocks, scratch.totals);
      second_ = static_cast<T>(-scale * totals.correction);
      __syncthreads();
    }
    if (centers_gradient_on_the_way(p_)) {
      means_of(Summed::gradient, scratch, means.first);
    }
    const Panel& panel = p_.task.panel;
    const RowTotals* rows = totals_of(p_, matrix_) + panel.row_begin / kWarps;
    return block_totals(rows, divide_up(panel.rows, kWarps), scratch.totals).pairs > 0;
  }

  // whether an entry of V is made from W at its mirror image, too
  AFFKD_DEVICE bool reads_mirror() const {
    return keys_ || p_.columns || (p_.task.both_sides && !is_symmetric());
  }
  AFFKD_DEVICE bool reads_direct() const { return !keys_ || p_.columns; }

  // What an entry of V gets from the pairs as they lie, and from their mirror image: the pair (i,
  // j) of this item and of one on the other side.
  AFFKD_DEVICE T direct(int64_t item, int64_t other) const {
    return keys_ ? column_entry(other, item) : entry(item, other);
  }
  AFFKD_DEVICE T mirror(int64_t item, int64_t other) const {
    return !keys_ && p_.columns ? column_entry(item, other) : entry(other, item);
  }

  // a W1 + b W2
  AFFKD_DEVICE T entry(int64_t i, int64_t j) const {
    const int64_t at = pair_index(p_, matrix_, i, j);
    const T first = static_cast<const T*>(p_.work.first)[at];
    if (!has_second(p_)) {
      return first_ * first;
    }
    const T second = static_cast<const T*>(p_.work.second)[at];
    if (centers_gradient_on_the_way(p_)) {
      const T slope = static_cast<const T*>(p_.work.slopes)[at];
      return first_ * (means_.first.centered(first, i, j) * slope) + second_ * second;
    }
    return is_closed(p_) ? aligned_entry(i, j, second, first) : first_ * first + second_ * second;
  }

  // the inner product of two unit items, of which the one on the other side may be 0
  AFFKD_DEVICE T cosine(int64_t i, int64_t j) const {
    const T held = static_cast<const T*>(p_.work.student)[pair_index(p_, matrix_, i, j)];
    if (!is_distance(p_.settings.pair)) {
      return held;
    }
    const bool nothing = inverse_length(keys_ ? i : j, !keys_) == T{0};
    return nothing ? T{0} : T{1} - held * T{0.5};
  }

  AFFKD_DEVICE T inverse_length(int64_t item, bool key) const {
    const int64_t longest = p_.queries > p_.keys ? p_.queries : p_.keys;
    const int64_t list = (key && !is_mirrored(p_) ? p_.matrices : 0) + matrix_;
    return static_cast<const T*>(p_.work.inverse_lengths)[list * longest + item];
  }

 private:
  // b times W1 of the columns
  AFFKD_DEVICE T column_entry(int64_t i, int64_t j) const {
    return second_ * static_cast<const T*>(p_.work.first)[transposed_index(p_, matrix_, i, j)];
  }

  // nothing tells the rows of a symmetric matrix apart: W' is W
  AFFKD_DEVICE bool is_symmetric() const {
    const Normalization kind = p_.settings.normalization;
    return (is_global(kind) || kind == Normalization::none) && p_.row_weight.data == nullptr &&
           p_.pair_mask.data == nullptr;
  }

  AFFKD_DEVICE void means_of(Summed what, Scratch& scratch, Centering<T>& means) const {
    Centering<T> found;
    found.find(p_, what, matrix_, scratch.sums);
    if (threadIdx.x == 0) {
      means = found;
    }
    __syncthreads();
  }

  // of linear kernel alignment, whose pairs are still what they were
  AFFKD_DEVICE T aligned_entry(int64_t i, int64_t j, T student, T teacher) const {
    if (!takes_part(p_, matrix_, i, j)) {
      return T{0};
    }
    const T scale = student_scale_;
    const T s = means_.second.centered(scale * student + offset_, i, j);
    const T t = means_.first.centered(teacher_scale_ * teacher + offset_, i, j);
    return (second_ * s + first_ * t) * scale;
  }

  const Params& p_;
  const int64_t matrix_;
  const bool keys_;
  const Means& means_;
  const T student_scale_;
  const T teacher_scale_;
  const T offset_;
  T first_ = 1;
  T second_ = 0;
};

}  // namespace affkd::cuda
