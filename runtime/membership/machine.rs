//! The state machine of one rank: what it knows, what it wants, what it publishes.
//!
//! Every input comes by a `handle_*` call with the time; then the whole state is settled anew from what is known, so
//! that it does not matter which changes were seen one by one and which at once. Outputs are [`Action`]s, in order, and
//! one time at which to call [`Membership::handle_timeout`].
//!
//! INVARIANT: after [`Stop`] nothing changes any more.

use core::cell::Cell;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::view::{Instance, Link, Plan, Row, RowAck, SlotState, Start, View};
use super::{MembershipConfig, MembershipGuard, RankSet};
use crate::error::{Evidence, Violation};
use crate::ids::{Epoch, Rank};

mod duty;
mod links;
mod round;

use duty::Duties;
use links::{Gate, LinkState};
use round::Round;

/// Where this rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its claim stands; the group has not admitted it yet.
    Outside,
    /// Admitted: it connects and fetches what it needs.
    Joining,
    /// A member of the epoch.
    Member,
    /// It has left at a gate, and waits until nobody needs it any more.
    Leaving,
}

/// Why a rank must stop. Nothing of the group may be used after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Stop {
    /// The group goes on without this rank, or its name belongs to another process.
    #[error("this rank was evicted: the group is at epoch {epoch} without it")]
    Fenced {
        /// The epoch without this rank.
        epoch: Epoch,
    },
    /// The store was away for longer than `store_grace_ms`.
    #[error("the store has been unavailable for {away_ns} ns, the limit is {limit_ns} ns")]
    StoreUnavailable {
        /// For how long.
        away_ns: u64,
        /// The limit.
        limit_ns: u64,
    },
    /// Too few members reach each other, for longer than `store_grace_ms`.
    #[error("{reachable} of {members} members of epoch {epoch} reach each other: no quorum")]
    NoQuorum {
        /// The epoch that cannot be followed.
        epoch: Epoch,
        /// Its members.
        members: u32,
        /// How many of them reach each other.
        reachable: u32,
    },
    /// Somebody broke the protocol in a way that nobody can repair.
    #[error(transparent)]
    Violation(Violation),
    /// What had to be done was refused too often.
    #[error("could not {doing}, tried {attempts} times")]
    Failed {
        /// What.
        doing: &'static str,
        /// How often.
        attempts: u32,
    },
    /// It left, as it wanted.
    #[error("this rank has left the group at epoch {epoch}")]
    Left {
        /// The epoch that began without it.
        epoch: Epoch,
    },
}

/// What the owner of a [`Membership`] must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Pin this row.
    PutRow(Row),
    /// Replace the view if its version in the store is `expect`.
    CasView {
        /// The version; 0 if the cell was never written.
        expect: u64,
        /// The view to write.
        view: View,
    },
    /// Make queue pairs to this incarnation of a peer, offer them to it, and connect to what it offers; then
    /// [`Membership::handle_connected`].
    Connect {
        /// Who.
        peer: Rank,
        /// Which incarnation.
        instance: Instance,
    },
    /// Take down everything that stands between this rank and an incarnation of a peer; then
    /// [`Membership::handle_fenced`]. A [`Action::Connect`] to it that is not done yet is void.
    Fence {
        /// Who.
        peer: Rank,
        /// Which incarnation.
        instance: Instance,
    },
    /// A pure removal: these members are gone, at once, in both tables.
    Remove {
        /// The epoch without them.
        epoch: Epoch,
        /// Who is gone.
        ranks: RankSet,
    },
    /// Launch nothing of the next step or later; then [`Membership::handle_ack`].
    CloseGate(Plan),
    /// The plan is void: go on as if the gate had never been closed.
    OpenGate,
    /// A plan is agreed on: run up to its step, switch there, open the gate; a rank that joins begins there. Then
    /// [`Membership::handle_committed`]. The members are those of [`Membership::view`] at that time.
    Commit(Start),
    /// Stop using the group.
    Stop(Stop),
}

