//! Changes of the view: who makes which, and when.
//!
//! Every rank derives from what it knows which change is next. Any member may make it; the lowest does so at once, each
//! other only if those before it have not done so in time. Compare-and-set lets one of them win.
//!
//! | change | when |
//! |---|---|
//! | evict members | a round is over and proposes a quorum without them |
//! | commit | every member has acknowledged the plan; the counters at its step are known |
//! | evict a joining rank | its claim is gone, a member suspects it, or it is not connected in time |
//! | admit | a claim, a vacant slot, nobody holds anything of its last incarnation, no hold-down |
//! | plan | a joining rank is connected with everybody and ready, a member wants to leave, a newer placement is known |
//! | form | there is no member: those who are to begin are connected with each other and ready |
//! | dissolve | every member's claim is gone: the group begins anew, at the next epoch |

use super::{Claim, Membership, Standing, Stop, StoreState, is_linked};
use crate::error::Violation;
use crate::ids::Rank;
use crate::membership::RankSet;
use crate::membership::view::{Plan, RowAck, Slot, SlotState, Start, View};

/// Which change it is; one that differs waits its turn anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Duty {
    Evict,
    Commit,
    EvictJoining,
    Admit,
    Plan,
    Form,
    Dissolve,
}

/// The change that is next, and what became of the last one tried.
#[derive(Debug, Default)]
pub(super) struct Duties {
    /// What the open round proposes.
    pub(super) eviction: Option<RankSet>,
    /// The version that a change under way expects.
    in_flight: Option<u64>,
    /// The version at which a change was answered: there is a newer view on its way, this rank's or another's.
    answered_at: Option<u64>,
    /// Version, change, and since when it has been the next.
    due: Option<(u64, Duty, u64)>,
}

impl Duties {
    /// Nothing is known of a change that was under way when the store went away; its view will tell.
    pub(super) fn forget(&mut self) {
        self.in_flight = None;
        self.answered_at = None;
    }

    /// Takes the answer to a change. Made or refused, the view has moved on from `expect`, and only the store says to
    /// what: the answer may be to a change from before an outage that nobody noticed.
    pub(super) fn answered(&mut self, expect: u64) {
        if self.in_flight.take_if(|version| *version == expect).is_some() {
            self.answered_at = Some(expect);
        }
    }
}

impl Membership {
    /// Makes the next change if it is this rank's turn.
    pub(super) fn settle_duties(&mut self) {
        let can_write = matches!(self.store, StoreState::Up { has_listed_view: true, .. });
        if self.stopped.is_some() || !can_write || self.duties.in_flight.is_some() {
            return;
        }
        if self.duties.answered_at == Some(self.version) {
            return;
        }
        let (duty, view, position) = match self.next_change() {
            Ok(Some(change)) => change,
            Ok(None) => {
                self.duties.due = None;
                return;
            }
            Err(violation) => return self.stop(Stop::Violation(violation)),
        };
        let known = self.duties.due.filter(|(version, known, _)| (*version, *known) == (self.version, duty));
        let (_, _, since) = *self.duties.due.insert(known.unwrap_or((self.version, duty, self.now)));
        // CAST: a position is below NUM_RANKS_MAX.
        let turn = since.saturating_add((position as u64).saturating_mul(self.config.detect_ns));
        if self.is_due(turn) {
            self.duties.in_flight = Some(self.version);
            self.actions.push_back(super::Action::CasView { expect: self.version, view });
        }
    }

    /// The next change, what the view is after it, and how many ranks come before this one.
    fn next_change(&self) -> Result<Option<(Duty, View, usize)>, Violation> {
        if self.standing == Standing::Member {
            if let Some(proposal) = self.duties.eviction {
                return Ok(Some((Duty::Evict, self.evict(proposal), proposal.position(self.me))));
            }
            let position = self.view.members().difference(&self.suspects()).position(self.me);
            let place = |(duty, view)| (duty, view, position);
            return Ok(self.change_as_member()?.map(place));
        }
        if self.standing == Standing::Leaving {
            return Ok(None);
        }
        let position = self.alive_claims().position(self.me);
        let change =
            if self.view.members().is_empty() { self.change_without_members() } else { self.dissolve() };
        Ok(change.map(|(duty, view)| (duty, view, position)))
    }

    fn change_as_member(&self) -> Result<Option<(Duty, View)>, Violation> {
        if let Some(plan) = self.view.plan
            && let Some(view) = self.commit(plan)?
        {
            return Ok(Some((Duty::Commit, view)));
        }
        let evicted = self.evict_joining().map(|view| (Duty::EvictJoining, view));
        let admitted = || self.admit().map(|view| (Duty::Admit, view));
        let planned = || self.begin_plan().map(|view| (Duty::Plan, view));
        Ok(evicted.or_else(admitted).or_else(planned))
    }

    fn change_without_members(&self) -> Option<(Duty, View)> {
        let evicted = self.evict_joining().map(|view| (Duty::EvictJoining, view));
        let admitted = || self.admit().map(|view| (Duty::Admit, view));
        let formed = || self.form().map(|view| (Duty::Form, view));
        evicted.or_else(admitted).or_else(formed)
    }

