//! Groups that find each other through a store and outlive their members. Threads stand for processes here; processes
//! that are really killed are the campaigns' (`tests/chaos.rs`).
#![expect(clippy::unwrap_used, reason = "a scenario that cannot be set up is a failed test")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ibex::config::{Config, RoutePolicy, ValidConfig};
use ibex::error::Error;
use ibex::harness::{RigRank, StepPlan};
use ibex::ids::{Epoch, Rank};
use ibex::membership::{RankSet, Stop};
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::reference::routing::Routing;
use ibex::session::{
    ElasticMember, ElasticOptions, GroupName, Happening, MemberFabric, MemberOptions, TopkDtype,
};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::derived::Kind;
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::Stamp;
use ibex_metadata::name::RecordName;
use ibex_metadata::record::{Buffer, BufferState, RecordState};
use ibex_metadata::url::StoreUrl;
use parking_lot::Mutex;

/// Nobody waits longer for anything; far more than a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(120);
const TOKENS: u32 = 4;
/// Steps that every member did, without a loss, before a group counts as whole.
const CLEAN_STEPS: usize = 5;
const SEED: u64 = 11;

fn config(num_ranks: u32) -> Config {
    Config {
        num_ranks,
        max_tokens: TOKENS,
        hidden: 256,
        num_experts: 12,
        max_topk: 3,
        num_sms: 2,
        detect_ms: 400,
        // In one process a peer's memory is used as it is: a rank that "dies" would take it along.
        route: RoutePolicy::Ibgda,
        ..Config::default()
    }
}

fn store() -> Blocking {
    Blocking::open(&StoreUrl::Memory, Clock::system(), Duration::from_secs(30)).unwrap()
}

fn set(ranks: &[u16]) -> RankSet {
    ranks.iter().map(|rank| Rank(*rank)).collect()
}

fn options(rank: u16, initial: &[u16], takeover: bool) -> ElasticOptions {
    ElasticOptions {
        group: GroupName { cluster: "test".into(), group: "elastic".into() },
        rank: Rank(rank),
        initial: set(initial),
        takeover,
        flap_window: None,
        node: MemberOptions { fabric: MemberFabric::Shm, ..MemberOptions::default() },
    }
}

/// What one rank saw of one step.
#[derive(Clone, Copy, Debug)]
struct Seen {
    epoch: Epoch,
    alive: RankSet,
    verdict: Verdict,
}

/// What the ranks of a test share.
struct Group {
    config: Config,
    store: Blocking,
    seen: Mutex<BTreeMap<(u64, u16), Seen>>,
    last_step: AtomicU64,
}

/// One rank that runs.
struct Running {
    killed: Arc<AtomicBool>,
    thread: JoinHandle<Result<Option<Stop>, Error>>,
}

impl Group {
    fn new(config: Config) -> Arc<Self> {
        let last_step = AtomicU64::new(u64::MAX);
        Arc::new(Self { config, store: store(), seen: Mutex::default(), last_step })
    }

    fn start(self: &Arc<Self>, options: ElasticOptions, end: &Arc<Barrier>) -> Running {
        let killed = Arc::new(AtomicBool::new(false));
        let (group, is_killed, end) = (Arc::clone(self), Arc::clone(&killed), Arc::clone(end));
        let thread = thread::spawn(move || {
            let member = ElasticMember::join(&group.config, &group.store, &options)?;
            let stop = group.serve(&member, &is_killed);
            if !matches!(stop, Ok(None)) {
                eprintln!("rank {}: {stop:?}, {:?}", options.rank, member.take_events());
            }
            // Nobody goes while another still waits for it, but for the dead.
            if !is_killed.load(Ordering::Relaxed) {
                end.wait();
            }
            drop(member);
            stop
        });
        Running { killed, thread }
    }

