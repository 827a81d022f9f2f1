//! One rank's part in its group: a [`Keeper`] drives one session by one membership over one board.
//!
//! It owns the membership and the board, and shares the session with those who launch. It has no thread and no clock:
//! its owner calls [`Keeper::step`] with the time, at the latest when the last call said, and sooner when something may
//! have happened. Nothing in it waits; one call does bounded work.
//!
//! ```text
//!  board ---- views, rows, claims ----> membership <---- suspicions, gate, links ---- session
//!    ^                                      |                                            ^
//!    +------- row, view, offers ------------+------- connect, fence, remove, switch -----+
//! ```
//!
//! Invariants:
//! - A peer is activated only by a switch that names it, after both sides have said that they are connected.
//! - Whatever a device refuses is tried again, with growing pauses and a limit; the slots stay masked meanwhile.
//! - After [`Stop`] the gate is closed and stays closed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ibex_hca::AsyncEvent;
use ibex_metadata::derived::{Provenance, RegistryCounters};
use ibex_metadata::record::RecordState;

use super::{Session, Switch};
use crate::error::{Error, Evidence};
use crate::ids::{Epoch, Rank};
use crate::membership::{
    Action, Board, BoardEvent, Instance, Membership, Plan, RankSet, Row, Slot, SlotState, Standing, Start,
    Stop, View,
};
use crate::placement::Placement;
use crate::telemetry::{Fault, FaultKind};

mod cells;
mod derived;
mod event;
mod links;

pub use derived::{Records, Whereabouts};
pub use event::{Happening, KeeperEvent};

use cells::{OffersCell, placement_from_bytes, placement_to_bytes};
use links::{Links, Retry};

/// Events of the board that one step takes in, per rank.
const EVENTS_PER_RANK: usize = 8;
/// Events for reports that are kept until somebody takes them; the oldest go first.
const EVENTS_MAX: usize = 4096;
/// The session's words are read this often within `detect_ms`.
const LOOKS_PER_DETECT: u64 = 32;
/// Rounds of actions that one step carries out; what is left comes with the next.
const ROUNDS_MAX: usize = 16;

/// Makes the port of a peer known to the fabric, by its advert; called before a peer is connected.
pub type Introduce = dyn FnMut(Rank, &[u8]) -> Result<(), Error> + Send;

/// How a [`Keeper`] meets its peers.
#[derive(Default)]
pub struct KeeperOptions {
    /// How the fabric finds this rank's port; empty where ports find each other.
    pub advert: Vec<u8>,
    /// What makes a peer's port known to the fabric.
    pub introduce: Option<Box<Introduce>>,
    /// Where records are; without them nobody looks at any.
    pub records: Option<Box<dyn Records>>,
}

/// What a rank knows of its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MembershipView {
    /// The epoch agreed on.
    pub epoch: Epoch,
    /// The epoch of this rank's member tables.
    pub applied: Epoch,
    /// Where this rank stands.
    pub standing: Standing,
    /// The members of the epoch.
    pub members: RankSet,
    /// Every rank's slot.
    pub slots: Vec<Slot>,
    /// Whom this rank no longer waits for.
    pub suspects: RankSet,
    /// Whether the store answers.
    pub is_store_up: bool,
    /// Whether the group is between two epochs: no step begins.
    pub is_gate_closed: bool,
}

/// Drives one session by one membership over one board. See the module documentation.
pub struct Keeper {
    session: Arc<Session>,
    membership: Membership,
    board: Box<dyn Board>,
    links: Links,
    /// Placements by version, of which the configuration's own is the first.
    placements: BTreeMap<u32, Placement>,
    /// A plan whose counters are not known yet.
    acking: Option<u64>,
    /// A switch to be done, as soon as the session is at its gate.
    switching: Option<Start>,
    /// Whether the session runs as a member, or has.
    has_started: bool,
    /// An action that was refused, and those behind it wait.
    held_back: Option<(Action, Retry)>,
    known_epoch: Epoch,
    next_look_ns: u64,
    events: VecDeque<KeeperEvent>,
    stopped: Option<Stop>,
}

