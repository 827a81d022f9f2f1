//! What agreement takes: the membership of every rank, each on a thread of its own, over boards on one store.
//!
//! An [`AgreementRig`] owns the store, which is memory of this process, and per rank the [`Membership`] that sessions
//! run and the [`StoreBoard`] that members use. There are no sessions: what they would do (connect, fence, close the
//! gate, commit) is done at once, because it is measured on real ones elsewhere. So what is left is what the protocol
//! takes: how often it goes to the store and back, one time after another.
//!
//! Nobody here is slow or lost but the one that a test drops, and no timer plays a part.

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::url::StoreUrl;
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::error::{Error, Evidence, OsError};
use crate::ids::{Epoch, Rank};
use crate::membership::{
    Action, Board, BoardEvent, Instance, Membership, MembershipConfig, RankSet, Row, Stop, View,
};
use crate::recovery::draw_instance;
use crate::session::{Bell, BoardClaim, GroupName, StoreBoard};
use crate::time::{Deadline, now_ns};

/// How long the store may take to answer.
const STORE_BUDGET: Duration = Duration::from_secs(30);
/// A group that has not come so far by then never will.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest time between two looks at a board: its bell rings whenever it has something to tell.
const NAP: Duration = Duration::from_millis(50);
/// Bytes of an offer to one incarnation, before what a session offers: rank and instance.
const ADDRESS_LEN: usize = 2 + 16;

/// What one death and one replacement took.
#[derive(Clone, Debug, Default)]
pub struct Agreement {
    /// From the first suspicion until the last survivor has the agreed mask.
    pub agree: Duration,
    /// From the first gate that closed to the last commit.
    pub gate: Duration,
    /// Per survivor, in order: from its closed gate to its commit.
    pub pauses: Vec<Duration>,
    /// From the replacement's claim to the last commit.
    pub join: Duration,
}

/// When a rank came how far, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Log {
    removed: Option<u64>,
    closed: Option<u64>,
    committed: Option<u64>,
}

/// One rank: what its keeper would hold.
struct Seat {
    membership: Membership,
    board: StoreBoard,
    /// Who offers to which incarnation of this rank, by the newest offers of each.
    offered: BTreeMap<Rank, Instance>,
    /// To whom this rank offers.
    wanted: BTreeMap<Rank, Instance>,
    offer_len: usize,
    log: Log,
    stopped: Option<Stop>,
}

impl Seat {
    /// Takes in what the board has, and does what is due; returns when to look again at the latest.
    fn step(&mut self) -> u64 {
        let now = now_ns();
        while let Some(event) = self.board.poll() {
            self.take_in(now, event);
        }
        if self.membership.poll_timeout().is_some_and(|at| now >= at) {
            self.membership.handle_timeout(now);
        }
        while let Some(action) = self.membership.poll_action() {
            self.carry_out(action);
        }
        self.membership.poll_timeout().unwrap_or(u64::MAX)
    }

    fn take_in(&mut self, now: u64, event: BoardEvent) {
        let membership = &mut self.membership;
        match event {
            BoardEvent::Available { up_for_ns } => membership.handle_store_up(now, up_for_ns),
            BoardEvent::Unavailable => membership.handle_store_away(now),
            BoardEvent::View { version: 0, .. } => {
                let empty = View::empty(membership.config().num_ranks);
                membership.handle_view(now, 0, empty);
            }
            // Everything here was written by this process; what is no view or row would be missed below.
            BoardEvent::View { version, bytes } => {
                if let Ok(view) = View::from_bytes(&bytes) {
                    membership.handle_view(now, version, view);
                }
            }
            BoardEvent::ViewCas { expect, .. } => membership.handle_cas(now, expect),
            BoardEvent::Row { from, bytes } => {
                if let Ok(row) = Row::from_bytes(&bytes) {
                    membership.handle_row(now, from, row);
                }
            }
            BoardEvent::Claim { claim, is_alive } => membership.handle_claim(now, claim, is_alive),
            BoardEvent::Offers { from, bytes } => {
                let me = membership.rank();
                if let Some(instance) = offered_to(me, self.offer_len, &bytes) {
                    self.offered.insert(from, instance);
                }
                self.connect(from);
            }
            BoardEvent::Placement { .. } => {}
        }
    }

    /// Both sides have offered to each other's present incarnation: a session would connect now.
    fn connect(&mut self, peer: Rank) {
        let Some(instance) = self.wanted.get(&peer).copied() else { return };
        if self.offered.get(&peer) == Some(&self.membership.instance()) {
            self.membership.handle_connected(now_ns(), peer, instance);
        }
    }

