// What the tile units of AMX would make of the kernels' products: python -m benchmarks.amx.
//
// The units multiply bfloat16 and add in float32. A float32 number is the sum of three of bfloat16,
// x = x0 + x1 + x2, so that products of float32 are possible too: of the nine partial products six
// matter. Features given in bfloat16 have x0 alone, and need one against each other, and three
// against the float32 weights of the gradient.
//
// A block of the size that `tiled` works on, [192, 256] times [256, 192], by the micro-kernel of
// csrc/cpu/matmul.h and by the tile units, each from float32 in memory to float32 in memory.
#define AFFKD_NAMESPACE amx_trial
#define AFFKD_VECTOR_BYTES 64
#define AFFKD_GROUP_ROWS 12

#include "../csrc/cpu/matmul.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

using namespace affkd;
using namespace affkd::amx_trial;

namespace {

constexpr int64_t kRows = 192, kColumns = 192, kSteps = 256;
constexpr int64_t kTileRows = 16, kTileSteps = 32, kTile = kTileRows * kTileSteps;
constexpr int64_t kRowTiles = kRows / kTileRows, kColumnTiles = kColumns / kTileRows;
constexpr int64_t kStepTiles = kSteps / kTileSteps;
constexpr int64_t kParts = 3;
constexpr int64_t kPanelWidth = kPanel<float>;
static_assert(kDepth == kSteps && kRows % kTileRows == 0 && kColumns % kPanelWidth == 0);

struct alignas(64) TileShape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Whether the processor has the units, and Linux lets this process use them.
bool start_units() {
  constexpr unsigned bfloat16 = 1U << 22, tiles = 1U << 24;
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & bfloat16) == 0 || (d & tiles) == 0 ||
      syscall(SYS_arch_prctl, request_permission, tile_data) != 0) {
    return false;
  }
  const TileShape shape;
  _tile_loadconfig(&shape);
  return true;
}

// the upper halves of 16 numbers, rounded, as float32 whose lower half is zero
Int32Vector upper_half(FloatVector x) {
  return (reinterpret_cast<Int32Vector>(x) + 0x8000) & -0x10000;
}

void split(FloatVector x, int parts, Int32Vector* part) {
  for (int p = 0; p < parts; ++p) {
    part[p] = upper_half(x);
    x = x - reinterpret_cast<FloatVector>(part[p]);
  }
}

// Rows of 32 steps, of 16 rows a tile.
void split_left(const float* x, int parts, int16_t* tiles) {
  typedef int16_t Int16Vector __attribute__((vector_size(64)));
  constexpr Int16Vector upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t step = 0; step < kStepTiles; ++step) {
      const float* from = x + row * kSteps + step * kTileSteps;
      Int32Vector low[kParts], high[kParts];
      split(load(from), parts, low);
      split(load(from + kLanes<float>), parts, high);
      for (int p = 0; p < parts; ++p) {
        const auto first = reinterpret_cast<Int16Vector>(low[p]);
        const auto second = reinterpret_cast<Int16Vector>(high[p]);
        const Int16Vector numbers = __builtin_shuffle(first, second, upper);
        int16_t* tile = tiles + ((row / kTileRows * kStepTiles + step) * kParts + p) * kTile;
        __builtin_memcpy(tile + row % kTileRows * kTileSteps, &numbers, sizeof(numbers));
      }
    }
  }
}

// Of a panel [steps][32 columns]: pairs of steps side by side, of 16 columns a tile.
void split_panel(const float* panel, int parts, int16_t* tiles) {
  typedef uint32_t Unsigned __attribute__((vector_size(64)));
  for (int64_t pair = 0; pair < kSteps / 2; ++pair) {
    for (int64_t half = 0; half < 2; ++half) {
      const float* from = panel + 2 * pair * kPanelWidth + half * kLanes<float>;
      Int32Vector even[kParts], odd[kParts];
      split(load(from), parts, even);
      split(load(from + kPanelWidth), parts, odd);
      for (int p = 0; p < parts; ++p) {
        const auto low = reinterpret_cast<Unsigned>(even[p]) >> 16;
        const Int32Vector numbers = odd[p] | reinterpret_cast<Int32Vector>(low);
        int16_t* tile = tiles + ((pair / kTileRows * kParts + p) * 2 + half) * kTile;
        __builtin_memcpy(tile + pair % kTileRows * kTileSteps, &numbers, sizeof(numbers));
      }
    }
  }
}

