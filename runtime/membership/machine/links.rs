//! What stands between this rank and its peers, and its gate: derived from the view, carried out by the owner.

use super::{Action, Membership, Standing, Stop};
use crate::ids::Rank;
use crate::membership::view::{Instance, Link, Plan, RowAck, SlotState};

/// How far the link to one incarnation of a peer is. Without an entry nothing of the peer is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkState {
    Connecting(Instance),
    Connected(Instance),
    Fencing(Instance),
}

impl LinkState {
    fn instance(self) -> Instance {
        let (Self::Connecting(instance) | Self::Connected(instance) | Self::Fencing(instance)) = self;
        instance
    }

    /// What the row says of it.
    pub(super) fn said(self) -> Option<Link> {
        Some(Link { instance: self.instance(), is_connected: matches!(self, Self::Connected(_)) })
    }
}

/// This rank's gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    Open,
    /// For the plan of this id.
    Closed(u64, Option<RowAck>),
    /// The plan of this id is agreed on; until the owner has switched.
    Committing(u64),
}

impl Gate {
    pub(super) fn ack(&self) -> Option<&RowAck> {
        match self {
            Self::Closed(_, ack) => ack.as_ref(),
            Self::Open | Self::Committing(_) => None,
        }
    }

    /// Ignores an answer to a plan that is void by now.
    pub(super) fn acknowledge(&mut self, ack: RowAck) {
        if let Self::Closed(plan, kept) = self
            && *plan == ack.plan
        {
            *kept = Some(ack);
        }
    }

    /// Whether that was the plan to be carried out.
    pub(super) fn committed(&mut self, plan: u64) -> bool {
        let is_it = *self == Self::Committing(plan);
        if is_it {
            *self = Self::Open;
        }
        is_it
    }
}

impl Membership {
    pub(super) fn link_fenced(&mut self, peer: Rank, instance: Instance) {
        if self.links.get(&peer) == Some(&LinkState::Fencing(instance)) {
            self.links.remove(&peer);
        }
    }

    pub(super) fn link_connected(&mut self, peer: Rank, instance: Instance) {
        if self.links.get(&peer) == Some(&LinkState::Connecting(instance)) {
            self.links.insert(peer, LinkState::Connected(instance));
        }
    }

    pub(super) fn link_disconnected(&mut self, peer: Rank, instance: Instance) {
        if self.links.get(&peer) == Some(&LinkState::Connected(instance)) {
            self.links.insert(peer, LinkState::Connecting(instance));
        }
    }

    /// Whether a switch that is agreed on has still to be done here. Who joins takes part from its own switch on.
    pub(super) fn owes_switch(&self) -> bool {
        let takes_part = matches!(self.standing, Standing::Member | Standing::Leaving);
        takes_part && self.view.start.as_ref().is_some_and(|start| start.epoch > self.applied)
    }

    /// Which incarnation of `peer` this rank should be linked with.
    fn wanted(&self, peer: Rank) -> Option<Instance> {
        let slot = self.view.slot(peer);
        match self.standing {
            Standing::Outside => None,
            // Peers may still fetch what this rank has sent.
            Standing::Leaving => self.links.get(&peer).map(|link| link.instance()),
            Standing::Joining | Standing::Member if slot.state != SlotState::Vacant => Some(slot.instance),
            // One that leaves at a gate takes part in every step before it.
            _ => self.is_needed_until_gate(peer).then_some(slot.instance),
        }
    }

    fn is_needed_until_gate(&self, peer: Rank) -> bool {
        let leaves = self.view.start.as_ref().is_some_and(|start| start.plan.leave.contains(peer));
        let slot = self.view.slot(peer);
        let is_linked = self.links.get(&peer) == Some(&LinkState::Connected(slot.instance));
        leaves && is_linked && self.owes_switch()
    }

    /// Fences what should not be there, connects what should.
    pub(super) fn settle_links(&mut self) {
        if self.stopped.is_some() {
            return;
        }
        for index in 0..self.config.num_ranks {
            // CAST: at most NUM_RANKS_MAX.
            let peer = Rank(index as u16);
            if peer == self.me {
                continue;
            }
            let wanted = self.wanted(peer);
            match (self.links.get(&peer).copied(), wanted) {
                (None, Some(instance)) => {
                    self.links.insert(peer, LinkState::Connecting(instance));
                    self.actions.push_back(Action::Connect { peer, instance });
                }
                (Some(LinkState::Connecting(held) | LinkState::Connected(held)), wanted)
                    if wanted != Some(held) =>
                {
                    self.links.insert(peer, LinkState::Fencing(held));
                    self.actions.push_back(Action::Fence { peer, instance: held });
                }
                _ => {}
            }
        }
    }

    /// Members that are gone leave both tables at once; those that leave on purpose do so at the gate.
    pub(super) fn settle_removals(&mut self) {
        if self.stopped.is_some() || self.standing != Standing::Member {
            return;
        }
        let members = self.view.members();
        let mut kept = members;
        if let Some(start) = self.view.start.as_ref().filter(|_| self.owes_switch()) {
            kept = kept.union(&start.plan.leave);
        }
        let ranks = self.adopted.difference(&kept);
        if !ranks.is_empty() {
            self.adopted = self.adopted.difference(&ranks);
            self.actions.push_back(Action::Remove { epoch: self.view.epoch, ranks });
        }
        if !self.owes_switch() {
            self.applied = self.view.epoch;
        }
    }

    /// Follows the plan in the view with this rank's gate.
    pub(super) fn settle_gate(&mut self) {
        if self.stopped.is_some() || !matches!(self.standing, Standing::Member | Standing::Leaving) {
            return;
        }
        if let Some(start) = self.view.start.clone().filter(|_| self.owes_switch()) {
            if self.gate != Gate::Committing(start.plan.id) {
                self.gate = Gate::Committing(start.plan.id);
                self.adopted = self.view.members();
                self.actions.push_back(Action::Commit(start));
            }
            return;
        }
        match (&self.gate, self.view.plan) {
            (Gate::Closed(id, _), plan) if plan.is_none_or(|plan| plan.id != *id) => {
                self.gate = Gate::Open;
                self.actions.push_back(Action::OpenGate);
                self.close_for(plan);
            }
            (Gate::Open, plan) => self.close_for(plan),
            _ => {}
        }
    }

    fn close_for(&mut self, plan: Option<Plan>) {
        let Some(plan) = plan.filter(|_| self.standing == Standing::Member) else { return };
        self.gate = Gate::Closed(plan.id, None);
        self.actions.push_back(Action::CloseGate(plan));
    }

    /// Who has left stays until nobody holds anything of it, so that what it sent last arrives.
    pub(super) fn settle_leaving(&mut self) {
        if self.stopped.is_some() || self.standing != Standing::Leaving || self.owes_switch() {
            return;
        }
        let epoch = self.view.start.as_ref().map_or(self.view.epoch, |start| start.epoch);
        let vacated = self.view.slot(self.me).since;
        let lets_go = |by: Rank| {
            self.row_of(by).is_some_and(|row| row.seen >= vacated && !row.links.contains_key(&self.me))
        };
        let is_needed = !self.view.members().iter().all(lets_go);
        // A bound all the same, counted from when the slot was seen vacant.
        let limit = self.since(self.me).saturating_add(self.config.store_grace_ns);
        if !is_needed || self.is_due(limit) {
            self.stop(Stop::Left { epoch });
        }
    }
}
