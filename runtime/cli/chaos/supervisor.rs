//! A group of processes that come and go, under one plan of faults.
//!
//! A [`Supervisor`] owns every process and the store. One turn takes in what was said, looks who has ended, lets faults
//! strike and starts replacements; nothing in it waits for a rank.

use core::time::Duration;
use std::sync::mpsc::{self, Receiver, Sender};

use ibex::chaos::draws::Draws;
use ibex::chaos::plan::{CLEAN_STEPS, Plan};
use ibex::chaos::procs::{Observer, Order, Role, Said, Seen, Shape, Way};
use ibex::chaos::timeline::Happened;
use ibex::ids::Rank;
use ibex::membership::{Instance, SlotState};
use ibex::time::{Stopwatch, unix_ns};
use ibex_metadata::url::StoreUrl;

use super::inject::Injector;
use super::process::{Follower, Heard, Host, RankProcess, StoreProcess};
use crate::cli::CliError;
use crate::cli::launch::{LaunchError, Namespaces};

/// How long a turn waits for something to be said.
const TURN: Duration = Duration::from_millis(1);
/// A group that finishes no step, and changes nothing, for so long hangs.
const PATIENCE_NS: u64 = 120_000_000_000;
/// Steps that everybody must have finished since the newest one of the time, before a pair counts as unharmed: every
/// ring slot has been used again.
const HEALED_BY_STEPS: u64 = 3;
/// A group is whole again this long after a fault, and so many `detect_ms`: the longest fault, the lease, a rank that
/// is held down, and then some.
const WHOLE_WITHIN: (u64, u64) = (60_000_000_000, 60);
/// Steps that everybody may be ahead of the last one heard of.
const AHEAD: u64 = 24;
/// Processes that may end without a reason before the campaign is given up.
const CRASHES_MAX: u32 = 8;

/// A process that is to start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Birth {
    pub(super) rank: Rank,
    pub(super) at_ns: u64,
    /// Its predecessor is known to be dead: its name need not wait for the lease.
    pub(super) takes_over: bool,
}

/// What a supervisor is made with.
pub(super) struct Ground<'a> {
    pub(super) plan: &'a Plan,
    pub(super) shape: Shape,
    /// Namespaces, and ranks in each.
    pub(super) hosts: Option<(&'a Namespaces, u32)>,
    /// The store, if it is ours to break.
    pub(super) store: Option<StoreProcess>,
    /// Told the newest step now and then.
    pub(super) progress: &'a mut dyn FnMut(u64),
    /// Whether a signal wants an end.
    pub(super) is_interrupted: &'a dyn Fn() -> bool,
}

/// Where the campaign stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Running,
    /// Everybody runs to this step.
    Finishing {
        until: u64,
    },
    Ending,
}

/// See the module documentation.
pub(super) struct Supervisor<'a> {
    pub(super) procs: Vec<RankProcess>,
    pub(super) births: Vec<Birth>,
    pub(super) observer: Observer,
    pub(super) store: Option<StoreProcess>,
    pub(super) draws: Draws,
    pub(super) shape: Shape,
    /// Pairs that a fault has touched and may have left unharmed: when that can be said, by the clock and by the step
    /// that everybody must have finished.
    healing: Vec<(Rank, Rank, u64, u64)>,
    hosts: Option<(&'a Namespaces, u32)>,
    incarnations: Vec<usize>,
    heard: Receiver<Heard>,
    sender: Sender<Heard>,
    next_id: u64,
    stage: Stage,
    steps_wanted: u64,
    retry_ns: u64,
    moved_ns: u64,
    /// When the group was whole for the last time.
    whole_ns: u64,
    crashes: u32,
}

