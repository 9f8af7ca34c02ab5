// Stage 3 on a GPU. Of a pair its dot product is held, or its squared distance: what A and its
// slope follow from is chosen at run time, as a branch that all threads take alike costs next to
// nothing.
#pragma once

#include "../stages.h"
#include "views.cuh"

namespace affkd::cuda {

using namespace affkd::portable;

template <typename T>
struct PairTerms {
  T affinity;
  T slope;  // d A / d g, or the factor of x_i - x_j in d A / d x_i for a function of the distance
  bool flows;  // whether any gradient does: neither clamped nor a constant of the diagonal

  // d A / d scale of a linear function, of which g is held
  AFFKD_DEVICE T by_scale(T held) const { return flows ? held : T{0}; }
};

template <typename T>
class PairStage {
 public:
  AFFKD_DEVICE explicit PairStage(const Params& p)
      : pair_(p.settings.pair),
        order_(p.settings.order),
        unit_(p.settings.unit),
        zeroed_(p.settings.diagonal == Diagonal::zero),
        // the cosine of an item with itself is 1 wherever the item goes
        constant_(p.self && p.settings.unit),
        offset_(static_cast<T>(p.settings.offset)),
        eps_(static_cast<T>(p.settings.affinity_eps)),
        taylor_factor_(static_cast<T>(p.taylor_factor)),
        low_(p.settings.clamped ? static_cast<T>(p.settings.clamp_min)
                                : -static_cast<T>(INFINITY)) {}

  // `scale` is that of the side, `own`: the pair lies on the diagonal
  AFFKD_DEVICE PairTerms<T> terms(T held, T scale, bool own) const {
    PairTerms<T> pair = free_terms(held, scale);
    if (own && is_distance(pair_)) {
      pair = {pair_ == PairFunction::gaussian ? T{1} : T{0}, T{0}, false};
    }
    if (own && constant_) {
      pair = {pair.affinity, T{0}, false};
    }
    if (pair.affinity < low_) {
      pair = {low_, T{0}, false};
    }
    return own && zeroed_ ? PairTerms<T>{T{0}, T{0}, false} : pair;
  }

  AFFKD_DEVICE T affinity(T held, T scale, bool own) const {
    return terms(held, scale, own).affinity;
  }

 private:
  // without clamp and diagonal
  AFFKD_DEVICE PairTerms<T> free_terms(T held, T scale) const {
    switch (pair_) {
      case PairFunction::linear:
        return of<PairFunction::linear>(held, scale, scale);
      case PairFunction::squared_distance:
        return {held, T{2}, true};
      case PairFunction::distance:
        return of<PairFunction::distance>(held, scale, T{1});
      case PairFunction::gaussian:
        // of unit items it is a function of their inner product
        return of<PairFunction::gaussian>(held, scale, (unit_ ? T{2} : T{-2}) * scale);
      case PairFunction::taylor:
        return of<PairFunction::taylor>(held, scale, scale * taylor_factor_);
      case PairFunction::power:
        return of<PairFunction::power>(held, scale, scale);
    }
    return {held, T{0}, false};
  }

  template <PairFunction P>
  AFFKD_DEVICE PairTerms<T> of(T held, T scale, T slope_factor) const {
    const T value = is_distance(P) ? pair_value<P>(T{0}, held, T{0}, scale, offset_, eps_)
                                   : pair_value<P>(held, T{0}, T{0}, scale, offset_, eps_);
    return {affinity_of<P>(value, order_, taylor_factor_),
            slope_factor * affinity_slope<P>(value, order_, square_root(eps_)), true};
  }

  PairFunction pair_;
  int64_t order_;
  bool unit_;
  bool zeroed_;
  bool constant_;
  T offset_;
  T eps_;
  T taylor_factor_;
  T low_;
};

}  // namespace affkd::cuda
