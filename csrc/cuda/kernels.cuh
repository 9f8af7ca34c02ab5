// The kernels: phases as they are launched (schedule.cuh). All take kThreads threads a block and
// shared_bytes<...>() of dynamic shared memory. A grid constant may be referred to where it is; of
// another parameter every thread would keep a copy.
#pragma once

#include "angle.cuh"
#include "center.cuh"
#include "centered_rows.cuh"
#include "count.cuh"
#include "gram.cuh"
#include "means.cuh"
#include "product.cuh"

namespace affkd::cuda {

// Blocks that are to fit a multiprocessor. Left to itself the compiler spills for one more.
template <typename T>
constexpr int kBlocks = sizeof(T) == sizeof(float) ? 2 : 1;

template <typename T, Precision P>
constexpr int kGramBlocks = kBlocks<T> + (sizeof(T) == sizeof(float) && P != Precision::ieee);

template <typename T, Precision P>
__global__ void __launch_bounds__(kThreads, kGramBlocks<T, P>)
    gram_kernel(const __grid_constant__ Params p) {
  using Block = GramBlock<T, P>;
  AFFKD_DYNAMIC_SHARED(typename Block::Shared, shared);
  Block(p, *shared).run();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) means_kernel(const __grid_constant__ Params p) {
  using Block = MeansBlock<T>;
  AFFKD_DYNAMIC_SHARED(typename Block::Shared, shared);
  Block(p, *shared).run();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) statistics_kernel(const __grid_constant__ Params p) {
  AFFKD_DYNAMIC_SHARED(StatisticsShared<T>, shared);
  run_statistics<T>(p, *shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Params p) {
  using Block = CountBlock<T>;
  AFFKD_DYNAMIC_SHARED(typename Block::Shared, shared);
  Block(p, *shared).run();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    rows_kernel(const __grid_constant__ Params p) {
  using Block = RowBlock<T, false>;
  AFFKD_DYNAMIC_SHARED(typename Block::Shared, shared);
  Block(p, *shared).run();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    centered_rows_kernel(const __grid_constant__ Params p) {
  using Block = CenteredRows<T>;
  AFFKD_DYNAMIC_SHARED(typename Block::Shared, shared);
  Block(p, *shared).run();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T> + 1)
    center_kernel(const __grid_constant__ Params p) {
  using Block = CenterBlock<T>;
  AFFKD_DYNAMIC_SHARED(typename Block::Shared, shared);
  Block(p, *shared).run();
}

template <typename T, Precision P>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    product_kernel(const __grid_constant__ Params p) {
  using Tile = ProductTile<T, P>;
  AFFKD_DYNAMIC_SHARED(typename Tile::Shared, shared);
  Tile(p, *shared).run();
}

// What every launch may have without asking for more.
template <typename Shared>
constexpr size_t shared_bytes() {
  static_assert(sizeof(Shared) <= 48 << 10, "a block of every GPU has 48 KiB of shared memory");
  return sizeof(Shared);
}

// A kernel and what it is launched with.
struct Kernel {
  void (*function)(const Params);
  size_t shared_bytes;
};

template <typename T, Precision P>
inline Kernel kernel_of(Phase phase, bool centered) {
  switch (phase) {
    case Phase::gram:
      return {gram_kernel<T, P>, shared_bytes<typename GramBlock<T, P>::Shared>()};
    case Phase::means:
      return {means_kernel<T>, shared_bytes<typename MeansBlock<T>::Shared>()};
    case Phase::statistics:
      return {statistics_kernel<T>, shared_bytes<StatisticsShared<T>>()};
    case Phase::count:
      return {count_kernel<T>, shared_bytes<typename CountBlock<T>::Shared>()};
    case Phase::rows:
      return centered
                 ? Kernel{centered_rows_kernel<T>, shared_bytes<typename CenteredRows<T>::Shared>()}
                 : Kernel{rows_kernel<T>, shared_bytes<typename RowBlock<T, false>::Shared>()};
    case Phase::center:
      return {center_kernel<T>, shared_bytes<typename CenterBlock<T>::Shared>()};
    case Phase::product:
      return {product_kernel<T, P>, shared_bytes<typename ProductTile<T, P>::Shared>()};
  }
  return {nullptr, 0};
}

inline Kernel find_kernel(Phase phase, const Params& p) {
  if (p.wide) {
    return kernel_of<double, Precision::ieee>(phase, is_centered(p));
  }
  switch (phase == Phase::gram && has_exact_tf32(p) ? Precision::tf32 : p.precision) {
    case Precision::tf32x3:
      return kernel_of<float, Precision::tf32x3>(phase, is_centered(p));
    case Precision::tf32:
      return kernel_of<float, Precision::tf32>(phase, is_centered(p));
    default:
      return kernel_of<float, Precision::ieee>(phase, is_centered(p));
  }
}

// The angle loss takes two launches: angle_blocks(p) blocks, and one.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    angle_kernel(const __grid_constant__ AngleParams p) {
  using Block = AngleBlock<T>;
  AFFKD_DYNAMIC_SHARED(typename Block::Shared, shared);
  Block(p, *shared).run();
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    angle_sum_kernel(const __grid_constant__ AngleParams p) {
  AFFKD_DYNAMIC_SHARED(double, scratch);
  finish_angle(p, scratch);
}

struct AngleKernel {
  void (*function)(const AngleParams);
  size_t shared_bytes;
};

inline AngleKernel find_angle_kernel(const AngleParams& p) {
  return p.wide ? AngleKernel{angle_kernel<double>, shared_bytes<AngleBlock<double>::Shared>()}
                : AngleKernel{angle_kernel<float>, shared_bytes<AngleBlock<float>::Shared>()};
}

inline AngleKernel find_angle_sum_kernel() {
  return {angle_sum_kernel<double>, kWarps * sizeof(double)};
}

}  // namespace affkd::cuda