/// Runs a plan; what was seen. Nothing of it stays.
pub(super) fn run(ground: Ground<'_>) -> Result<Observer, CliError> {
    let url = StoreUrl::parse(&ground.shape.store)?;
    let config = ground.shape.config()?;
    let (sender, heard) = mpsc::channel();
    let follower = Follower::start(&url, &ground.shape.group, sender.clone())?;
    let now_ns = unix_ns();
    let hang_ns = 3 * u64::from(config.num_ranks * config.stall_ms()) * 1_000_000;
    let mut supervisor = Supervisor {
        procs: Vec::new(),
        births: Vec::new(),
        observer: Observer::new(config.num_ranks, hang_ns, now_ns),
        store: ground.store,
        draws: Draws::new(ground.plan.seed, 11),
        healing: Vec::new(),
        hosts: ground.hosts,
        incarnations: vec![0; config.num_ranks as usize],
        heard,
        sender,
        next_id: 0,
        stage: Stage::Running,
        steps_wanted: ground.plan.steps,
        retry_ns: config.rc_timers().timeout_ns(),
        moved_ns: now_ns,
        whole_ns: now_ns,
        crashes: 0,
        shape: ground.shape,
    };
    // CAST: at most 512 ranks.
    let all = (0..config.num_ranks as u16).map(Rank);
    supervisor.births.extend(all.map(|rank| Birth { rank, at_ns: now_ns, takes_over: false }));
    let mut injector = Injector::new(ground.plan);
    let watch = Stopwatch::start();
    let mut told = Duration::ZERO;
    while !supervisor.turn(&mut injector)? && !(ground.is_interrupted)() {
        if watch.elapsed() >= told + Duration::from_secs(1) {
            told = watch.elapsed();
            (ground.progress)(supervisor.observer.step());
        }
    }
    supervisor.procs.clear();
    drop(follower);
    supervisor.observer.close();
    Ok(supervisor.observer)
}

