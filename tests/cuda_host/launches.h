// Runs launches of CUDA kernels on a CPU: the blocks of a launch are shared out among threads of
// the operating system. Shared memory starts as NaN, and a copy_async lands when it is waited for,
// not before.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "fibers.h"

namespace host {

// how many blocks run at a time
inline unsigned workers = 2;

inline void enter(unsigned low, unsigned high) {
  auto* fiber = reinterpret_cast<Fiber*>((static_cast<uintptr_t>(high) << 32) | low);
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(fiber);
#endif
  Block& block = *fiber->block;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, block.stack ? nullptr : &block.stack,
                                  block.stack_bytes ? nullptr : &block.stack_bytes);
#endif
  (*block.body)();
#if defined(__SANITIZE_THREAD__)
  __tsan_release(const_cast<std::function<void()>*>(block.body));
#endif
  [](Fiber* done) HOST_UNSEEN {
    done->finished = true;
    --done->block->unfinished;
    done->block->idle = 0;
    switch_to_next(done);
  }(fiber);
  std::abort();
}

// What fibers need to live, kept from one launch to the next: making it takes longer than a kernel.
// Under ThreadSanitizer every block of a launch has a home of its own, as it would take two fibers
// in the same place for one thread.
struct Home {
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<void*> sanitizers;

  void make_room(size_t fibers) {
    while (stacks.size() < fibers) {
      stacks.emplace_back(new char[kStackBytes]);
#if defined(__SANITIZE_THREAD__)
      sanitizers.push_back(__tsan_create_fiber(0));
#endif
    }
  }
};

#if defined(__SANITIZE_THREAD__)
constexpr bool kHomeOfBlock = true;
#else
constexpr bool kHomeOfBlock = false;
#endif
inline std::vector<std::unique_ptr<Home>> homes;

inline void start_fiber(Block& block, Home& home, unsigned index) {
  Fiber& fiber = block.fibers[index];
  fiber.block = &block;
  fiber.index = index;
  fiber.copies.emplace_back();
  fiber.stack = home.stacks[index].get();
#if defined(__SANITIZE_ADDRESS__)
  // the fiber that was here ended without leaving its functions
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(&fiber);
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 2,
              static_cast<unsigned>(address), static_cast<unsigned>(address >> 32));
#if defined(__SANITIZE_THREAD__)
  fiber.sanitizer = home.sanitizers[index];
#endif
}

inline void run_fibers(Block& block, Home& home) {
#if defined(__SANITIZE_THREAD__)
  block.sanitizer = __tsan_get_current_fiber();
#endif
  home.make_room(block.fibers.size());
  for (unsigned thread = 0; thread < block.fibers.size(); ++thread) {
    start_fiber(block, home, thread);
  }
#if defined(__SANITIZE_THREAD__)
  for (Fiber& fiber : block.fibers) {
    __tsan_release(&fiber);
  }
#endif
  // not with the first: what it alone writes must not be there for all others by chance
  switch_to(block, nullptr, &block.fibers.back());
}

struct Launch {
  unsigned blocks;
  unsigned threads;
  size_t shared_bytes;
  std::function<void()> body;
};

inline void run_block(const Launch& launch, unsigned index, Home& home) {
  auto block = std::make_unique<Block>();
  block->index = {index};
  block->count = {launch.blocks};
  block->body = &launch.body;
  block->fibers.resize(launch.threads);
  block->unfinished = block->barrier.expected = launch.threads;
  block->warps.resize((launch.threads + kWarpSize - 1) / kWarpSize);
  for (Warp& warp : block->warps) {
    warp.barrier.expected = kWarpSize;
  }
  const size_t bytes = launch.shared_bytes - (fault == Fault::short_memory ? 16 : 0);
  block->shared.reset(new unsigned char[bytes]);
  std::memset(block->shared.get(), 0xff, bytes);
  run_fibers(*block, home);
#if defined(__SANITIZE_THREAD__)
  // the worker does not wait for the fibers, or it would order this block before its next
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  block.reset();
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
}

// Launches between which nothing is waited for: of a correct program, one.
inline void run_launches(const std::vector<Launch>& launches) {
  size_t rooms = workers;
  for (const Launch& launch : launches) {
    rooms += kHomeOfBlock ? launch.blocks : 0;
  }
  while (homes.size() < rooms) {
    homes.push_back(std::make_unique<Home>());
  }
  std::atomic<unsigned> next{0};
  const auto work = [&](unsigned worker) {
    for (unsigned ticket = next++;; ticket = next++) {
      unsigned block = ticket;
      auto launch = launches.begin();
      while (launch != launches.end() && block >= launch->blocks) {
        block -= launch->blocks;
        ++launch;
      }
      if (launch == launches.end()) {
        return;
      }
      run_block(*launch, block, *homes[kHomeOfBlock ? ticket : worker]);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned worker = 0; worker < workers; ++worker) {
    threads.emplace_back(work, worker);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
#if defined(__SANITIZE_THREAD__)
  for (const Launch& launch : launches) {
    __tsan_acquire(const_cast<std::function<void()>*>(&launch.body));
  }
#endif
}

// What is launched one after the other on one stream.
class Stream {
 public:
  void launch(Launch launch) {
    launches_.push_back(std::move(launch));
    if (fault != Fault::missing_boundary) {
      wait();
    }
  }

  void wait() {
    run_launches(launches_);
    launches_.clear();
  }

 private:
  std::vector<Launch> launches_;
};

}  // namespace host
