/// A double of NCCL (libnccl.so.2) for one process: it counts communicators and groups, moves bytes of host memory, and
/// fails where it is told to. Every rank of a communicator is a thread-free entry of one table.
///
/// Where NVIDIA's header is found, the compiler compares every signature here with it.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#if __has_include(<nccl.h>)
#include <nccl.h>
#define RESULT(code) static_cast<ncclResult_t>(code)
#else
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct ncclComm;
using ncclComm_t = ncclComm*;
using ncclResult_t = int;
using ncclDataType_t = int;
struct ncclUniqueId { char internal[128]; };
#define RESULT(code) (code)
#endif

namespace {

struct Comm {
  int num_ranks, rank;
};

/// One send or receive of a group, until the group ends.
struct Pending {
  const void* from;
  void* to;
  size_t len;
  int peer;
};

int version = 22705, fail_in = 0, fail_code = 0, async_error = 0, depth = 0;
std::map<Comm*, int> comms;
std::vector<Pending> pending;

bool fails() { return fail_in != 0 && --fail_in == 0; }
Comm* of(ncclComm_t comm) { return reinterpret_cast<Comm*>(comm); }
bool is_live(ncclComm_t comm) { return comms.count(of(comm)) == 1; }

constexpr int kInvalidArgument = 4, kInvalidUsage = 5, kBytes = 1;

}  // namespace

#define BEGIN() \
  if (fails()) return RESULT(fail_code)
#define NEED(condition) \
  if (!(condition)) return RESULT(kInvalidArgument)

extern "C" {

void ibex_double_fail(int in, int code) { fail_in = in, fail_code = code; }
void ibex_double_version(int code) { version = code; }
void ibex_double_async_error(int code) { async_error = code; }
int ibex_double_live() { return static_cast<int>(comms.size()); }
int ibex_double_depth() { return depth; }

ncclResult_t ncclGetVersion(int* code) {
  *code = version;
  return RESULT(0);
}
const char* ncclGetErrorString(ncclResult_t code) {
  return static_cast<int>(code) == 1 ? "unhandled cuda error (double)" : "another error (double)";
}
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  BEGIN();
  std::memset(id->internal, 0x5a, sizeof id->internal);
  return RESULT(0);
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int rank) {
  BEGIN();
  NEED(id.internal[127] == 0x5a && rank < num_ranks);
  auto* made = new Comm{num_ranks, rank};
  comms[made] = 1;
  *comm = reinterpret_cast<ncclComm_t>(made);
  return RESULT(0);
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  NEED(is_live(comm));
  comms.erase(of(comm));
  delete of(comm);
  return RESULT(fails() ? fail_code : 0);
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  BEGIN();
  NEED(is_live(comm));
  *count = of(comm)->num_ranks;
  return RESULT(0);
}
ncclResult_t ncclCommUserRank(const ncclComm_t comm, int* rank) {
  BEGIN();
  NEED(is_live(comm));
  *rank = of(comm)->rank;
  return RESULT(0);
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  BEGIN();
  NEED(is_live(comm));
  *error = RESULT(async_error);
  return RESULT(0);
}
ncclResult_t ncclGroupStart() {
  BEGIN();
  depth += 1;
  return RESULT(0);
}
ncclResult_t ncclGroupEnd() {
  if (depth == 0) return RESULT(kInvalidUsage);
  depth -= 1;
  // What a rank sends to itself arrives with the group, in order; everything else has nobody to take it.
  for (Pending& send : pending) {
    if (send.from == nullptr) continue;
    for (Pending& receive : pending) {
      if (receive.to == nullptr || send.peer != receive.peer) continue;
      if (send.len == receive.len) std::memcpy(receive.to, send.from, send.len);
      receive.to = nullptr;
      break;
    }
  }
  pending.clear();
  return RESULT(fails() ? fail_code : 0);
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t len, ncclDataType_t type, ncclComm_t comm, cudaStream_t) {
  BEGIN();
  NEED(is_live(comm) && static_cast<int>(type) == kBytes);
  for (int rank = 0; rank < of(comm)->num_ranks; ++rank) {
    std::memcpy(static_cast<char*>(to) + len * static_cast<size_t>(rank), from, len);
  }
  return RESULT(0);
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t len, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t) {
  BEGIN();
  NEED(is_live(comm) && static_cast<int>(type) == kBytes && root < of(comm)->num_ranks);
  std::memcpy(to, from, len);
  return RESULT(0);
}
ncclResult_t ncclSend(const void* from, size_t len, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
  BEGIN();
  NEED(is_live(comm) && static_cast<int>(type) == kBytes && depth == 1);
  pending.push_back({from, nullptr, len, peer});
  return RESULT(0);
}
ncclResult_t ncclRecv(void* to, size_t len, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t) {
  BEGIN();
  NEED(is_live(comm) && static_cast<int>(type) == kBytes && depth == 1);
  pending.push_back({nullptr, to, len, peer});
  return RESULT(0);
}

}  // extern "C"
