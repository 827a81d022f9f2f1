/// A double of the CUDA driver (libcuda.so.1): the calls that `gpu::CudaGpu` makes, on host memory.
///
/// It judges sequences of calls: handles must be live and of the right kind, what is created is counted until it is
/// released, and any call can be made to fail. It says nothing of kernels on a GPU: a launch is counted, or handed to
/// the test (`Hooks`), which may run the same kernel on the CPU.
///
/// Where NVIDIA's header is found, the compiler compares every signature here with it.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<cuda.h>)
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#define RESULT(code) static_cast<CUresult>(code)
#else
using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;
using CUdevice_attribute = int;
using CUfunction_attribute = int;
using CUstreamCaptureMode = int;
using CUmemRangeHandleType = int;
using cuuint32_t = std::uint32_t;
using cuuint64_t = std::uint64_t;
struct CUuuid { char bytes[16]; };
struct CUipcMemHandle { char reserved[64]; };
using CUmemGenericAllocationHandle = unsigned long long;
using CUmemAllocationGranularity_flags = int;
using CUmemAllocationHandleType = int;
struct CUmemLocation { int type, id; };
struct CUmemAllocationProp {
  int type, requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType, gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};
struct CUmemAccessDesc { CUmemLocation location; int flags; };
#define CUDAAPI
#define RESULT(code) (code)
#endif

