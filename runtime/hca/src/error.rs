//! What a device or its seam refuses, with the values that would have been right.

use ibex_abi::prm::{Op, Status};
use ibex_abi::types::QpState;

use crate::emulated::AdvertError;
use crate::emulated::switch::PlanLimit;
use crate::shared_memory::SharedMemoryError;

/// A PRM command that did not complete with status OK.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("command {} failed: status {status}, syndrome {syndrome:#x}, errno {errno}{}",
    name_of(*.opcode), in_state(.qp_state))]
pub struct CommandError {
    /// The command's opcode, known to us or not; see [`op`](Self::op).
    pub opcode: u16,
    /// The status the device returned.
    pub status: Status,
    /// The device's own detail; see the device's documentation.
    pub syndrome: u32,
    /// The operating system's error, as the kernel driver translates the status.
    pub errno: i32,
    /// State of the queue pair that the command named, where it named one.
    pub qp_state: Option<QpState>,
}

impl CommandError {
    /// A command that the device answered with `status`.
    #[must_use]
    pub fn new(opcode: u16, status: Status, syndrome: u32, qp_state: Option<QpState>) -> Self {
        Self { opcode, status, syndrome, errno: status.errno(), qp_state }
    }

    /// The command, if it is one we know.
    #[must_use]
    pub fn op(&self) -> Option<Op> {
        Op::from_code(self.opcode).ok()
    }
}

fn name_of(opcode: u16) -> String {
    Op::from_code(opcode).map_or_else(|_| format!("{opcode:#06x}"), |op| op.to_string())
}

fn in_state(state: &Option<QpState>) -> String {
    state.map(|state| format!(", queue pair in state {state}")).unwrap_or_default()
}

/// Why a call through [`crate::Hca`] failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HcaError {
    /// The device refused a command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The advert of a port of another process was refused, or could not be made.
    #[error(transparent)]
    Advert(#[from] AdvertError),
    /// A fault plan is not one.
    #[error(transparent)]
    Plan(#[from] PlanLimit),
    /// Memory that processes share could not be made, or a peer's could not be reached.
    #[error(transparent)]
    SharedMemory(#[from] SharedMemoryError),
    /// The operating system refused a call.
    #[error("{call} failed with errno {errno}")]
    Os {
        /// Name of the call.
        call: &'static str,
        /// Its error number.
        errno: i32,
    },
    /// A value is outside what the device takes; nothing was created.
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
    /// An address must be a multiple of some power of two and is not.
    #[error("{field} is {value:#x}; it must be a multiple of {align}")]
    Misaligned {
        /// Which value.
        field: &'static str,
        /// What it was.
        value: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// A bounded resource is used up.
    #[error("no {what} left: {requested} requested, limit {limit}")]
    Exhausted {
        /// Which resource.
        what: &'static str,
        /// The amount asked for.
        requested: u64,
        /// The most there can be.
        limit: u64,
    },
    /// The remote port cannot be reached from this one.
    #[error("remote port is unreachable: {reason}")]
    Unreachable {
        /// What does not match.
        reason: &'static str,
    },
    /// Something that only emulated devices have.
    #[error("{what} is for emulated devices only")]
    OnlyEmulated {
        /// What was asked for.
        what: &'static str,
    },
    /// A queue cannot live there.
    #[error("queues cannot live in memory that is reached by copies")]
    QueueInCopied,
    /// The object does not exist on this device.
    #[error("no {what} with number {number:#x}")]
    Unknown {
        /// Which kind of object.
        what: &'static str,
        /// The number given.
        number: u64,
    },
}

/// Takes the answer to a destroy. An object that the device does not know is destroyed: the reply of an earlier attempt
/// was lost, and the retry must not fail for ever.
///
/// # Errors
/// Any other refusal: the object is still there.
pub fn destroyed(answer: Result<(), HcaError>) -> Result<(), HcaError> {
    match answer {
        Err(HcaError::Command(refusal)) if refusal.status == Status::BadRes => Ok(()),
        other => other,
    }
}
