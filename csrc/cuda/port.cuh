// What differs between a GPU and the machine that tests the kernels without one: everything beyond
// plain C++ that the kernels use. This is the only file with PTX.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// dynamic shared memory as an array of T
#define AFFKD_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(16) unsigned char affkd_shared[]; \
  T* const name = reinterpret_cast<T*>(affkd_shared)

#define AFFKD_DEVICE __device__ __forceinline__

namespace affkd::cuda {

AFFKD_DEVICE float half_bits_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

// the nearest number with 10 bits of mantissa, as tensor cores take it
AFFKD_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d += a b by a warp, a [16, 8] and b [8, 8]. With g = lane / 4 and t = lane % 4 a thread has
//   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4);   b: (t, g) (t + 4, g);
//   d: (g, 2 t) (g, 2 t + 1) (g + 8, 2 t) (g + 8, 2 t + 1)
AFFKD_DEVICE void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts to copy 16 aligned bytes to shared memory, or zeros; they are there after the wait.
AFFKD_DEVICE void copy_async(void* shared, const void* global, bool zeros) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = zeros ? 0 : 16;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}

// Everything started since the last call becomes a group.
AFFKD_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's copies but those of the newest `kPending` groups.
template <int kPending>
AFFKD_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Counts a block in, once it has written what others read, and returns how many came before.
AFFKD_DEVICE unsigned arrive(unsigned* counter) {
  __threadfence();
  const unsigned before = atomicAdd(counter, 1u);
  __threadfence();
  return before;
}

// Counts up for all blocks alike, and returns what the counter was; orders nothing.
AFFKD_DEVICE unsigned take(unsigned* counter) {
  return atomicAdd(counter, 1u);
}

// Waits until `count` blocks have arrived, and sees what they have written.
AFFKD_DEVICE void wait_for(const unsigned* counter, unsigned count) {
  unsigned arrived = 0;
  for (;;) {
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
    if (arrived >= count) {
      break;
    }
    __nanosleep(32);
  }
  __threadfence();
}

}  // namespace affkd::cuda

#else
#include "host_port.h"  // tests/cuda_host
#endif
