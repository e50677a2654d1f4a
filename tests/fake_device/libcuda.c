// libcuda.so.1 of a GPU that is not there. Loads binaries without a device, starts nothing, and
// notes what each launch was given.
//
// The sizes of a kernel's parameters are read from its binary, where ptxas wrote them for the
// driver: section .nv.info.KERNEL, one entry EIATTR_KPARAM_INFO a parameter.
#include <elf.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cuda.h"

#define MOST_PARAMETERS 512

typedef struct {
  char name[256];
  int parameters;
  int offset[MOST_PARAMETERS];
  int size[MOST_PARAMETERS];
  int bytes;
} Kernel;

typedef struct {
  const Kernel* kernel;
  unsigned grid[3], block[3], shared, attributes;
  void* stream;
  unsigned char* parameters;
} Recorded;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int capability_major = 9, capability_minor = 0, shared_bytes = 232448;
static long charged_nanoseconds, launched, loaded, failing_after = -1;
static CUresult failure;
static int capturing, recording;
static Recorded* recorded;
static long recorded_count, recorded_room;

void stub_set_device(int major, int minor, int shared) {
  capability_major = major, capability_minor = minor, shared_bytes = shared;
}
void stub_charge(long nanoseconds) { charged_nanoseconds = nanoseconds; }
// The launch after so many more, and none other, returns `error`.
void stub_fail(long after, int error) { failing_after = after, failure = (CUresult)error; }
void stub_capture(int on) { capturing = on; }
long stub_launched(void) { return launched; }
long stub_loaded(void) { return loaded; }
long stub_recorded(void) { return recorded_count; }
const Recorded* stub_recorded_at(long i) { return &recorded[i]; }
void stub_record(int on) {
  pthread_mutex_lock(&lock);
  if (on) {
    for (long i = 0; i < recorded_count; i++) free(recorded[i].parameters);
    recorded_count = 0;
  }
  recording = on;
  pthread_mutex_unlock(&lock);
}

