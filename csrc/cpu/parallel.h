// Parallel loops and scratch memory for the kernels of one instruction set.
#pragma once

#include "../numeric.h"
#include "arena.h"
#include "call.h"

namespace affkd::AFFKD_NAMESPACE {

// Scratch of a scope: what was taken inside is free again after it.
class Scratch {
 public:
  Scratch() : mark_(arena_mark()) {}
  ~Scratch() { arena_release(mark_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  ArenaMark mark_;
};

template <typename X>
inline X* take(int64_t count) {
  return static_cast<X*>(arena_take(sizeof(X) * static_cast<size_t>(count)));
}

template <typename X>
inline X* take_filled(int64_t count, X value) {
  X* taken = take<X>(count);
  for (int64_t i = 0; i < count; ++i) {
    taken[i] = value;
  }
  return taken;
}

// body(task) for every task; which thread runs which task changes no result
template <typename Body>
inline void for_each_task(Parallel parallel, int64_t tasks, Body body) {
  const auto run_range = [](int64_t begin, int64_t end, void* context) {
    for (int64_t task = begin; task < end; ++task) {
      (*static_cast<Body*>(context))(task);
    }
  };
  parallel(tasks, run_range, &body);
}

// For work that is linear in the number of elements: below this, waking the threads costs more.
inline Parallel parallel_for_elements(Parallel parallel, int64_t elements) {
  return elements <= (int64_t{1} << 13) ? run_serially : parallel;
}

struct Range {
  int64_t begin;
  int64_t size;
};

// block number `index` of [0, n) cut into blocks of `block`
inline Range block_range(int64_t n, int64_t block, int64_t index) {
  const int64_t begin = index * block;
  return {begin, n - begin < block ? n - begin : block};
}

inline int64_t count_blocks(int64_t n, int64_t block) {
  return (n + block - 1) / block;
}

}  // namespace affkd::AFFKD_NAMESPACE
