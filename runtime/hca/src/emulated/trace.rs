//! The command trace: which objects were touched, in which order.
//!
//! A test asks it what a recreation did, to whom. It is bounded; a full trace drops its oldest record
//! and counts the loss, so that a long-lived device does not grow.

use std::collections::VecDeque;

use ibex_abi::prm::{Op, Status};
use ibex_abi::types::QpNum;

/// Most records kept.
pub const TRACE_MAX: usize = 1 << 16;

/// The kind of object that a command created, changed or destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// The device itself.
    Device,
    /// Protection domain.
    Pd,
    /// Memory key.
    Mkey,
    /// Memory for queues.
    Umem,
    /// Doorbell page.
    Uar,
    /// Event queue.
    Eq,
    /// Completion queue.
    Cq,
    /// Queue pair.
    Qp,
}

/// One executed command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandRecord {
    /// The command; `None` if the device does not know the opcode.
    pub op: Option<Op>,
    /// What kind of object it named or made.
    pub object: ObjectKind,
    /// The object's number, if the command got as far as knowing it.
    pub number: Option<u32>,
    /// The queue pair, where the object is one.
    pub qpn: Option<QpNum>,
    /// How it ended.
    pub status: Status,
}

#[derive(Debug, Default)]
pub(super) struct Trace {
    records: VecDeque<CommandRecord>,
    dropped: u64,
}

impl Trace {
    pub(super) fn push(&mut self, record: CommandRecord) {
        if self.records.len() == TRACE_MAX {
            self.records.pop_front();
            self.dropped += 1;
        }
        self.records.push_back(record);
    }

    pub(super) fn records(&self) -> Vec<CommandRecord> {
        self.records.iter().copied().collect()
    }

    pub(super) fn take(&mut self) -> Vec<CommandRecord> {
        std::mem::take(&mut self.records).into()
    }

    pub(super) const fn dropped(&self) -> u64 {
        self.dropped
    }
}
