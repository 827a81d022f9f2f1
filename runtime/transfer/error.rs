//! Why a transfer did not happen, or is not to be trusted.

use core::time::Duration;

use ibex_hca::HcaError;
use ibex_hca::control_region::ControlError;
use ibex_hca::host_qp::PostError;
use ibex_metadata::derived::DeriveError;
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{BufferId, Stamp};
use ibex_metadata::name::RecordName;

/// Why a transfer failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The lease does not cover the use, or the store refused something.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A value of a request is outside what the local or remote memory allows; nothing was posted.
    #[error("{field} is {value}; it must be {min}..={max}")]
    OutOfRange {
        /// Which value.
        field: &'static str,
        /// What it was.
        value: u64,
        /// Smallest valid value.
        min: u64,
        /// Largest valid value.
        max: u64,
    },
    /// The buffer's owner does not allow this.
    #[error("buffer {buffer} does not allow a remote {verb}")]
    Denied {
        /// The buffer.
        buffer: BufferId,
        /// What was wanted.
        verb: &'static str,
    },
    /// More requests wait than may.
    #[error("{waiting} requests wait for peer slot {slot}, the limit is {limit}")]
    Full {
        /// The peer's slot.
        slot: u32,
        /// Requests that wait.
        waiting: usize,
        /// The limit.
        limit: usize,
    },
    /// The record that was resolved is not the newest one any more: resolve again.
    #[error("the record of {seen} was overtaken by {known}: resolve the name again")]
    Outdated {
        /// The guard's.
        seen: Stamp,
        /// The newest known.
        known: Stamp,
    },
    /// Two contents were published under one stamp; neither is used.
    #[error("two publishers share the stamp {stamp}")]
    ConcurrentPublisher {
        /// The stamp.
        stamp: Stamp,
    },
    /// Another process owns the name now. A request that had been posted may or may not have taken effect on
    /// the one that is gone.
    #[error("{name} is another process now")]
    PeerReplaced {
        /// The name.
        name: RecordName,
    },
    /// The way to the peer was taken down while the request was posted.
    #[error("the way to {name} was taken down")]
    PathRetired {
        /// The name.
        name: RecordName,
    },
    /// The owner does not offer the buffer any more.
    #[error("buffer {buffer} is not offered")]
    NotOffered {
        /// The buffer.
        buffer: BufferId,
    },
    /// The record says nothing that a connection could be made from.
    #[error("{name} cannot be reached: {missing}")]
    Unreachable {
        /// The name.
        name: RecordName,
        /// What its record lacks.
        missing: &'static str,
    },
    /// The device completed the request with an error.
    #[error("queue pair {qpn:#x}: syndrome {syndrome:#04x}, vendor syndrome {vendor:#04x}")]
    Completion {
        /// The queue pair.
        qpn: u32,
        /// What failed.
        syndrome: u8,
        /// Which check.
        vendor: u8,
    },
    /// The budget was used up.
    #[error("not done within {} ms", .budget.as_millis())]
    Deadline {
        /// The budget.
        budget: Duration,
    },
    /// The batch was dropped before the request was posted.
    #[error("cancelled before it was posted")]
    Cancelled,
    /// Too much was derived from records.
    #[error(transparent)]
    Derive(#[from] DeriveError),
    /// The request does not fit a queue.
    #[error(transparent)]
    Post(#[from] PostError),
    /// The device refused a command.
    #[error(transparent)]
    Hca(#[from] HcaError),
    /// Control memory refused a piece, or the device did.
    #[error(transparent)]
    Control(#[from] ControlError),
}
