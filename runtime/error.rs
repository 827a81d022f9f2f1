//! The one public error of Ibex and its parts.
//!
//! Owns no memory. Every part is a small typed value: what failed, with which numbers, and what would
//! have been right. Leaf crates keep enums of their own; they are wrapped here, never flattened into text.
//!
//! INVARIANT: nothing here is a `String`; a condition that a test can inject has a variant it can match.

use std::fmt;

use ibex_hca::control_region::ControlError;
use ibex_hca::{AsyncEvent, CommandError, HcaError};
use ibex_metadata::error::StoreError;

use crate::bootstrap::BootstrapError;
use crate::gpu::GpuError;
use crate::ids::{Epoch, QpSlot, Rank};
use crate::membership::Stop;
use crate::transfer::TransferError;

/// Anything that Ibex can refuse or report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of the configuration or of a call was rejected before anything was created or posted.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The HCA refused a command.
    #[error(transparent)]
    Command(CommandError),
    /// The HCA could not do what was asked, for a reason other than a refused command.
    #[error(transparent)]
    Hca(HcaError),
    /// A work request completed with an error.
    #[error(transparent)]
    Completion(#[from] CompletionError),
    /// A peer is lost to this rank.
    #[error(transparent)]
    PeerLost(#[from] PeerLost),
    /// A peer broke the protocol.
    #[error(transparent)]
    Protocol(#[from] Violation),
    /// A bounded resource has no room for the request.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// A handle belongs to another epoch or incarnation.
    #[error(transparent)]
    Stale(#[from] Stale),
    /// The launch belongs to a step that waits for a switch of members or placement.
    #[error(transparent)]
    Gated(#[from] Gated),
    /// The GPU refused or failed a call.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Control memory refused a block.
    #[error(transparent)]
    Control(ControlError),
    /// Ranks in processes of their own did not find each other.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The metadata store refused or failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A host-driven transfer was refused, failed, or is not to be trusted.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The group is lost to this rank.
    #[error(transparent)]
    Membership(#[from] Stop),
    /// A call to the operating system failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

impl From<HcaError> for Error {
    fn from(error: HcaError) -> Self {
        match error {
            HcaError::Command(command) => Self::Command(command),
            HcaError::Os { call, errno } => Self::Os(OsError { call, errno }),
            other => Self::Hca(other),
        }
    }
}

impl From<ControlError> for Error {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::Hca(hca) => hca.into(),
            other => Self::Control(other),
        }
    }
}

impl From<CommandError> for Error {
    fn from(error: CommandError) -> Self {
        Self::Command(error)
    }
}

/// A field whose value is outside its limit.
///
/// `Config::validate` and every dispatch/combine call report with this type, before any side effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value} is refused: it must be {limit}")]
pub struct ConfigError {
    /// The field as it is spelled in the Rust API.
    pub field: &'static str,
    /// What was given.
    pub value: Value,
    /// What would have been accepted.
    pub limit: Limit,
}

/// A refused value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// A number that cannot be negative.
    Number(u64),
    /// A number that may be negative.
    Signed(i64),
    /// One of a closed list of names, or "absent".
    Name(&'static str),
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Number(value)
    }
}

impl From<&'static str> for Value {
    fn from(value: &'static str) -> Self {
        Self::Name(value)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(n) => n.fmt(f),
            Self::Signed(n) => n.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// What a value must satisfy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// `min..=max`.
    Range {
        /// Smallest accepted value.
        min: u64,
        /// Largest accepted value.
        max: u64,
    },
    /// A positive multiple of a number, no larger than `max`.
    MultipleOf {
        /// The divisor.
        step: u64,
        /// Largest accepted value.
        max: u64,
    },
    /// Not above another field.
    AtMostField {
        /// The other field.
        field: &'static str,
        /// Its value.
        max: u64,
    },
    /// Not below another field.
    AtLeastField {
        /// The other field.
        field: &'static str,
        /// Its value.
        min: u64,
    },
    /// Equal to another field or to what was agreed earlier.
    Exactly {
        /// Where the expected value comes from.
        field: &'static str,
        /// The expected value.
        value: u64,
    },
    /// Present, because another choice needs it.
    Present {
        /// The choice that needs it.
        needed_by: &'static str,
    },
    /// One of a closed list.
    OneOf(&'static [&'static str]),
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Range { min, max } if min == max => write!(f, "{min}"),
            Self::Range { min, max } => write!(f, "in {min}..={max}"),
            Self::MultipleOf { step, max } => write!(f, "a multiple of {step} in {step}..={max}"),
            Self::AtMostField { field, max } => write!(f, "at most {field} = {max}"),
            Self::AtLeastField { field, min } => write!(f, "at least {field} = {min}"),
            Self::Exactly { field, value } => write!(f, "{field} = {value}"),
            Self::Present { needed_by } => write!(f, "present, because {needed_by} needs it"),
            Self::OneOf(names) => write!(f, "one of {}", names.join(", ")),
        }
    }
}

