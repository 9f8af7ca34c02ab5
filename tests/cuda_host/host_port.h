// The counterpart of csrc/cuda/port.cuh for a CPU: what the kernels use of CUDA, on fibers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

#define AFFKD_DEVICE inline
#define AFFKD_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(host::self()->block->shared.get())

#define threadIdx (host::Index{host::self()->index})
#define blockIdx (host::self()->block->index)

// by default where they are called
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::block_barrier(file, line);
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  return host::block_count(predicate != 0, file, line);
}

template <typename X>
X __shfl_xor_sync(unsigned, X x, int mask) {
  const unsigned lane = host::self()->index % host::kWarpSize;
  return host::read_slot<X>(host::exchange(x), lane ^ static_cast<unsigned>(mask));
}

namespace affkd::cuda {

inline float half_bits_to_float(uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size = std::ldexp(static_cast<float>(mantissa), -24);
  if (exponent == 31) {
    size = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent > 0) {
    size = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return sign != 0 ? -size : size;
}

// to the nearest, ties away from zero
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
};

// A tensor core ignores the bits that tf32 does not have.
inline float tensor_core_number(uint32_t bits) {
  bits &= ~0x1fffu;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Fragments own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* slots = host::exchange(own);
  const unsigned lane = host::self()->index % host::kWarpSize, g = lane / 4, t = lane % 4;
  for (unsigned k = 0; k < 8; ++k) {
    const auto left = host::read_slot<Fragments>(slots, g * 4 + k % 4);
    for (unsigned column = 0; column < 2; ++column) {
      const auto right = host::read_slot<Fragments>(slots, (2 * t + column) * 4 + k % 4);
      const float factor = tensor_core_number(right.b[k / 4]);
      d[column] += tensor_core_number(left.a[k / 4 * 2]) * factor;
      d[2 + column] += tensor_core_number(left.a[k / 4 * 2 + 1]) * factor;
    }
  }
}

inline void copy_async(void* shared, const void* global, bool zeros) {
  host::self()->copies.back().push_back({shared, zeros ? nullptr : global});
}

inline void commit_copies() {
  host::self()->copies.emplace_back();
}

template <int kPending>
void wait_for_copies() {
  if (host::fault == host::Fault::missing_wait) {
    return;
  }
  auto& groups = host::self()->copies;
  while (groups.size() > kPending + 1) {
    for (const host::Copy& copy : groups.front()) {
      copy.from == nullptr ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
    }
    groups.pop_front();
  }
}

inline unsigned arrive(unsigned* counter) {
  return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
}

inline unsigned take(unsigned* counter) {
  return __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED);
}

// Whoever is still to arrive runs on another thread of the operating system.
inline void wait_for(const unsigned* counter, unsigned count) {
  host::spin([=] { return __atomic_load_n(counter, __ATOMIC_ACQUIRE) >= count; });
}

}  // namespace affkd::cuda
