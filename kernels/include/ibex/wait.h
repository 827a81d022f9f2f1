/// Bounded waits for one peer: the clocks, the verdict on a signal word, and what is recorded when time is up.
///
/// Two limits per wait. `detect_ns` without a sign of life. `stall_ns` for a live peer, and that clock runs only
/// while the peer's published progress shows that it has passed the half that produces what we wait for: a peer in
/// an earlier half is itself waiting, and its own clocks bound it. A hard cap ends any wait.
///
/// Everything here runs on one lane and is broadcast: lanes that decide for themselves could disagree.
#pragma once
#include "ibex/args.h"
#include "ibex/guards.h"
#include "ibex/half.h"
#include "ibex/layout.h"
#include "ibex/qp.h"
#include "ibex/warp.h"

namespace ibex {

IBEX_DEV const LifeWords* life_of(const LaneArgs& a, uint32_t peer) {
  return reinterpret_cast<const LifeWords*>(a.peers[peer].my_region + a.layout.life_off);
}

IBEX_DEV bool is_suspected(const LaneArgs& a, uint32_t peer) {
  return guarded(a, kGuardMembership) && ld_relaxed_gpu(&a.suspects[peer]) != 0;
}

IBEX_DEV void set_bit(uint64_t* words, uint32_t bit) { or_relaxed_gpu(&words[bit / 64], uint64_t{1} << (bit % 64)); }

IBEX_DEV bool has_bit(const uint64_t* words, uint32_t bit) {
  return (ld_relaxed_gpu(&words[bit / 64]) >> (bit % 64) & 1) != 0;
}

/// What is known about a fault beyond its kind.
struct Evidence {
  uint64_t waited_ns;
  uint64_t detail;
  uint32_t qp_slot;
  Completion completion;
};

/// Writes the first fault of `peer` since the host cleared the record. One lane only.
///
/// # Ordering
/// ORDER(14): fields -> published. Release at sys; pairs with the host's acquire.
IBEX_DEV void record_fault(const LaneArgs& a, const HalfContext& h, uint32_t peer, uint32_t kind, Evidence e) {
  DeviceFault& f = a.faults[peer];
  if (cas_relaxed_sys(&f.claimed, 0u, 1u) != 0) return;
  f.kind = kind;
  f.peer = peer;
  f.qp_slot = e.qp_slot;
  f.op = h.op;
  f.half = h.half;
  f.syndrome = e.completion.syndrome();
  f.vendor_syndrome = e.completion.vendor();
  f.wqe_counter = e.completion.wqe_counter();
  f.seq = h.seq;
  f.waited_ns = e.waited_ns;
  f.detail = e.detail;
  st_release_sys(&f.published, 1u);
}

/// Records the fault and stops waiting for this peer from now on, until membership commits or clears it.
IBEX_DEV void suspect(const LaneArgs& a, const HalfContext& h, uint32_t peer, uint32_t kind, Evidence e) {
  record_fault(a, h, peer, kind, e);
  st_relaxed_gpu(&a.suspects[peer], 1u);
}

IBEX_DEV void start_clock(WaitClock& w, uint64_t now) {
  w.started_ns = now;
  w.last_poll_ns = now;
  w.silent_ns = 0;
  w.stalled_ns = 0;
  w.beat = 0;
  w.polls = 0;
  w.reserved = 0;
}

/// Has the peer finished the send half whose signal we wait for?
IBEX_DEV bool has_sent(const LaneArgs& a, uint32_t peer, uint32_t op, uint64_t seq) {
  return ld_relaxed_sys(&life_of(a, peer)->sent[op]) >= seq;
}

/// Has the peer posted the credit of `seq`?
IBEX_DEV bool has_credited(const LaneArgs& a, uint32_t peer, uint32_t op, uint64_t seq) {
  return ld_relaxed_sys(&life_of(a, peer)->credited[op]) >= seq;
}

/// Advances the clocks of one wait. One lane only. Returns kFaultNone to go on waiting, else why to stop.
///
/// Time counts only in steps of at most an eighth of detect_ns: a waiter that was itself descheduled must not
/// blame its peer for it.
IBEX_DEV uint32_t tick(const LaneArgs& a, WaitClock& w, uint32_t peer, bool passed) {
  const uint64_t now = clock_ns();
  const uint64_t detect_ns = ld_relaxed_sys(&a.limits->detect_ns);
  const uint64_t step = min_of(now - w.last_poll_ns, detect_ns / 8 + 1);
  w.last_poll_ns = now;
  w.polls += 1;
  const bool is_own = peer == a.shape.rank || !guarded(a, kGuardMembership);
  const uint64_t beat = is_own ? now : ld_relaxed_sys(&life_of(a, peer)->beat);
  w.silent_ns = beat == w.beat ? w.silent_ns + step : 0;
  w.beat = beat;
  if (passed) w.stalled_ns += step;
  if (w.silent_ns > detect_ns) return kFaultSilent;
  if (w.stalled_ns > ld_relaxed_sys(&a.limits->stall_ns)) return kFaultStalled;
  if (now - w.started_ns > ld_relaxed_sys(&a.limits->cap_ns)) return kFaultCap;
  return kFaultNone;
}

/// Every K polls of a wait for a peer its completion queues are read: an error CQE ends the wait in microseconds.
IBEX_DEV bool has_failed_qp(const LaneArgs& a, uint32_t peer, uint32_t polls, Evidence* e) {
  const uint32_t interval = ld_relaxed_sys(&a.limits->polls_per_cq_read);
  if (interval == 0 || polls % interval != 0 || a.peers[peer].route != kRouteIbgda) return false;
  IBEX_ROLLED
  for (uint32_t c = 0; c < a.shape.num_channels; ++c) {
    const uint32_t q = qp_index(a.shape, peer, c);
    if (!is_active(a.qps[q])) continue;
    const Completion completion = read_cqe(a.qps[q]);
    if (completion.error()) {
      e->completion = completion;
      e->qp_slot = a.qp_slot_base + q;
      return true;
    }
  }
  return false;
}

/// First verdict wins, so that all warps of a half treat a source's channel alike. One lane only.
///
/// # Ordering
/// ORDER(7): what this warp acquired with the signal -> verdict. acq_rel at gpu scope.
IBEX_DEV uint64_t settle(uint64_t* verdict, uint64_t seen, uint64_t wanted) {
  const uint64_t old = cas_acq_rel_gpu(verdict, seen, wanted);
  return old == seen ? wanted : old;
}

IBEX_DEV uint64_t waited(const WaitClock& w) { return w.last_poll_ns - w.started_ns; }

/// Gives up on (peer, channel) for this step, unless another warp has just seen its signal. One lane only.
/// A peer that is suspected already, or no member, adds no new evidence.
IBEX_DEV uint32_t settle_lost(const LaneArgs& a, const HalfContext& h, uint64_t* verdict, uint64_t seen,
                              uint32_t peer, uint32_t kind, Evidence e) {
  const uint32_t count = signal_count(settle(verdict, seen, signal_word(h.generation, kCountLost)));
  if (count == kCountLost && kind != kFaultNone && kind != kFaultReported) suspect(a, h, peer, kind, e);
  add_relaxed_sys(&a.telemetry[peer].receive_wait_ns, e.waited_ns);
  return count;
}

/// What a signal word says about the step that is awaited: its count, kCountLost, or nothing yet.
struct Reading {
  bool arrived;
  uint32_t count;
};

IBEX_DEV Reading read_signal(const LaneArgs& a, const uint64_t* word, uint32_t generation) {
  // ORDER(5): data placed by the NIC -> signal word. ORDER(6): rows copied by a mapped peer -> signal word. Acquire
  // at sys.
  const uint64_t v = ld_acquire_sys(word);
  const uint32_t g = signal_generation(v);
  if (g == generation || (g != 0 && !guarded(a, kGuardGeneration))) return Reading{true, signal_count(v)};
  return Reading{is_newer(g, generation), kCountLost};
}

/// Is this step older than the queue pairs to the peer? What it sent then was zeroed with their words, and the new
/// pairs carry nothing of it. That is no evidence against the peer.
IBEX_DEV bool is_before_pair(const LaneArgs& a, const HalfContext& h, uint32_t peer) {
  return h.seq < a.peers[peer].base_seq[h.op];
}

/// The clock of a wait for a signal: one per warp, in shared memory, so that waiting costs no registers.
IBEX_DEV WaitClock& clock_of_this_warp() {
  IBEX_SHARED(WaitClock, clocks, kMaxWarps);
  return clocks[warp::id()];
}

/// The slow part of `await_signal`: waits, and gives up when time is up. One lane only.
IBEX_DEV uint32_t wait_for_signal(const LaneArgs& a, const HalfContext& h, uint64_t* verdict, uint32_t peer,
                                  uint32_t channel) {
  WaitClock& clock = clock_of_this_warp();
  start_clock(clock, clock_ns());
  for (;;) {
    const uint64_t seen = ld_acquire_gpu(verdict);
    if (signal_generation(seen) == h.generation) return signal_count(seen);
    if (!is_alive(a, *h.table, peer) || is_before_pair(a, h, peer)) {
      return settle_lost(a, h, verdict, seen, peer, kFaultNone, Evidence{});
    }
    // Only a member's context may be read: the host rewrites those of others.
    const uint64_t* word = reinterpret_cast<const uint64_t*>(
        a.peers[peer].my_region + signal_offset(a, h.op, h.slot, channel));
    const Reading r = read_signal(a, word, h.generation);
    if (r.arrived) {
      if (clock.polls != 0) add_relaxed_sys(&a.telemetry[peer].receive_wait_ns, waited(clock));
      return signal_count(settle(verdict, seen, signal_word(h.generation, r.count)));
    }
    Evidence e{};
    uint32_t kind = kFaultNone;
    if (is_suspected(a, peer)) kind = kFaultReported;
    if (kind == kFaultNone && has_failed_qp(a, peer, clock.polls, &e)) kind = kFaultCompletion;
    if (kind == kFaultNone) kind = tick(a, clock, peer, has_sent(a, peer, h.op, h.seq));
    if (kind != kFaultNone) {
      e.waited_ns = waited(clock);
      return settle_lost(a, h, verdict, seen, peer, kind, e);
    }
    backoff();
  }
}

/// Waits until (peer, channel) has signalled this step, or is found lost. Any warp may call it; all get one answer.
/// Returns the count in the signal, or kCountLost.
///
/// # Ordering
/// ORDER(7): one warp's acquire of the signal -> verdict -> another warp's reads. acq_rel / acquire at gpu scope.
IBEX_DEV uint32_t await_signal(const LaneArgs& a, const HalfContext& h, uint64_t* verdicts, uint32_t peer,
                               uint32_t channel) {
  const uint32_t count = warp::one_lane([&]() -> uint32_t {
    uint64_t* verdict = &verdicts[qp_index(a.shape, peer, channel)];
    const uint64_t seen = ld_acquire_gpu(verdict);
    if (signal_generation(seen) == h.generation) return signal_count(seen);
    return wait_for_signal(a, h, verdict, peer, channel);
  });
  warp::sync();
  return count;
}

}  // namespace ibex