static void read_parameters(Kernel* kernel, const unsigned char* at, const unsigned char* end) {
  enum { WITH_BYTES = 4, KPARAM_INFO = 0x17 };
  while (at + 4 <= end) {
    uint16_t count;
    memcpy(&count, at + 2, 2);
    const unsigned char* body = at + 4;
    if (at[0] == WITH_BYTES && at[1] == KPARAM_INFO) {
      uint16_t ordinal, offset;
      uint32_t flags;
      memcpy(&ordinal, body + 4, 2);
      memcpy(&offset, body + 6, 2);
      memcpy(&flags, body + 8, 4);
      if (ordinal >= MOST_PARAMETERS) abort();
      kernel->offset[ordinal] = offset;
      kernel->size[ordinal] = flags >> 18;
      if (kernel->parameters <= ordinal) kernel->parameters = ordinal + 1;
    }
    at = body + (at[0] == WITH_BYTES ? count : 0);
  }
  // The binary counts from the first parameter's place in constant memory.
  int first = kernel->parameters ? kernel->offset[0] : 0;
  for (int i = 0; i < kernel->parameters; i++) {
    kernel->offset[i] -= first;
    kernel->bytes = kernel->offset[i] + kernel->size[i];
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const Elf64_Ehdr* header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  const Elf64_Shdr* sections = (const void*)((const char*)image + header->e_shoff);
  size_t size = header->e_shoff + (size_t)header->e_shnum * sizeof(Elf64_Shdr);
  for (int i = 0; i < header->e_shnum; i++) {
    size_t end = sections[i].sh_type == SHT_NOBITS ? 0 : sections[i].sh_offset + sections[i].sh_size;
    if (size < end) size = end;
  }
  void* copy = malloc(size);
  memcpy(copy, image, size);
  *module = copy;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const char* image = (const char*)module;
  const Elf64_Ehdr* header = (const void*)image;
  const Elf64_Shdr* sections = (const void*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++) {
    const char* section = names + sections[i].sh_name;
    if (strncmp(section, ".nv.info.", 9) || strcmp(section + 9, name)) continue;
    Kernel* kernel = calloc(1, sizeof(Kernel));
    strncpy(kernel->name, name, sizeof(kernel->name) - 1);
    const unsigned char* start = (const void*)(image + sections[i].sh_offset);
    read_parameters(kernel, start, start + sections[i].sh_size);
    __atomic_add_fetch(&loaded, 1, __ATOMIC_RELAXED);
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* size) {
  const Kernel* kernel = (const Kernel*)function;
  if (index >= (size_t)kernel->parameters) return CUDA_ERROR_INVALID_VALUE;
  *offset = kernel->offset[index];
  if (size) *size = kernel->size[index];
  return CUDA_SUCCESS;
}

static void note(const CUlaunchConfig* config, const Kernel* kernel, void** parameters) {
  if (recorded_count == recorded_room) {
    recorded_room = recorded_room ? 2 * recorded_room : 256;
    recorded = realloc(recorded, recorded_room * sizeof(Recorded));
  }
  Recorded* entry = &recorded[recorded_count++];
  *entry = (Recorded){kernel,
                      {config->gridDimX, config->gridDimY, config->gridDimZ},
                      {config->blockDimX, config->blockDimY, config->blockDimZ},
                      config->sharedMemBytes,
                      config->numAttrs,
                      config->hStream,
                      calloc(1, kernel->bytes + 1)};
  for (int i = 0; i < kernel->parameters; i++)
    memcpy(entry->parameters + kernel->offset[i], parameters[i], kernel->size[i]);
}

static long nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000L + now.tv_nsec;
}

CUresult cuLaunchKernelEx(
    const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  (void)extra;
  if (charged_nanoseconds)
    for (long end = nanoseconds() + charged_nanoseconds; nanoseconds() < end;) continue;
  __atomic_add_fetch(&launched, 1, __ATOMIC_RELAXED);
  if (failing_after >= 0 && __atomic_fetch_sub(&failing_after, 1, __ATOMIC_RELAXED) == 0)
    return failure;
  if (recording) {
    pthread_mutex_lock(&lock);
    note(config, (const Kernel*)function, parameters);
    pthread_mutex_unlock(&lock);
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
    unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
    void** parameters, void** extra) {
  CUlaunchConfig config = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, 0, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}

// A tensor map as the arguments that it encodes, each where no other is: equal bytes, equal maps.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
    void* address, const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
    const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  struct {
    uint64_t address, shape[5];
    uint32_t type, rank, strides[4];
    uint16_t box[5];
    uint8_t element_strides[5], interleave, swizzle, promotion, fill;
  } told = {(uint64_t)address, {0}, type, rank, {0}, {0}, {0}, interleave, swizzle, promotion, fill};
  if (rank < 1 || rank > 5 || ((uint64_t)address & 15)) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; i++) {
    told.shape[i] = shape[i];
    told.box[i] = box[i];
    told.element_strides[i] = element_strides[i];
    if (i + 1 < rank) {
      if (strides[i] & 15) return CUDA_ERROR_INVALID_VALUE;
      told.strides[i] = strides[i] >> 4;
    }
  }
  _Static_assert(sizeof(told) <= sizeof(CUtensorMap), "a map has 128 bytes");
  memset(map, 0, sizeof(CUtensorMap));
  memcpy(map, &told, sizeof(told));
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  (void)stream;
  *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS ? "no error" : "an error of the device that is not there";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = capability_major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = capability_minor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_bytes; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 1024;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

#define ANSWERS(name, parameters, ...) \
  CUresult name parameters { __VA_ARGS__; return CUDA_SUCCESS; }

ANSWERS(cuInit, (unsigned flags), (void)flags)
ANSWERS(cuDriverGetVersion, (int* version), *version = 12080)
ANSWERS(cuDeviceGet, (CUdevice* device, int ordinal), *device = ordinal)
ANSWERS(cuDeviceGetCount, (int* count), *count = 1)
ANSWERS(cuCtxGetCurrent, (CUcontext* context), *context = (CUcontext)8)
ANSWERS(cuCtxGetDevice, (CUdevice* device), *device = 0)
ANSWERS(cuCtxSetCurrent, (CUcontext context), (void)context)
ANSWERS(cuDevicePrimaryCtxRetain, (CUcontext* context, CUdevice device), (void)device;
        *context = (CUcontext)8)
ANSWERS(cuCtxGetLimit, (size_t* value, CUlimit limit), (void)limit; *value = 1 << 20)
ANSWERS(cuCtxSetLimit, (CUlimit limit, size_t value), (void)limit, (void)value)
ANSWERS(cuFuncSetAttribute, (CUfunction function, CUfunction_attribute attribute, int value),
        (void)function, (void)attribute, (void)value)
ANSWERS(cuFuncSetCacheConfig, (CUfunction function, CUfunc_cache config), (void)function,
        (void)config)
ANSWERS(cuOccupancyMaxActiveClusters,
        (int* count, CUfunction function, const CUlaunchConfig* config), (void)function,
        (void)config; *count = 1)
// Every pointer counts as one of the device.
ANSWERS(cuPointerGetAttribute, (void* value, CUpointer_attribute attribute, CUdeviceptr pointer),
        (void)attribute; *(CUdeviceptr*)value = pointer)
ANSWERS(cuPointerGetAttributes, (unsigned count, CUpointer_attribute* attributes, void** values,
        CUdeviceptr pointer), (void)count, (void)attributes, (void)values, (void)pointer)
