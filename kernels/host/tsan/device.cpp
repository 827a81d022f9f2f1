#include "host/tsan/device.h"

#include <cstring>

#include "ibex/ptx.h"
#include "ibex/qp.h"
#include "ibex/wqe.h"

namespace ibex::rig {

namespace {

constexpr uint32_t kOpNop = 0x00;
constexpr uint32_t kSegment = 16;
constexpr uint32_t kSegmentsMax = kWqeBytesMax / kSegment;
/// {send opcode, QPN} of a completion.
constexpr uint32_t kCqeOpcodeOff = 0x38;
/// Steps for which a queue may leave completions out.
constexpr uint32_t kHeldSteps = 200;
constexpr uint32_t kInline = 0x80000000u;
constexpr uint8_t kCompletionAlways = 0x08;

uint32_t be32(const uint8_t* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, sizeof(v));
  return bswap32(v);
}

uint64_t be64(const uint8_t* p) { return uint64_t{be32(p)} << 32 | be32(p + 4); }

uint8_t vendor_of(Syndrome s) {
  switch (s) {
    case Syndrome::none: return 0;
    case Syndrome::qp_operation: return 0x68;
    case Syndrome::local_protection: return 0x51;
    case Syndrome::flushed: return 0xf9;
    case Syndrome::remote_access: return 0x88;
  }
  return 0;
}

uint32_t num_wqebbs(uint32_t ds) { return (ds * kSegment + kWqebbBytes - 1) / kWqebbBytes; }

/// A data or inline segment; false if its bytes do not stand in the WQE.
bool parse_payload(const uint8_t* segment, uint32_t room, ParsedWqe* wqe) {
  const uint32_t count = be32(segment);
  wqe->bytes = count & ~kInline;
  if ((count & kInline) != 0) {
    wqe->inline_data = segment + 4;
    return wqe->bytes + 4 <= room;
  }
  wqe->lkey = be32(segment + 4);
  wqe->local_va = be64(segment + 8);
  return room == kSegment;
}

/// The producer index that a doorbell announces: that of the last WQE and its size.
uint32_t rung_index(uint64_t doorbell) {
  const uint32_t ctrl = bswap32(static_cast<uint32_t>(doorbell));
  const uint32_t ds = bswap32(static_cast<uint32_t>(doorbell >> 32)) & 0x3f;
  return (ctrl >> 8 & 0xffffu) + num_wqebbs(ds);
}

/// Does index `a` stand before `b`? Both are 16-bit indices that are less than 2^15 apart.
bool is_before(uint32_t a, uint32_t b) { return static_cast<int16_t>(static_cast<uint16_t>(a - b)) < 0; }

}  // namespace

uint8_t* Keys::find(uint32_t key, uint64_t iova, uint64_t len) const {
  for (const MemoryKey& k : keys_) {
    if (k.key != key) continue;
    const bool covers = iova >= k.iova && len <= k.len && iova - k.iova <= k.len - len;
    if (covers) return k.base + (iova - k.iova);
  }
  return nullptr;
}

bool parse_wqe(const uint8_t (&bytes)[kWqeBytesMax], ParsedWqe* wqe) {
  const uint32_t first = be32(bytes), second = be32(bytes + 4);
  *wqe = ParsedWqe{};
  wqe->opmod = static_cast<uint8_t>(first >> 24);
  wqe->idx = static_cast<uint16_t>(first >> 8);
  wqe->opcode = static_cast<uint8_t>(first);
  wqe->qpn = second >> 8;
  wqe->ds = second & 0x3f;
  wqe->num_wqebbs = num_wqebbs(wqe->ds);
  wqe->signaled = (bytes[11] & kCompletionAlways) != 0;
  if (wqe->opmod != 0 || wqe->ds == 0 || wqe->ds > kSegmentsMax) return false;
  if (wqe->opcode == kOpNop) return true;
  if (wqe->ds < 2) return false;
  wqe->remote_va = be64(bytes + kSegment);
  wqe->rkey = be32(bytes + kSegment + 8);
  const uint32_t room = (wqe->ds - 2u) * kSegment;
  const uint8_t* rest = bytes + 2 * kSegment;
  switch (wqe->opcode) {
    case kOpRdmaWrite: return room == 0 || parse_payload(rest, room, wqe);
    case kOpAtomicFetchAdd:
      if (room != 2 * kSegment) return false;
      wqe->add = be64(rest);
      return parse_payload(rest + kSegment, kSegment, wqe) && wqe->inline_data == nullptr && wqe->bytes == 8;
    default: return false;
  }
}

