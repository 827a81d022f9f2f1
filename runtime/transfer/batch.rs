//! Requests that were submitted together, as their submitter sees them.

use core::time::Duration;
use std::sync::Arc;

use ibex_metadata::lease::Moment;
use ibex_metadata::scope::Guard;

use super::work::Op;
use super::{Requester, TransferError};
use crate::time::sleep;

/// Pauses between looks: doubled from the first to the longest.
const PAUSES: (Duration, Duration) = (Duration::from_micros(1), Duration::from_millis(2));
/// Looks before the first pause.
const LOOKS: u32 = 64;

/// How one request ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Bytes moved, or why not.
    pub outcome: Result<u32, TransferError>,
    /// Whether no device can touch the local memory on its behalf any more. If not, the region stays pinned
    /// until that is so.
    pub is_quiescent: bool,
}

/// Requests in progress. Borrows the guard, so that a use ends within the request that looked the record up.
///
/// Dropping it cancels what has not been posted and lets the rest end by itself, its memory pinned.
#[derive(Debug)]
pub struct Batch<'g> {
    requester: &'g Requester,
    guard: &'g Guard<'g>,
    ops: Vec<Arc<Op>>,
    deadline: Moment,
    budget: Duration,
}

impl<'g> Batch<'g> {
    pub(super) fn new(
        requester: &'g Requester,
        guard: &'g Guard<'g>,
        ops: Vec<Arc<Op>>,
        deadline: Moment,
        budget: Duration,
    ) -> Self {
        Self { requester, guard, ops, deadline, budget }
    }

    /// Whether every request has an outcome. Never waits.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.ops.iter().all(|op| op.look(|status| status.outcome.is_some()))
    }

    /// Whether no request can touch local memory any more. Never waits.
    #[must_use]
    pub fn is_quiescent(&self) -> bool {
        self.ops.iter().all(|op| op.look(|status| status.is_quiescent))
    }

    /// The guard that it was submitted under.
    #[must_use]
    pub const fn guard(&self) -> &'g Guard<'g> {
        self.guard
    }

    /// Helps the requester on until every request has an outcome, or the budget is used up.
    pub fn wait(&self) -> Vec<Report> {
        let (mut looks, mut pause) = (0, PAUSES.0);
        while !self.is_done() {
            if self.requester.progress() > 0 {
                (looks, pause) = (0, PAUSES.0);
                continue;
            }
            if self.requester.clock().now() >= self.deadline {
                self.expire();
                break;
            }
            looks += 1;
            if looks > LOOKS {
                sleep(pause);
                pause = (pause * 2).min(PAUSES.1);
            }
        }
        self.reports()
    }

    fn expire(&self) {
        for op in &self.ops {
            op.decide(Err(TransferError::Deadline { budget: self.budget }));
        }
        self.requester.drop_decided();
    }

    /// What is known of each request; those without an outcome say that the deadline is still ahead.
    fn reports(&self) -> Vec<Report> {
        let report = |op: &Arc<Op>| {
            op.look(|status| Report {
                outcome: status
                    .outcome
                    .clone()
                    .unwrap_or(Err(TransferError::Deadline { budget: self.budget })),
                is_quiescent: status.is_quiescent,
            })
        };
        self.ops.iter().map(report).collect()
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        if !self.is_done() {
            self.requester.cancel(&self.ops);
        }
    }
}
