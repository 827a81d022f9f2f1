//! A queue pair: its rings, its state, and its two halves.
//!
//! *Who owns what.* Rings and doorbell record are the driver's memory, in umems that the queue pair
//! holds. The requester half (what this end sends) and the responder half (what it answers) have a lock
//! each, so that two ends of a connection may be stepped by two threads.
//!
//! Locks are taken in one order, which is why nothing here can deadlock:
//!
//! ```text
//!  requester half -> key tables (lower port first) -> responder half -> CQ -> events, counters
//! ```
//!
//! INVARIANT: one thread holds at most one lock of each kind (two key tables excepted). INVARIANT: the
//! state changes only under a half's lock; commands hold both.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};

use ibex_abi::types::{Pd, QpNum, QpState};
use ibex_abi::wqe::WQEBB;
use parking_lot::Mutex;

use super::cq::Cq;
use super::doorbell::Uar;
use super::fabric::shm::PortMemory;
use super::memory::Span;
use super::requester::Requester;
use super::responder::Responder;
use super::umem::UmemHold;

/// A WQE takes at most this many bytes (`ds` is 6 bits).
pub(super) const WQE_BYTES_MAX: usize = 1024;

/// What CREATE_QP fixes.
#[derive(Debug)]
pub(super) struct QpLayout {
    pub(super) num: QpNum,
    pub(super) pd: Pd,
    pub(super) user_index: u32,
    /// The send ring: a power of two of WQEBBs.
    pub(super) sq: Span,
    pub(super) rq: Option<RecvRing>,
    pub(super) record: Span,
    pub(super) send_cq: Arc<Cq>,
    pub(super) recv_cq: Arc<Cq>,
    pub(super) uar: Arc<Uar>,
}

/// The receive ring.
#[derive(Debug)]
pub(super) struct RecvRing {
    pub(super) memory: Span,
    pub(super) log_size: u8,
    pub(super) stride: u64,
}

/// A queue pair.
#[derive(Debug)]
pub(super) struct Qp {
    pub(super) layout: QpLayout,
    state: AtomicU8,
    /// Producer index of the latest doorbell.
    rung: AtomicU16,
    /// See [`note_idle`](Self::note_idle).
    idle_at: AtomicU32,
    /// Released when the queue pair is destroyed, however long the object itself is referred to.
    pub(super) holds: Mutex<Vec<UmemHold>>,
    pub(super) requester: Mutex<Requester>,
    pub(super) responder: Mutex<Responder>,
    /// Where requests wait for another process to take them, if the fabric has such a place.
    pub(super) port: Option<Arc<PortMemory>>,
}

/// Marks [`Qp::idle_at`] as holding the next index of an idle half.
const IDLE: u32 = 1 << 16;

/// How far ahead of `from` a 16-bit index is; zero if it lies behind.
pub(super) const fn ahead(idx: u16, from: u16) -> u16 {
    let distance = idx.wrapping_sub(from);
    if distance <= 1 << 15 { distance } else { 0 }
}

/// The state with this code; written as a table because it is read for every message.
#[inline]
fn state_of(code: u8) -> QpState {
    const TABLE: [QpState; 8] = [
        QpState::Reset,
        QpState::Init,
        QpState::Rtr,
        QpState::Rts,
        QpState::Sqer,
        QpState::Sqd,
        QpState::Err,
        QpState::SqDraining,
    ];
    // The device suspends nothing, so there is no other state.
    TABLE[usize::from(code & 7)]
}

impl Qp {
    pub(super) fn new(layout: QpLayout, holds: Vec<UmemHold>, port: Option<Arc<PortMemory>>) -> Arc<Self> {
        Arc::new(Self {
            layout,
            state: AtomicU8::new(QpState::Reset.code()),
            rung: AtomicU16::new(0),
            idle_at: AtomicU32::new(0),
            holds: Mutex::new(holds),
            requester: Mutex::default(),
            responder: Mutex::default(),
            port,
        })
    }

    pub(super) const fn num(&self) -> QpNum {
        self.layout.num
    }

    pub(super) fn state(&self) -> QpState {
        state_of(self.state.load(Ordering::Acquire))
    }