impl Keeper {
    /// A keeper of a session that has launched nothing and is connected with nobody.
    ///
    /// # Errors
    /// `Config` if the ranks that begin have no room for all experts.
    pub fn new(
        session: Arc<Session>,
        membership: Membership,
        board: Box<dyn Board>,
        options: KeeperOptions,
    ) -> Result<Self, Error> {
        let first = Placement::contiguous(session.config(), 1, &membership.config().initial)?;
        // Until it is a member nothing of it may run.
        session.close_gate(0);
        Ok(Self {
            links: Links::new(options, membership.instance(), &session, membership.config().detect_ns),
            session,
            membership,
            board,
            placements: BTreeMap::from([(1, first)]),
            acking: None,
            switching: None,
            has_started: false,
            held_back: None,
            known_epoch: Epoch(0),
            next_look_ns: 0,
            events: VecDeque::new(),
            stopped: None,
        })
    }

    /// The session.
    #[must_use]
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The state machine.
    #[must_use]
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// What this rank knows of its group.
    #[must_use]
    pub fn view(&self) -> MembershipView {
        let view: &View = self.membership.view();
        MembershipView {
            epoch: view.epoch,
            applied: self.membership.applied(),
            standing: self.membership.standing(),
            members: view.members(),
            slots: view.slots.clone(),
            suspects: self.membership.suspects(),
            is_store_up: self.membership.is_store_up(),
            is_gate_closed: self.session.is_gate_closed(),
        }
    }

