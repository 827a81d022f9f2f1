/// The send half as owner warps run it: each owner goes round its QPs and takes each a step further.
///
///   Open -> Credit -> Rows -> Signal -> Drain -> Done        any wait that runs out: -> Lost -> Done
///
/// An owner never blocks on one peer: every step does what is possible now and returns. What differs between
/// dispatch and combine (which rows go where) is the `Rows` policy:
///
///   uint32_t step(SendJob&)           post the rows that can go now; kPhaseSignal after the last one
///   bool owed_nothing(SendJob&)       the peer's input was lost here: say LOST, no credit needed
///   bool has_trailer(SendJob&)        does something go before the signal?
///   void put_trailer(SendJob&, Batch&), void copy_trailer(SendJob&)       it does: by one WQE, or by ourselves
///   uint32_t count(const SendCursor&) the count in the signal word
///   void posted(SendJob&)             all of this QP's WQEs of the step are posted
///   bool kMayDrain, must_drain()      rows may not be reused after the half, so wait for the CQE
#pragma once
#include "ibex/args.h"
#include "ibex/guards.h"
#include "ibex/half.h"
#include "ibex/layout.h"
#include "ibex/qp.h"
#include "ibex/wait.h"
#include "ibex/warp.h"

namespace ibex {

enum SendPhase : uint32_t {
  kPhaseOpen = 0,
  kPhaseCredit,
  kPhaseRows,
  kPhaseSignal,
  kPhaseDrain,
  kPhaseLost,
  kPhaseDone,
  // What one look at a QP came to: its next phase, or one of these.
  kStays,    ///< something was done, there is more of it
  kIdles,    ///< waits for this GPU's own casters, which always finish
  kStarves,  ///< waits for its peer or for CQEs, and that wait is bounded
};

/// One QP in one send half.
struct SendJob {
  const LaneArgs& a;
  const HalfContext& h;
  QpDeviceCtx& qp;
  PeerCtx& to;
  SendCursor& cursor;
  uint32_t peer, channel;