// 32 x 32 sums of the products whose parts together have at most two places too many.
void multiply_tiles(const int16_t* left, int left_parts, const int16_t* panel, int panel_parts,
                    float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  // small sums first: they lose nothing to the large ones
  for (int p = left_parts + panel_parts - 2; p >= 0; --p) {
    for (int a = 0; a < left_parts && p < kParts; ++a) {
      const int b = p - a;
      if (b < 0 || b >= panel_parts) {
        continue;
      }
      for (int64_t step = 0; step < kStepTiles; ++step) {
        _tile_loadd(4, left + (step * kParts + a) * kTile, 64);
        _tile_loadd(5, left + ((kStepTiles + step) * kParts + a) * kTile, 64);
        _tile_loadd(6, panel + (step * kParts + b) * 2 * kTile, 64);
        _tile_loadd(7, panel + (step * kParts + b) * 2 * kTile + kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  constexpr int64_t stride = kColumns * sizeof(float);
  _tile_stored(0, out, stride);
  _tile_stored(1, out + kTileRows, stride);
  _tile_stored(2, out + kTileRows * kColumns, stride);
  _tile_stored(3, out + kTileRows * kColumns + kTileRows, stride);
}

struct Block {
  std::vector<float> left, panels, out;
  std::vector<int16_t> left_tiles, panel_tiles;

  Block(int left_parts, int panel_parts)
      : left(kRows * kSteps),
        panels(kColumns * kSteps),
        out(kRows * kColumns),
        left_tiles(kRows * kSteps * kParts),
        panel_tiles(kPanelWidth * kSteps * kParts) {
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, int parts) {
      for (float& value : x) {
        value = normal(generator);
        // what is given in bfloat16 has one part
        Int32Vector part[kParts];
        split(splat<FloatVector>(value), 1, part);
        value = parts == 1 ? reinterpret_cast<FloatVector>(part[0])[0] : value;
      }
    };
    fill(left, left_parts);
    fill(panels, panel_parts);
  }

  const float* panel(int64_t j) const { return panels.data() + j * kSteps; }

  void by_vectors() {
    for (int64_t j = 0; j < kColumns; j += kPanelWidth) {
      multiply_panel<float>(kRows, kSteps, {left.data(), kSteps, 1}, panel(j),
                            {out.data() + j, kColumns}, kPanelWidth, false);
    }
  }

  void by_tiles(int left_parts, int panel_parts) {
    split_left(left.data(), left_parts, left_tiles.data());
    for (int64_t j = 0; j < kColumns; j += kPanelWidth) {
      split_panel(panel(j), panel_parts, panel_tiles.data());
      for (int64_t i = 0; i < kRowTiles; i += 2) {
        multiply_tiles(left_tiles.data() + i * kStepTiles * kParts * kTile, left_parts,
                       panel_tiles.data(), panel_parts,
                       out.data() + i * kTileRows * kColumns + j);
      }
    }
  }

  // the largest error against float64, in units of the largest sum
  double error() const {
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t j = 0; j < kColumns; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < kSteps; ++k) {
          const float* row = panel(j / kPanelWidth * kPanelWidth) + k * kPanelWidth;
          sum += static_cast<double>(left[i * kSteps + k]) * row[j % kPanelWidth];
        }
        worst = std::max(worst, std::abs(sum - out[i * kColumns + j]));
        largest = std::max(largest, std::abs(sum));
      }
    }
    return worst / largest;
  }
};

template <typename Run>
double seconds(Run run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

// A line for every kind of factors: parts of the left one, of the right one, median seconds by the
// vector units and by the tile units, the errors of both.
int main() {
  if (!start_units()) {
    std::fputs("this processor has no AMX with bfloat16, or the system keeps it back\n", stderr);
    return 1;
  }
  constexpr int rounds = 301;
  const int kinds[][2] = {{1, 1}, {3, 1}, {3, 3}};
  for (const auto& [left_parts, panel_parts] : kinds) {
    Block block(left_parts, panel_parts);
    std::vector<double> vectors, tiles;
    for (int round = 0; round < rounds; ++round) {
      vectors.push_back(seconds([&] { block.by_vectors(); }));
      tiles.push_back(seconds([&] { block.by_tiles(left_parts, panel_parts); }));
    }
    block.by_vectors();
    const double vector_error = block.error();
    block.by_tiles(left_parts, panel_parts);
    std::printf("%d %d %.9g %.9g %.3g %.3g\n", left_parts, panel_parts, median(vectors),
                median(tiles), vector_error, block.error());
  }
  return 0;
}
