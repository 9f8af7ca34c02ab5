// Which launches make a call, and over which panels.
//
//   gram -> rows -> product              every triple whose matrices fit the workspace
//   gram -> means -> product             but linear kernel alignment (`is_closed`)
//
// A loss alone needs no product. Where a matrix does not fit, it is worked on in panels of rows: a
// statistic or a correction of the whole matrix then takes a sweep over the panels of its own, in
// which the pairs are computed again, and keys that want a gradient take a product of their own:
//   gram -> means, gram -> statistics, gram -> rows, gram -> rows -> means,
//   gram -> rows -> center -> product    what is centered, each over all panels
#pragma once

#include "layout.cuh"

namespace affkd::cuda {

inline int64_t block_count(Phase phase, const Params& p) {
  const Panel& panel = p.task.panel;
  const int64_t row_blocks = panel.matrices * divide_up(panel.rows, kWarps);
  switch (phase) {
    case Phase::gram:
      return 2 * panel.matrices * gram_blocks(p, panel);
    case Phase::means:
      return panel.matrices * sums_blocks(p);
    case Phase::rows:
      return panel.matrices * line_blocks(p);
    case Phase::product:
      return (p.task.keys ? 0 : query_blocks(p)) +
             (p.task.keys || p.task.also_keys ? key_blocks(p) : 0);
    default:
      return row_blocks;
  }
}

// Calls launch(phase, params, blocks) for every launch of a call, in order.
template <typename Launch>
class Schedule {
 public:
  Schedule(const Params& params, Launch launch) : p_(params), launch_(launch) {}

  void run() {
    p_.task = {};
    p_.task.resets = true;
    const int64_t step = p_.largest.matrices;
    for (int64_t begin = 0; begin < p_.matrices; begin += step) {
      matrix_begin_ = begin;
      matrices_ = p_.matrices - begin < step ? p_.matrices - begin : step;
      if (begin == 0 && p_.counts && needs_product() && !fits(p_)) {
        count();
      }
      run_matrices();
    }
  }

 private:
  bool needs_product() const { return p_.query_gradient != nullptr || p_.key_gradient != nullptr; }

  bool whole() const { return p_.largest.rows == p_.queries; }

  // How many pairs of all matrices take part, before the first gradient. After a launch that resets
  // the arrivals.
  void count() {
    hold(0);
    begin_panel(0, p_.matrices, 0, p_.queries);
    emit(Phase::count);
  }

  void run_matrices() {
    if (is_closed(p_)) {
      return sweep([this] {
        emit(Phase::means);
        products();
      });
    }
    if (is_centered(p_) && !whole()) {
      sweep([this] { emit(Phase::means); });
    }
    if (is_global(p_.settings.normalization) && !whole()) {
      sweep([this] { emit(Phase::statistics); });
    }
    const bool gradient = wants_gradient(p_);
    const bool losses_first = !gradient || (!whole() && has_second(p_));
    if (losses_first) {
      sweep([this] { rows(true, false); });
    }
    if (gradient && centers_gradient(p_) && !whole()) {
      centered_gradients();
    } else if (gradient) {
      sweep([&] {
        rows(!losses_first, true);
        products();
      });
    }
  }

  void centered_gradients() {
    sweep([this] {
      rows(false, true);
      p_.task.of_gradient = true;
      emit(Phase::means);
      p_.task.of_gradient = false;
    });
    sweep([this] {
      rows(false, true);
      emit(Phase::center);
      products();
    });
  }

  void rows(bool losses, bool pairs) {
    p_.task.writes_losses = losses;
    p_.task.writes_pairs = pairs;
    emit(Phase::rows);
    overwritten_ = overwritten_ || pairs;
  }

  // The gradients of one panel. Of a self-affinity in panels of rows, row i of V is W_i and W'_i:
  // the first panel's columns are written, everything else is added.
  void products() {
    const bool mirrored = is_mirrored(p_), first = p_.task.panel.row_begin == 0;
    Task& task = p_.task;
    task.also_keys = whole() && p_.key_gradient != nullptr && p_.query_gradient != nullptr;
    if (task.also_keys) {
      emit(Phase::product);
      task.also_keys = false;
      return;
    }
    if (p_.key_gradient != nullptr || (p_.self && !mirrored && p_.query_gradient != nullptr)) {
      task.keys = true;
      task.accumulates = !first;
      emit(Phase::product);
      task.keys = false;
    }
    if (p_.query_gradient != nullptr) {
      task.both_sides = mirrored;
      task.accumulates = p_.self && !mirrored;
      emit(Phase::product);
      task.both_sides = false;
    }
    task.accumulates = false;
  }

  // visit() with the pairs of every panel of the current matrices at hand
  template <typename Visit>
  void sweep(Visit visit) {
    for (int64_t row = 0; row < p_.queries; row += p_.largest.rows) {
      hold(row);
      visit();
    }
  }

  void hold(int64_t row) {
    const int64_t left = p_.queries - row;
    begin_panel(matrix_begin_, matrices_, row, left < p_.largest.rows ? left : p_.largest.rows);
    if (held_matrix_ != matrix_begin_ || held_row_ != row || overwritten_) {
      emit(Phase::gram);
      p_.task.resets = false;
      held_matrix_ = matrix_begin_;
      held_row_ = row;
      overwritten_ = false;
    }
  }

  void begin_panel(int64_t matrix, int64_t matrices, int64_t row, int64_t rows) {
    p_.task.panel = {matrix, matrices, row, rows};
  }

  void emit(Phase phase) {
    const int64_t blocks = block_count(phase, p_);
    if (blocks > 0) {
      launch_(phase, p_, blocks);
    }
  }

  Params p_;
  Launch launch_;
  int64_t matrix_begin_ = 0;
  int64_t matrices_ = 0;
  int64_t held_matrix_ = -1;  // of which panel the workspace holds the pairs
  int64_t held_row_ = -1;
  bool overwritten_ = false;  // by W1 and W2
};

template <typename Launch>
void run_schedule(const Params& params, Launch launch) {
  Schedule<Launch>(params, launch).run();
}

}  // namespace affkd::cuda