/// A name of the group and who has claimed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Which rank.
    pub rank: Rank,
    /// By which process.
    pub instance: Instance,
    /// The store's token: it grows with every claim of the name.
    pub fence: u64,
}

/// Who holds a name, as the store says.
#[derive(Clone, Copy, Debug)]
struct Claim {
    instance: Instance,
    fence: u64,
    is_alive: bool,
}

/// Why this rank no longer waits for an incarnation of a peer.
#[derive(Clone, Copy, Debug)]
struct Suspicion {
    of: Instance,
    evidence: Evidence,
    since: u64,
}

/// Whether the store answers.
#[derive(Clone, Copy, Debug)]
enum StoreState {
    Away { since: u64 },
    Up { since: u64, has_listed_view: bool },
}

/// The state machine of one rank's membership. See the module documentation.
#[derive(Debug)]
pub struct Membership {
    config: MembershipConfig,
    me: Rank,
    instance: Instance,
    fence: u64,
    now: u64,
    store: StoreState,
    /// Version of the view's cell.
    version: u64,
    view: View,
    standing: Standing,
    rows: BTreeMap<Rank, Row>,
    claims: BTreeMap<Rank, Claim>,
    /// Sticky, per incarnation: until that incarnation is gone.
    suspects: BTreeMap<Rank, Suspicion>,
    round: Round,
    links: BTreeMap<Rank, LinkState>,
    gate: Gate,
    /// Members whose alive bits the tables have, as far as this rank was told to change them.
    adopted: RankSet,
    applied: Epoch,
    ready: Option<u128>,
    is_leaving: bool,
    placement_version: u32,
    duties: Duties,
    /// When the present holder of a slot was first seen in it, or the slot vacant.
    seen_since: BTreeMap<Rank, (Instance, SlotState, u64)>,
    published: Option<Row>,
    actions: VecDeque<Action>,
    wake: Cell<Option<u64>>,
    stopped: Option<Stop>,
}

impl Membership {
    /// A rank that holds its name by `claim`, and knows nothing else yet.
    #[must_use]
    pub fn new(config: MembershipConfig, claim: Claimed, now: u64) -> Self {
        let view = View::empty(config.num_ranks);
        Self {
            me: claim.rank,
            instance: claim.instance,
            fence: claim.fence,
            now,
            store: StoreState::Away { since: now },
            version: 0,
            view,
            standing: Standing::Outside,
            rows: BTreeMap::new(),
            claims: BTreeMap::new(),
            suspects: BTreeMap::new(),
            round: Round::default(),
            links: BTreeMap::new(),
            gate: Gate::Open,
            adopted: RankSet::EMPTY,
            applied: Epoch(0),
            ready: None,
            is_leaving: false,
            placement_version: 1,
            duties: Duties::default(),
            seen_since: BTreeMap::new(),
            published: None,
            actions: VecDeque::new(),
            wake: Cell::new(Some(now + config.store_grace_ns)),
            stopped: None,
            config,
        }
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.me
    }

    /// This incarnation.
    #[must_use]
    pub fn instance(&self) -> Instance {
        self.instance
    }

    /// The limits.
    #[must_use]
    pub fn config(&self) -> &MembershipConfig {
        &self.config
    }

    /// What the group has agreed on, as far as this rank knows.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Where this rank stands.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// The epoch that this rank's member tables have.
    #[must_use]
    pub fn applied(&self) -> Epoch {
        self.applied
    }

    /// Whether the store answers.
    #[must_use]
    pub fn is_store_up(&self) -> bool {
        matches!(self.store, StoreState::Up { .. })
    }

    /// Why this rank has stopped.
    #[must_use]
    pub fn stopped(&self) -> Option<Stop> {
        self.stopped
    }

    /// Whom this rank no longer waits for.
    #[must_use]
    pub fn suspects(&self) -> RankSet {
        self.suspects.keys().copied().collect()
    }

