//! Changing the members of a [`World`], by what a session can do and without a membership protocol.
//!
//! All ranks live in one process and the caller is their only will, so there is nothing to agree on: this calls the
//! parts of each session in the order that membership does between processes. For tests, benches and first looks.
//!
//! ```text
//!  remove_peers   clear the alive bit, mask                                     at once
//!  regroup        joiners: fence and connect every pair                         the others run on
//!                 close every gate -> from_step, from_seq -> run up to it       queued halves keep their table
//!                 admit -> commit (members), start (joiners) -> open            graphs stay valid
//! ```

use super::gate::GateAck;
use super::switch::Switch;
use super::world::{Replacement, World};
use crate::config::ValidConfig;
use crate::error::{Error, Stale};
use crate::ids::{Epoch, Rank};
use crate::membership::RankSet;
use crate::placement::Placement;

/// Who is a member from the next step on, and where experts stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regroup {
    /// The members. Those that are none now join; members that are missing leave.
    pub members: RankSet,
    /// The placement; one that differs from the present one needs a version of its own.
    pub placement: Placement,
}

impl World {
    /// Starts the first members.
    pub(super) fn form(
        &self,
        config: &ValidConfig,
        members: RankSet,
        from_seq: Vec<[u64; 2]>,
    ) -> Result<(), Error> {
        if members == RankSet::first(config.num_ranks) {
            // What every session begins with.
            return Ok(());
        }
        let placement = Placement::contiguous(config, 1, &members)?;
        let switch = Switch { epoch: Epoch(1), alive: members, placement, from_step: 0, from_seq };
        for rank in members.iter() {
            self.replaceable(rank)?.start(&switch)?;
        }
        Ok(())
    }

    /// The members.
    #[must_use]
    pub fn members(&self) -> RankSet {
        *self.members.lock()
    }

    /// Notes members that the caller has switched to by the sessions' own calls.
    pub fn note_members(&self, members: RankSet) {
        *self.members.lock() = members;
    }

    /// Removes members at once; what they own is lost until a switch places it elsewhere.
    ///
    /// # Errors
    /// `Gpu` if memory cannot be written.
    pub fn remove_peers(&self, gone: &RankSet) -> Result<(), Error> {
        let members = self.members();
        for rank in members.difference(gone).iter() {
            let session = self.session(rank);
            session.remove(gone, session.epoch().next())?;
        }
        *self.members.lock() = members.difference(gone);
        Ok(())
    }

    /// Switches to other members or another placement, from the next step of the present members on.
    ///
    /// Every pair with a joiner is connected while the others run; a rank that is a member already keeps its queue
    /// pairs. Halves that are queued go on under the table of their sequence number.
    ///
    /// # Errors
    /// `Stale` if a member is inside a step, or behind the others, or halves still use the table to be overwritten:
    /// run its streams and retry. What a device refused. Then the gates are open again and the members as before; a
    /// retry goes on where this stopped.
    pub fn regroup(&self, change: &Regroup) -> Result<(), Error> {
        let old = self.members();
        for joiner in change.members.difference(&old).iter() {
            self.connect_joiner(joiner, change, &old)?;
        }
        let staying = old.intersection(&change.members);
        let acks: Vec<GateAck> = staying.iter().map(|rank| self.session(rank).close_gate(0)).collect();
        let done = self.switch(change, &staying, &acks);
        for session in self.sessions() {
            session.open_gate(0);
        }
        done?;
        *self.members.lock() = change.members;
        Ok(())
    }

    /// Fences a joiner and connects it with every later member; the slots stay masked.
    fn connect_joiner(&self, joiner: Rank, change: &Regroup, old: &RankSet) -> Result<(), Error> {
        let session = self.replaceable(joiner)?;
        // Pairs of two joiners are connected once, by the higher one.
        let peers = || change.members.iter().filter(|peer| old.contains(*peer) || *peer < joiner);
        for peer in peers().filter(|peer| *peer != joiner) {
            self.session(peer).fence(joiner)?;
            session.fence(peer)?;
        }
        let unknown = vec![[1; 2]; session.config().lanes as usize];
        for peer in peers().filter(|peer| *peer != joiner) {
            self.connect_pair(joiner, peer, Replacement::default(), &unknown)?;
        }
        Ok(())
    }

    fn switch(&self, change: &Regroup, staying: &RankSet, acks: &[GateAck]) -> Result<(), Error> {
        let from_step = acks.iter().map(|ack| ack.step).max().unwrap_or(0);
        let from_seq = acks.iter().filter(|ack| ack.step == from_step).find_map(|ack| ack.next_seq.clone());
        let from_seq = from_seq.ok_or(Stale { what: "step (open on every member)", found: 0, current: 1 })?;
        for rank in staying.iter() {
            if !self.session(rank).is_at_gate()? {
                let found = self.session(rank).next_step();
                return Err(Error::Stale(Stale { what: "gate (not reached)", found, current: from_step }));
            }
        }
        let epoch = staying.lowest().map_or(Epoch(0), |rank| self.session(rank).epoch()).next();
        let joiners = change.members.difference(staying);
        for joiner in joiners.iter() {
            for peer in change.members.iter().filter(|peer| *peer != joiner) {
                self.session(peer).admit(joiner, &from_seq)?;
                self.session(joiner).admit(peer, &from_seq)?;
            }
        }
        let (alive, placement) = (change.members, change.placement.clone());
        let switch = Switch { epoch, alive, placement, from_step, from_seq };
        staying.iter().try_for_each(|rank| self.session(rank).commit(&switch))?;
        joiners.iter().try_for_each(|rank| self.session(rank).start(&switch))
    }
}