  IBEX_DEV bool rdma() const { return to.route == kRouteIbgda; }
  IBEX_DEV uint32_t queue() const { return qp_index(a.shape, peer, channel); }
};

IBEX_DEV SendJob job_of(const LaneArgs& a, const HalfContext& h, uint32_t q) {
  const uint32_t peer = q / a.shape.num_channels;
  return SendJob{a, h, a.qps[q], a.peers[peer], a.cursors[q], peer, q - peer * a.shape.num_channels};
}

/// Adds what this QP has done since it was last counted. Lane 0 only.
IBEX_DEV void count_queue(SendJob& j) {
  QpDeviceCtx& qp = j.qp;
  PeerTelemetry& t = j.a.telemetry[j.peer];
  add_relaxed_sys(&t.wqes, uint64_t{qp.producer_idx - qp.counted_idx});
  add_relaxed_sys(&t.doorbells, uint64_t{qp.doorbells});
  add_relaxed_sys(&t.cqes, uint64_t{qp.cqes});
  max_relaxed_sys(&t.sq_high_water, uint64_t{qp.in_flight_max});
  qp.counted_idx = qp.producer_idx;
  qp.doorbells = 0;
  qp.cqes = 0;
}

/// Adds what this half has sent, to the byte counter of the route that reaches the peer. Lane 0 only.
IBEX_DEV void count_bytes(SendJob& j, uint64_t bytes) {
  PeerTelemetry& t = j.a.telemetry[j.peer];
  uint64_t* counter = &t.bytes_rdma;
  if (j.to.route == kRouteLocal) counter = &t.bytes_local;
  if (j.to.route == kRouteMapped) counter = &t.bytes_mapped;
  add_relaxed_sys(counter, bytes);
  if (j.rdma()) count_queue(j);
}

/// WQEBBs that data never takes: credits of every slot of both operations, a trailer, a signal or LOST.
IBEX_DEV uint32_t reserved_wqebbs(const Shape& s) { return kNumOps * s.ring + 3; }

/// WQEBBs that data may take now, at most `wanted`; reads the CQ only if the cached index says that they are short.
IBEX_DEV uint32_t data_space(SendJob& j, uint32_t wanted) {
  const uint32_t reserve = reserved_wqebbs(j.a.shape);
  if (has_space(j.qp, reserve + wanted)) return wanted;
  // One lane reads: the others could see what it takes in at its next look at the CQ, and disagree.
  const uint32_t space = warp::one_lane([&] { return known_space(j.qp); });
  return space > reserve ? space - reserve : 0;
}

/// How many rows one batch may hold, so that it always fits the queue.
IBEX_DEV uint32_t batch_limit(const SendJob& j) {
  return min_of(kWarpSize, j.qp.sq_mask + 1 - reserved_wqebbs(j.a.shape));
}

IBEX_DEV void set_phase(SendCursor& cursor, uint32_t phase) {
  warp::sync();
  ONE_LANE {
    cursor.phase = static_cast<uint16_t>(phase);
    start_clock(cursor.clock, clock_ns());
  }
  warp::sync();
}

IBEX_DEV void advance_cursor(SendJob& j, uint32_t next, uint32_t messages, uint32_t picks) {
  warp::sync();
  ONE_LANE {
    j.cursor.next = next;
    j.cursor.num_messages += messages;
    j.cursor.num_picks += picks;
    start_clock(j.cursor.clock, clock_ns());
  }
  warp::sync();
}

/// Tells the HCA that the job's batch is ready.
IBEX_DEV void ring(SendJob& j, Batch& b, Ctrl last) {
  ONE_LANE j.qp.in_flight_max = max_of(j.qp.in_flight_max, b.next_idx - j.qp.consumer_idx);
  ring_doorbell(b, last, guarded(j.a, kGuardDoorbell));
}

/// Begins, or goes on with, a wait for room. `counter` counts each wait once, however often it looks.
IBEX_DEV uint32_t starve_for_room(SendJob& j, uint64_t& counter) {
  ONE_LANE {
    if (j.cursor.clock.polls == 0) add_relaxed_sys(&counter, uint64_t{1});
  }
  return kStarves;
}
IBEX_DEV uint32_t starve_for_space(SendJob& j) { return starve_for_room(j, j.a.telemetry[j.peer].sq_full); }

/// Writes the WQE that turns one little-endian word at the peer from `last` into `word`; returns its ctrl. One lane.
///
/// Where a fabric keeps no order among writes, one that is sent again may be placed after a newer one, and the word
/// would go back: there FETCH_ADD adds (word - last), in order and once, so that the word ends up the same.
IBEX_CALL Ctrl put_word_wqe(const LaneArgs& a, const QpDeviceCtx& qp, uint32_t queue, uint32_t wqe_idx,
                            RemoteAddress remote, uint64_t last, uint64_t word) {
  if (a.shape.signal_mode == kSignalWrite) return put_write_inline8(qp, wqe_idx, remote, word, kSignaled);
  const uint64_t result = reinterpret_cast<uint64_t>(&a.atomic_result[queue]);
  return put_fetch_add(qp, wqe_idx, remote, word - last, result, a.lkey_be, kSignaled);
}

/// Turns one word in our region at the peer from `last` into `word`, as a WQE of `b`. Lane 0 gets its ctrl.
IBEX_DEV Ctrl put_word(SendJob& j, Batch& b, uint64_t offset, uint64_t last, uint64_t word) {
  const RemoteAddress remote{j.to.region_va + offset, j.to.region_rkey_be};
  Ctrl ctrl{};
  ONE_LANE ctrl = put_word_wqe(j.a, j.qp, j.queue(), b.next_idx, remote, last, word);
  count_in(b, 1);
  return ctrl;
}

/// Puts the signal word of this step.
IBEX_DEV Ctrl put_signal(SendJob& j, Batch& b, uint64_t word) {
  uint64_t& last = j.qp.signal_last[j.h.op][j.h.slot];
  const Ctrl ctrl = put_word(j, b, signal_offset(j.a, j.h.op, j.h.slot, j.channel), last, word);
  ONE_LANE last = word;
  return ctrl;
}

/// Stores a word into our region at a mapped peer, after everything this warp has copied there.
///
/// # Ordering
/// ORDER(6): rows copied by all lanes -> word. `warp::sync`, then a release at sys; pairs with the acquires of
///   `read_signal` and `credit_of`.
IBEX_DEV void store_word_mapped(SendJob& j, uint64_t offset, uint64_t word) {
  warp::sync();
  ONE_LANE st_release_sys(reinterpret_cast<uint64_t*>(j.to.region_ptr + offset), word);
}

/// The consumed word that `j.peer` is told. Who is suspected gets no place: it would soil that one too (late.h).
IBEX_DEV uint64_t credit_for(const SendJob& j, uint32_t op, uint64_t word) {
  const bool withheld = op == kCombine && guarded(j.a, kGuardLateRows) && is_suspected(j.a, j.peer);
  return withheld ? consumed_word(consumed_seq(word), kNowhere) : word;
}

/// Posts the credit of every step that was consumed since the last send half. Never waits: without space the
/// credit stays pending and goes with the next half.
IBEX_DEV void post_credits(SendJob& j) {
  if (j.peer == j.a.shape.rank) return;
  Batch b = begin_batch(j.qp);
  Ctrl last{};
  IBEX_ROLLED
  for (uint32_t i = 0; i < kNumOps * kMaxRing; ++i) {
    const uint32_t op = i / kMaxRing, slot = i % kMaxRing;
    if (slot >= j.a.shape.ring) continue;
    const uint64_t consumed = j.a.state->posting[op][slot];
    // What was said once of a step stands, also if the peer has come under suspicion or out of it since.
    if (consumed_seq(consumed) == consumed_seq(j.to.posted_credit[op][slot])) continue;
    const uint64_t word = warp::one_lane([&] { return credit_for(j, op, consumed); });
    const uint64_t offset = consumed_offset(j.a, op, slot);
    if (!j.rdma()) {
      store_word_mapped(j, offset, word);
    } else {
      if (!has_space(j.qp, b.num_wqes + 1)) continue;
      last = put_word(j, b, offset, j.to.posted_credit[op][slot], word);
    }
    warp::sync();
    ONE_LANE {
      j.to.posted_credit[op][slot] = word;
      add_relaxed_sys(&j.a.telemetry[j.peer].credits, uint64_t{1});
    }
  }
  warp::sync();
  if (b.num_wqes != 0) ring(j, b, last);
}

/// May this QP be posted to at all? Lane 0 decides for the warp: a host may be changing the state.
IBEX_DEV bool is_usable(SendJob& j) {
  const bool usable = warp::one_lane([&] {
    if (!is_alive(j.a, *j.h.table, j.peer)) return false;
    if (!j.rdma()) return true;
    return is_active(j.qp) && j.qp.syndrome == 0;
  });
  warp::sync();
  return usable;
}

/// What `credit_of` says as long as the peer has not given its credit.
constexpr uint32_t kNoCredit = 0xffff;

/// Must the peer have emptied the step that is one ring before this one? The first ring of steps finds all slots empty,
/// and so do the first dispatches of a new pair. Its first combines do not: others' rows stand in that slab.
IBEX_DEV bool needs_credit(const SendJob& j) {
  if (!guarded(j.a, kGuardCredit) || j.h.seq <= j.a.shape.ring) return false;
  return j.h.op == kCombine || j.h.seq - j.a.shape.ring >= j.to.base_seq[j.h.op];
}

/// The peer's credit for this step: kNoCredit, or the place for our rows in its combine slab (late.h).
///
/// A word of this very step says that the peer has gone on without us: then our rows have no place there any more.
IBEX_DEV uint32_t credit_of(const SendJob& j) {
  if (j.peer == j.a.shape.rank) return j.h.place;
  const uint64_t* at =
      reinterpret_cast<const uint64_t*>(j.to.my_region + consumed_offset(j.a, j.h.op, j.h.slot));
  // ORDER(8): the peer's slab reads -> consumed word -> our writes into that slot. Acquire at sys.
  const uint64_t word = ld_acquire_sys(at), seq = consumed_seq(word);
  if (seq + j.a.shape.ring < j.h.seq) return needs_credit(j) ? kNoCredit : 0;
  const bool passed = j.h.op == kCombine && seq >= j.h.seq && guarded(j.a, kGuardLateRows);
  return passed ? kNowhere : consumed_place(word);
}

/// Has this QP's wait for its peer, or for CQEs, gone on for too long? Then it is on its way to Lost.
IBEX_DEV bool is_out_of_time(SendJob& j) {
  const bool over = warp::one_lane([&] {
    Evidence e{};
    e.qp_slot = j.a.qp_slot_base + j.queue();
    e.waited_ns = waited(j.cursor.clock);
    uint32_t kind = kFaultNone;
    if (j.rdma() && poll_cq(j.qp)) {
      e.completion = read_cqe(j.qp);
      kind = kFaultCompletion;
    } else if (is_suspected(j.a, j.peer)) {
      kind = kFaultReported;
    } else {
      // Only a credit is the peer's to give; for CQEs its device answers, whatever the peer itself does.
      const bool passed = j.cursor.phase != kPhaseCredit ||
                          has_credited(j.a, j.peer, j.h.op, j.h.seq - j.a.shape.ring);
      kind = tick(j.a, j.cursor.clock, j.peer, passed);
    }
    if (kind == kFaultNone) return false;
    if (kind != kFaultReported) suspect(j.a, j.h, j.peer, kind, e);
    add_relaxed_sys(&j.a.telemetry[j.peer].send_wait_ns, e.waited_ns);
    return true;
  });
  warp::sync();
  return over;
}

/// Notes that the peer's picks of this dispatch are lost. A combine that cannot be sent costs the peer its sums, not
/// us ours: what comes back is judged by what arrives. Lane 0 only.
IBEX_DEV void note_lost(SendJob& j) {
  if (j.h.op == kDispatch) set_bit(j.h.ctx->lost, j.peer);
}

template <class Rows>
IBEX_DEV uint32_t open_queue(SendJob& j, Rows& rows) {
  if (!is_usable(j)) {
    ONE_LANE note_lost(j);
    return kPhaseDone;
  }
  if (j.channel == 0) post_credits(j);
  const bool give_up = warp::one_lane([&] { return is_suspected(j.a, j.peer); });
  return give_up || j.h.go == kGoNoRows || rows.owed_nothing(j) ? kPhaseLost : kPhaseCredit;
}

IBEX_DEV uint32_t take_credit(SendJob& j) {
  const uint32_t place = warp::one_lane([&] { return credit_of(j); });
  warp::sync();
  if (place == kNoCredit) return kStarves;
  ONE_LANE j.cursor.place = static_cast<uint16_t>(place);
  return kPhaseRows;
}

/// Says how many rows went to the peer, or LOST to one that cannot be served in this step. The count waits for
/// space in the queue, LOST does not: a queue that takes no WQE says it by its silence.
template <class Rows>
IBEX_DEV uint32_t signal_peer(SendJob& j, Rows& rows) {
  const bool lost = j.cursor.phase == kPhaseLost;
  const uint64_t word = signal_word(j.h.generation, lost ? kCountLost : rows.count(j.cursor));
  const bool trailer = !lost && rows.has_trailer(j);
  if (lost) {
    ONE_LANE {
      note_lost(j);
      add_relaxed_sys(&j.a.telemetry[j.peer].steps_lost, uint64_t{1});
    }
  }
  if (!j.rdma()) {
    if (trailer) rows.copy_trailer(j);
    store_word_mapped(j, signal_offset(j.a, j.h.op, j.h.slot, j.channel), word);
  } else if (!(lost && (!guarded(j.a, kGuardLost) || warp::one_lane([&] { return j.qp.syndrome != 0; }))) &&
             has_space(j.qp, trailer ? 2 : 1)) {
    Batch b = begin_batch(j.qp);
    if (trailer) rows.put_trailer(j, b);
    const Ctrl last = put_signal(j, b, word);
    ring(j, b, last);
  } else if (!lost) {
    return starve_for_space(j);
  }
  rows.posted(j);
  return Rows::kMayDrain && rows.must_drain(j) ? kPhaseDrain : kPhaseDone;
}

/// Waits until a CQE covers every WQE of this QP, so that the rows they name may be reused by anyone (ORDER(15)).
///
/// If time runs out the peer is suspected and the host fences the QP; its flush ends this wait. Only the hard cap,
/// that is a host that does not act at all, ends it without.
IBEX_DEV uint32_t drain(SendJob& j) {
  const bool over = warp::one_lane([&] {
    poll_cq(j.qp);
    if (j.qp.consumer_idx == j.qp.producer_idx) return true;
    Evidence e{};
    e.qp_slot = j.a.qp_slot_base + j.queue();
    e.waited_ns = waited(j.cursor.clock);
    const uint32_t kind = tick(j.a, j.cursor.clock, j.peer, true);
    if (kind == kFaultNone) return false;
    suspect(j.a, j.h, j.peer, kFaultSourceRows, e);
    note_lost(j);
    return kind == kFaultCap;
  });
  warp::sync();
  return over ? kPhaseDone : kIdles;
}

template <class Rows>
IBEX_DEV uint32_t look_at(SendJob& j, Rows& rows) {
  switch (j.cursor.phase) {
    case kPhaseOpen:
      return open_queue(j, rows);
    case kPhaseCredit:
      return take_credit(j);
    case kPhaseRows:
      return rows.step(j);
    case kPhaseSignal:
    case kPhaseLost:
      return signal_peer(j, rows);
    case kPhaseDrain:
      return Rows::kMayDrain ? drain(j) : kIdles;
    default:
      return kIdles;
  }
}

/// Takes one QP a step further. Returns whether anything changed.
template <class Rows>
IBEX_DEV bool advance(SendJob& j, Rows& rows) {
  uint32_t next = look_at(j, rows);
  if (next == kStarves) next = is_out_of_time(j) ? kPhaseLost : kIdles;
  if (next <= kPhaseDone) set_phase(j.cursor, next);
  return next != kIdles;
}

/// Runs all QPs of one owner to their end: `first`, `first + stride`, …
template <class Rows>
IBEX_DEV void drive_queues(const LaneArgs& a, const HalfContext& h, Rows& rows, uint32_t first, uint32_t stride) {
  const uint32_t num_qps = a.shape.num_ranks * a.shape.num_channels;
  for (uint32_t q = first; q < num_qps; q += stride) {
    ONE_LANE {
      SendCursor& c = a.cursors[q];
      c.phase = kPhaseOpen;
      c.place = kNowhere;
      c.next = c.num_messages = c.num_picks = 0;
    }
  }
  warp::sync();
  for (bool open = true; open;) {
    open = false;
    bool progress = false;
    for (uint32_t q = first; q < num_qps; q += stride) {
      SendJob j = job_of(a, h, q);
      if (j.cursor.phase == kPhaseDone) continue;
      progress |= advance(j, rows);
      open |= j.cursor.phase != kPhaseDone;
    }
    if (open && !progress) backoff();
  }
}

}  // namespace ibex