/// A work request that completed with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "completion error on slot {slot} (qpn {qpn:#x}): syndrome {syndrome:#04x}, vendor syndrome \
     {vendor_syndrome:#04x}, wqe_counter {wqe_counter}{}", if *.first { "" } else { ", last seen" }
)]
pub struct CompletionError {
    /// The slot of the queue pair.
    pub slot: QpSlot,
    /// The number that the device gave the queue pair.
    pub qpn: u32,
    /// The 16-bit index that the completion echoes.
    pub wqe_counter: u16,
    /// Syndrome of the error completion.
    pub syndrome: u8,
    /// Vendor syndrome of the error completion.
    pub vendor_syndrome: u8,
    /// Whether this is the first error of the queue pair; a collapsed queue may only show the last.
    pub first: bool,
}

/// A peer that this rank no longer waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("peer {rank} is lost in epoch {epoch}: {evidence}")]
pub struct PeerLost {
    /// The peer.
    pub rank: Rank,
    /// The epoch in which it was lost.
    pub epoch: Epoch,
    /// What convinced this rank first.
    pub evidence: Evidence,
}

/// The first evidence against a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Evidence {
    /// No sign of life within `detect_ms`.
    #[error("no sign of life for {waited_ns} ns")]
    Silent {
        /// How long the kernel waited.
        waited_ns: u64,
    },
    /// Alive and past the half we wait for, but nothing came within `stall_ms`, or the hard cap struck.
    #[error("no progress for {waited_ns} ns")]
    Stalled {
        /// How long the kernel waited.
        waited_ns: u64,
    },
    /// The device reported an error completion.
    #[error("error completion, syndrome {syndrome:#04x}")]
    Syndrome {
        /// The last syndrome seen on the queue pair.
        syndrome: u8,
    },
    /// Our own device reported that what leads to it has failed.
    #[error("the device reported: {event}")]
    Device {
        /// What it reported.
        event: AsyncEvent,
    },
    /// The peer itself said LOST, or skipped the step.
    #[error("the peer reported the step lost")]
    Reported,
    /// A header or count of it contradicts the protocol.
    #[error("it contradicted the protocol")]
    Contradiction,
    /// Rows sent to it could not be reused: nothing says that they arrived.
    #[error("rows sent to it are not known to have arrived")]
    SourceRows,
    /// Its lease ran out at the store, while the store was up.
    #[error("its lease expired")]
    Lease,
    /// Its process has ended.
    #[error("its process has ended")]
    Exit,
    /// Another process holds its name.
    #[error("another process has claimed its name")]
    Superseded,
    /// It was admitted, and could not be connected.
    #[error("it could not be connected")]
    Unconnected,
}

/// A peer's message that contradicts the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("peer {from} broke the protocol: {check} = {found}, expected {expected}")]
pub struct Violation {
    /// Who sent it.
    pub from: Rank,
    /// The offending field.
    pub check: &'static str,
    /// What it held.
    pub found: u64,
    /// What it had to hold.
    pub expected: u64,
}

/// A bounded resource without room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{resource} exhausted: {requested} requested, {in_use} of {limit} in use")]
pub struct Exhausted {
    /// Which resource.
    pub resource: Resource,
    /// How much exists.
    pub limit: u64,
    /// How much is taken.
    pub in_use: u64,
    /// How much was asked for.
    pub requested: u64,
}

