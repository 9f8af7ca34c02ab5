// The threads of a block as fibers on one thread of the operating system. Standard C++ and the
// sanitizers' own interfaces only.
//
// Fibers switch where CUDA threads wait for each other: at barriers and in warp collectives. A
// barrier that not all threads reach ends the process with a message. Under ThreadSanitizer a fiber
// is a thread: only barriers, atomics and the end of a launch order what fibers do.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#define HOST_UNSEEN __attribute__((noinline, no_sanitize("thread")))
#else
#define HOST_UNSEEN
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace host {

// What goes wrong on purpose, to see that it is noticed.
enum class Fault : int {
  none,
  missing_barrier,
  divergent_barrier,
  short_memory,
  missing_wait,
  missing_boundary,
};

// A barrier in the sources: __FILE__ and __LINE__ of where it is asked for.
struct Site {
  std::string file;
  int line;
  bool operator<(const Site& other) const {
    return std::tie(file, line) < std::tie(other.file, other.line);
  }
};

inline Fault fault = Fault::none;
inline Site fault_site;  // of a barrier that is missing or divergent; a file's last name
inline std::set<Site>* met = nullptr;  // where not null, all barriers that are met
inline std::mutex met_lock;

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarpSize = 32;

struct Index {
  unsigned x;
};

struct Barrier {
  unsigned expected = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  // What a fiber releases when it gets here, all others acquire when they go on. One place for all
  // times would order too much: the fiber that goes on first is at the next barrier, and has
  // released what it did on the way, before the others acquire.
  unsigned char meetings[2] = {};
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Block;

struct Fiber {
  Block* block = nullptr;
  unsigned index = 0;
  bool started = false;
  bool finished = false;
  unsigned collectives = 0;              // of its warp
  std::deque<std::vector<Copy>> copies;  // groups, the last still open
  jmp_buf place;
  ucontext_t context;
  char* stack = nullptr;
  void* sanitizer = nullptr;
};

// What the threads of a warp tell each other; of two collectives in a row, each has a slot.
struct Warp {
  Barrier barrier;
  unsigned char slots[2][kWarpSize][32];
};

struct Block {
  Index index;
  Index count;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::unique_ptr<unsigned char[]> shared;
  const std::function<void()>* body = nullptr;
  unsigned unfinished = 0;
  unsigned idle = 0;     // switches since anything happened
  unsigned counted = 0;  // by block_count
  jmp_buf place;
  ucontext_t context;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;
};

inline thread_local Fiber* running = nullptr;

HOST_UNSEEN inline Fiber* self() {
  return running;
}

// To another fiber of the block, or back to the block itself.
HOST_UNSEEN inline void switch_to(Block& block, Fiber* from, Fiber* to) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const bool leaves = from != nullptr && from->finished;
  __sanitizer_start_switch_fiber(leaves ? nullptr : &fake_stack, to ? to->stack : block.stack,
                                 to ? kStackBytes : block.stack_bytes);
#endif
  running = to;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to ? to->sanitizer : block.sanitizer, __tsan_switch_to_fiber_no_sync);
  swapcontext(from ? &from->context : &block.context, to ? &to->context : &block.context);
#else
  // system calls for the signal mask would cost ten times the switch: only the first takes one
  if (_setjmp(from ? from->place : block.place) == 0) {
    if (to == nullptr) {
      _longjmp(block.place, 1);
    }
    if (to->started) {
      _longjmp(to->place, 1);
    }
    to->started = true;
    setcontext(&to->context);
  }
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

HOST_UNSEEN inline void switch_to_next(Fiber* from) {
  Block& block = *from->block;
  const size_t count = block.fibers.size();
  for (size_t step = 1; step <= count; ++step) {
    Fiber& to = block.fibers[(from->index + step) % count];
    if (&to != from && !to.finished) {
      return switch_to(block, from, &to);
    }
  }
  if (from->finished) {
    switch_to(block, from, nullptr);
  }
}

[[noreturn]] HOST_UNSEEN inline void die_of_divergence(const Fiber* fiber, const Barrier& barrier,
                                                       const char* what) {
  std::fprintf(stderr,
               "divergent %s in block %u: thread %u waits, %u of %u have arrived, %u have not "
               "finished\n",
               what, fiber->block->index.x, fiber->index, barrier.arrived, barrier.expected,
               fiber->block->unfinished);
  std::_Exit(86);
}

HOST_UNSEEN inline void wait(Barrier& barrier, const char* what) {
  Fiber* fiber = self();
  Block& block = *fiber->block;
  const unsigned generation = barrier.generation;
  block.idle = 0;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) {
    if (++block.idle > 2 * block.fibers.size() + 2) {
      die_of_divergence(fiber, barrier, what);
    }
    switch_to_next(fiber);
  }
}

// Waits for another block, of which this one's other fibers need know nothing. Patience is counted
// in looks, not in time, in which a process may be stopped.
constexpr int kPatience = 300'000;

template <typename Ready>
void spin(Ready ready) {
  for (int looks = 0; !ready(); ++looks) {
    if (looks == kPatience) {
      std::fprintf(stderr, "block %u waits for others in vain\n", self()->block->index.x);
      std::_Exit(86);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(10));
  }
}

// Whether a fault of this kind hits this barrier.
HOST_UNSEEN inline bool is_faulty(Fault kind, const char* file, int line) {
  return fault == kind && line == fault_site.line &&
         std::string_view(file).ends_with(fault_site.file);
}

HOST_UNSEEN inline unsigned generation_of(const Barrier& barrier) {
  return barrier.generation;
}

HOST_UNSEEN inline void note(const char* file, int line) {
  if (met != nullptr) {
    const std::lock_guard lock(met_lock);
    met->insert({file, line});
  }
}

inline void block_barrier(const char* file, int line) {
  Fiber* fiber = self();
  note(file, line);
  if (is_faulty(Fault::missing_barrier, file, line) ||
      (is_faulty(Fault::divergent_barrier, file, line) && fiber->index % 2 == 1)) {
    return;
  }
  Barrier& barrier = fiber->block->barrier;
#if defined(__SANITIZE_THREAD__)
  void* meeting_place = &barrier.meetings[generation_of(barrier) % 2];
  __tsan_release(meeting_place);
#endif
  wait(barrier, "__syncthreads");
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(meeting_place);
#endif
}

HOST_UNSEEN inline void add_to_count(bool predicate) {
  Block& block = *self()->block;
  block.counted = (block.barrier.arrived == 0 ? 0 : block.counted) + (predicate ? 1 : 0);
}

HOST_UNSEEN inline int read_count() {
  return static_cast<int>(self()->block->counted);
}

inline int block_count(bool predicate, const char* file, int line) {
  add_to_count(predicate);
  block_barrier(file, line);
  const int count = read_count();
  block_barrier(file, line);
  return count;
}

template <typename X>
HOST_UNSEEN const unsigned char (*exchange(const X& x))[32] {
  static_assert(sizeof(X) <= 32);
  Fiber* fiber = self();
  Warp& warp = fiber->block->warps[fiber->index / kWarpSize];
  auto& slots = warp.slots[fiber->collectives++ % 2];
  __builtin_memcpy(slots[fiber->index % kWarpSize], &x, sizeof(X));
  wait(warp.barrier, "warp collective");
  return slots;
}

template <typename X>
HOST_UNSEEN X read_slot(const unsigned char (*slots)[32], unsigned lane) {
  X x;
  __builtin_memcpy(&x, slots[lane], sizeof(X));
  return x;
}

}  // namespace host