    /// A copy of the view that counts as the next change.
    fn changed(&self) -> View {
        View { serial: self.view.serial + 1, ..self.view.clone() }
    }

    fn vacate(&self, view: &mut View, rank: Rank, is_evicted: bool) {
        let evictions = self.evictions(rank);
        let since = view.serial;
        let slot = &mut view.slots[rank.index()];
        *slot = Slot { state: SlotState::Vacant, since, ..*slot };
        if is_evicted {
            slot.evictions = evictions;
        }
    }

    /// How often in a row `rank` will have been evicted soon, with this time.
    fn evictions(&self, rank: Rank) -> u32 {
        let lived_ns = self.now.saturating_sub(self.since(rank));
        let is_flapping = lived_ns < self.config.flap_window_ns;
        if is_flapping { self.view.slot(rank).evictions.saturating_add(1) } else { 1 }
    }

    fn evict(&self, proposal: RankSet) -> View {
        let mut view = self.changed();
        view.epoch = view.epoch.next();
        view.plan = None;
        for rank in self.view.members().difference(&proposal).iter() {
            self.vacate(&mut view, rank, true);
        }
        view
    }

    /// The plan as a fact, once every member has said where its gate is.
    fn commit(&self, plan: Plan) -> Result<Option<View>, Violation> {
        let Some(rows) = self.rows_of(self.view.members()) else { return Ok(None) };
        let mut acks: Vec<(Rank, RowAck)> = Vec::new();
        for (rank, row) in rows {
            let Some(ack) = row.ack.as_ref().filter(|ack| ack.plan == plan.id) else { return Ok(None) };
            acks.push((rank, ack.clone()));
        }
        let Some(from_step) = acks.iter().map(|(_, ack)| ack.step).max() else { return Ok(None) };
        let mut counters = acks.into_iter().filter(|(_, ack)| ack.step == from_step);
        let mut known = counters.by_ref().filter_map(|(rank, ack)| Some((rank, ack.next_seq?)));
        let Some((_, from_seq)) = known.next() else { return Ok(None) };
        for (from, other) in known {
            check_counters(from, &other, &from_seq)?;
        }
        let mut view = self.changed();
        view.epoch = view.epoch.next();
        self.enact(&mut view, plan);
        view.start = Some(Start { plan, epoch: view.epoch, from_step, from_seq });
        Ok(Some(view))
    }

    fn enact(&self, view: &mut View, plan: Plan) {
        for rank in plan.join.iter() {
            let since = view.serial;
            let slot = &mut view.slots[rank.index()];
            *slot = Slot { state: SlotState::Member, since, ..*slot };
        }
        for rank in plan.leave.iter() {
            self.vacate(view, rank, false);
        }
        view.placement_version = plan.placement_version;
        view.plan = None;
    }

    /// The view without the first joining rank that cannot become a member.
    fn evict_joining(&self) -> Option<View> {
        let is_lost = |rank: &Rank| *rank != self.me && self.is_joining_lost(*rank);
        let rank = self.view.in_state(SlotState::Joining).iter().find(is_lost)?;
        let mut view = self.changed();
        self.vacate(&mut view, rank, true);
        view.plan = view.plan.filter(|plan| !plan.join.contains(rank));
        Some(view)
    }

    fn is_joining_lost(&self, rank: Rank) -> bool {
        let slot = self.view.slot(rank);
        if let Some(claim) = self.claims.get(&rank) {
            let is_gone = claim.fence == slot.fence && !claim.is_alive && self.can_judge_leases();
            if claim.fence > slot.fence || is_gone {
                return true;
            }
        }
        let members = self.view.members();
        let is_suspected = |by: Rank| self.row_of(by).is_some_and(|row| row.suspects.contains(rank));
        if members.iter().any(is_suspected) {
            return true;
        }
        let others = if members.is_empty() { self.view.in_state(SlotState::Joining) } else { members };
        let is_connected = others.iter().all(|other| other == rank || self.are_linked(rank, other));
        !is_connected && self.is_due(self.since(rank).saturating_add(self.config.join_ns))
    }

    /// The view with everybody admitted who can be.
    fn admit(&self) -> Option<View> {
        let admitted: Vec<(Rank, Claim)> = self
            .claims
            .iter()
            .map(|(rank, claim)| (*rank, *claim))
            .filter(|(rank, claim)| self.can_admit(*rank, *claim))
            .collect();
        if admitted.is_empty() {
            return None;
        }
        let mut view = self.changed();
        for (rank, Claim { instance, fence, .. }) in admitted {
            let since = view.serial;
            let slot = &mut view.slots[rank.index()];
            *slot = Slot { state: SlotState::Joining, instance, fence, since, ..*slot };
        }
        Some(view)
    }

    fn can_admit(&self, rank: Rank, claim: Claim) -> bool {
        let slot = self.view.slot(rank);
        let has_room = rank.index() < self.view.slots.len() && slot.state == SlotState::Vacant;
        if !has_room || !claim.is_alive || claim.fence <= slot.fence || !self.is_held_by_nobody(rank, slot) {
            return false;
        }
        self.is_due(self.since(rank).saturating_add(self.config.hold_down(slot.evictions)))
    }