    fn carry_out(&mut self, action: Action) {
        let now = now_ns();
        match action {
            Action::PutRow(row) => self.board.put_row(row.to_bytes()),
            Action::CasView { expect, view } => self.board.cas_view(expect, view.to_bytes()),
            Action::Connect { peer, instance } => {
                self.wanted.insert(peer, instance);
                self.board.put_offers(offers_to(&self.wanted, self.offer_len));
                self.connect(peer);
            }
            Action::Fence { peer, instance } => {
                self.wanted.retain(|rank, wanted| *rank != peer || *wanted != instance);
                self.membership.handle_fenced(now, peer, instance);
            }
            Action::Remove { .. } => self.log.removed = Some(now),
            Action::CloseGate(plan) => {
                self.log.closed.get_or_insert(now);
                let config = self.membership.config();
                let (step, next_seq) = (config.first_step, config.first_seq.clone());
                self.membership.handle_ack(now, plan.id, step, Some(next_seq));
            }
            Action::OpenGate => self.log.closed = None,
            Action::Commit(start) => {
                self.membership.handle_committed(now, start.plan.id);
                self.log.committed = Some(now);
            }
            Action::Stop(stop) => self.stopped = Some(stop),
        }
    }
}

/// An offers cell: for each peer the rank, the incarnation that is meant, and as many bytes as a session's offer has.
fn offers_to(wanted: &BTreeMap<Rank, Instance>, offer_len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(wanted.len() * (ADDRESS_LEN + offer_len));
    for (rank, instance) in wanted {
        bytes.extend(rank.0.to_le_bytes());
        bytes.extend(instance.0.to_le_bytes());
        bytes.resize(bytes.len() + offer_len, 0);
    }
    bytes
}

/// Which incarnation of `me` an offers cell names.
fn offered_to(me: Rank, offer_len: usize, bytes: &[u8]) -> Option<Instance> {
    bytes.chunks_exact(ADDRESS_LEN + offer_len).find_map(|offer| {
        let (rank, rest) = offer.split_first_chunk()?;
        let (instance, _) = rest.split_first_chunk()?;
        (u16::from_le_bytes(*rank) == me.0).then(|| Instance(u128::from_le_bytes(*instance)))
    })
}

/// What a rank's thread and the rig share.
struct Shared {
    seat: Mutex<Seat>,
    stepped: Condvar,
    is_over: Mutex<bool>,
}

/// A rank that runs; dropped, it has died without a word.
struct Running {
    shared: Arc<Shared>,
    bell: Bell,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(seat: Seat) -> Result<Self, Error> {
        let bell = seat.board.bell();
        let shared =
            Arc::new(Shared { seat: Mutex::new(seat), stepped: Condvar::new(), is_over: Mutex::new(false) });
        let (own, own_bell) = (Arc::clone(&shared), bell.clone());
        let run = move || {
            while !*own.is_over.lock() {
                let next = own.seat.lock().step();
                own.stepped.notify_all();
                own_bell.wait(Duration::from_nanos(next.saturating_sub(now_ns())).min(NAP));
            }
        };
        let thread = thread::Builder::new().name("ibex-seat".into()).spawn(run);
        let thread = thread.map_err(|error| OsError::from_io("pthread_create", &error))?;
        Ok(Self { shared, bell, thread: Some(thread) })
    }

    /// Tells the membership something; its thread does what follows.
    fn tell(&self, what: impl FnOnce(&mut Seat)) {
        what(&mut self.shared.seat.lock());
        self.bell.ring();
    }

    /// Waits until a rank has come somewhere, and returns when it did.
    fn wait(&self, when: impl Fn(&Log) -> Option<u64>) -> Result<u64, Error> {
        let deadline = Deadline::after(PATIENCE);
        let mut seat: MutexGuard<'_, Seat> = self.shared.seat.lock();
        loop {
            if let Some(stop) = seat.stopped {
                return Err(Error::Membership(stop));
            }
            if let Some(at) = when(&seat.log) {
                return Ok(at);
            }
            // PANIC: nobody fails here but the one that was dropped, so this membership must get there.
            assert!(!deadline.has_passed(), "no agreement: {:?}", seat.membership);
            self.shared.stepped.wait_for(&mut seat, deadline.remaining());
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        *self.shared.is_over.lock() = true;
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            // It has panicked already where it could, and said so.
            let _ = thread.join();
        }
    }
}

/// A group that agrees on deaths and replacements. See the module documentation.
pub struct AgreementRig {
    config: MembershipConfig,
    offer_len: usize,
    ranks: BTreeMap<Rank, Running>,
    store: Blocking,
}

impl AgreementRig {
    /// A group of which all of `config.initial` are members; offers to a peer have `offer_len` bytes.
    ///
    /// # Errors
    /// `Store` if a name cannot be claimed, `Os` if there can be no thread, `Membership` if a rank had to stop.
    pub fn new(mut config: MembershipConfig, offer_len: usize) -> Result<Self, Error> {
        // Ranks are replaced here as often as somebody wants to measure it: none of them is flapping.
        config.flap_window_ns = 0;
        let store = Blocking::open(&StoreUrl::Memory, Clock::system(), STORE_BUDGET)?;
        let mut rig = Self { config, offer_len, ranks: BTreeMap::new(), store };
        for rank in rig.config.initial.iter() {
            let running = rig.claim(rank, false)?;
            rig.ranks.insert(rank, running);
        }
        rig.each(|log| log.committed)?;
        Ok(rig)
    }