Queue::Queue(const QueueConfig& config, uint64_t seed)
    : config_(config),
      next_(config.first_idx),
      completed_(config.first_idx),
      producer_(config.first_idx),
      random_(seed),
      agent_(host::tsan_create_agent([](void* queue) { return static_cast<Queue*>(queue)->advance(); }, this)) {}

Queue::~Queue() {
  host::tsan_join_agent(agent_);
  host::tsan_destroy_agent(agent_);
}

bool Queue::step() { return !frozen_.load(std::memory_order_relaxed) && host::tsan_step_agent(agent_); }

Violations Queue::violations() const {
  host::tsan_join_agent(agent_);
  uint32_t unrung = record_behind_.load(std::memory_order_relaxed);
  const uint64_t doorbell = ld_acquire_sys(config_.doorbell);
  const uint32_t record = bswap32(ld_acquire_sys(config_.record));
  const bool retired = retired_.load(std::memory_order_relaxed);
  if (!retired && is_before(doorbell != 0 ? rung_index(doorbell) : config_.first_idx, record)) ++unrung;
  return {bad_wqes_.load(std::memory_order_relaxed), unrung};
}

uint64_t Queue::random() {
  random_ = random_ * 6364136223846793005u + 1442695040888963407u;
  return random_ >> 33;
}

bool Queue::advance() {
  if (failing_.exchange(false, std::memory_order_relaxed)) failed_ = true;
  const uint64_t r = random();
  if ((r & 3) == 0 && complete()) return true;
  if ((r & 12) != 0 && next_ != producer_) return execute();
  return notice() || (next_ != producer_ && execute()) || complete();
}

/// Learns of work from the doorbell, or from the record: hardware that was told of work once may look there at
/// any time. Each of them alone must order everything that is then read.
///
/// # Ordering
/// ORDER(2): WQEs, rows -> record. ORDER(3): the record and all before it -> doorbell. Acquire at sys, either.
bool Queue::notice() {
  uint32_t seen;
  if (rung_ && (random() & 1) != 0) {
    seen = bswap32(ld_acquire_sys(config_.record));
  } else {
    const uint64_t doorbell = ld_acquire_sys(config_.doorbell);
    if (doorbell == 0) return false;
    seen = rung_index(doorbell);
    const uint32_t record = bswap32(ld_relaxed_sys(config_.record));
    if (is_before(record, seen)) record_behind_.fetch_add(1, std::memory_order_relaxed);
    rung_ = true;
  }
  if (!is_before(producer_, seen)) return false;
  producer_ += static_cast<uint16_t>(seen - producer_);
  return true;
}

/// Takes the WQE at `idx` out of the ring; its segments may wrap at the end.
bool Queue::read_wqe(uint32_t idx) {
  const uint32_t ring = config_.num_wqebbs * kWqebbBytes;
  uint32_t len = kSegment;
  for (uint32_t at = 0; at < len; at += kSegment) {
    std::memcpy(bytes_ + at, config_.sq + (idx * kWqebbBytes + at) % ring, kSegment);
    if (at == 0) len = min_of((bytes_[7] & 0x3fu) * kSegment, kWqeBytesMax);
  }
  return parse_wqe(bytes_, &wqe_);
}

bool Queue::execute() {
  const bool parsed = read_wqe(next_);
  Syndrome s = Syndrome::flushed;
  if (!failed_) {
    const bool valid = parsed && wqe_.qpn == config_.qpn && wqe_.idx == static_cast<uint16_t>(next_);
    s = valid ? place() : Syndrome::qp_operation;
  }
  const uint32_t idx = next_;
  // A WQE whose size cannot be trusted takes everything that was posted with it.
  next_ = parsed ? next_ + wqe_.num_wqebbs : producer_;
  executed_.fetch_add(1, std::memory_order_relaxed);
  if (s == Syndrome::none) return true;
  if (!failed_) bad_wqes_.fetch_add(1, std::memory_order_relaxed);
  failed_ = true;
  completed_ = next_;
  write_cqe(static_cast<uint16_t>(idx), s);
  return true;
}

