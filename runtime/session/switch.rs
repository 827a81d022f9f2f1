//! Changing members and placement: removal at once, everything else at a sequence number.
//!
//! A lane has two member tables. Sequence number s uses the newer one iff s >= its from_seq; a combine uses the table
//! of its dispatch. So halves that are queued or running when a switch commits go on under the table they belong to,
//! and captured graphs need not know.
//!
//! ```text
//!              from_seq
//!  older table | seq 1 .. 9     the next commit overwrites it, once no half of a step before 10 is left
//!  newer table | seq 10 ..      written at a gate: no half of seq 10 has been launched
//! ```
//!
//! A removal clears the alive bit in *both* tables: it can only lose data, so it needs no gate.
//!
//! No policy stands here. Who is a member, and when, is membership's to say; a session checks that what it is told
//! fits what it has: its own counters, its own queue pairs.
//!
//! INVARIANT: a table is overwritten only when no half that uses it is queued or running.

use ibex_abi::device_ctx::MemberTable;
use parking_lot::Mutex;
use zerocopy::FromZeros;

use super::order::Mark;
use super::{COMBINE, DISPATCH, Guard, LaneRuntime, Session};
use crate::buffer::LaneBuffers;
use crate::error::{Error, Stale, Violation};
use crate::ids::{Epoch, Rank};
use crate::membership::RankSet;
use crate::placement::Placement;
use crate::recovery::BASE_SEQ_OFF;

/// What a group has agreed to do from one step on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// The epoch that begins.
    pub epoch: Epoch,
    /// Its members.
    pub alive: RankSet,
    /// Its expert placement; one that differs from the last has a version of its own.
    pub placement: Placement,
    /// The first step under it.
    pub from_step: u64,
    /// Per lane, the sequence numbers of dispatch and combine with which that step begins.
    pub from_seq: Vec<[u64; 2]>,
}

/// Which of a lane's two tables is the newer one, and what may still use the older.
#[derive(Default)]
pub(crate) struct Tables {
    newer: usize,
    /// First sequence number of a dispatch under the newer table.
    from_seq: u64,
    /// What had been launched under the older table when the newer one was written.
    older_until: Vec<Mark>,
}

/// What a session was last told.
pub(crate) struct Membership {
    epoch: Epoch,
    alive: RankSet,
    placement: Placement,
    /// What [`Session::ready`] said, until it is taken.
    ready: Option<u128>,
}

impl Membership {
    pub(super) fn new(epoch: Epoch, alive: RankSet, placement: Placement) -> Mutex<Self> {
        Mutex::new(Self { epoch, alive, placement, ready: None })
    }
}