/// The bounded resources of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Resource {
    /// Ring slots: sends whose receive half has not been launched yet.
    #[error("ring slots (launch the receive half of the oldest send first)")]
    RingSlots,
    /// A lane runs one send half at a time.
    #[error("lane")]
    Lane,
    /// Outstanding dispatch handles or combine tickets.
    #[error("handles")]
    Handles,
    /// Control memory: rings, completion queues, doorbell records.
    #[error("control memory bytes")]
    ControlMemory,
    /// Address space of one buffer.
    #[error("buffer bytes")]
    BufferBytes,
    /// Blocks that the GPU can run at the same time.
    #[error("co-resident blocks")]
    CoresidentBlocks,
    /// Graph captures: a session runs one at a time.
    #[error("graph captures")]
    Captures,
    /// Spare regions for replaced peers.
    #[error("spare regions")]
    SpareRegions,
}

/// A handle that outlived what it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} is stale: it has {found}, the current one is {current}")]
pub struct Stale {
    /// What kind of handle.
    pub what: &'static str,
    /// The handle's epoch, sequence or owner.
    pub found: u64,
    /// The current one.
    pub current: u64,
}

/// A step that may not begin yet, because the group is switching before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("step {step} waits at the gate until its members and placement are agreed")]
pub struct Gated {
    /// The step.
    pub step: u64,
}

/// A failed call to the operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed: {}", std::io::Error::from_raw_os_error(*.errno))]
pub struct OsError {
    /// The call.
    pub call: &'static str,
    /// Its errno.
    pub errno: i32,
}

impl OsError {
    /// The error of a call that just failed through `std::io`.
    #[must_use]
    pub fn from_io(call: &'static str, error: &std::io::Error) -> Self {
        Self { call, errno: error.raw_os_error().unwrap_or(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_field_value_and_limit() {
        let error =
            ConfigError { field: "max_topk", value: 33u32.into(), limit: Limit::Range { min: 1, max: 32 } };
        assert_eq!(error.to_string(), "max_topk = 33 is refused: it must be in 1..=32");
    }

    #[test]
    fn limits_say_what_would_have_been_right() {
        let cases = [
            (Limit::Range { min: 3, max: 3 }, "3"),
            (Limit::MultipleOf { step: 16, max: 64 }, "a multiple of 16 in 16..=64"),
            (Limit::AtMostField { field: "num_experts", max: 4 }, "at most num_experts = 4"),
            (Limit::AtLeastField { field: "detect_ms", min: 9 }, "at least detect_ms = 9"),
            (Limit::Exactly { field: "lane", value: 1 }, "lane = 1"),
            (Limit::Present { needed_by: "reduced" }, "present, because reduced needs it"),
            (Limit::OneOf(&["a", "b"]), "one of a, b"),
        ];
        for (limit, text) in cases {
            assert_eq!(limit.to_string(), text);
        }
    }

    #[test]
    fn parts_convert_into_the_public_error() {
        let lost =
            PeerLost { rank: Rank(3), epoch: Epoch(1), evidence: Evidence::Syndrome { syndrome: 0x15 } };
        let error = Error::from(lost);
        assert_eq!(error.to_string(), "peer 3 is lost in epoch 1: error completion, syndrome 0x15");
        assert!(matches!(error, Error::PeerLost(PeerLost { rank: Rank(3), .. })));
    }

    #[test]
    fn a_refused_command_keeps_its_own_variant() {
        let errno = HcaError::Os { call: "ioctl", errno: 22 };
        assert!(matches!(Error::from(errno), Error::Os(OsError { call: "ioctl", errno: 22 })));
        let unreachable = HcaError::Unreachable { reason: "another subnet" };
        assert!(matches!(Error::from(unreachable), Error::Hca(HcaError::Unreachable { .. })));
    }

    #[test]
    fn completion_says_whether_it_is_the_first_error() {
        let mut error = CompletionError {
            slot: QpSlot(2),
            qpn: 0x40,
            wqe_counter: 7,
            syndrome: 0x15,
            vendor_syndrome: 0x81,
            first: true,
        };
        assert!(!error.to_string().contains("last seen"));
        error.first = false;
        assert!(error.to_string().ends_with("wqe_counter 7, last seen"));
    }
}
