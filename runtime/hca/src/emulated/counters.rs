//! What a device did, in numbers that anyone may read at any time.
//!
//! Counters only grow; they are statistics, so relaxed additions suffice and a snapshot of a running
//! device is not a consistent cut.

use std::sync::atomic::{AtomicU64, Ordering};

use ibex_abi::types::QpNum;
use parking_lot::Mutex;

/// The first error completion that a queue pair met: what a collapsed CQ may no longer show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstError {
    /// The queue pair.
    pub qpn: QpNum,
    /// Index of the failed WQE's first basic block.
    pub wqe_counter: u16,
    /// Syndrome of the CQE.
    pub syndrome: u8,
    /// Vendor syndrome of the CQE.
    pub vendor: u8,
}

/// A snapshot of [`EmulatedHca::counters`](super::EmulatedHca::counters).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceCounters {
    /// Send WQEs executed, each once however often it was retransmitted.
    pub wqes: u64,
    /// Doorbell values seen.
    pub doorbells: u64,
    /// Completions written, errors included.
    pub cqes: u64,
    /// Error completions among them.
    pub error_cqes: u64,
    /// Entries written to event queues.
    pub eqes: u64,
    /// Payload bytes of RDMA WRITEs that left this device.
    pub bytes_written: u64,
    /// Payload bytes of RDMA READs that arrived at this device.
    pub bytes_read: u64,
    /// Payload bytes of SENDs that left this device.
    pub bytes_sent: u64,
    /// Payload bytes of atomics that left this device.
    pub bytes_atomic: u64,
    /// Messages sent again.
    pub retransmissions: u64,
    /// Requests that arrived a second time and were not executed again.
    pub duplicates: u64,
    /// Requests that this device answered with a negative acknowledgement: a key, a range, a right or an
    /// operation that does not hold.
    pub refused_requests: u64,
    /// Requests of other processes that were dropped without an answer: malformed, withdrawn, for a queue
    /// pair that does not exist or is connected elsewhere.
    pub dropped_requests: u64,
    /// WQEBBs that a doorbell covered before the record did, or that a record covered although no
    /// doorbell ever did: each is a violation of the doorbell protocol.
    pub unrung_wqes: u64,
    /// Doorbells for a queue pair that does not exist or does not send.
    pub late_doorbells: u64,
    /// Asynchronous events that nobody took in time, and events for a full event queue.
    pub dropped_events: u64,
    /// The first error completion of this device.
    pub first_error: Option<FirstError>,
    /// What it did with packets; all zero on a fabric that carries none.
    pub packets: PacketCounters,
}

/// Packets of a device, and why some were dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PacketCounters {
    /// Packets sent.
    pub sent: u64,
    /// Of these, packets of requests sent again.
    pub sent_again: u64,
    /// Packets that the network below refused.
    pub unsent: u64,
    /// Packets that arrived.
    pub received: u64,
    /// Dropped: the ICRC is wrong.
    pub bad_icrc: u64,
    /// Dropped: not RoCEv2, or not for this port.
    pub malformed: u64,
    /// Dropped: there is no such queue pair.
    pub unknown_qp: u64,
    /// Dropped: from another address than the queue pair is connected to.
    pub wrong_source: u64,
    /// Dropped: another partition.
    pub wrong_pkey: u64,
    /// Dropped: its queue pair does not take it in its state.
    pub unexpected: u64,
    /// Requests refused with a negative acknowledgement: a bad key, range, right or sequence of opcodes.
    pub refused: u64,
}

/// The live counters of packets.
#[derive(Debug, Default)]
pub(super) struct Packets {
    pub(super) sent: AtomicU64,
    pub(super) sent_again: AtomicU64,
    pub(super) unsent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) bad_icrc: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) unknown_qp: AtomicU64,
    pub(super) wrong_source: AtomicU64,
    pub(super) wrong_pkey: AtomicU64,
    pub(super) unexpected: AtomicU64,
    pub(super) refused: AtomicU64,
}

impl Packets {
    fn snapshot(&self) -> PacketCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PacketCounters {
            sent: read(&self.sent),
            sent_again: read(&self.sent_again),
            unsent: read(&self.unsent),
            received: read(&self.received),
            bad_icrc: read(&self.bad_icrc),
            malformed: read(&self.malformed),
            unknown_qp: read(&self.unknown_qp),
            wrong_source: read(&self.wrong_source),
            wrong_pkey: read(&self.wrong_pkey),
            unexpected: read(&self.unexpected),
            refused: read(&self.refused),
        }
    }
}

/// The live counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) wqes: AtomicU64,
    pub(super) doorbells: AtomicU64,
    pub(super) cqes: AtomicU64,
    pub(super) error_cqes: AtomicU64,
    pub(super) eqes: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_sent: AtomicU64,
    pub(super) bytes_atomic: AtomicU64,
    pub(super) retransmissions: AtomicU64,
    pub(super) duplicates: AtomicU64,
    pub(super) refused_requests: AtomicU64,
    pub(super) dropped_requests: AtomicU64,
    pub(super) unrung_wqes: AtomicU64,
    pub(super) late_doorbells: AtomicU64,
    pub(super) dropped_events: AtomicU64,
    pub(super) packets: Packets,
    first_error: Mutex<Option<FirstError>>,
}

/// Adds to a statistic.
pub(super) fn add(counter: &AtomicU64, amount: u64) {
    if amount != 0 {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

impl Counters {
    pub(super) fn note_error(&self, error: FirstError) {
        add(&self.error_cqes, 1);
        self.first_error.lock().get_or_insert(error);
    }

    pub(super) fn snapshot(&self) -> DeviceCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceCounters {
            wqes: read(&self.wqes),
            doorbells: read(&self.doorbells),
            cqes: read(&self.cqes),
            error_cqes: read(&self.error_cqes),
            eqes: read(&self.eqes),
            bytes_written: read(&self.bytes_written),
            bytes_read: read(&self.bytes_read),
            bytes_sent: read(&self.bytes_sent),
            bytes_atomic: read(&self.bytes_atomic),
            retransmissions: read(&self.retransmissions),
            duplicates: read(&self.duplicates),
            refused_requests: read(&self.refused_requests),
            dropped_requests: read(&self.dropped_requests),
            unrung_wqes: read(&self.unrung_wqes),
            late_doorbells: read(&self.late_doorbells),
            dropped_events: read(&self.dropped_events),
            first_error: *self.first_error.lock(),
            packets: self.packets.snapshot(),
        }
    }
}
