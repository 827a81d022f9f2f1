/// One send queue as its owner warp drives it: space, batches, doorbells, completions.
///
/// Only the owner warp of a QP posts to it, so there is no lock and no compare-and-swap. Indices count WQEBBs and
/// only grow; every WQE of ours is one WQEBB. All functions are called by the whole warp unless they say otherwise.
///
/// INVARIANT: producer_idx - consumer_idx <= sq_mask + 1: a WQE is never overwritten before a CQE covers it.
#pragma once
#include "ibex/args.h"
#include "ibex/warp.h"
#include "ibex/wqe.h"

namespace ibex {

constexpr uint32_t kCqeCompletionOff = 0x3c;
constexpr uint32_t kCqeSyndromeOff = 0x34;
constexpr uint32_t kCqeOpcodeInvalid = 0xf;
constexpr uint32_t kCqeOpcodeRequesterError = 0xd;
constexpr uint32_t kCqeOpcodeResponderError = 0xe;

/// May this queue be posted to, and its other fields be read? Any single lane may ask, after the half has announced
/// its entry: from a half that sees Active the host keeps its hands off until that half has left (ORDER(9)).
///
/// # Ordering
/// ORDER(16): queue fields that the host wrote -> state Active. Acquire at sys.
IBEX_DEV bool is_active(const QpDeviceCtx& qp) { return ld_acquire_sys(&qp.state) == kQpActive; }

/// What the collapsed CQE says, as it stands there (little-endian loads of big-endian fields), so that it is two
/// registers. Opcode and counter come from one 4-byte load, so they belong together.
struct Completion {
  uint32_t word;       ///< {opcode:4 .. | signature | wqe_counter:16 swapped}
  uint32_t syndromes;  ///< {syndrome | vendor syndrome | ..}; 0 unless it is an error

  IBEX_HD uint32_t opcode() const { return word >> 28; }
  IBEX_HD bool valid() const { return opcode() != kCqeOpcodeInvalid; }
  IBEX_HD bool error() const { return opcode() == kCqeOpcodeRequesterError || opcode() == kCqeOpcodeResponderError; }
  IBEX_HD uint32_t wqe_counter() const { return (word & 0xffu) << 8 | (word >> 8 & 0xffu); }
  IBEX_HD uint32_t syndrome() const { return syndromes >> 24; }
  IBEX_HD uint32_t vendor() const { return syndromes >> 16 & 0xffu; }
};

/// Reads the CQE. Any single lane may call this; it changes nothing.
///
/// # Ordering
/// ORDER(4): CQE body -> completion word. Acquire at sys; pairs with the device's release store at 0x3c.
/// ORDER(15): the device's reads of WQEs and rows -> completion word -> what overwrites them. The same acquire; every
///   warp that then writes there synchronises with the lane that polled.
IBEX_DEV Completion read_cqe(const QpDeviceCtx& qp) {
  Completion c{ld_acquire_sys(reinterpret_cast<const uint32_t*>(qp.cqe + kCqeCompletionOff)), 0};
  if (c.error()) c.syndromes = ld_relaxed_sys(reinterpret_cast<const uint32_t*>(qp.cqe + kCqeSyndromeOff));
  return c;
}

/// The consumer index that a completion implies, given an earlier one. The CQE carries 16 bits of it; a queue is
/// never deeper than 2^15, so the difference is unambiguous.
IBEX_DEV uint32_t completed_idx(const Completion& c, uint32_t consumer_idx) {
  return consumer_idx + ((c.wqe_counter() + 1 - consumer_idx) & 0xffffu);
}

/// Takes in what the CQE says. Lane 0 only. Returns whether the QP is in error.
///
/// An error CQE completes its WQE too: the device will not read that WQE's rows again. "Error, last syndrome seen"
/// is the verdict; in a collapsed CQ the flush overwrites the first error.
IBEX_DEV bool poll_cq(QpDeviceCtx& qp) {
  const Completion c = read_cqe(qp);
  if (c.valid()) {
    const uint32_t completed = completed_idx(c, qp.consumer_idx);
    qp.cqes += completed != qp.consumer_idx ? 1 : 0;
    qp.consumer_idx = completed;
  }
  if (c.syndrome() != 0) qp.syndrome = c.syndrome();
  return qp.syndrome != 0;
}

/// Does a CQE still have to cover the WQE before index `pi`? An index that is older than the queue's memory of 2^32
/// WQEBBs, or 0 for "never", reads as covered.
IBEX_DEV bool is_in_flight(const QpDeviceCtx& qp, uint32_t pi) {
  return pi - 1 - qp.consumer_idx < qp.producer_idx - qp.consumer_idx;
}

/// WQEBBs that may be written now without asking the CQ.
IBEX_DEV uint32_t known_space(const QpDeviceCtx& qp) { return qp.sq_mask + 1 - (qp.producer_idx - qp.consumer_idx); }

/// Makes sure of `wanted` WQEBBs, reading the CQ only when the cached index says no.
IBEX_DEV bool has_space(QpDeviceCtx& qp, uint32_t wanted) {
  const bool enough = warp::one_lane([&] {
    if (known_space(qp) < wanted) poll_cq(qp);
    return known_space(qp) >= wanted;
  });
  warp::sync();
  return enough;
}

/// WQEs written but not yet rung. The owner writes them through `put_*` at `next_idx`, counts them in, and rings once.
struct Batch {
  QpDeviceCtx* qp;
  uint32_t next_idx;   ///< index of the next WQE to write
  uint32_t num_wqes;
};

IBEX_DEV Batch begin_batch(QpDeviceCtx& qp) { return Batch{&qp, qp.producer_idx, 0}; }

IBEX_DEV void count_in(Batch& b, uint32_t num_wqes) {
  b.next_idx += num_wqes;
  b.num_wqes += num_wqes;
}

/// Tells the HCA that all WQEs of the batch are ready. `last` is the ctrl of the last one, which must be signalled.
/// Returns at once; completion is the CQ's word.
///
/// # Ordering
/// ORDER(2): WQE stores -> doorbell record. `warp::sync` gathers the lanes' stores, then a release at sys, which
///   covers the rings, the record and every buffer that a WQE names (host memory on the emulated HCA).
/// ORDER(3): doorbell record -> doorbell. A fence, then a relaxed MMIO store.
/// Pairs with ORDER(2), ORDER(3) in runtime/hca/src/emulated.
/// `rings` is false only where a test leaves the doorbell out.
IBEX_DEV void ring_doorbell(Batch& b, Ctrl last, bool rings = true) {
  warp::sync();
  ONE_LANE {
    QpDeviceCtx& qp = *b.qp;
    qp.producer_idx = b.next_idx;
    qp.doorbells += 1;
    st_release_sys(reinterpret_cast<uint32_t*>(qp.doorbell_record), bswap32(b.next_idx & 0xffffu));
    fence_acq_rel_sys();
    if (rings) {
      st_relaxed_mmio_sys(reinterpret_cast<uint64_t*>(qp.doorbell),
                          static_cast<uint64_t>(last.qpn_ds_be) << 32 | last.opcode_idx_be);
    }
  }
  warp::sync();
  b.num_wqes = 0;
}

}  // namespace ibex