impl Supervisor<'_> {
    /// The newest process of a rank.
    pub(super) fn newest(&self, rank: Rank) -> Option<&RankProcess> {
        self.procs.iter().rev().find(|process| process.rank() == rank)
    }

    pub(super) fn newest_mut(&mut self, rank: Rank) -> Option<&mut RankProcess> {
        self.procs.iter_mut().rev().find(|process| process.rank() == rank)
    }

    pub(super) fn with_id(&mut self, id: u64) -> Option<&mut RankProcess> {
        self.procs.iter_mut().find(|process| process.id == id)
    }

    pub(super) fn ranks(&self) -> impl Iterator<Item = Rank> + use<> {
        // CAST: at most 512 ranks.
        (0..self.shape.ranks as u16).map(Rank)
    }

    /// Whether a process of the rank runs as a member.
    pub(super) fn is_serving(&self, rank: Rank) -> bool {
        let slot = self.observer.view().slot(rank);
        slot.state == SlotState::Member
            && self.newest(rank).is_some_and(|process| {
                !process.is_condemned && !process.is_stopped && process.seen.instance == slot.instance
            })
    }

    /// Everybody is a member, runs, and is not switching. An evicted process may still be on its way out: the last
    /// step that it has launched must end first.
    pub(super) fn is_whole(&self) -> bool {
        self.observer.is_settled() && self.births.is_empty() && self.ranks().all(|rank| self.is_serving(rank))
    }

    /// A path is whole again. Unless somebody is evicted for it, the pair counts as whole once every retry of that
    /// time has been answered, silence would have been noticed, and everybody has finished steps since: who waits for a
    /// queue pair that is dead at the other end finds out after `stall_ms` only.
    pub(super) fn heal_if_unharmed(&mut self, now_ns: u64, a: Rank, b: Rank) {
        let notice_ns = self.retry_ns + 1_500_000 * u64::from(self.shape.detect_ms);
        let step = self.observer.step() + HEALED_BY_STEPS;
        self.healing.push((a, b, now_ns + notice_ns, step));
    }

    /// One turn; whether the campaign is over.
    fn turn(&mut self, injector: &mut Injector) -> Result<bool, CliError> {
        if let Ok(first) = self.heard.recv_timeout(TURN) {
            let mut next = Some(first);
            while let Some(heard) = next {
                self.hear(heard);
                next = self.heard.try_recv().ok();
            }
        }
        let now_ns = unix_ns();
        self.reap(now_ns);
        self.heal(now_ns);
        injector.turn(self, now_ns)?;
        self.start_processes(now_ns)?;
        self.note_baselines();
        if let Some(why) = self.given_up(now_ns) {
            let text = format!("{why}: {}; {}; {injector}", self.describe(), self.observer.describe());
            self.observer.hang(now_ns, text);
            return Ok(true);
        }
        Ok(self.is_over(now_ns, injector.is_done()))
    }

    /// Why the campaign makes no sense any more; none while it does.
    fn given_up(&mut self, now_ns: u64) -> Option<&'static str> {
        let (pause_ns, detects) = WHOLE_WITHIN;
        let whole_within_ns = pause_ns + detects * u64::from(self.shape.detect_ms) * 1_000_000;
        if self.is_whole() || self.stage == Stage::Ending {
            self.whole_ns = now_ns;
        }
        if now_ns.saturating_sub(self.moved_ns) > PATIENCE_NS {
            return Some("nothing moves any more");
        }
        if now_ns.saturating_sub(self.whole_ns) > whole_within_ns {
            return Some("the group does not become whole again");
        }
        (self.crashes > CRASHES_MAX).then_some("too many processes have ended by themselves")
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::View(at_ns, view) => {
                self.moved_ns = at_ns;
                let procs = &self.procs;
                let process = |rank: Rank| -> Option<Seen> {
                    procs.iter().rev().find(|process| process.rank() == rank).map(|process| process.seen)
                };
                self.observer.see(at_ns, *view, &process);
            }
            Heard::Noise(id, line) => {
                let rank = self.with_id(id).map(|process| process.rank());
                self.observer.hang(unix_ns(), format!("rank {rank:?} said {line:?}"));
            }
            Heard::Word(id, word) => {
                let Some(process) = self.procs.iter_mut().find(|process| process.id == id) else { return };
                let rank = process.rank();
                if let Said::Hello { instance: [low, high] } = &word.said {
                    process.seen.instance = Instance(u128::from(*high) << 64 | u128::from(*low));
                }
                let from = (rank, process.seen.instance);
                match &word.said {
                    Said::Hello { .. } => {
                        if let Stage::Finishing { until } = self.stage {
                            process.tell(&Order::Finish { until });
                        }
                    }
                    Said::Step(_) => self.moved_ns = word.at_ns,
                    Said::Done { .. } => process.is_done = true,
                    Said::Gone { .. } => process.is_gone = true,
                    Said::Dies => process.seen.is_doomed = true,
                    _ => {}
                }
                let is_newest = self.newest(rank).is_some_and(|newest| newest.id == id);
                self.observer.hear(from, is_newest, word);
            }
        }
    }

    /// Looks who has ended. Whoever was not told to gets a successor all the same.
    fn reap(&mut self, now_ns: u64) {
        let mut index = 0;
        while index < self.procs.len() {
            let Some(status) = self.procs[index].ended() else {
                index += 1;
                continue;
            };
            // What it said last counts as its own.
            self.procs[index].hear_out();
            self.take_in_words();
            let process = self.procs.remove(index);
            let (rank, was_newest) = (process.rank(), self.newest(process.rank()).is_none());
            if process.is_condemned || process.seen.is_doomed || self.stage == Stage::Ending {
                self.observer.note(now_ns, Some(rank), Happened::Died);
            } else if !status.success() {
                self.crashes += 1;
                self.observer.died(now_ns, rank);
                self.observer.hang(now_ns, format!("a process of rank {rank} ended: {status}"));
            }
            let is_awaited = self.births.iter().any(|birth| birth.rank == rank);
            if was_newest && !is_awaited && self.stage != Stage::Ending {
                let at_ns = now_ns + self.draws.between(100_000, 5_000_000);
                self.births.push(Birth { rank, at_ns, takes_over: true });
            }
        }
    }

    fn take_in_words(&mut self) {
        while let Ok(heard) = self.heard.try_recv() {
            self.hear(heard);
        }
    }

    fn start_processes(&mut self, now_ns: u64) -> Result<(), LaunchError> {
        for birth in core::mem::take(&mut self.births) {
            if birth.at_ns > now_ns {
                self.births.push(birth);
                continue;
            }
            let index = birth.rank.index();
            // Every way of launching steps is somebody's; in a small group in time everybody's.
            let is_small = (self.shape.ranks as usize) < Way::ALL.len();
            let turn = if is_small { self.incarnations[index] } else { 0 };
            let way = Way::ALL[(index + turn) % Way::ALL.len()];
            self.incarnations[index] += 1;
            let role = Role {
                shape: self.shape.clone(),
                rank: birth.rank.0,
                takeover: birth.takes_over,
                way,
                draw: self.draws.bits(),
            };
            self.next_id += 1;
            let process = RankProcess::start(self.next_id, role, self.host(birth.rank), &self.sender)?;
            self.observer.note(now_ns, Some(birth.rank), Happened::Started);
            self.procs.push(process);
        }
        Ok(())
    }

    fn host(&self, rank: Rank) -> Host<'_> {
        let (namespaces, per_host) = self.hosts?;
        let (host, local) = (u32::from(rank.0) / per_host, u32::from(rank.0) % per_host);
        Some((namespaces.host(host), Namespaces::address(host, local)))
    }

    fn note_baselines(&mut self) {
        if self.stage == Stage::Running && self.procs.iter().any(|p| !p.has_baseline) && self.is_whole() {
            for process in self.procs.iter_mut().filter(|process| !process.has_baseline) {
                process.has_baseline = true;
                process.tell(&Order::Baseline);
            }
        }
    }

    fn heal(&mut self, now_ns: u64) {
        if self.healing.is_empty() {
            return;
        }
        let is_calm = self.is_whole() && self.observer.is_trusting();
        let (step, finished) = (self.observer.step() + 1, self.observer.step_of_all());
        let ledger = &mut self.observer.ledger;
        self.healing.retain(|(a, b, at_ns, by_step)| {
            if is_calm && now_ns >= *at_ns && finished >= *by_step {
                ledger.healed(*a, *b, step);
            }
            ledger.is_touched(*a, *b)
        });
    }

    fn is_over(&mut self, now_ns: u64, faults_done: bool) -> bool {
        match self.stage {
            Stage::Running => {
                let is_ready = faults_done && self.is_whole() && self.observer.ledger.is_whole();
                if is_ready && self.procs.iter().all(|process| process.has_baseline) {
                    let from = self.observer.step() + AHEAD;
                    let until = (from + CLEAN_STEPS).max(self.steps_wanted);
                    self.observer.expect_clean(until - CLEAN_STEPS);
                    self.tell_all(&Order::Finish { until });
                    self.stage = Stage::Finishing { until };
                }
                false
            }
            Stage::Finishing { .. } => {
                if self.is_whole_and_done() {
                    self.stage = Stage::Ending;
                    self.moved_ns = now_ns;
                    self.tell_all(&Order::End);
                }
                false
            }
            Stage::Ending => self.procs.is_empty(),
        }
    }

    fn is_whole_and_done(&self) -> bool {
        self.births.is_empty()
            && self.procs.len() == self.shape.ranks as usize
            && self.procs.iter().all(|process| process.is_done)
    }

    fn tell_all(&mut self, order: &Order) {
        self.procs.iter_mut().for_each(|process| process.tell(order));
    }

    /// Who stands where, for a message.
    fn describe(&self) -> String {
        let of = |process: &RankProcess| {
            format!(
                "rank {} {}{}{}",
                process.rank(),
                process.seen.instance,
                if process.is_stopped { " stopped" } else { "" },
                if process.is_condemned { " condemned" } else { "" },
            )
        };
        let procs: Vec<String> = self.procs.iter().map(of).collect();
        let (view, births) = (self.observer.view(), &self.births);
        format!("{}; {view:?}; births {births:?}; {:?}", procs.join(", "), self.stage)
    }
}