    /// Whether nobody holds anything of who was in a slot last. Only rows that know of the vacancy say so.
    fn is_held_by_nobody(&self, rank: Rank, slot: Slot) -> bool {
        if slot.instance.is_none() {
            return true;
        }
        let holders = self.view.members().union(&self.view.in_state(SlotState::Joining));
        let lets_go = |by: Rank| {
            self.row_of(by).is_some_and(|row| row.seen >= slot.since && !row.links.contains_key(&rank))
        };
        holders.iter().all(lets_go)
    }

    /// Begins a switch, if there is a reason and nothing in its way.
    fn begin_plan(&self) -> Option<View> {
        let members = self.view.members();
        let rows = self.rows_of(members)?;
        let has_switched = |epoch| self.view.start.as_ref().is_none_or(|start| epoch >= start.epoch);
        let is_quiet = rows.values().all(|row| has_switched(row.applied));
        let is_suspected = super::suspected_in(&rows).iter().any(|rank| members.contains(*rank));
        if self.view.plan.is_some() || !is_quiet || is_suspected {
            return None;
        }
        let known = rows.values().map(|row| row.placement_version).min()?;
        let placement_version = known.max(self.view.placement_version);
        let leave: RankSet = rows.iter().filter(|(_, row)| row.is_leaving).map(|(rank, _)| *rank).collect();
        let join = self.ready_to_join(members, placement_version);
        let changes = placement_version > self.view.placement_version;
        if join.is_empty() && leave.is_empty() && !changes {
            return None;
        }
        let mut view = self.changed();
        view.plan = Some(Plan { id: view.serial, join, leave, placement_version });
        Some(view)
    }

    /// Joining ranks that are ready, and connected with all members and each other.
    fn ready_to_join(&self, members: RankSet, placement_version: u32) -> RankSet {
        let is_ready = |rank: &Rank| {
            self.row_of(*rank)
                .is_some_and(|row| row.ready.is_some() && row.placement_version >= placement_version)
        };
        let mut join: RankSet = self.view.in_state(SlotState::Joining).iter().filter(is_ready).collect();
        loop {
            let others = members.union(&join);
            let is_alone = |rank: &Rank| others.iter().any(|o| o != *rank && !self.are_linked(*rank, o));
            let Some(left_out) = join.iter().find(is_alone) else { return join };
            join.remove(left_out);
        }
    }

    fn are_linked(&self, a: Rank, b: Rank) -> bool {
        let says = |by: Rank, of: Rank| is_linked(self.row_of(by).as_deref(), of, self.view.holder(of));
        says(a, b) && says(b, a)
    }

    /// The first epoch, or the first after everybody was gone.
    fn form(&self) -> Option<View> {
        let initial = self.config.initial;
        if self.standing != Standing::Joining || !initial.contains(self.me) {
            return None;
        }
        let join = self.ready_to_join(RankSet::EMPTY, self.view.placement_version);
        if !initial.is_subset(&join) {
            return None;
        }
        let mut view = self.changed();
        view.epoch = view.epoch.next();
        let placement_version = view.placement_version;
        let plan = Plan { id: view.serial, join: initial, leave: RankSet::EMPTY, placement_version };
        self.enact(&mut view, plan);
        let from_seq = self.config.first_seq.clone();
        view.start = Some(Start { plan, epoch: view.epoch, from_step: self.config.first_step, from_seq });
        Some(view)
    }

    /// A group whose members are all gone begins anew.
    fn dissolve(&self) -> Option<(Duty, View)> {
        let is_gone = |rank: Rank| {
            let slot = self.view.slot(rank);
            self.claims.get(&rank).is_none_or(|claim| claim.fence > slot.fence || !claim.is_alive)
        };
        if !self.view.members().iter().all(is_gone) || !self.can_judge_leases() {
            return None;
        }
        let mut view = self.changed();
        view.epoch = view.epoch.next();
        (view.plan, view.start) = (None, None);
        for rank in self.view.members().union(&self.view.in_state(SlotState::Joining)).iter() {
            self.vacate(&mut view, rank, false);
        }
        Some((Duty::Dissolve, view))
    }

    /// Ranks whose name is held.
    fn alive_claims(&self) -> RankSet {
        self.claims.iter().filter(|(_, claim)| claim.is_alive).map(|(rank, _)| *rank).collect()
    }
}

/// Ranks that are at one step have launched the same operations.
fn check_counters(from: Rank, found: &[[u64; 2]], expected: &[[u64; 2]]) -> Result<(), Violation> {
    let checks = ["next dispatch at the gate", "next combine at the gate"];
    if found.len() != expected.len() {
        let (found, expected) = (found.len() as u64, expected.len() as u64);
        return Err(Violation { from, check: "lanes at the gate", found, expected });
    }
    for (found, expected) in found.iter().zip(expected) {
        for (op, check) in checks.into_iter().enumerate() {
            if found[op] != expected[op] {
                return Err(Violation { from, check, found: found[op], expected: expected[op] });
            }
        }
    }
    Ok(())
}
