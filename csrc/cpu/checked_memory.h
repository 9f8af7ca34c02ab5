// What a build with AddressSanitizer checks of the scratch memory; in any other build, nothing.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace affkd {

#if defined(__SANITIZE_ADDRESS__)

constexpr size_t kGap = 64;  // forbidden bytes after whatever was taken

// From here on an access to these bytes is reported.
inline void forbid(void* data, size_t bytes) {
  ASAN_POISON_MEMORY_REGION(data, bytes);
}

inline void allow(void* data, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
}

// All bits set is NaN in every floating type: what reads before it writes shows in the result.
inline void poison(void* data, size_t bytes) {
  std::memset(data, 0xFF, bytes);
}

#else

constexpr size_t kGap = 0;

inline void forbid(void*, size_t) {}
inline void allow(void*, size_t) {}
inline void poison(void*, size_t) {}

#endif

}  // namespace affkd
