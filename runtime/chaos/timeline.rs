//! What happened when, to be drawn. Pure.

use crate::ids::{Epoch, Rank};
use crate::membership::RankSet;

/// Most entries of one timeline; later ones are dropped and counted.
pub const ENTRIES_MAX: usize = 1 << 16;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    /// A fault was carried out.
    Fault(String),
    /// What lasted is over.
    Ended(String),
    /// A process started.
    Started,
    /// A process ended.
    Died,
    /// A process stands still, or goes on.
    Frozen(bool),
    /// A rank no longer waits for another.
    Suspects(Rank),
    /// The group goes on without a rank.
    Evicted,
    /// A rank became a member.
    Joined,
    /// Another epoch with these members.
    Epoch(Epoch, RankSet),
    /// A rank launches nothing, for a switch.
    GateClosed,
    /// It goes on.
    GateOpened,
    /// A rank has stopped using the group.
    Stopped(String),
    /// A process was late by its own clock.
    Late(String),
    /// A rank has finished a step.
    Step {
        /// Which.
        step: u64,
        /// When it was launched.
        since_ns: u64,
        /// Picks and sources reported lost.
        lost: u64,
    },
    /// Something is wrong.
    Flaw(String),
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When, in nanoseconds of the campaign's clock.
    pub at_ns: u64,
    /// To whom; the whole group if absent.
    pub rank: Option<Rank>,
    /// What.
    pub what: Happened,
}

/// Entries in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// Ranks that it has rows for.
    pub num_ranks: u32,
    /// What happened.
    pub entries: Vec<Entry>,
    /// Entries that did not fit.
    pub dropped: u64,
}

impl Timeline {
    /// An empty one.
    #[must_use]
    pub fn new(num_ranks: u32) -> Self {
        Self { num_ranks, ..Self::default() }
    }

    /// Adds an entry.
    pub fn push(&mut self, at_ns: u64, rank: Option<Rank>, what: Happened) {
        if self.entries.len() == ENTRIES_MAX {
            self.dropped += 1;
            return;
        }
        self.entries.push(Entry { at_ns, rank, what });
    }
}
