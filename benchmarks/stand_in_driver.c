// A CUDA driver without a GPU: whatever Triton's launcher asks is granted, and launches are counted
// and, where that is asked for, written down. Enough for a kernel to be loaded and launched, and
// nothing is computed.
#include <stdint.h>
#include <string.h>

typedef int Result;

typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;

// a launch; of its parameters the first 8 bytes each, of which a kernel may read fewer
typedef struct {
  Config config;
  void *function;
  int64_t parameters[128];
} Launch;

static int64_t launched = 0, refused = 0, to_keep = 0;
static const int64_t *parameter_counts;
static Launch *kept;

int64_t stand_in_launches(void) { return launched; }

// Writes down so many launches that follow, of which it is known how many parameters they have.
void stand_in_keep(Launch *launches, const int64_t *counts, int64_t launch_count) {
  kept = launches, parameter_counts = counts, to_keep = launch_count;
}

// Refuses so many launches that follow.
void stand_in_refuse(int64_t launch_count) { refused = launch_count; }

static Result grant(void **handle) {
  static intptr_t handles = 0;
  *handle = (void *)++handles;
  return 0;
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { return *version = 13000, 0; }
Result cuDeviceGetCount(int *count) { return *count = 1, 0; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
Result cuCtxGetDevice(int *device) { return *device = 0, 0; }
Result cuCtxGetCurrent(void **context) { return grant(context); }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return grant(context); }
Result cuGetErrorString(Result code, const char **text) { return *text = "stand-in", 0; }
Result cuModuleLoadData(void **module, const void *image) { return grant(module); }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) {
  return grant(function);
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }

// of an H100, as far as it is asked
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 10: return *value = 32, 0;       // threads in a warp
    case 12: return *value = 65536, 0;    // registers
    case 16: return *value = 132, 0;      // multiprocessors
    case 75: return *value = 9, 0;        // compute capability
    case 76: return *value = 0, 0;
    case 81: case 97: return *value = 232448, 0;  // shared memory
    default: return *value = 1, 0;
  }
}

Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0, 0;
}

Result cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
  memcpy(data, &pointer, sizeof pointer);
  return 0;
}

Result cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  if (refused) return --refused, 201;  // invalid context
  ++launched;
  if (to_keep) {
    --to_keep, kept->config = *config, kept->function = function;
    for (int64_t i = 0; i < *parameter_counts; ++i) memcpy(&kept->parameters[i], parameters[i], 8);
    ++kept, ++parameter_counts;
  }
  return 0;
}