    /// Why this rank no longer waits for a peer.
    #[must_use]
    pub fn evidence(&self, peer: Rank) -> Option<Evidence> {
        self.suspects.get(&peer).map(|suspicion| suspicion.evidence)
    }

    /// The newest row of a peer.
    #[must_use]
    pub fn row(&self, peer: Rank) -> Option<&Row> {
        self.rows.get(&peer)
    }

    /// The store answers, and has been up for `up_for_ns`.
    ///
    /// It may have been away unnoticed: an outage can be over before anybody could say so. Whatever was under way is
    /// lost with it, and the view that follows tells what has become of it.
    pub fn handle_store_up(&mut self, now: u64, up_for_ns: u64) {
        let since = now.saturating_sub(up_for_ns);
        self.store = StoreState::Up { since, has_listed_view: false };
        self.duties.forget();
        self.round.restart(now);
        self.settle(now);
    }

    /// The store does not answer.
    pub fn handle_store_away(&mut self, now: u64) {
        if self.is_store_up() {
            self.store = StoreState::Away { since: now };
            self.duties.forget();
        }
        self.settle(now);
    }

    /// The view's cell has this content; version 0 and an empty view if it was never written.
    pub fn handle_view(&mut self, now: u64, version: u64, view: View) {
        if let StoreState::Up { has_listed_view, .. } = &mut self.store {
            *has_listed_view = true;
        }
        if version > self.version {
            let (found, expected) = (view.slots.len() as u64, u64::from(self.config.num_ranks));
            if found != expected {
                let violation = Violation { from: self.me, check: "slots of the view", found, expected };
                return self.stop(Stop::Violation(violation));
            }
            self.version = version;
            self.view = view;
            self.note_holders(now);
        }
        self.settle(now);
    }

    /// A [`Action::CasView`] that expected this version was answered: made or not, a newer view comes.
    pub fn handle_cas(&mut self, now: u64, expect: u64) {
        self.duties.answered(expect);
        self.settle(now);
    }

    /// Another rank's row.
    pub fn handle_row(&mut self, now: u64, from: Rank, row: Row) {
        if from != self.me && self.rows.get(&from) != Some(&row) {
            self.rows.insert(from, row);
            self.settle(now);
        }
    }

    /// Who holds a name, and whether its lease runs.
    pub fn handle_claim(&mut self, now: u64, claim: Claimed, is_alive: bool) {
        let Claimed { rank, instance, fence } = claim;
        self.claims.insert(rank, Claim { instance, fence, is_alive });
        self.settle(now);
    }

    /// This rank no longer waits for that incarnation of `peer`. Sticky: it holds until the incarnation is gone.
    ///
    /// Returns whether that is news about the process that holds the rank.
    pub fn handle_suspicion(&mut self, now: u64, peer: Rank, instance: Instance, evidence: Evidence) -> bool {
        self.now = self.now.max(now);
        let is_news = self.suspect(peer, instance, evidence);
        self.settle(now);
        is_news
    }

    /// By its sign of life, `peer` no longer waits for `suspects`. If it does not say so in its row, everybody is
    /// asked: it may be cut off from the store.
    pub fn handle_peer_suspicions(&mut self, now: u64, peer: Rank, suspects: RankSet) {
        if self.round.hear(now, peer, suspects.intersection(&self.view.members())) {
            self.settle(now);
        }
    }

    /// Where this rank's gate is: the answer to [`Action::CloseGate`]; again, once the counters are known.
    pub fn handle_ack(&mut self, now: u64, plan: u64, step: u64, next_seq: Option<Vec<[u64; 2]>>) {
        self.gate.acknowledge(RowAck { plan, step, next_seq });
        self.settle(now);
    }

    /// The switch of this plan is done here.
    pub fn handle_committed(&mut self, now: u64, plan: u64) {
        if self.gate.committed(plan) {
            self.applied = self.view.epoch;
        }
        self.settle(now);
    }