impl Session {
    /// The epoch of the present members.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.membership.lock().epoch
    }

    /// The present members, this rank included.
    #[must_use]
    pub fn alive(&self) -> RankSet {
        self.membership.lock().alive
    }

    /// The present expert placement.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.membership.lock().placement.clone()
    }

    /// Says that this rank has all that a member needs, with a digest of what it holds.
    pub fn ready(&self, digest: u128) {
        self.membership.lock().ready = Some(digest);
    }

    /// What [`Session::ready`] said since this was last asked.
    pub fn take_ready(&self) -> Option<u128> {
        self.membership.lock().ready.take()
    }

    /// Is the table that the next commit overwrites used by nothing any more?
    ///
    /// # Errors
    /// `Gpu` if the state of the streams cannot be read.
    pub fn is_old_table_free(&self) -> Result<bool, Error> {
        for runtime in &self.lanes {
            if runtime.is_guarded(Guard::Table) && !runtime.tables.lock().is_older_free(self)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Switches at the gate: every later step runs under `switch`, every earlier one under the table it has.
    ///
    /// # Errors
    /// `Stale` if this session is not at the gate of that step, or halves still use the table to be overwritten;
    /// `Config` for another number of lanes; `Protocol` if its counters are not those of the group, or a member has no
    /// active queue pairs here. Nothing is changed then. `Gpu` if memory cannot be written.
    pub fn commit(&self, switch: &Switch) -> Result<(), Error> {
        self.check_start(&switch.from_seq)?;
        if !self.is_gate_closed() {
            let (found, current) = (self.next_step(), switch.from_step);
            return Err(Error::Stale(Stale { what: "gate (open)", found, current }));
        }
        self.check_at_step(switch.from_step)?;
        if !self.is_old_table_free()? {
            return Err(Error::Stale(Stale {
                what: "member table (halves still use it)",
                found: 1,
                current: 0,
            }));
        }
        self.check_counters(&switch.from_seq)?;
        self.check_members(&switch.alive)?;
        for (runtime, from_seq) in self.lanes.iter().zip(&switch.from_seq) {
            self.write_newer(runtime, switch, *from_seq)?;
        }
        self.note_switch(switch);
        Ok(())
    }

    /// Starts a session on which nothing runs as a member, at the step and the sequence numbers of its group.
    ///
    /// # Errors
    /// As [`Session::commit`] and [`Session::start_at`]; `Stale` while halves are queued here.
    pub fn start(&self, switch: &Switch) -> Result<(), Error> {
        self.check_members(&switch.alive)?;
        self.check_idle()?;
        self.start_at(&switch.from_seq)?;
        for (runtime, from_seq) in self.lanes.iter().zip(&switch.from_seq) {
            self.write_first(runtime, switch, *from_seq)?;
        }
        self.steps.start_at(switch.from_step);
        self.note_switch(switch);
        Ok(())
    }

    /// Refuses while anything that was launched here has not ended.
    fn check_idle(&self) -> Result<(), Error> {
        for runtime in &self.lanes {
            for mark in runtime.order.lock().marks() {
                if !mark.is_past(&*self.gpu)? {
                    return Err(Error::Stale(Stale {
                        what: "session (halves are queued)",
                        found: 1,
                        current: 0,
                    }));
                }
            }
        }
        Ok(())
    }

    fn note_switch(&self, switch: &Switch) {
        let mut membership = self.membership.lock();
        membership.epoch = switch.epoch;
        membership.alive = switch.alive;
        membership.placement = switch.placement.clone();
    }

    fn check_counters(&self, from_seq: &[[u64; 2]]) -> Result<(), Error> {
        for (ours, theirs) in self.launched_seqs().iter().zip(from_seq) {
            for (op, check) in [(DISPATCH, "next dispatch"), (COMBINE, "next combine")] {
                if ours[op] != theirs[op] {
                    let (from, found, expected) = (self.rank, ours[op], theirs[op]);
                    return Err(Error::Protocol(Violation { from, check, found, expected }));
                }
            }
        }
        Ok(())
    }

    /// Every member but this rank has queue pairs here that kernels may use; this rank is one.
    fn check_members(&self, alive: &RankSet) -> Result<(), Error> {
        let refuse = |from, check| Err(Error::Protocol(Violation { from, check, found: 0, expected: 1 }));
        if !alive.contains(self.rank) {
            return refuse(self.rank, "this rank among the members");
        }
        match alive.iter().find(|&rank| rank != self.rank && !self.is_active(rank)) {
            Some(rank) => refuse(rank, "active queue pairs of a member"),
            None => Ok(()),
        }
    }

    fn table(&self, switch: &Switch, from_seq: [u64; 2], owner_of: u64) -> MemberTable {
        MemberTable {
            epoch: switch.epoch.0,
            placement_version: switch.placement.version(),
            num_experts: self.config.num_experts,
            from_seq,
            owner_of,
            alive: *switch.alive.words(),
            ..MemberTable::new_zeroed()
        }
    }

    /// Writes the first table of a lane; the second applies to no sequence number.
    pub(super) fn write_first(
        &self,
        runtime: &LaneRuntime,
        switch: &Switch,
        from_seq: [u64; 2],
    ) -> Result<(), Error> {
        let mut tables = runtime.tables.lock();
        let buffers = runtime.buffers.read();
        for (index, first) in [(0, from_seq), (1, [u64::MAX; 2])] {
            self.write_table(&buffers, index, switch, first)?;
        }
        *tables = Tables { newer: 0, from_seq: from_seq[DISPATCH], older_until: Vec::new() };
        Ok(())
    }

    /// Writes the table that applies from `from_seq` on.
    fn write_newer(&self, runtime: &LaneRuntime, switch: &Switch, from_seq: [u64; 2]) -> Result<(), Error> {
        let mut tables = runtime.tables.lock();
        let buffers = runtime.buffers.read();
        if from_seq[DISPATCH] != tables.from_seq {
            tables.newer = 1 - tables.newer;
            tables.from_seq = from_seq[DISPATCH];
            tables.older_until = runtime.order.lock().marks();
        }
        // Otherwise no step has run under the newer table since it was written: it is replaced itself.
        self.write_table(&buffers, tables.newer, switch, from_seq)
    }

    /// While it is written a table applies to no sequence number, whatever a running half reads of it.
    fn write_table(
        &self,
        buffers: &LaneBuffers,
        index: usize,
        switch: &Switch,
        from_seq: [u64; 2],
    ) -> Result<(), Error> {
        let addr = buffers.table_addr(index);
        let first = |op: usize| addr + FROM_SEQ_OFF + 8 * op as u64;
        for op in [DISPATCH, COMBINE] {
            self.gpu.store_u64(first(op), u64::MAX)?;
        }
        let owner_of = buffers.owner_of_addr(index);
        let chosen = switch.placement.chosen_for(self.rank, &switch.alive);
        let bytes: Vec<u8> = chosen.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.gpu.write(owner_of, &bytes)?;
        LaneBuffers::write(&*self.gpu, addr, &self.table(switch, [u64::MAX; 2], owner_of))?;
        for op in [DISPATCH, COMBINE] {
            self.gpu.store_u64(first(op), from_seq[op])?;
        }
        Ok(())
    }

    /// Removes members at once: no half that enters from here on posts to them or waits for them, and what they own
    /// is lost until a switch places it elsewhere. The others go on.
    ///
    /// # Errors
    /// `Gpu` if memory cannot be written.
    pub fn remove(&self, ranks: &RankSet, epoch: Epoch) -> Result<(), Error> {
        for runtime in &self.lanes {
            let tables = runtime.tables.lock();
            let buffers = runtime.buffers.read();
            for index in 0..2 {
                let addr = buffers.table_addr(index);
                for (word, gone) in (0..).zip(ranks.words()) {
                    let at = addr + ALIVE_OFF + 8 * word;
                    let alive = self.gpu.load_u64(at)?;
                    if alive & gone != 0 {
                        self.gpu.store_u64(at, alive & !gone)?;
                    }
                }
            }
            self.gpu.store_u32(buffers.table_addr(tables.newer) + EPOCH_OFF, epoch.0)?;
        }
        {
            let mut membership = self.membership.lock();
            membership.epoch = epoch;
            membership.alive = membership.alive.difference(ranks);
        }
        ranks.iter().filter(|rank| *rank != self.rank).try_for_each(|rank| self.mask(rank))
    }

    /// Lets kernels use the slots of a connected peer that becomes a member with the next commit. `base_seq` is, per
    /// lane and operation, the first sequence number that the two exchange: older ones need no credit.
    ///
    /// # Errors
    /// `Config` for another number of lanes; `Protocol` if the slots are not connected; `Gpu` if memory cannot be
    /// written.
    pub fn admit(&self, peer: Rank, base_seq: &[[u64; 2]]) -> Result<(), Error> {
        self.check_start(base_seq)?;
        for (runtime, base_seq) in self.lanes.iter().zip(base_seq) {
            let addr = runtime.buffers.read().peer_ctx_addr(peer) + BASE_SEQ_OFF;
            for (op, base_seq) in (0..).zip(base_seq) {
                self.gpu.store_u64(addr + 8 * op, *base_seq)?;
            }
        }
        self.activate(peer)
    }
}

impl Tables {
    fn is_older_free(&self, session: &Session) -> Result<bool, Error> {
        for mark in &self.older_until {
            if !mark.is_past(&*session.gpu)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Offset of `MemberTable::from_seq`.
const FROM_SEQ_OFF: u64 = core::mem::offset_of!(MemberTable, from_seq) as u64;
/// Offset of `MemberTable::alive`.
const ALIVE_OFF: u64 = core::mem::offset_of!(MemberTable, alive) as u64;
/// Offset of `MemberTable::epoch`.
const EPOCH_OFF: u64 = core::mem::offset_of!(MemberTable, epoch) as u64;
