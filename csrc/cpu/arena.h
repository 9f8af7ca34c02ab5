// Scratch memory: a stack per thread, kept between calls so that small calls allocate nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace affkd {

struct ArenaMark {
  size_t block;
  size_t used;
};

ArenaMark arena_mark();
void arena_release(ArenaMark mark);
void* arena_take(size_t bytes);  // aligned to a cache line, uninitialized

}  // namespace affkd