namespace {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kInvalidContext = 201, kInvalidHandle = 400, kNotReady = 600,
              kOperatingSystem = 304, kNotSupported = 801;

/// What pages come in; a real one's are larger.
constexpr size_t kGranularity = 64 << 10;

/// What the test does for the double; null: nothing happens, and everything is done at once.
struct Hooks {
  void* ctx;
  int (*launch)(void* ctx, uint64_t stream, const char* name, const void* args, uint32_t blocks, uint32_t threads);
  int (*record)(void* ctx, uint64_t event, uint64_t stream);
  int (*wait)(void* ctx, uint64_t event, uint64_t stream);
  int (*begin_capture)(void* ctx, uint64_t stream);
  int (*end_capture)(void* ctx, uint64_t stream, uint64_t graph);
  int (*replay)(void* ctx, uint64_t graph, uint64_t stream);
  int (*synchronize)(void* ctx, uint64_t stream);
  int (*is_idle)(void* ctx, uint64_t stream);
  int (*is_done)(void* ctx, uint64_t event);
};

enum Kind {
  kContext, kModule, kStream, kEvent, kGraph, kExec, kDeviceMemory, kHostMemory, kRegistered, kIpc,
  kPhysical, kReserved, kMapped,
};

struct Object {
  Kind kind;
  size_t len = 0;
  /// Of device memory: the file behind it, and where in memory that is.
  int fd = -1;
  uint64_t pages = 0;
};

/// How a test wants its machine.
struct Machine {
  int version = 13000;
  int devices = 2;
  int capability = 9;
  int attribute_off = -1;  ///< this attribute reads as 0
  int busy = 0;            ///< streams have work
  int refuses_io = 0;      ///< registers of devices are not mapped
};

std::mutex lock;
Machine machine;
Hooks hooks{};
std::map<uint64_t, Object> objects;
std::map<uint64_t, int> ipc_opened;
std::map<uint64_t, std::string> functions;
std::vector<std::string> calls;
/// What streams were told to wait for. Nothing waits here.
std::vector<std::pair<uint64_t, uint32_t>> held;
uint64_t next_handle = 0x1000;
uint64_t launches = 0, cooperative = 0;
/// Countdown to the call that fails; 0: none does.
uint64_t fail_in = 0;
int fail_code = 0;
thread_local std::vector<CUcontext> current;

/// Counts a call; whether it is the one that is to fail.
bool fails(const char* name) {
  calls.emplace_back(name);
  return fail_in != 0 && --fail_in == 0;
}

template <class T>
T create(Kind kind) {
  const uint64_t handle = next_handle += 16;
  objects[handle] = {kind};
  return reinterpret_cast<T>(handle);
}

bool is_live(const void* handle, Kind kind) {
  const auto found = objects.find(reinterpret_cast<uint64_t>(handle));
  return found != objects.end() && found->second.kind == kind;
}

/// Ends an object, also where the call is to fail: the driver's release calls report earlier failures.
int release(uint64_t handle, Kind kind, bool fail) {
  const auto found = objects.find(handle);
  if (found == objects.end() || found->second.kind != kind) return kInvalidHandle;
  objects.erase(found);
  return fail ? fail_code : 0;
}

uint64_t id(const void* handle) { return reinterpret_cast<uint64_t>(handle); }

/// Whether `len` bytes at `addr` lie in one live allocation.
bool is_memory(uint64_t addr, size_t len) {
  for (const auto& [base, object] : objects) {
    const bool is_one = object.kind == kDeviceMemory || object.kind == kHostMemory || object.kind == kMapped;
    if (is_one && addr >= base && addr + len <= base + object.len) return true;
  }
  return false;
}

/// Device memory is a file mapped here, so that a dma-buf of it is that file. What is allocated begins 512 bytes
/// before, on a page of its own: callers must align what they need more of.
int allocate_on_device(uint64_t* addr, size_t len) {
  constexpr size_t kPage = 4096;
  if (len == 0 || len > size_t{1} << 34) return kOutOfMemory;
  const size_t size = (len + kPage - 1) / kPage * kPage;
  const int fd = memfd_create("ibex-double", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(size)) != 0) return kOutOfMemory;
  void* room = mmap(nullptr, kPage + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return kOutOfMemory;
  char* pages = static_cast<char*>(room) + kPage;
  if (mmap(pages, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) return kOutOfMemory;
  *addr = reinterpret_cast<uint64_t>(pages) - 512;
  std::memset(reinterpret_cast<void*>(*addr), 0xa5, len);
  objects[*addr] = {kDeviceMemory, len, fd, reinterpret_cast<uint64_t>(pages)};
  return 0;
}

int free_on_device(uint64_t addr, bool fail) {
  const auto found = objects.find(addr);
  if (found == objects.end() || found->second.kind != kDeviceMemory) return kInvalidHandle;
  const Object object = found->second;
  const size_t size = (object.len + 4095) / 4096 * 4096;
  munmap(reinterpret_cast<void*>(object.pages - 4096), 4096 + size);
  close(object.fd);
  return release(addr, kDeviceMemory, fail);
}

int allocate(uint64_t* addr, size_t len, Kind kind) {
  if (len == 0 || len > size_t{1} << 34) return kOutOfMemory;
  // 512 bytes and not a page: callers must align what they need more of.
  char* room = static_cast<char*>(std::aligned_alloc(4096, (len + 512 + 4095) / 4096 * 4096));
  std::memset(room, 0xa5, len + 512);
  *addr = reinterpret_cast<uint64_t>(room) + 512;
  objects[*addr] = {kind, len};
  return 0;
}

/// Whether pages can be shared with another process, and with NICs.
bool is_shareable(const CUmemAllocationProp& prop) {
  return static_cast<int>(prop.type) == 1 && static_cast<int>(prop.requestedHandleTypes) == 1 &&
         static_cast<int>(prop.location.type) == 1 && prop.win32HandleMetaData == nullptr &&
         prop.allocFlags.compressionType == 0 && prop.allocFlags.gpuDirectRDMACapable == 1;
}

int give_back(uint64_t addr, Kind kind, bool fail) {
  const int answer = release(addr, kind, fail);
  if (answer != kInvalidHandle) std::free(reinterpret_cast<void*>(addr - 512));
  return answer;
}

}  // namespace

/// `BEGIN(name)` in every call: count it, fail it, and ask for a current context where the driver does.
#define BEGIN(name)                    \
  const std::lock_guard guard(lock);   \
  if (fails(name)) return RESULT(fail_code)
#define BEGIN_IN_CONTEXT(name) \
  BEGIN(name);                 \
  if (current.empty()) return RESULT(kInvalidContext)
/// The name of a call in its second version, as the driver spells it.
#define SECOND(name) name##_v##2
#define NEED(condition) \
  if (!(condition)) return RESULT(kInvalidHandle)

extern "C" {

// ---- What a test says and asks ----

void ibex_double_reset() {
  const std::lock_guard guard(lock);
  machine = {};
  hooks = {};
  calls.clear();
  launches = cooperative = fail_in = 0;
}
void ibex_double_machine(int version, int devices, int capability, int attribute_off) {
  const std::lock_guard guard(lock);
  machine = {version, devices, capability, attribute_off, 0, 0};
}
void ibex_double_busy(int busy) { machine.busy = busy; }
void ibex_double_refuse_io(int refuses) { machine.refuses_io = refuses; }
void ibex_double_hook(const Hooks* wanted) { hooks = *wanted; }
void ibex_double_fail(uint64_t in, int code) {
  const std::lock_guard guard(lock);
  fail_in = in;
  fail_code = code;
}
/// The call that failed has been made.
int ibex_double_has_failed() { return fail_in == 0; }
uint64_t ibex_double_calls() { return calls.size(); }
const char* ibex_double_call(uint64_t at) { return calls[at].c_str(); }
uint64_t ibex_double_live() { return objects.size(); }
/// Streams that still wait for a word.
uint64_t ibex_double_held() {
  const std::lock_guard guard(lock);
  uint64_t waiting = 0;
  for (const auto& [addr, value] : held) {
    if (is_memory(addr, 4) && static_cast<int32_t>(*reinterpret_cast<volatile uint32_t*>(addr) - value) < 0) ++waiting;
  }
  return waiting;
}
uint64_t ibex_double_launches() { return launches; }
uint64_t ibex_double_cooperative() { return cooperative; }

// ---- The driver ----

CUresult CUDAAPI cuInit(unsigned int flags) {
  BEGIN("cuInit");
  return RESULT(flags == 0 ? 0 : kInvalidValue);
}
CUresult CUDAAPI cuDriverGetVersion(int* version) {
  BEGIN("cuDriverGetVersion");
  *version = machine.version;
  return RESULT(0);
}
CUresult CUDAAPI cuDeviceGetCount(int* count) {
  BEGIN("cuDeviceGetCount");
  *count = machine.devices;
  return RESULT(0);
}
CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  BEGIN("cuDeviceGet");
  if (ordinal < 0 || ordinal >= machine.devices) return RESULT(101);
  *device = ordinal;
  return RESULT(0);
}
CUresult CUDAAPI cuDeviceGetName(char* name, int len, CUdevice device) {
  BEGIN("cuDeviceGetName");
  snprintf(name, static_cast<size_t>(len), "double %d", device);
  return RESULT(0);
}
CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  BEGIN("cuDeviceGetUuid");
  std::memset(uuid->bytes, 0x10 + device, 16);
  return RESULT(0);
}
CUresult CUDAAPI cuDeviceGetPCIBusId(char* name, int len, CUdevice device) {
  BEGIN("cuDeviceGetPCIBusId");
  snprintf(name, static_cast<size_t>(len), "0000:%02X:00.0", 0x19 + device);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuDeviceTotalMem)(size_t* bytes, CUdevice) {
  BEGIN("cuDeviceTotalMem_v2");
  *bytes = size_t{1} << 34;
  return RESULT(0);
}
CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  BEGIN("cuDeviceGetAttribute");
  switch (static_cast<int>(attribute)) {
    case 16: *value = 64; break;                    // multiprocessors
    case 75: *value = machine.capability; break;    // major
    case 76: *value = 0; break;                     // minor
    case 118: *value = 100; break;                  // writes ordered for their owner; off: for nobody
    default: *value = 1;
  }
  if (static_cast<int>(attribute) == machine.attribute_off) *value = 0;
  return RESULT(0);
}
CUresult CUDAAPI cuDeviceCanAccessPeer(int* can, CUdevice, CUdevice) {
  BEGIN("cuDeviceCanAccessPeer");
  *can = 0;
  return RESULT(0);
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  BEGIN("cuDevicePrimaryCtxRetain");
  *context = create<CUcontext>(kContext);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuDevicePrimaryCtxRelease)(CUdevice) {
  const std::lock_guard guard(lock);
  const bool fail = fails("cuDevicePrimaryCtxRelease_v2");
  // One reference among others; which one does not matter.
  for (const auto& [handle, object] : objects) {
    if (object.kind == kContext) return RESULT(release(handle, kContext, fail));
  }
  return RESULT(kInvalidContext);
}
CUresult CUDAAPI SECOND(cuCtxPushCurrent)(CUcontext context) {
  BEGIN("cuCtxPushCurrent_v2");
  if (!is_live(context, kContext)) return RESULT(kInvalidContext);
  current.push_back(context);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuCtxPopCurrent)(CUcontext* context) {
  const std::lock_guard guard(lock);
  const bool fail = fails("cuCtxPopCurrent_v2");
  if (current.empty()) return RESULT(kInvalidContext);
  *context = current.back();
  current.pop_back();
  return RESULT(fail ? fail_code : 0);
}
CUresult CUDAAPI cuCtxGetDevice(CUdevice* device) {
  BEGIN_IN_CONTEXT("cuCtxGetDevice");
  *device = 1;
  return RESULT(0);
}
CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  BEGIN_IN_CONTEXT("cuModuleLoadData");
  NEED(image != nullptr);
  *module = create<CUmodule>(kModule);
  return RESULT(0);
}
CUresult CUDAAPI cuModuleUnload(CUmodule module) {
  const std::lock_guard guard(lock);
  return RESULT(release(id(module), kModule, fails("cuModuleUnload")));
}
CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  BEGIN_IN_CONTEXT("cuModuleGetFunction");
  NEED(is_live(module, kModule));
  const uint64_t handle = next_handle += 16;
  functions[handle] = name;
  *function = reinterpret_cast<CUfunction>(handle);
  return RESULT(0);
}
CUresult CUDAAPI cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction function) {
  BEGIN_IN_CONTEXT("cuFuncGetAttribute");
  NEED(functions.count(id(function)) == 1);
  *value = 64;
  return RESULT(0);
}
CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t) {
  BEGIN_IN_CONTEXT("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  NEED(functions.count(id(function)) == 1);
  // 1024 threads of 64 registers each fill a multiprocessor.
  *blocks = 1024 / threads;
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuMemAlloc)(CUdeviceptr* addr, size_t len) {
  BEGIN_IN_CONTEXT("cuMemAlloc_v2");
  uint64_t at = 0;
  const int answer = allocate_on_device(&at, len);
  *addr = at;
  return RESULT(answer);
}
CUresult CUDAAPI SECOND(cuMemFree)(CUdeviceptr addr) {
  const std::lock_guard guard(lock);
  return RESULT(free_on_device(addr, fails("cuMemFree_v2")));
}
CUresult CUDAAPI cuMemHostAlloc(void** addr, size_t len, unsigned int flags) {
  BEGIN_IN_CONTEXT("cuMemHostAlloc");
  NEED((flags & 2) != 0);
  uint64_t at = 0;
  const int answer = allocate(&at, len, kHostMemory);
  *addr = reinterpret_cast<void*>(at);
  return RESULT(answer);
}
CUresult CUDAAPI cuMemFreeHost(void* addr) {
  const std::lock_guard guard(lock);
  return RESULT(give_back(id(addr), kHostMemory, fails("cuMemFreeHost")));
}
CUresult CUDAAPI SECOND(cuMemHostRegister)(void* addr, size_t len, unsigned int flags) {
  BEGIN_IN_CONTEXT("cuMemHostRegister_v2");
  NEED(id(addr) % 4096 == 0 && len % 4096 == 0 && (flags & 2) != 0);
  if ((flags & 4) != 0 && machine.refuses_io != 0) return RESULT(kOperatingSystem);
  // The driver refuses a page that is registered already.
  if (objects.count(id(addr)) != 0) return RESULT(712);
  objects[id(addr)] = {kRegistered, len};
  return RESULT(0);
}
CUresult CUDAAPI cuMemHostUnregister(void* addr) {
  const std::lock_guard guard(lock);
  return RESULT(release(id(addr), kRegistered, fails("cuMemHostUnregister")));
}
CUresult CUDAAPI SECOND(cuMemHostGetDevicePointer)(CUdeviceptr* device, void* host, unsigned int) {
  BEGIN_IN_CONTEXT("cuMemHostGetDevicePointer_v2");
  NEED(is_live(host, kRegistered));
  *device = id(host);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuMemGetAddressRange)(CUdeviceptr* base, size_t* len, CUdeviceptr addr) {
  BEGIN_IN_CONTEXT("cuMemGetAddressRange_v2");
  for (const auto& [begin, object] : objects) {
    if (object.kind == kDeviceMemory && addr >= begin && addr < begin + object.len) {
      *base = begin;
      *len = object.len;
      return RESULT(0);
    }
  }
  return RESULT(kInvalidValue);
}
CUresult CUDAAPI SECOND(cuMemcpyHtoDAsync)(CUdeviceptr to, const void* from, size_t len, CUstream stream) {
  BEGIN_IN_CONTEXT("cuMemcpyHtoDAsync_v2");
  NEED(is_live(stream, kStream) && is_memory(to, len));
  std::memcpy(reinterpret_cast<void*>(to), from, len);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuMemcpyDtoHAsync)(void* to, CUdeviceptr from, size_t len, CUstream stream) {
  BEGIN_IN_CONTEXT("cuMemcpyDtoHAsync_v2");
  NEED(is_live(stream, kStream) && is_memory(from, len));
  std::memcpy(to, reinterpret_cast<const void*>(from), len);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuMemcpyDtoDAsync)(CUdeviceptr to, CUdeviceptr from, size_t len, CUstream stream) {
  BEGIN_IN_CONTEXT("cuMemcpyDtoDAsync_v2");
  NEED(is_live(stream, kStream) && is_memory(to, len) && is_memory(from, len));
  std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), len);
  return RESULT(0);
}
CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr addr, unsigned char byte, size_t len, CUstream stream) {
  BEGIN_IN_CONTEXT("cuMemsetD8Async");
  NEED(is_live(stream, kStream) && is_memory(addr, len));
  std::memset(reinterpret_cast<void*>(addr), byte, len);
  return RESULT(0);
}
CUresult CUDAAPI cuMemGetHandleForAddressRange(void* handle, CUdeviceptr addr, size_t len, CUmemRangeHandleType kind,
                                               unsigned long long) {
  BEGIN_IN_CONTEXT("cuMemGetHandleForAddressRange");
  NEED(static_cast<int>(kind) == 1 && addr % 4096 == 0 && len % 4096 == 0 && is_memory(addr, len));
  if (machine.attribute_off == 124) return RESULT(kNotSupported);
  for (const auto& [base, object] : objects) {
    // A file has no part that begins elsewhere.
    if (object.fd < 0 || object.pages != addr) continue;
    *static_cast<int*>(handle) = fcntl(object.fd, F_DUPFD_CLOEXEC, 0);
    return RESULT(0);
  }
  return RESULT(kInvalidValue);
}
CUresult CUDAAPI cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* prop,
                                               CUmemAllocationGranularity_flags option) {
  BEGIN_IN_CONTEXT("cuMemGetAllocationGranularity");
  NEED(static_cast<int>(option) == 0 && is_shareable(*prop));
  *granularity = kGranularity;
  return RESULT(0);
}
CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp* prop,
                             unsigned long long flags) {
  BEGIN_IN_CONTEXT("cuMemCreate");
  NEED(size != 0 && size % kGranularity == 0 && flags == 0 && is_shareable(*prop));
  const int fd = memfd_create("ibex-double", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(size)) != 0) return RESULT(kOutOfMemory);
  *handle = next_handle += 16;
  objects[*handle] = {kPhysical, size, fd, 0};
  return RESULT(0);
}
CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle) {
  const std::lock_guard guard(lock);
  const bool fail = fails("cuMemRelease");
  const auto found = objects.find(handle);
  if (found != objects.end() && found->second.kind == kPhysical) close(found->second.fd);
  return RESULT(release(handle, kPhysical, fail));
}
CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr* addr, size_t size, size_t align, CUdeviceptr wanted,
                                     unsigned long long flags) {
  BEGIN_IN_CONTEXT("cuMemAddressReserve");
  NEED(size % kGranularity == 0 && align <= kGranularity && wanted == 0 && flags == 0);
  // The mapping of a whole granule more leaves room for one that begins at a multiple.
  void* room = mmap(nullptr, size + kGranularity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return RESULT(kOutOfMemory);
  const uint64_t start = (reinterpret_cast<uint64_t>(room) + kGranularity - 1) / kGranularity * kGranularity;
  objects[start + 1] = {kReserved, size, -1, reinterpret_cast<uint64_t>(room)};
  *addr = start;
  return RESULT(0);
}
CUresult CUDAAPI cuMemAddressFree(CUdeviceptr addr, size_t size) {
  const std::lock_guard guard(lock);
  const bool fail = fails("cuMemAddressFree");
  const auto found = objects.find(addr + 1);
  NEED(found != objects.end() && found->second.len == size && objects.count(addr) == 0);
  munmap(reinterpret_cast<void*>(found->second.pages), size + kGranularity);
  return RESULT(release(addr + 1, kReserved, fail));
}
CUresult CUDAAPI cuMemMap(CUdeviceptr addr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                          unsigned long long flags) {
  BEGIN_IN_CONTEXT("cuMemMap");
  const auto range = objects.find(addr + 1), pages = objects.find(handle);
  NEED(range != objects.end() && range->second.kind == kReserved && range->second.len == size);
  NEED(pages != objects.end() && pages->second.kind == kPhysical && flags == 0 && offset == 0);
  if (pages->second.len != size) return RESULT(kInvalidValue);
  void* at = reinterpret_cast<void*>(addr);
  if (mmap(at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, pages->second.fd, 0) == MAP_FAILED) {
    return RESULT(kOutOfMemory);
  }
  objects[addr] = {kMapped, size, fcntl(pages->second.fd, F_DUPFD_CLOEXEC, 0), addr};
  return RESULT(0);
}
CUresult CUDAAPI cuMemUnmap(CUdeviceptr addr, size_t size) {
  const std::lock_guard guard(lock);
  const bool fail = fails("cuMemUnmap");
  const auto found = objects.find(addr);
  NEED(found != objects.end() && found->second.kind == kMapped && found->second.len == size);
  mmap(reinterpret_cast<void*>(addr), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  close(found->second.fd);
  return RESULT(release(addr, kMapped, fail));
}
CUresult CUDAAPI cuMemSetAccess(CUdeviceptr addr, size_t size, const CUmemAccessDesc* access, size_t count) {
  BEGIN_IN_CONTEXT("cuMemSetAccess");
  NEED(is_live(reinterpret_cast<void*>(addr), kMapped) && count == 1);
  NEED(static_cast<int>(access->flags) == 3 && static_cast<int>(access->location.type) == 1);
  mprotect(reinterpret_cast<void*>(addr), size, PROT_READ | PROT_WRITE);
  // What nobody has written is not zero: callers must not count on it.
  return RESULT(0);
}
CUresult CUDAAPI cuMemExportToShareableHandle(void* descriptor, CUmemGenericAllocationHandle handle,
                                              CUmemAllocationHandleType kind, unsigned long long flags) {
  BEGIN_IN_CONTEXT("cuMemExportToShareableHandle");
  NEED(is_live(reinterpret_cast<void*>(handle), kPhysical) && static_cast<int>(kind) == 1 && flags == 0);
  *static_cast<int*>(descriptor) = fcntl(objects[handle].fd, F_DUPFD_CLOEXEC, 0);
  return RESULT(0);
}
CUresult CUDAAPI cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* descriptor,
                                                CUmemAllocationHandleType kind) {
  BEGIN_IN_CONTEXT("cuMemImportFromShareableHandle");
  NEED(static_cast<int>(kind) == 1);
  const int fd = fcntl(static_cast<int>(reinterpret_cast<intptr_t>(descriptor)), F_DUPFD_CLOEXEC, 0);
  struct stat pages {};
  if (fd < 0 || fstat(fd, &pages) != 0) return RESULT(kInvalidValue);
  *handle = next_handle += 16;
  objects[*handle] = {kPhysical, static_cast<size_t>(pages.st_size), fd, 0};
  return RESULT(0);
}
CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr addr) {
  BEGIN_IN_CONTEXT("cuIpcGetMemHandle");
  NEED(is_live(reinterpret_cast<void*>(addr), kDeviceMemory));
  std::memset(handle, 0, sizeof *handle);
  std::memcpy(handle, &addr, sizeof addr);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuIpcOpenMemHandle)(CUdeviceptr* addr, CUipcMemHandle handle, unsigned int) {
  BEGIN_IN_CONTEXT("cuIpcOpenMemHandle_v2");
  std::memcpy(addr, &handle, sizeof *addr);
  NEED(is_live(reinterpret_cast<void*>(*addr), kDeviceMemory));
  ipc_opened[*addr] += 1;
  objects[*addr + 1] = {kIpc};
  return RESULT(0);
}
CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr addr) {
  const std::lock_guard guard(lock);
  const bool fail = fails("cuIpcCloseMemHandle");
  if (ipc_opened[addr] > 1) return RESULT((--ipc_opened[addr], 0));
  ipc_opened.erase(addr);
  return RESULT(release(addr + 1, kIpc, fail));
}
CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned int flags) {
  BEGIN_IN_CONTEXT("cuStreamCreate");
  NEED(flags == 1);
  *stream = create<CUstream>(kStream);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuStreamDestroy)(CUstream stream) {
  const std::lock_guard guard(lock);
  return RESULT(release(id(stream), kStream, fails("cuStreamDestroy_v2")));
}
CUresult CUDAAPI cuStreamQuery(CUstream stream) {
  BEGIN("cuStreamQuery");
  NEED(is_live(stream, kStream));
  if (machine.busy != 0) return RESULT(kNotReady);
  if (hooks.is_idle != nullptr && hooks.is_idle(hooks.ctx, id(stream)) == 0) return RESULT(kNotReady);
  return RESULT(0);
}
CUresult CUDAAPI cuEventQuery(CUevent event) {
  BEGIN("cuEventQuery");
  NEED(is_live(event, kEvent));
  if (hooks.is_done != nullptr && hooks.is_done(hooks.ctx, id(event)) == 0) return RESULT(kNotReady);
  return RESULT(machine.busy != 0 ? kNotReady : 0);
}
CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
  {
    BEGIN("cuStreamSynchronize");
    NEED(is_live(stream, kStream));
  }
  // Without the lock: it may take as long as kernels do.
  return RESULT(hooks.synchronize != nullptr ? hooks.synchronize(hooks.ctx, id(stream)) : 0);
}
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
  BEGIN_IN_CONTEXT("cuStreamWaitEvent");
  NEED(is_live(stream, kStream) && is_live(event, kEvent));
  return RESULT(hooks.wait != nullptr ? hooks.wait(hooks.ctx, id(event), id(stream)) : 0);
}
CUresult CUDAAPI SECOND(cuStreamWaitValue32)(CUstream stream, CUdeviceptr addr, cuuint32_t value, unsigned int flags) {
  BEGIN_IN_CONTEXT("cuStreamWaitValue32_v2");
  NEED(is_live(stream, kStream) && is_memory(addr, 4) && flags == 0);
  held.push_back({addr, value});
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuStreamBeginCapture)(CUstream stream, CUstreamCaptureMode) {
  BEGIN_IN_CONTEXT("cuStreamBeginCapture_v2");
  NEED(is_live(stream, kStream));
  return RESULT(hooks.begin_capture != nullptr ? hooks.begin_capture(hooks.ctx, id(stream)) : 0);
}
CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  BEGIN_IN_CONTEXT("cuStreamEndCapture");
  NEED(is_live(stream, kStream));
  *graph = create<CUgraph>(kGraph);
  const int answer = hooks.end_capture != nullptr ? hooks.end_capture(hooks.ctx, id(stream), id(*graph)) : 0;
  if (answer != 0) release(id(*graph), kGraph, false);
  return RESULT(answer);
}
CUresult CUDAAPI cuEventCreate(CUevent* event, unsigned int) {
  BEGIN_IN_CONTEXT("cuEventCreate");
  *event = create<CUevent>(kEvent);
  return RESULT(0);
}
CUresult CUDAAPI SECOND(cuEventDestroy)(CUevent event) {
  const std::lock_guard guard(lock);
  return RESULT(release(id(event), kEvent, fails("cuEventDestroy_v2")));
}
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
  BEGIN_IN_CONTEXT("cuEventRecord");
  NEED(is_live(stream, kStream) && is_live(event, kEvent));
  return RESULT(hooks.record != nullptr ? hooks.record(hooks.ctx, id(event), id(stream)) : 0);
}
CUresult CUDAAPI cuEventElapsedTime(float* ms, CUevent start, CUevent end) {
  BEGIN("cuEventElapsedTime");
  NEED(is_live(start, kEvent) && is_live(end, kEvent));
  *ms = 1.5f;
  return RESULT(0);
}
CUresult CUDAAPI cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  BEGIN_IN_CONTEXT("cuGraphInstantiateWithFlags");
  NEED(is_live(graph, kGraph));
  *exec = create<CUgraphExec>(kExec);
  // The graph may go before what was made of it; hooks know both by the graph.
  functions[id(*exec)] = std::to_string(id(graph));
  return RESULT(0);
}
CUresult CUDAAPI cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  BEGIN_IN_CONTEXT("cuGraphLaunch");
  NEED(is_live(exec, kExec) && is_live(stream, kStream));
  const uint64_t graph = std::stoull(functions[id(exec)]);
  return RESULT(hooks.replay != nullptr ? hooks.replay(hooks.ctx, graph, id(stream)) : 0);
}
CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec exec) {
  const std::lock_guard guard(lock);
  return RESULT(release(id(exec), kExec, fails("cuGraphExecDestroy")));
}
CUresult CUDAAPI cuGraphDestroy(CUgraph graph) {
  const std::lock_guard guard(lock);
  return RESULT(release(id(graph), kGraph, fails("cuGraphDestroy")));
}

static CUresult launch(CUfunction function, unsigned int blocks, unsigned int threads, CUstream stream, void** params) {
  const auto found = functions.find(id(function));
  NEED(found != functions.end() && is_live(stream, kStream) && params != nullptr);
  launches += 1;
  if (hooks.launch == nullptr) return RESULT(0);
  return RESULT(hooks.launch(hooks.ctx, id(stream), found->second.c_str(), params[0], blocks, threads));
}
CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int, unsigned int,
                                unsigned int block_x, unsigned int, unsigned int, unsigned int, CUstream stream,
                                void** params, void**) {
  BEGIN_IN_CONTEXT("cuLaunchKernel");
  return launch(function, grid_x, block_x, stream, params);
}
#ifndef IBEX_DOUBLE_IS_OLD
CUresult CUDAAPI cuLaunchCooperativeKernel(CUfunction function, unsigned int grid_x, unsigned int, unsigned int,
                                           unsigned int block_x, unsigned int, unsigned int, unsigned int,
                                           CUstream stream, void** params) {
  BEGIN_IN_CONTEXT("cuLaunchCooperativeKernel");
  cooperative += 1;
  return launch(function, grid_x, block_x, stream, params);
}
#endif

}  // extern "C"
