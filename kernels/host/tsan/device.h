/// A small mlx5 reader: it executes the send queues that kernels drive, in the same C++ process.
///
/// ThreadSanitizer cannot follow the Rust device, so here is the least device that serves the shipped kernels:
/// RDMA WRITE, inline WRITE, FETCH_ADD and NOP between queues of one process, one collapsed CQ per queue, error
/// and flush completions. It knows only memory: rings, doorbell records, doorbells, and what WQEs name.
///
/// Every queue is an agent of its own, because hardware orders nothing between two queues
/// but what a doorbell, a signal word or a completion orders. Its edges are those of the hardware and no more:
///
///   ORDER(2) ORDER(3)  doorbell record or doorbell -> WQEs and rows       acquire, sys
///   ORDER(5)           data placed -> an aligned 8-byte word placed later  release, sys
///   ORDER(4) ORDER(15) the entry, reads of rows and WQEs -> completion word  release, sys
///
/// Until its completion is written a WQE may be sent again: just before writing one, the queue reads every WQE
/// and row once more that it covers. So rows that are reused on a consumer's credit alone are a race.
///
/// Who owns what: a `Queue` owns nothing but its own indices; all memory is the rig's, and outlives it.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "host/tsan_agent.h"

namespace ibex::rig {

/// Memory under a key: `len` bytes from `iova` on, which lie at `base` in this process.
struct MemoryKey {
  uint32_t key;
  uint64_t iova;
  uint8_t* base;
  uint64_t len;
};

/// The keys of one port. One key may name several pieces of memory.
class Keys {
 public:
  void add(const MemoryKey& key) { keys_.push_back(key); }
  /// Where `len` bytes at `iova` lie; null if the key is unknown or does not cover them.
  uint8_t* find(uint32_t key, uint64_t iova, uint64_t len) const;

 private:
  std::vector<MemoryKey> keys_;
};

/// Syndromes of error completions (reference: libmlx5's status mapping, tests/golden/wqe.txt).
enum class Syndrome : uint8_t {
  none = 0,
  qp_operation = 0x02,
  local_protection = 0x04,
  flushed = 0x05,
  remote_access = 0x13,
};

/// The longest WQE that is read: 16 segments.
constexpr uint32_t kWqeBytesMax = 256;

/// What a send WQE says. Segments are big-endian; see ibex/wqe.h for the picture.
struct ParsedWqe {
  uint32_t qpn, num_wqebbs;
  uint16_t idx;
  uint8_t opmod, opcode, ds;
  bool signaled;
  uint32_t rkey, lkey;
  uint64_t remote_va, local_va;
  uint64_t add;
  uint32_t bytes;              ///< of payload
  const uint8_t* inline_data;  ///< in the bytes that were parsed; null: the payload is at `local_va`
};

/// False: an opcode that kernels do not post, or segments that do not fit it. The ctrl fields stand in any case.
bool parse_wqe(const uint8_t (&bytes)[kWqeBytesMax], ParsedWqe* wqe);

struct QueueConfig {
  uint32_t qpn;
  uint8_t* sq;
  uint32_t num_wqebbs;        ///< a power of two
  const uint32_t* record;     ///< SND counter, big-endian
  const uint64_t* doorbell;
  uint8_t* cqe;               ///< 64 bytes, prefilled with 0xff
  const Keys* local;
  const Keys* remote;
  uint16_t first_idx = 0;
};

/// What a queue found that no legal driver does.
struct Violations {
  uint32_t bad_wqes;          ///< completed in error although nobody injected one
  uint32_t unrung;            ///< the record was behind the doorbell, or stayed ahead of it
};

class Queue {
 public:
  Queue(const QueueConfig& config, uint64_t seed);
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  /// Does one small piece that hardware may do now: notice work, execute a WQE, or complete. Returns whether it
  /// did something. One thread at a time.
  bool step();

  /// As RTS: what the caller has set up is there when the queue first looks. Before this it does nothing.
  void start() {
    host::tsan_start_agent(agent_);
    frozen_.store(false, std::memory_order_relaxed);
  }
  /// A peer that is gone: nothing happens any more, completions included. Any thread.
  void freeze() { frozen_.store(true, std::memory_order_relaxed); }
  /// As 2ERR: everything outstanding and everything posted from now on is flushed. Any thread.
  void fail() {
    failing_.store(true, std::memory_order_relaxed);
    frozen_.store(false, std::memory_order_relaxed);
  }
  /// As 2RST, on either end: the queue has done its last, and all of that happens before what the caller does next.
  /// Not while another thread steps the queue.
  void reset() {
    freeze();
    host::tsan_join_agent(agent_);
    retired_.store(true, std::memory_order_relaxed);
  }
  /// Exact once no thread steps the queue. Of a queue that was reset only what it saw while it lived.
  Violations violations() const;
  const QueueConfig& config() const { return config_; }
  uint64_t executed() const { return executed_.load(std::memory_order_relaxed); }

 private:
  bool advance();
  bool notice();
  bool read_wqe(uint32_t idx);
  bool execute();
  Syndrome place();
  bool complete();
  void read_rows_again();
  void write_cqe(uint16_t wqe_counter, Syndrome syndrome);
  uint64_t random();

  const QueueConfig config_;
  // Touched by the queue's agent only.
  uint32_t next_, completed_, producer_;
  uint32_t held_ = 0;
  bool rung_ = false, failed_ = false;
  uint64_t random_;
  uint8_t bytes_[kWqeBytesMax];
  ParsedWqe wqe_;
  std::array<uint8_t, 64 << 10> scratch_;
  std::atomic<bool> failing_{false}, frozen_{true}, retired_{false};
  std::atomic<uint32_t> bad_wqes_{0}, record_behind_{0};
  std::atomic<uint64_t> executed_{0};
  /// Created last: all of the above happens before its first step.
  host::Agent* agent_;
};

}  // namespace ibex::rig