/// Executes a WQE at the peer.
///
/// # Ordering
/// ORDER(5): data placed -> an aligned word placed later by the same queue. The word is one release store.
Syndrome Queue::place() {
  const ParsedWqe& wqe = wqe_;
  if (wqe.opcode == kOpNop) return Syndrome::none;
  const uint8_t* from = wqe.inline_data;
  if (from == nullptr && wqe.bytes != 0) from = config_.local->find(wqe.lkey, wqe.local_va, wqe.bytes);
  if (from == nullptr && wqe.bytes != 0) return Syndrome::local_protection;
  uint8_t* to = config_.remote->find(wqe.rkey, wqe.remote_va, wqe.bytes);
  if (to == nullptr) return Syndrome::remote_access;
  if (wqe.opcode == kOpAtomicFetchAdd) {
    const uint64_t old = add_release_sys(reinterpret_cast<uint64_t*>(to), wqe.add);
    __builtin_memcpy(const_cast<uint8_t*>(from), &old, sizeof(old));
  } else if (wqe.inline_data != nullptr && wqe.bytes == 8 && wqe.remote_va % 8 == 0) {
    uint64_t word;
    __builtin_memcpy(&word, from, sizeof(word));
    st_release_sys(reinterpret_cast<uint64_t*>(to), word);
  } else {
    std::memcpy(to, from, wqe.bytes);
  }
  return Syndrome::none;
}

/// Completes the oldest signalled WQE that is executed, and with it all before it.
bool Queue::complete() {
  if (failed_) {
    if (completed_ == next_) return false;
    completed_ = next_;
    write_cqe(static_cast<uint16_t>(next_ - 1), Syndrome::flushed);
    return true;
  }
  // Now and then completions stay away for a while, and queues fill up.
  if (held_ > 0) {
    --held_;
    return false;
  }
  uint32_t idx = completed_;
  do {
    if (idx == next_) return false;
    read_wqe(idx);
    read_rows_again();
    idx += wqe_.num_wqebbs;
  } while (!wqe_.signaled);
  completed_ = idx;
  write_cqe(wqe_.idx, Syndrome::none);
  if (random() % 4 == 0) held_ = static_cast<uint32_t>(random() % kHeldSteps);
  return true;
}

/// A retransmission, as far as local memory can tell.
void Queue::read_rows_again() {
  const ParsedWqe& wqe = wqe_;
  if (wqe.opcode != kOpRdmaWrite || wqe.inline_data != nullptr || wqe.bytes > scratch_.size()) return;
  const uint8_t* from = config_.local->find(wqe.lkey, wqe.local_va, wqe.bytes);
  if (from != nullptr) std::memcpy(scratch_.data(), from, wqe.bytes);
}

/// ORDER(4): the entry -> its last word. ORDER(15): everything this queue has read -> the same word. Relaxed words,
/// then one release store: kernels read single words of an entry that the next completion may overwrite.
void Queue::write_cqe(uint16_t wqe_counter, Syndrome syndrome) {
  uint32_t* words = reinterpret_cast<uint32_t*>(config_.cqe);
  const bool error = syndrome != Syndrome::none;
  for (uint32_t i = 0; i < kCqeCompletionOff / 4; ++i) {
    uint32_t word = 0;
    if (error && i == kCqeSyndromeOff / 4) word = uint32_t{vendor_of(syndrome)} << 8 | static_cast<uint32_t>(syndrome);
    if (i == kCqeOpcodeOff / 4) word = kOpRdmaWrite << 24 | config_.qpn;
    st_relaxed_sys(words + i, bswap32(word));
  }
  const uint32_t op_own = error ? kCqeOpcodeRequesterError << 4 : 0;
  st_release_sys(words + kCqeCompletionOff / 4, bswap32(uint32_t{wqe_counter} << 16 | op_own));
}

}  // namespace ibex::rig
