#include "arena.h"

#include <new>
#include <vector>

#include "checked_memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace affkd {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kFirstBlock = size_t{1} << 20;
// More than this is given back to the system when the outermost call ends.
constexpr size_t kKept = size_t{16} << 20;

struct Block {
  char* data;
  size_t size;
};

// Large blocks come in huge pages where the system has them: faulting in 4 KiB at a time costs as
// much as the arithmetic that the memory is for.
constexpr size_t kHugePage = size_t{2} << 20;

std::align_val_t alignment_of(size_t size) {
  return std::align_val_t{size < 2 * kHugePage ? kAlignment : kHugePage};
}

Block new_block(size_t size) {
  const Block block{static_cast<char*>(::operator new(size, alignment_of(size))), size};
  forbid(block.data, block.size);
#if defined(__linux__)
  if (size >= 2 * kHugePage) {
    madvise(block.data, size, MADV_HUGEPAGE);
  }
#endif
  return block;
}

void free_block(const Block& block) {
  allow(block.data, block.size);
  ::operator delete(block.data, alignment_of(block.size));
}

struct Arena {
  std::vector<Block> blocks;
  size_t current = 0;
  size_t used = 0;  // of the current block

  ~Arena() {
    for (const Block& block : blocks) {
      free_block(block);
    }
  }

  void* take(size_t requested) {
    const size_t bytes = (requested + kGap + kAlignment - 1) / kAlignment * kAlignment;
    while (current < blocks.size() && used + bytes > blocks[current].size) {
      ++current;
      used = 0;
    }
    if (current == blocks.size()) {
      blocks.push_back(new_block(bytes > kFirstBlock ? bytes : kFirstBlock));
    }
    void* taken = blocks[current].data + used;
    used += bytes;
    allow(taken, requested);
    poison(taken, requested);
    return taken;
  }

  void release(ArenaMark mark) {
    current = mark.block;
    used = mark.used;
    for (size_t i = current; i < blocks.size(); ++i) {
      const size_t kept = i == current ? used : 0;
      forbid(blocks[i].data + kept, blocks[i].size - kept);
    }
    if (current == 0 && used == 0) {
      trim();
    }
  }

  void trim() {
    size_t kept = 0;
    size_t count = 0;
    while (count < blocks.size() && kept + blocks[count].size <= kKept) {
      kept += blocks[count++].size;
    }
    while (blocks.size() > count) {
      free_block(blocks.back());
      blocks.pop_back();
    }
  }
};

Arena& arena() {
  thread_local Arena instance;
  return instance;
}

}  // namespace

ArenaMark arena_mark() {
  return {arena().current, arena().used};
}

void arena_release(ArenaMark mark) {
  arena().release(mark);
}

void* arena_take(size_t bytes) {
  return arena().take(bytes);
}

}  // namespace affkd