    fn serve(&self, member: &ElasticMember, killed: &AtomicBool) -> Result<Option<Stop>, Error> {
        let session = member.session();
        let rank =
            RigRank { tensors: session.tensors()?, stream: session.stream(), session: Arc::clone(session) };
        assert!(member.wait_linked(PATIENCE)?, "{:?}", member.view());
        member.ready(u128::from(session.rank().0));
        loop {
            match member.wait_open(PATIENCE) {
                Ok(true) => {}
                Ok(false) => panic!("no step may begin: {:?}", member.view()),
                Err(Error::Membership(stop)) => return Ok(Some(stop)),
                Err(error) => return Err(error),
            }
            let step = session.next_step();
            if killed.load(Ordering::Relaxed) || step >= self.last_step.load(Ordering::Relaxed) {
                return Ok(None);
            }
            match self.step(&rank, step) {
                Ok(seen) => drop(self.seen.lock().insert((step, session.rank().0), seen)),
                Err(Error::Gated(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn step(&self, rank: &RigRank, step: u64) -> Result<Seen, Error> {
        let session = &rank.session;
        let (epoch, alive, placement) = (session.epoch(), session.alive(), session.placement());
        let inputs = inputs(session.config(), step);
        let input = &inputs[session.rank().index()];
        rank.load(input, TopkDtype::I32)?;
        session.place_experts(&rank.tensors)?;
        rank.launch(session.config().max_topk, &StepPlan::default())?;
        session.gpu().synchronize(&rank.stream)?;
        let reference = Step::new(session.config(), &inputs).placed(&placement, &alive);
        let ranks = (0..).map(Rank).take(inputs.len());
        let members: Vec<bool> = ranks.map(|rank| alive.contains(rank)).collect();
        let verdict = rank.check_combine(&reference, input, &members)?;
        Ok(Seen { epoch, alive, verdict })
    }

    /// Waits until those members have done some steps together, without a loss, in one epoch behind another.
    fn await_clean_steps(&self, members: &[u16], after: Epoch) -> Epoch {
        let began = Instant::now();
        let wanted = set(members);
        loop {
            let mut clean: BTreeMap<Epoch, BTreeMap<u64, usize>> = BTreeMap::new();
            for ((step, _), seen) in self.seen.lock().iter() {
                if seen.alive == wanted && seen.epoch > after && seen.verdict.lost == 0 {
                    *clean.entry(seen.epoch).or_default().entry(*step).or_default() += 1;
                }
            }
            let is_whole = |steps: &BTreeMap<u64, usize>| {
                steps.values().filter(|ranks| **ranks == members.len()).count() >= CLEAN_STEPS
            };
            if let Some((epoch, _)) = clean.iter().rev().find(|(_, steps)| is_whole(steps)) {
                return *epoch;
            }
            assert!(began.elapsed() < PATIENCE, "no clean steps of {wanted}: {:?}", self.tail());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn tail(&self) -> Vec<((u64, u16), Seen)> {
        self.seen.lock().iter().rev().take(8).map(|(key, seen)| (*key, *seen)).collect()
    }

    /// Lets everybody end behind the same step.
    fn finish(&self) {
        let newest = self.seen.lock().last_key_value().map_or(0, |((step, _), _)| *step);
        self.last_step.store(newest + 20, Ordering::Relaxed);
    }

    /// Steps whose outputs differ from the reference, given the losses that were reported.
    fn wrong(&self) -> Vec<((u64, u16), Seen)> {
        let seen = self.seen.lock();
        seen.iter().filter(|(_, seen)| seen.verdict.wrong != 0).map(|(key, seen)| (*key, *seen)).collect()
    }
}

fn inputs(config: &ValidConfig, step: u64) -> Vec<RankInput> {
    let key = |rank| InputKey { seed: SEED, iteration: step, rank: Rank(rank) };
    let generate = |rank| RankInput::generate(config, Routing::Uniform, key(rank), TOKENS);
    (0..config.num_ranks as u16).map(generate).collect()
}

#[test]
fn a_group_forms_loses_a_rank_takes_in_another_and_grows() {
    // Room for four; three begin.
    let group = Group::new(Config { local_experts: Some(6), ..config(4) });
    let end = Arc::new(Barrier::new(4));
    let mut running: Vec<Running> =
        (0..3).map(|rank| group.start(options(rank, &[0, 1, 2], false), &end)).collect();
    let first = group.await_clean_steps(&[0, 1, 2], Epoch(0));
    let dead = running.pop().unwrap();
    dead.killed.store(true, Ordering::Relaxed);
    assert_eq!(dead.thread.join().unwrap().unwrap(), None);
    let newcomer = group.start(options(2, &[0, 1, 2], true), &end);
    let second = group.await_clean_steps(&[0, 1, 2], first);
    let fourth = group.start(options(3, &[0, 1, 2], false), &end);
    group.await_clean_steps(&[0, 1, 2, 3], second);
    group.finish();
    for rank in running.into_iter().chain([newcomer, fourth]) {
        assert_eq!(rank.thread.join().unwrap().unwrap(), None);
    }
    let wrong = group.wrong();
    assert!(wrong.is_empty(), "{} of {}: {wrong:?}", wrong.len(), group.seen.lock().len());
}

#[test]
fn a_name_that_is_held_is_refused_and_one_that_is_taken_over_fences_its_holder() {
    let group = Group::new(config(1));
    let end = Arc::new(Barrier::new(1));
    let first = group.start(options(0, &[0], false), &end);
    group.await_clean_steps(&[0], Epoch(0));
    let refused = ElasticMember::join(&group.config, &group.store, &options(0, &[0], false));
    assert!(matches!(refused.err(), Some(Error::Store(StoreError::Held { .. }))));
    let second = group.start(options(0, &[0], true), &Arc::new(Barrier::new(1)));
    let stop = first.thread.join().unwrap().unwrap();
    assert!(matches!(stop, Some(Stop::Fenced { .. })), "{stop:?}");
    second.killed.store(true, Ordering::Relaxed);
    assert_eq!(second.thread.join().unwrap().unwrap(), None);
}

#[test]
fn a_rank_with_another_configuration_is_not_let_in() {
    let group = Group::new(config(2));
    let join = |config: &Config, rank| {
        ElasticMember::join(config, &group.store, &options(rank, &[0, 1], false)).unwrap()
    };
    let zero = join(&group.config, 0);
    let other = join(&Config { num_experts: 8, ..group.config.clone() }, 1);
    assert_eq!(zero.wait_linked(Duration::from_secs(2)).ok(), Some(false));
    let why = other.take_events();
    assert!(!why.is_empty(), "{:?}", other.view());
}

/// What stands on `member` of what was made for a peer, and under which stamp; all four kinds, or none.
fn made(member: &ElasticMember, peer: u16) -> Option<Stamp> {
    let derived = member.derived(Rank(peer));
    let kinds: Vec<Kind> = derived.iter().map(|from| from.kind).collect();
    let wanted = [Kind::QueuePair, Kind::Rkey, Kind::Rail, Kind::GpuSlot];
    assert!(kinds.is_empty() || kinds == wanted, "of {peer}: {kinds:?}");
    derived.first().map(|from| from.stamp)
}

fn come_in(group: &Group, options: &ElasticOptions) -> ElasticMember {
    let member = ElasticMember::join(&group.config, &group.store, options).unwrap();
    member.ready(1);
    member
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < PATIENCE, "{what} did not happen");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_changed_record_retires_what_kernels_have_of_that_peer_and_of_no_other() {
    let group = Group::new(config(3));
    let mut members: Vec<ElasticMember> =
        (0..3).map(|rank| come_in(&group, &options(rank, &[0, 1, 2], false))).collect();
    for member in &members {
        assert!(member.wait_open(PATIENCE).unwrap(), "{:?}", member.view());
    }
    let first = [0, 1].map(|me: usize| [made(&members[me], 1 - me as u16), made(&members[me], 2)]);
    assert!(first.as_flattened().iter().all(Option::is_some), "{first:?}");
    assert_eq!(members[0].derived_counters().retired.total(), 0, "first connections replace nothing");

    let name = RecordName::new("test", "elastic", "rank-2").unwrap();
    until("the record of a member", || {
        group.store.get(&name).unwrap().unchecked().record.state == RecordState::Ready
    });
    // Rank 2 offers a buffer, moves it, and takes it back: queue pairs, keys and slots of kernels stay.
    let queue_pairs = members[0].session().queue_pairs(Rank(2));
    let buffer = |addr| Buffer { addr, len: 4096, state: BufferState::Ready, ..Buffer::default() };
    let mut last = Stamp::default();
    for buffers in [vec![buffer(4096)], vec![buffer(8192)], vec![]] {
        last = members[2].publish(|record| record.buffers = buffers).unwrap();
    }
    let record = group.store.get(&name).unwrap();
    assert_eq!((record.stamp(), record.unchecked().record.state), (last, RecordState::Ready));
    // Another rank's retirement below is later in the watch than these.
    let others = (made(&members[0], 1), made(&members[1], 0));

    // Another process takes the name of one that lives: everything of it goes, and nothing else.
    let newcomer = come_in(&group, &options(2, &[0, 1, 2], true));
    until("the replacement's connection", || {
        [0, 1].iter().all(|me: &usize| made(&members[*me], 2).is_some_and(|stamp| stamp.fence > last.fence))
    });
    for (me, member) in members[..2].iter().enumerate() {
        let counters = member.derived_counters();
        let retired = Kind::ALL.map(|kind| counters.retired.of(kind));
        assert_eq!(retired, [1, 1, 1, 0, 1], "rank {me}: of each kind the one, by order of Kind::ALL");
        assert_eq!(counters.replaced, 1, "buffers that come and go replace nobody");
        assert_eq!((counters.stale_snapshots, counters.concurrent_publishers), (0, 0));
        let events = member.take_events();
        let retired = events.iter().filter(|event| matches!(event.what, Happening::Retired { .. })).count();
        // None where the group's agreement, which the other rank began, came before this rank's own look.
        assert!(retired <= 1, "{events:?}");
    }
    assert_eq!((made(&members[0], 1), made(&members[1], 0)), others, "the others' stand as they stood");
    assert_ne!(members[0].session().queue_pairs(Rank(2)), queue_pairs, "new ones for the new process");
    let fenced = members[2].wait_open(PATIENCE);
    assert!(matches!(fenced, Err(Error::Membership(_))), "the old holder is out: {fenced:?}");
    drop(members.pop());
    members.push(newcomer);
    for member in &members {
        assert!(member.wait_open(PATIENCE).unwrap(), "{:?}", member.view());
    }
}
