//! What the group agrees on, and what each rank says of itself.
//!
//! A [`View`] is the one cell that only compare-and-set changes; a [`Row`] has one writer, its rank. Both are plain
//! values; `codec` has their bytes.
//!
//! ```text
//!            admitted                    committed at a gate
//!  Vacant ------------> Joining{instance} ------------> Member{instance}
//!    ^                      |                               |
//!    +----------------------+-------------------------------+      evicted, or left at a gate
//! ```
//!
//! INVARIANT: a vacant slot keeps the instance that was in it last: it is admitted anew only when nobody holds
//! anything of that incarnation any more.

use std::collections::BTreeMap;
use std::fmt;

use super::RankSet;
use crate::ids::{Epoch, Rank};

/// Which process holds a rank: drawn anew by every start; 0 is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instance(pub u128);

impl Instance {
    /// Nobody yet.
    pub const NONE: Self = Self(0);

    /// Whether it is nobody.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The first digits tell instances of one group apart.
        write!(f, "{:08x}", self.0 >> 96)
    }
}

/// What a slot of the group holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum SlotState {
    /// Nobody: never taken, evicted, or left.
    #[default]
    Vacant,
    /// A process that connects and fetches what it needs; it takes part in no step.
    Joining,
    /// A member of the epoch.
    Member,
}

/// One rank's place in the group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// What it holds.
    pub state: SlotState,
    /// Who is in it, or was last.
    pub instance: Instance,
    /// The store's token of that claim.
    pub fence: u64,
    /// [`View::serial`] of the change that made it so.
    pub since: u64,
    /// How often in a row its holder was evicted soon after it had come; damps flapping.
    pub evictions: u32,
}

/// A switch of the member tables that is under way: every member closes its gate for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// [`View::serial`] of the view that began it; no two plans share one.
    pub id: u64,
    /// Joining ranks that become members.
    pub join: RankSet,
    /// Members that leave on purpose.
    pub leave: RankSet,
    /// The placement from there on.
    pub placement_version: u32,
}

/// The last plan that was committed: where it takes effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// What was planned.
    pub plan: Plan,
    /// The epoch that began with it.
    pub epoch: Epoch,
    /// The first step under the new table.
    pub from_step: u64,
    /// Per lane and operation, the first sequence number under the new table.
    pub from_seq: Vec<[u64; 2]>,
}

/// What the group has agreed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Counts the changes of this cell, from 1; rows say which one they answer.
    pub serial: u64,
    /// Counts the changes of members and placement.
    pub epoch: Epoch,
    /// The placement in use; 1 is the one that the configuration implies.
    pub placement_version: u32,
    /// By rank.
    pub slots: Vec<Slot>,
    /// The switch under way.
    pub plan: Option<Plan>,
    /// The last switch that was committed.
    pub start: Option<Start>,
}

impl View {
    /// Before anybody has written: all slots vacant, epoch 0.
    #[must_use]
    pub fn empty(num_ranks: u32) -> Self {
        // CAST: at most NUM_RANKS_MAX.
        Self { slots: vec![Slot::default(); num_ranks as usize], placement_version: 1, ..Self::default() }
    }

    /// Ranks whose slot is in `state`.
    #[must_use]
    pub fn in_state(&self, state: SlotState) -> RankSet {
        // CAST: at most NUM_RANKS_MAX slots.
        let ranks = (0..self.slots.len()).map(|index| Rank(index as u16));
        ranks.filter(|rank| self.slots[rank.index()].state == state).collect()
    }

    /// The members of the epoch.
    #[must_use]
    pub fn members(&self) -> RankSet {
        self.in_state(SlotState::Member)
    }

    /// The slot of `rank`; a vacant one for a rank that the group has no room for.
    #[must_use]
    pub fn slot(&self, rank: Rank) -> Slot {
        self.slots.get(rank.index()).copied().unwrap_or_default()
    }

    /// Who holds `rank` now; none if vacant.
    #[must_use]
    pub fn holder(&self, rank: Rank) -> Option<Instance> {
        let slot = self.slot(rank);
        (slot.state != SlotState::Vacant).then_some(slot.instance)
    }
}

/// How a rank stands to one incarnation of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Which incarnation.
    pub instance: Instance,
    /// Whether this side's queue pairs are connected to it; otherwise something of it is still held.
    pub is_connected: bool,
}

/// The answer to a [`Plan`]: where this rank's gate is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowAck {
    /// [`Plan::id`].
    pub plan: u64,
    /// The first step of which this rank has launched nothing, and will not.
    pub step: u64,
    /// What the counters read there, per lane and operation; none while an open step has yet to launch something.
    pub next_seq: Option<Vec<[u64; 2]>>,
}

/// What a rank says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Who writes.
    pub instance: Instance,
    /// [`View::serial`] of the view that this row answers.
    pub seen: u64,
    /// The epoch of that view.
    pub epoch: Epoch,
    /// The highest round of suspicions in that epoch that this row answers; 0 before the first.
    pub round: u32,
    /// Whom this rank no longer waits for.
    pub suspects: RankSet,
    /// The epoch that this rank's member tables have.
    pub applied: Epoch,
    /// Incarnations of peers of which this rank still holds anything: keys, queue pairs.
    pub links: BTreeMap<Rank, Link>,
    /// Where this rank's gate is.
    pub ack: Option<RowAck>,
    /// A joining rank has all it needs, with this digest.
    pub ready: Option<u128>,
    /// A member wants to leave.
    pub is_leaving: bool,
    /// The newest placement that this rank has written into its cell; 0 for none.
    pub placement_version: u32,
}