    /// Whether this rank takes part in steps.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.has_started && self.stopped.is_none()
    }

    /// Why the group is lost to this rank; none while it is not.
    #[must_use]
    pub fn stopped(&self) -> Option<Stop> {
        self.stopped
    }

    /// Whether the group has admitted this rank, and it is connected with everybody who is in or comes in with it. A
    /// group that forms has everybody who begins it.
    #[must_use]
    pub fn is_linked(&self) -> bool {
        let is_admitted = matches!(self.membership.standing(), Standing::Joining | Standing::Member);
        let (view, me) = (self.membership.view(), self.session.rank());
        let begins = |peer| view.epoch == Epoch(0) && self.membership.config().initial.contains(peer);
        let mut others = (0..).map(Rank).zip(&view.slots).filter(|(peer, _)| *peer != me);
        is_admitted
            && others.all(|(peer, slot)| match slot.state {
                SlotState::Vacant => !begins(peer),
                _ => self.links.connected(peer) == Some(slot.instance),
            })
    }

    /// What was made of a peer's record, and stands.
    #[must_use]
    pub fn derived(&self, peer: Rank) -> Vec<Provenance> {
        self.links.derived.of(peer)
    }

    /// What was retired because records changed, or queue pairs went.
    #[must_use]
    pub fn derived_counters(&self) -> RegistryCounters {
        self.links.derived.counters()
    }

    /// What has happened since this was last asked.
    pub fn take_events(&mut self) -> Vec<KeeperEvent> {
        self.events.drain(..).collect()
    }

    /// The process of a peer has ended; of another incarnation than the present one it says nothing.
    pub fn handle_process_exit(&mut self, now_ns: u64, peer: Rank, instance: Instance) {
        self.suspect(now_ns, peer, instance, Evidence::Exit, None);
    }

    /// This rank leaves at the next gate, once its steps before it are done.
    pub fn leave(&mut self, now_ns: u64) {
        self.membership.handle_leave(now_ns);
    }

    /// Asks for another placement; the group switches to the newest that every member knows.
    pub fn propose_placement(&mut self, now_ns: u64, placement: Placement) {
        let version = placement.version();
        self.board.put_placement(version, placement_to_bytes(&placement));
        self.placements.insert(version, placement);
        self.membership.handle_placement(now_ns, version);
    }

    /// Takes in what has happened and does what is due; returns when to call again at the latest.
    ///
    /// # Errors
    /// [`Stop`]: the group may not be used any more; every later call says the same.
    pub fn step(&mut self, now_ns: u64) -> Result<u64, Stop> {
        if let Some(stop) = self.stopped {
            return Err(stop);
        }
        self.take_in(now_ns);
        if self.is_serving() {
            // Before the group agrees on it, which may be within this step.
            self.give_up_lost(now_ns);
        }
        self.look_at_records(now_ns);
        if now_ns >= self.next_look_ns {
            self.look(now_ns);
            self.next_look_ns = now_ns + self.membership.config().detect_ns / LOOKS_PER_DETECT + 1;
        }
        if self.membership.poll_timeout().is_some_and(|at| now_ns >= at) {
            self.membership.handle_timeout(now_ns);
        }
        for _ in 0..ROUNDS_MAX {
            let did_act = self.act(now_ns);
            let did_work = self.work(now_ns);
            if self.stopped.is_some() || !did_act && !did_work {
                break;
            }
        }
        self.note_epoch(now_ns);
        match self.stopped {
            Some(stop) => Err(stop),
            None => Ok(self.next_look_ns.min(self.membership.poll_timeout().unwrap_or(u64::MAX))),
        }
    }

    fn note(&mut self, at_ns: u64, what: Happening) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(KeeperEvent { at_ns, what });
    }

    fn note_epoch(&mut self, now_ns: u64) {
        let (epoch, members) = (self.membership.view().epoch, self.membership.view().members());
        if epoch != self.known_epoch {
            self.known_epoch = epoch;
            self.note(now_ns, Happening::Agreed { epoch, members });
        }
    }

    fn stop(&mut self, now_ns: u64, stop: Stop) {
        if self.stopped.is_none() {
            self.stopped = Some(stop);
            self.session.close_gate(now_ns);
            self.note(now_ns, Happening::Stopped(stop));
        }
    }

    /// Takes in what the board has.
    fn take_in(&mut self, now_ns: u64) {
        let limit = EVENTS_PER_RANK * self.session.config().num_ranks as usize + EVENTS_PER_RANK;
        for _ in 0..limit {
            let Some(event) = self.board.poll() else { return };
            self.take_in_one(now_ns, event);
        }
    }

    /// Stops using what was made of records that say something else by now, and says what is new of the own one.
    fn look_at_records(&mut self, now_ns: u64) {
        let standing = self.membership.standing();
        self.links.derived.set_state(match standing {
            Standing::Leaving => RecordState::Draining,
            Standing::Member if self.has_started => RecordState::Ready,
            _ => RecordState::Joining,
        });
        self.links.derived.say();
        for (peer, instance) in self.links.look() {
            // Whoever leaves is let go by its peers, and has nothing to mask them for.
            if standing == Standing::Leaving || self.session.mask(peer).is_err() {
                continue;
            }
            self.links.stop_serving(peer);
            self.note(now_ns, Happening::Retired { peer, instance });
            self.suspect(now_ns, peer, instance, Evidence::Superseded, None);
        }
    }

    fn take_in_one(&mut self, now_ns: u64, event: BoardEvent) {
        let me = self.session.rank();
        match event {
            BoardEvent::Available { up_for_ns } => {
                self.note(now_ns, Happening::Store { is_up: true });
                self.membership.handle_store_up(now_ns, up_for_ns);
            }
            BoardEvent::Unavailable => {
                self.note(now_ns, Happening::Store { is_up: false });
                self.membership.handle_store_away(now_ns);
            }
            BoardEvent::View { version: 0, .. } => {
                let empty = View::empty(self.session.config().num_ranks);
                self.membership.handle_view(now_ns, 0, empty);
            }
            BoardEvent::View { version, bytes } => match View::from_bytes(&bytes) {
                Ok(view) => self.membership.handle_view(now_ns, version, view),
                Err(_) => self.note(now_ns, Happening::Unreadable { from: me, what: "view" }),
            },
            BoardEvent::ViewCas { expect, .. } => self.membership.handle_cas(now_ns, expect),
            BoardEvent::Row { from, bytes } => match Row::from_bytes(&bytes) {
                Ok(row) => self.membership.handle_row(now_ns, from, row),
                Err(_) => self.note(now_ns, Happening::Unreadable { from, what: "row" }),
            },
            BoardEvent::Offers { from, bytes } => match OffersCell::from_bytes(&bytes) {
                Ok(offers) => self.links.take_offers(from, offers),
                Err(_) => self.note(now_ns, Happening::Unreadable { from, what: "offers" }),
            },
            BoardEvent::Placement { version, bytes } => self.take_placement(now_ns, version, &bytes),
            BoardEvent::Claim { claim, is_alive } => self.membership.handle_claim(now_ns, claim, is_alive),
        }
    }

    fn take_placement(&mut self, now_ns: u64, version: u32, bytes: &[u8]) {
        match placement_from_bytes(self.session.config(), bytes) {
            Ok(placement) if placement.version() == version => {
                self.placements.insert(version, placement);
                self.membership.handle_placement(now_ns, version);
            }
            _ => self.note(now_ns, Happening::Unreadable { from: self.session.rank(), what: "placement" }),
        }
    }

    /// Reads what kernels and peers' hosts say, from words in memory; no device is asked.
    fn look(&mut self, now_ns: u64) {
        for told in self.session.take_device_events().unwrap_or_default() {
            self.note(now_ns, Happening::Device(told));
        }
        if let Some(digest) = self.session.take_ready() {
            self.membership.handle_ready(now_ns, digest);
        }
        if !self.is_serving() {
            return;
        }
        // What cannot be taken back now is tried again with the next look.
        let _ = self.session.release_quarantine();
        // Memory that cannot be read says nothing.
        let Ok(suspected) = self.session.suspected() else { return };
        let suspected: RankSet = suspected.into_iter().collect();
        if !suspected.is_empty() {
            self.look_at_suspects(now_ns, suspected);
        }
        for (peer, _) in self.links.serving() {
            if let Ok(suspects) = self.session.suspicions_heard_from(peer) {
                self.membership.handle_peer_suspicions(now_ns, peer, suspects);
            }
        }
        self.give_up_lost(now_ns);
    }

    fn look_at_suspects(&mut self, now_ns: u64, suspected: RankSet) {
        let known = self.membership.suspects();
        let news: Vec<(Rank, Instance)> = self
            .links
            .serving()
            .into_iter()
            .filter(|(peer, _)| suspected.contains(*peer) && !known.contains(*peer))
            .collect();
        if news.is_empty() {
            return;
        }
        let faults = self.session.faults().unwrap_or_default();
        for (peer, instance) in news {
            let fault = faults.iter().find(|fault| fault.peer == peer).copied();
            let event = self.session.device_evidence(peer);
            self.suspect(now_ns, peer, instance, evidence_of(fault.as_ref(), event), fault);
        }
    }

    fn suspect(
        &mut self,
        now_ns: u64,
        peer: Rank,
        instance: Instance,
        evidence: Evidence,
        fault: Option<Fault>,
    ) {
        if self.membership.handle_suspicion(now_ns, peer, instance, evidence) {
            self.note(now_ns, Happening::Suspected { peer, evidence, fault });
            self.give_up_lost(now_ns);
        }
    }

    /// Kernels stop waiting for whoever is lost for a reason that kernels cannot see: whose process has ended, or whose
    /// name is another's or nobody's. A member that is merely suspected goes on being told LOST in every step, until
    /// the group has agreed: were it not, it would stall, and healthy members with it.
    fn give_up_lost(&mut self, now_ns: u64) {
        for (peer, _) in self.links.serving() {
            let Some(evidence) = self.membership.evidence(peer) else { continue };
            let is_gone = matches!(evidence, Evidence::Exit | Evidence::Lease | Evidence::Superseded);
            // What cannot be written is tried again with the next look.
            if is_gone && self.session.is_active(peer) && self.session.mask(peer).is_ok() {
                self.links.stop_serving(peer);
                // The store says so to membership itself; everything else has been told on its way there.
                if evidence == Evidence::Lease {
                    self.note(now_ns, Happening::Suspected { peer, evidence, fault: None });
                }
            }
        }
    }

    /// Carries out what membership wants, in order; whether there was anything.
    fn act(&mut self, now_ns: u64) -> bool {
        let mut did_act = false;
        loop {
            let (action, mut retry) = match self.held_back.take() {
                Some((action, retry)) if !retry.is_due(now_ns) => {
                    self.held_back = Some((action, retry));
                    return did_act;
                }
                Some(held_back) => held_back,
                None => match self.membership.poll_action() {
                    Some(action) => (action, Retry::default()),
                    None => return did_act,
                },
            };
            did_act = true;
            if let Err(doing) = self.carry_out(now_ns, &action) {
                let peer = self.session.rank();
                match retry.again(now_ns, self.membership.config().detect_ns) {
                    Some(attempts) => self.note(now_ns, Happening::Refused { doing, peer, attempts }),
                    None => self.stop(now_ns, Stop::Failed { doing, attempts: retry.attempts() }),
                }
                self.held_back = Some((action, retry));
                return did_act;
            }
        }
    }

    fn carry_out(&mut self, now_ns: u64, action: &Action) -> Result<(), &'static str> {
        match action {
            Action::PutRow(row) => self.board.put_row(row.to_bytes()),
            Action::CasView { expect, view } => self.board.cas_view(*expect, view.to_bytes()),
            Action::Connect { peer, instance } => self.links.connect(*peer, *instance),
            Action::Fence { peer, instance } => {
                let has_left = self.has_left(*peer);
                self.links.fence(*peer, *instance, has_left);
            }
            Action::Remove { epoch, ranks } => {
                ranks.iter().for_each(|rank| self.links.stop_serving(rank));
                self.session.remove(ranks, *epoch).map_err(|_| "remove members")?;
            }
            Action::CloseGate(plan) => self.close_gate(now_ns, *plan),
            Action::OpenGate => {
                self.acking = None;
                let closed_ns = self.session.open_gate(now_ns);
                self.note(now_ns, Happening::GateOpened { closed_ns });
            }
            Action::Commit(start) => {
                self.acking = None;
                if self.has_started {
                    self.session.move_gate(start.from_step).map_err(|_| "move the gate")?;
                }
                self.switching = Some(start.clone());
            }
            Action::Stop(stop) => self.stop(now_ns, *stop),
        }
        Ok(())
    }

    /// Whether a peer has left on purpose: its queue pairs serve until the last half of its steps has left.
    fn has_left(&self, peer: Rank) -> bool {
        self.membership.view().start.as_ref().is_some_and(|start| start.plan.leave.contains(peer))
    }

    fn close_gate(&mut self, now_ns: u64, plan: Plan) {
        let ack = self.session.close_gate(now_ns);
        self.note(now_ns, Happening::GateClosed { step: ack.step });
        self.acking = ack.next_seq.is_none().then_some(plan.id);
        self.membership.handle_ack(now_ns, plan.id, ack.step, ack.next_seq);
    }

    /// Goes on with what takes time; whether anything has come of it.
    fn work(&mut self, now_ns: u64) -> bool {
        self.follow_gate();
        let mut did_work = self.finish_ack(now_ns);
        let mut notes = Vec::new();
        let done = self.links.work(now_ns, &self.session, self.membership.view(), &mut notes);
        notes.into_iter().for_each(|what| self.note(now_ns, what));
        match done {
            Ok(done) => {
                did_work |= !done.is_empty();
                done.into_iter().for_each(|done| self.links_done(now_ns, done));
            }
            Err(stop) => self.stop(now_ns, stop),
        }
        // The record first: an offer is good only beside it.
        self.links.derived.say();
        if let Some(cell) = self.links.changed_offers() {
            self.board.put_offers(cell);
        }
        did_work | self.finish_switch(now_ns)
    }

    fn links_done(&mut self, now_ns: u64, done: links::Done) {
        match done {
            links::Done::Connected(peer, instance) => {
                self.membership.handle_connected(now_ns, peer, instance);
            }
            links::Done::Disconnected(peer, instance) => {
                self.membership.handle_disconnected(now_ns, peer, instance);
            }
            links::Done::Fenced(peer, instance) => self.membership.handle_fenced(now_ns, peer, instance),
            links::Done::GivenUp(peer, instance) => {
                self.suspect(now_ns, peer, instance, Evidence::Unconnected, None);
            }
        }
    }

    /// Lets this rank run up to the first step of the switch as soon as every member has said where its gate is.
    ///
    /// Not only with the commit: who is ahead has a step open, and may need those behind to launch it before it can
    /// say what its counters will read. Steps that are acknowledged never shrink, so all members find the same one.
    fn follow_gate(&self) {
        let view = self.membership.view();
        let Some(plan) = view.plan.filter(|_| self.has_started && self.session.is_gate_closed()) else {
            return;
        };
        let mut from_step = self.session.next_step();
        for peer in view.members().iter().filter(|peer| *peer != self.session.rank()) {
            let row = self.membership.row(peer).filter(|row| view.holder(peer) == Some(row.instance));
            let Some(ack) = row.and_then(|row| row.ack.as_ref()).filter(|ack| ack.plan == plan.id) else {
                return;
            };
            from_step = from_step.max(ack.step);
        }
        // A gate that is open by now needs no move.
        let _ = self.session.move_gate(from_step);
    }

    /// Completes an acknowledgement once the counters at the gate are known.
    fn finish_ack(&mut self, now_ns: u64) -> bool {
        let Some(plan) = self.acking else { return false };
        let ack = self.session.gate_ack();
        if ack.next_seq.is_none() {
            return false;
        }
        self.acking = None;
        self.membership.handle_ack(now_ns, plan, ack.step, ack.next_seq);
        true
    }

    /// Switches once the session is at the gate and every member can be reached.
    fn finish_switch(&mut self, now_ns: u64) -> bool {
        let Some(start) = self.switching.take() else { return false };
        match self.switch(now_ns, &start) {
            Ok(true) => true,
            Ok(false) => {
                self.switching = Some(start);
                false
            }
            Err(Error::Protocol(violation)) => {
                self.stop(now_ns, Stop::Violation(violation));
                true
            }
            Err(_) => {
                // Memory or tables that are not ready: a later step finds them so.
                self.switching = Some(start);
                false
            }
        }
    }

    fn switch(&mut self, now_ns: u64, start: &Start) -> Result<bool, Error> {
        if self.has_started && !self.session.is_at_gate()? {
            return Ok(false);
        }
        let (epoch, alive) = (self.membership.view().epoch, self.membership.view().members());
        let me = self.session.rank();
        if alive.contains(me) {
            let others = || alive.iter().filter(|peer| *peer != me);
            let is_new = |peer: &Rank| !self.has_started || start.plan.join.contains(*peer);
            for peer in others().filter(is_new).collect::<Vec<_>>() {
                if let Some(instance) = self.links.connected(peer)
                    && !self.links.is_serving(peer)
                    && !self.membership.suspects().contains(peer)
                {
                    self.session.admit(peer, &start.from_seq)?;
                    self.links.serve(peer, instance);
                }
            }
            // Who is lost by now leaves by the next epoch; until then the gate stays closed.
            if others().any(|peer| !self.session.is_active(peer)) {
                return Ok(false);
            }
            let Some(placement) = self.placements.get(&start.plan.placement_version) else {
                return Ok(false);
            };
            let switch = Switch {
                epoch,
                alive,
                placement: placement.clone(),
                from_step: start.from_step,
                from_seq: start.from_seq.clone(),
            };
            if self.has_started {
                self.session.commit(&switch)?
            } else {
                self.session.start(&switch)?
            }
            self.has_started = true;
            let closed_ns = self.session.open_gate(now_ns);
            let from_step = start.from_step;
            self.note(now_ns, Happening::Switched { epoch, from_step, closed_ns });
        }
        self.membership.handle_committed(now_ns, start.plan.id);
        Ok(true)
    }
}

fn evidence_of(fault: Option<&Fault>, event: Option<AsyncEvent>) -> Evidence {
    let Some(fault) = fault else {
        // A suspicion without a record: our own device told of it; else the step was reported lost by the peer, or
        // the record was cleared.
        return event.map_or(Evidence::Reported, |event| Evidence::Device { event });
    };
    let waited_ns = fault.waited_ns;
    match fault.kind {
        FaultKind::Silent => Evidence::Silent { waited_ns },
        FaultKind::Stalled | FaultKind::Cap => Evidence::Stalled { waited_ns },
        FaultKind::Completion => Evidence::Syndrome { syndrome: fault.syndrome },
        FaultKind::Violation => Evidence::Contradiction,
        FaultKind::SourceRows => Evidence::SourceRows,
        FaultKind::Unknown(_) => Evidence::Reported,
    }
}