    /// Changes the state; in ERR and RST nothing that was sent may be executed any more, because software
    /// may overwrite its source as soon as it sees the state or a flushed completion.
    pub(super) fn set_state(&self, state: QpState) {
        self.state.store(state.code(), Ordering::Release);
        if let Some(port) = &self.port
            && matches!(state, QpState::Err | QpState::Reset)
        {
            port.withdraw(self.num());
        }
    }

    /// Forgets every doorbell; part of going to RST.
    pub(super) fn forget_doorbell(&self) {
        self.rung.store(0, Ordering::Release);
        self.note_busy();
    }

    /// Notes that the requester half waits for nothing but work at `next`.
    ///
    /// Most queue pairs are idle most of the time, and whoever steps them should not take their locks.
    pub(super) fn note_idle(&self, next: u16) {
        self.idle_at.store(IDLE | u32::from(next), Ordering::Release);
    }

    /// Notes that the requester half must be asked what it waits for.
    pub(super) fn note_busy(&self) {
        self.idle_at.store(0, Ordering::Release);
    }

    /// Whether the requester half certainly has nothing to do, seen without its lock.
    ///
    /// Only the doorbell is looked at: the record is memory that may be given back unless a lock is held.
    #[inline]
    pub(super) fn is_idle(&self, strict: bool) -> bool {
        let noted = self.idle_at.load(Ordering::Acquire);
        // CAST: the low half.
        strict && noted & IDLE != 0 && ahead(self.rung_idx(), noted as u16) == 0
    }

    pub(super) fn ring(&self, producer_idx: u16) {
        self.rung.store(producer_idx, Ordering::Release);
    }

    /// Producer index of the latest doorbell.
    pub(super) fn rung_idx(&self) -> u16 {
        self.rung.load(Ordering::Acquire)
    }

    /// Producer index in the doorbell record.
    pub(super) fn record_idx(&self) -> u16 {
        let [_, _, hi, lo] = self.layout.record.load32(4, Ordering::Acquire).to_ne_bytes();
        u16::from_be_bytes([hi, lo])
    }

    /// Receive counter in the doorbell record.
    pub(super) fn recv_idx(&self) -> u16 {
        let [_, _, hi, lo] = self.layout.record.load32(0, Ordering::Acquire).to_ne_bytes();
        u16::from_be_bytes([hi, lo])
    }

    /// WQEBBs after `next` that the device may execute.
    ///
    /// ORDER(2): WQE -> doorbell record. The acquire load of the record pairs with the release store of
    /// whoever posts, so that the WQEs below it are complete.
    #[inline]
    pub(super) fn covered(&self, next: u16, strict: bool) -> u16 {
        let rung = if strict { ahead(self.rung_idx(), next) } else { u16::MAX };
        if rung == 0 { 0 } else { rung.min(ahead(self.record_idx(), next)) }
    }

    /// Basic blocks in the send ring.
    #[inline]
    pub(super) fn num_blocks(&self) -> u16 {
        // CAST: at most 2^15, as CREATE_QP checked.
        (self.layout.sq.len() / WQEBB as u64) as u16
    }

    /// Asks for the WQEBB with this index to be near when it is read.
    #[inline]
    pub(super) fn prefetch_block(&self, idx: u16) {
        let ring = self.layout.sq;
        ring.prefetch((u64::from(idx) * WQEBB as u64) & (ring.len() - 1));
    }

    /// Reads the WQEBB with this index.
    #[inline]
    pub(super) fn read_block(&self, idx: u16, out: &mut [u8; WQEBB]) {
        let ring = self.layout.sq;
        let offset = u64::from(idx) * WQEBB as u64;
        ring.read_block(offset & (ring.len() - 1), out);
    }
}

#[cfg(test)]
mod tests {
    use super::{ahead, state_of};
    use ibex_abi::types::QpState;

    #[test]
    fn every_state_that_the_device_knows_is_found_by_its_code() {
        for state in QpState::ALL {
            if state != QpState::Suspended {
                assert_eq!(state_of(state.code()), state);
            }
        }
    }

    #[test]
    fn indices_are_compared_on_a_circle_of_2_to_the_16() {
        assert_eq!(ahead(5, 3), 2);
        assert_eq!(ahead(1, 0xffff), 2);
        assert_eq!(ahead(3, 5), 0);
        assert_eq!(ahead(0x8000, 0), 0x8000);
        assert_eq!(ahead(0x8001, 0), 0);
    }
}
