//! Switching guards of the protocol off, so that a test can prove that it would notice their absence.
//!
//! Only kernels of the host build look at the switch; on a GPU every guard always stands.

use core::sync::atomic::Ordering;

use ibex_abi::device_ctx::code;

use super::{LaneRuntime, Session};

/// A guard that [`Session::switch_guard_off`] knows.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Guard {
    /// A ring slot is rewritten at a peer only after that peer consumed it.
    Credit = code::GUARD_CREDIT,
    /// A row is overwritten only after a completion covers every WQE that names it.
    SourceRows = code::GUARD_SOURCE_ROWS,
    /// Signal words and headers are compared with the generation of the step.
    Generation = code::GUARD_GENERATION,
    /// A peer that cannot be served is told so.
    Lost = code::GUARD_LOST,
    /// The doorbell is rung after the record.
    Doorbell = code::GUARD_DOORBELL,
    /// Fencing waits for the halves that have entered.
    Grace = code::GUARD_GRACE,
    /// A member table applies from its first sequence number on, not earlier.
    FromSeq = code::GUARD_FROM_SEQ,
    /// A member table is overwritten only when no half uses it.
    Table = code::GUARD_TABLE,
    /// Masks, suspicions, signs of life and loss bits are looked at, and signs of life sent: what membership costs a
    /// group in which nothing happens.
    Membership = code::GUARD_MEMBERSHIP,
    /// A combine slot moves away from rows that may come too late.
    LateRows = code::GUARD_LATE_ROWS,
}

impl LaneRuntime {
    pub(crate) fn is_guarded(&self, guard: Guard) -> bool {
        self.guards_off.load(Ordering::Relaxed) & guard as u32 == 0
    }
}

impl Session {
    /// Runs later launches without `guard`. For tests only: the runtime is broken from here on.
    #[doc(hidden)]
    pub fn switch_guard_off(&self, guard: Guard) {
        for runtime in &self.lanes {
            runtime.guards_off.fetch_or(guard as u32, Ordering::Relaxed);
        }
    }

    /// Runs later launches with `guard` again. For benches that compare both in one run.
    #[doc(hidden)]
    pub fn switch_guard_on(&self, guard: Guard) {
        for runtime in &self.lanes {
            runtime.guards_off.fetch_and(!(guard as u32), Ordering::Relaxed);
        }
    }
}