    /// Nothing of this incarnation of `peer` is held any more.
    pub fn handle_fenced(&mut self, now: u64, peer: Rank, instance: Instance) {
        self.link_fenced(peer, instance);
        self.settle(now);
    }

    /// This side is connected with this incarnation of `peer`.
    pub fn handle_connected(&mut self, now: u64, peer: Rank, instance: Instance) {
        self.link_connected(peer, instance);
        self.settle(now);
    }

    /// The link to this incarnation of `peer` has to be made anew.
    pub fn handle_disconnected(&mut self, now: u64, peer: Rank, instance: Instance) {
        self.link_disconnected(peer, instance);
        self.settle(now);
    }

    /// A joining rank has what it needs.
    pub fn handle_ready(&mut self, now: u64, digest: u128) {
        if self.ready.replace(digest) != Some(digest) {
            self.settle(now);
        }
    }

    /// This rank wants to leave.
    pub fn handle_leave(&mut self, now: u64) {
        self.is_leaving = true;
        self.settle(now);
    }

    /// This rank knows the placement of that version; the newest that everybody knows is switched to.
    pub fn handle_placement(&mut self, now: u64, version: u32) {
        if version > self.placement_version {
            self.placement_version = version;
            self.settle(now);
        }
    }

    /// Time has passed.
    pub fn handle_timeout(&mut self, now: u64) {
        self.settle(now);
    }