    /// A new process for a rank, which is ready at once.
    fn claim(&self, rank: Rank, takeover: bool) -> Result<Running, Error> {
        let board = StoreBoard::claim(
            &self.store,
            &BoardClaim {
                group: GroupName { cluster: "bench".into(), group: "agreement".into() },
                rank,
                num_ranks: self.config.num_ranks,
                instance: draw_instance(),
                lease_ttl: Duration::from_nanos(self.config.lease_ttl_ns),
                takeover,
                grace: Duration::from_nanos(self.config.store_grace_ns),
            },
        )?;
        let now = now_ns();
        let mut membership = Membership::new(self.config.clone(), board.claimed(), now);
        membership.handle_ready(now, 0);
        Running::start(Seat {
            membership,
            board,
            offered: BTreeMap::new(),
            wanted: BTreeMap::new(),
            offer_len: self.offer_len,
            log: Log::default(),
            stopped: None,
        })
    }

    /// When each rank came somewhere.
    fn each(&self, when: impl Fn(&Log) -> Option<u64>) -> Result<BTreeMap<Rank, u64>, Error> {
        self.ranks.iter().map(|(rank, running)| Ok((*rank, running.wait(&when)?))).collect()
    }

    /// Lets `rank` die, its survivors notice and agree, and a replacement come in.
    ///
    /// # Errors
    /// As [`AgreementRig::new`].
    pub fn replace(&mut self, rank: Rank) -> Result<Agreement, Error> {
        let Some(dead) = self.ranks.remove(&rank) else { return Ok(Agreement::default()) };
        let instance = dead.shared.seat.lock().membership.instance();
        drop(dead);
        self.ranks.values().for_each(|running| running.tell(|seat| seat.log = Log::default()));
        let suspected = now_ns();
        for running in self.ranks.values() {
            running.tell(|seat| {
                let evidence = Evidence::Silent { waited_ns: 0 };
                seat.membership.handle_suspicion(now_ns(), rank, instance, evidence);
            });
        }
        let last = |times: &BTreeMap<Rank, u64>| times.values().max().copied().unwrap_or_default();
        let agreed = last(&self.each(|log| log.removed)?);
        let claimed = now_ns();
        let newcomer = self.claim(rank, true)?;
        self.ranks.insert(rank, newcomer);
        let committed = self.each(|log| log.committed)?;
        let mut closed = BTreeMap::new();
        for (survivor, running) in self.ranks.iter().filter(|(survivor, _)| **survivor != rank) {
            closed.insert(*survivor, running.wait(|log| log.closed)?);
        }
        let span = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
        let first_closed = closed.values().min().copied().unwrap_or(claimed);
        Ok(Agreement {
            agree: span(suspected, agreed),
            gate: span(first_closed, last(&committed)),
            pauses: closed.iter().map(|(survivor, at)| span(*at, committed[survivor])).collect(),
            join: span(claimed, last(&committed)),
        })
    }

    /// The epoch of every rank, which is one.
    #[must_use]
    pub fn epochs(&self) -> Vec<(Epoch, RankSet)> {
        let of = |running: &Running| {
            let seat = running.shared.seat.lock();
            (seat.membership.view().epoch, seat.membership.view().members())
        };
        self.ranks.values().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_group_agrees_on_each_death_and_each_replacement() {
        let config =
            Config { num_ranks: 4, num_experts: 4, max_topk: 2, detect_ms: 60_000, ..Config::default() };
        let limits = MembershipConfig::new(&config.validate().unwrap(), RankSet::first(4));
        let mut rig = AgreementRig::new(limits, 100).unwrap();
        for round in 0..6_u32 {
            let agreement = rig.replace(Rank(round as u16 % 4)).unwrap();
            assert!(!agreement.agree.is_zero() && agreement.pauses.len() == 3, "{agreement:?}");
            assert!(
                agreement.gate <= agreement.join && agreement.pauses.iter().all(|p| *p <= agreement.gate)
            );
            let epoch = Epoch(1 + 2 * (round + 1));
            assert_eq!(rig.epochs(), vec![(epoch, RankSet::first(4)); 4], "round {round}");
        }
    }

    #[test]
    fn an_offer_names_whom_it_is_for() {
        let wanted = BTreeMap::from([(Rank(1), Instance(7)), (Rank(3), Instance(9))]);
        let bytes = offers_to(&wanted, 5);
        assert_eq!(bytes.len(), 2 * 23);
        assert_eq!(offered_to(Rank(3), 5, &bytes), Some(Instance(9)));
        assert_eq!(offered_to(Rank(2), 5, &bytes), None);
    }
}