    /// When to call [`Membership::handle_timeout`] if nothing happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        self.wake.get()
    }

    /// Switches a rule off, as tests of the rule do.
    pub fn turn_off(&mut self, guard: MembershipGuard) {
        self.config.guards_off.push(guard);
    }

    fn has(&self, guard: MembershipGuard) -> bool {
        !self.config.guards_off.contains(&guard)
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Derives everything anew from what is known now.
    fn settle(&mut self, now: u64) {
        self.now = self.now.max(now);
        self.wake.set(None);
        if self.stopped.is_some() {
            return;
        }
        self.settle_standing();
        self.settle_store();
        self.settle_suspects();
        self.settle_removals();
        self.settle_links();
        self.settle_gate();
        self.settle_round();
        self.publish();
        self.settle_duties();
        self.settle_leaving();
    }

    fn stop(&mut self, stop: Stop) {
        if self.stopped.is_none() {
            self.stopped = Some(stop);
            self.actions.push_back(Action::Stop(stop));
        }
    }

    /// Asks to be called at `at`; whether that time has come.
    fn is_due(&self, at: u64) -> bool {
        if self.now >= at {
            return true;
        }
        self.wake.set(Some(self.wake.get().map_or(at, |wake| wake.min(at))));
        false
    }

    /// Reads this rank's own place in the view.
    fn settle_standing(&mut self) {
        let slot = self.view.slot(self.me);
        let epoch = self.view.epoch;
        let is_mine = slot.instance == self.instance;
        let has_left = || self.view.start.as_ref().is_some_and(|s| s.plan.leave.contains(self.me));
        match (slot.state, self.standing) {
            (SlotState::Member, Standing::Outside | Standing::Joining | Standing::Member) if is_mine => {
                self.standing = Standing::Member;
            }
            (SlotState::Joining, Standing::Outside | Standing::Joining) if is_mine => {
                self.standing = Standing::Joining;
            }
            (SlotState::Vacant, Standing::Member | Standing::Leaving) if is_mine && has_left() => {
                self.standing = Standing::Leaving;
            }
            (_, Standing::Outside) if !is_mine => {}
            (SlotState::Joining | SlotState::Member, _) if is_mine => {
                // An incarnation goes through its states once.
                let (found, expected) = (u64::from(slot.state == SlotState::Member), 0);
                let check = "state of this rank's slot, which it has passed";
                self.stop(Stop::Violation(Violation { from: self.me, check, found, expected }));
            }
            // It had a place, and has none: evicted, or its place is another's.
            _ => self.stop(Stop::Fenced { epoch }),
        }
        if self.claims.get(&self.me).is_some_and(|claim| claim.fence > self.fence) {
            self.stop(Stop::Fenced { epoch });
        }
    }

    fn settle_store(&mut self) {
        if let StoreState::Away { since } = self.store {
            let limit_ns = self.config.store_grace_ns;
            if self.is_due(since.saturating_add(limit_ns)) {
                self.stop(Stop::StoreUnavailable { away_ns: self.now - since, limit_ns });
            }
        }
    }

    /// Notes since when each slot has been as it is.
    fn note_holders(&mut self, now: u64) {
        for (index, slot) in self.view.slots.iter().enumerate() {
            // CAST: at most NUM_RANKS_MAX slots.
            let rank = Rank(index as u16);
            let known = self.seen_since.get(&rank).map(|(instance, state, _)| (*instance, *state));
            // Who becomes a member is flapping from when it was admitted on.
            let stays = known.is_some_and(|(instance, state)| {
                let is_holder = |state| state != SlotState::Vacant;
                instance == slot.instance && is_holder(state) == is_holder(slot.state)
            });
            if !stays {
                self.seen_since.insert(rank, (slot.instance, slot.state, now));
            }
        }
    }

    /// Since when a slot has had its holder, or none.
    fn since(&self, rank: Rank) -> u64 {
        self.seen_since.get(&rank).map_or(self.now, |(_, _, since)| *since)
    }

    /// Publishes this rank's row if it says anything new. Before the view is known it would answer nothing.
    fn publish(&mut self) {
        if self.stopped.is_some() || !self.has_listed_view() {
            return;
        }
        let row = self.own_row();
        if self.published.as_ref() != Some(&row) {
            self.published = Some(row.clone());
            self.actions.push_back(Action::PutRow(row));
        }
    }

    fn has_listed_view(&self) -> bool {
        // What was published stays published; an outage makes nothing of it untrue.
        self.published.is_some() || matches!(self.store, StoreState::Up { has_listed_view: true, .. })
    }

    /// What this rank says of itself now.
    fn own_row(&self) -> Row {
        let links = self.links.iter().filter_map(|(rank, link)| Some((*rank, link.said()?)));
        Row {
            instance: self.instance,
            seen: self.view.serial,
            epoch: self.view.epoch,
            round: self.round.number(),
            suspects: self.suspects(),
            applied: self.applied,
            links: links.collect(),
            ack: self.gate.ack().cloned(),
            ready: self.ready,
            is_leaving: self.is_leaving,
            placement_version: self.placement_version,
        }
    }

    /// The row of a holder of a rank, this one included, if it comes from that holder.
    fn row_of(&self, rank: Rank) -> Option<Cow<'_, Row>> {
        if rank == self.me {
            return Some(Cow::Owned(self.own_row()));
        }
        let holder = self.view.holder(rank)?;
        self.rows.get(&rank).filter(|row| row.instance == holder).map(Cow::Borrowed)
    }

    /// Rows of all these ranks; none if one is missing.
    fn rows_of(&self, ranks: RankSet) -> Option<BTreeMap<Rank, Cow<'_, Row>>> {
        ranks.iter().map(|rank| Some((rank, self.row_of(rank)?))).collect()
    }
}

/// Which ranks are named by some row of `rows`.
fn suspected_in(rows: &BTreeMap<Rank, Cow<'_, Row>>) -> BTreeSet<Rank> {
    rows.values().flat_map(|row| row.suspects.iter()).collect()
}

/// What a row says of the link to one incarnation.
fn is_linked(row: Option<&Row>, peer: Rank, instance: Option<Instance>) -> bool {
    let linked = |link: &Link| link.is_connected && Some(link.instance) == instance;
    row.and_then(|row| row.links.get(&peer)).is_some_and(linked)
}
