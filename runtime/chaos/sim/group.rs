//! A simulated group whose processes come and go: one turn of everything that is not a kernel or a device.
//!
//! The pool asks [`Group::turn`] between any two steps of its schedule. There the store delivers, keepers act, ranks
//! compute, faults strike and processes start; nothing of it waits. Time is the pool's.

use std::sync::Arc;

use super::agents::Agents;
use super::changes::Changer;
use super::inject::Injector;
use super::node::{Ground, Holdings, Motion, Node};
use super::watch::{Process, Watch};
use crate::chaos::draws::Draws;
use crate::chaos::inputs::{Inputs, THINK_NS_MAX};
use crate::chaos::plan::{CLEAN_STEPS, Plan};
use crate::chaos::timeline::Happened;
use crate::error::Error;
use crate::ids::Rank;
use crate::membership::{RankSet, Standing, Stop};
use crate::placement::Placement;

/// Nothing is done in most turns in which no time has passed: a look costs more than a step of the schedule.
const TURNS_PER_LOOK: u64 = 8;
/// Keepers act in one of so many looks, wherever the kernels stand then.
const KEEPER_LOOKS: u64 = 8;
/// How long a process that could not claim its name waits before it tries again.
const CLAIM_RETRY_NS: u64 = 1_000_000;
/// A group that is not whole and at rest after this time of the simulation never will be.
const GIVE_UP_NS: u64 = 60_000_000_000;
/// The same in turns of the schedule.
const GIVE_UP_TURNS: u64 = 20_000_000;

/// A process that is to start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Birth {
    pub(super) rank: Rank,
    pub(super) at_ns: u64,
    /// Its predecessor is known to be dead: its name need not wait for the lease.
    pub(super) takes_over: bool,
}

/// See the module documentation.
pub(super) struct Group {
    pub(super) nodes: Vec<Node>,
    pub(super) births: Vec<Birth>,
    pub(super) watch: Watch,
    pub(super) ground: Ground,
    pub(super) agents: Arc<Agents>,
    pub(super) draws: Draws,
    /// Who is to be a member, once nobody is missing.
    pub(super) expected: RankSet,
    /// Victims are taken as planned.
    pub(super) is_reckless: bool,
    injector: Option<Injector>,
    changer: Option<Changer>,
    inputs: Inputs,
    steps_wanted: u64,
    next_id: u32,
    turns: u64,
    last_now_ns: u64,
    /// By rank: what it held when the group was first whole.
    holdings: Vec<Option<Holdings>>,
    /// Pairs that a fault has touched and may have left unharmed: when that can be said.
    healing: Vec<(Rank, Rank, u64)>,
    is_stopping: bool,
    failed: Option<Error>,
}

impl Group {
    pub(super) fn new(plan: &Plan, ground: Ground, agents: Arc<Agents>) -> Result<Self, Error> {
        let mut draws = Draws::new(plan.seed, 5);
        let num_ranks = ground.config.num_ranks;
        // CAST: at most 512 ranks.
        let birth = |rank: u16| Birth { rank: Rank(rank), at_ns: draws.below(5_000_000), takes_over: false };
        let births = (0..plan.initial() as u16).map(birth).collect();
        let expected = RankSet::first(plan.initial());
        // What a keeper begins with.
        let first = Placement::contiguous(&ground.config, 1, &expected)?;
        Ok(Self {
            nodes: Vec::new(),
            births,
            watch: Watch::new(num_ranks, first),
            expected,
            is_reckless: plan.is_reckless,
            inputs: Inputs::new(plan.seed, &ground.config),
            injector: Some(Injector::new(plan)),
            changer: Some(Changer::new(plan)),
            steps_wanted: plan.steps,
            next_id: 0,
            turns: 0,
            last_now_ns: 0,
            holdings: vec![None; num_ranks as usize],
            healing: Vec::new(),
            is_stopping: false,
            failed: None,
            ground,
            agents,
            draws,
        })
    }

    /// The newest process of a rank that is not known to have lost it.
    pub(super) fn node(&self, rank: Rank) -> Option<&Node> {
        self.nodes.iter().rev().find(|node| node.rank == rank)
    }

    pub(super) fn node_mut(&mut self, rank: Rank) -> Option<&mut Node> {
        self.nodes.iter_mut().rev().find(|node| node.rank == rank)
    }

    /// The furthest step that any rank would begin next.
    pub(super) fn step(&self) -> u64 {
        self.nodes.iter().map(|node| node.session.next_step()).max().unwrap_or(0)
    }

    /// Whether a process of the rank runs as a member.
    pub(super) fn is_serving(&self, rank: Rank) -> bool {
        self.node(rank).is_some_and(|node| {
            node.motion == Motion::Runs
                && node.keeper.is_serving()
                && node.keeper.membership().standing() == Standing::Member
                && self.watch.view.holder(rank) == Some(node.instance)
        })
    }

    /// Everybody is a member, runs, and is not switching.
    pub(super) fn is_whole(&self) -> bool {
        self.watch.is_settled(&self.expected)
            && self.births.is_empty()
            && self.nodes.len() == self.expected.len()
            && self.nodes.iter().all(|node| !node.session.is_gate_closed())
            && self.expected.iter().all(|rank| self.is_serving(rank))
    }

    /// One turn; whether the campaign is over.
    pub(super) fn turn(&mut self) -> bool {
        match self.try_turn() {
            Ok(over) => over,
            Err(error) => {
                self.failed = Some(error);
                true
            }
        }
    }

    pub(super) fn take_failure(&mut self) -> Option<Error> {
        self.failed.take()
    }

    fn try_turn(&mut self) -> Result<bool, Error> {
        let now_ns = self.ground.pool.now_ns();
        self.turns += 1;
        let moved = now_ns != self.last_now_ns;
        if !moved && !self.turns.is_multiple_of(TURNS_PER_LOOK) {
            return Ok(false);
        }
        let heard = moved && self.ground.store.advance(now_ns);
        self.last_now_ns = now_ns;
        self.agents.stir();
        if heard || moved || self.draws.one_in(KEEPER_LOOKS) {
            self.keep(now_ns)?;
            self.start_processes(now_ns)?;
        }
        // A group that is being repaired computes in longer steps: what counts there is what time does.
        let is_repaired = self.watch.ledger.is_whole() && self.births.is_empty();
        self.inputs.think_ns_max = if is_repaired { THINK_NS_MAX } else { 5 * THINK_NS_MAX };
        self.compute(now_ns)?;
        self.nudge_slow(now_ns)?;
        let (is_done, injector_due) = self.disturb(now_ns)?;
        self.set_next_due(now_ns, injector_due);
        self.is_over(now_ns, is_done)
    }

    /// Lets faults strike and changes begin; whether all of them are over, and when the next one is due.
    fn disturb(&mut self, now_ns: u64) -> Result<(bool, Option<u64>), Error> {
        let mut injector = self.injector.take().expect("put back below");
        let mut changer = self.changer.take().expect("put back below");
        let struck = injector.turn(self, now_ns, changer.is_busy());
        let may_begin = injector.is_at_rest() && self.is_whole() && self.watch.ledger.is_whole();
        changer.turn(self, now_ns, may_begin);
        let is_done = injector.is_done() && changer.is_done();
        let due = injector.next_due();
        (self.injector, self.changer) = (Some(injector), Some(changer));
        struck.map(|()| (is_done, due))
    }

    /// Lets keepers act, and looks at what they did.
    fn keep(&mut self, now_ns: u64) -> Result<(), Error> {
        let mut stopped = Vec::new();
        for index in 0..self.nodes.len() {
            let node = &mut self.nodes[index];
            if node.motion == Motion::Frozen {
                continue;
            }
            if now_ns >= node.ready_ns {
                node.session.ready(u128::from(node.id));
                node.ready_ns = u64::MAX;
            }
            match node.keeper.step(now_ns) {
                Ok(due) => node.next_keeper_ns = due,
                Err(stop) => stopped.push((node.id, stop)),
            }
            self.look(now_ns);
            self.watch.look_at(now_ns, &mut self.nodes[index]);
        }
        self.look(now_ns);
        self.heal(now_ns);
        for (id, stop) in stopped {
            self.stopped(now_ns, id, stop)?;
        }
        Ok(())
    }

    fn look(&mut self, now_ns: u64) {
        let nodes = &self.nodes;
        let of = |node: &Node| Process {
            instance: node.instance,
            started_ns: node.started_ns,
            is_frozen: node.is_zombie,
        };
        let process = |rank| nodes.iter().rev().find(|node| node.rank == rank).map(of);
        self.watch.look(now_ns, &self.ground.store, process);
    }

    /// A process has been told to stop: it ends, and another one comes.
    fn stopped(&mut self, now_ns: u64, id: u32, stop: Stop) -> Result<(), Error> {
        let Some(index) = self.nodes.iter().position(|node| node.id == id) else { return Ok(()) };
        let node = &self.nodes[index];
        let (rank, is_newest) = (node.rank, self.node(node.rank).is_some_and(|newest| newest.id == id));
        self.watch.timeline.push(now_ns, Some(rank), Happened::Stopped(stop.to_string()));
        let has_left = matches!(stop, Stop::Left { .. }) && !self.expected.contains(rank);
        if !has_left && !matches!(stop, Stop::Fenced { .. }) {
            self.watch.report.findings.hangs += 1;
            self.watch.flaw(now_ns, format!("rank {rank} stopped: {stop}"));
        }
        self.end(now_ns, index)?;
        if is_newest && !has_left && !self.births.iter().any(|birth| birth.rank == rank) {
            let at_ns = now_ns + self.draws.between(100_000, 5_000_000);
            self.births.push(Birth { rank, at_ns, takes_over: true });
        }
        Ok(())
    }

    /// Ends a process as kill -9 does.
    pub(super) fn end(&mut self, now_ns: u64, index: usize) -> Result<(), Error> {
        let mut node = self.nodes.remove(index);
        self.watch.look_at_commands(now_ns, &mut node);
        self.agents.remove(node.id);
        self.watch.timeline.push(now_ns, Some(node.rank), Happened::Died);
        let (rank, left) = (node.rank, node.end()?);
        if left != 0 {
            self.watch.report.findings.leaked_bytes += left;
            self.watch.flaw(now_ns, format!("a process of rank {rank} left {left} bytes or objects behind"));
        }
        Ok(())
    }

    fn start_processes(&mut self, now_ns: u64) -> Result<(), Error> {
        for birth in core::mem::take(&mut self.births) {
            if birth.at_ns > now_ns {
                self.births.push(birth);
                continue;
            }
            let draws = Draws::new(self.draws.bits(), 6);
            match Node::start(&self.ground, birth.rank, self.next_id, birth.takes_over, draws)? {
                Some(node) => {
                    let first_beat = now_ns + self.draws.below(1_000_000);
                    self.agents.add(node.id, &node.device, &node.session, first_beat);
                    self.watch.timeline.push(now_ns, Some(node.rank), Happened::Started);
                    self.nodes.push(node);
                    self.next_id += 1;
                }
                None => self.births.push(Birth { at_ns: now_ns + CLAIM_RETRY_NS, ..birth }),
            }
        }
        Ok(())
    }

    /// A path is whole again. Unless somebody is evicted for it, the pair counts as whole once every retry of that
    /// time has been answered.
    pub(super) fn heal_if_unharmed(&mut self, now_ns: u64, a: Rank, b: Rank) {
        let retry_ns = self.ground.config.rc_timers().timeout_ns();
        self.healing.push((a, b, now_ns + 2 * retry_ns));
    }

    fn heal(&mut self, now_ns: u64) {
        let suspects_nobody = |node: &Node| node.keeper.membership().suspects().is_empty();
        let is_calm = self.is_whole() && self.nodes.iter().all(suspects_nobody);
        let step = self.step();
        let watch = &mut self.watch;
        self.healing.retain(|(a, b, at_ns)| {
            if is_calm && now_ns >= *at_ns {
                watch.ledger.healed(*a, *b, step);
            }
            watch.ledger.is_touched(*a, *b)
        });
    }

    /// Lets every rank go on with its step, or begin the next.
    fn compute(&mut self, now_ns: u64) -> Result<(), Error> {
        let hang_ns = 3 * u64::from(self.ground.config.num_ranks * self.ground.config.stall_ms()) * 1_000_000;
        for node in &mut self.nodes {
            if node.motion == Motion::Frozen {
                continue;
            }
            let may_begin = node.keeper.is_serving() && !self.is_stopping;
            match node.app.turn(now_ns, &mut self.inputs, &self.watch.tables, may_begin) {
                Ok(Some(finished)) => {
                    if now_ns - finished.launched_ns > hang_ns {
                        self.watch.report.findings.hangs += 1;
                        let took = (now_ns - finished.launched_ns) / 1_000_000;
                        self.watch.flaw(now_ns, format!("step {} took {took} ms", finished.step));
                    }
                    self.watch.finished(now_ns, node.rank, &finished);
                }
                Ok(None) => {}
                Err(Error::Gated(_)) => node.app.wait_until(now_ns + 200_000),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A slow rank's kernels stand still most of the time.
    fn nudge_slow(&mut self, now_ns: u64) -> Result<(), Error> {
        /// Turns of the schedule in a row, and the pause after them.
        const TURNS: u32 = 12;
        for node in &mut self.nodes {
            let Motion::Slow { again_ns, turns } = node.motion else { continue };
            node.motion = match turns {
                0 if now_ns >= again_ns => {
                    node.gpu.set_frozen(false)?;
                    Motion::Slow { again_ns, turns: TURNS }
                }
                0 => continue,
                1 => {
                    node.gpu.set_frozen(true)?;
                    Motion::Slow { again_ns: now_ns + self.draws.between(50_000, 500_000), turns: 0 }
                }
                left => Motion::Slow { again_ns, turns: left - 1 },
            };
        }
        Ok(())
    }

    fn set_next_due(&self, now_ns: u64, injector_due: Option<u64>) {
        let of_node = |node: &Node| {
            let slow = match node.motion {
                Motion::Slow { again_ns, turns: 0 } => Some(again_ns),
                Motion::Frozen => return None,
                _ => None,
            };
            [Some(node.next_keeper_ns), Some(node.ready_ns), node.app.next_due(), slow]
                .into_iter()
                .flatten()
                .filter(|due| *due > now_ns)
                .min()
        };
        let births = self.births.iter().map(|birth| birth.at_ns);
        let healing = self.healing.iter().map(|(.., at_ns)| *at_ns);
        let nodes = self.nodes.iter().filter_map(of_node);
        let others = [self.ground.store.next_due(), injector_due].into_iter().flatten();
        let due = births.chain(healing).chain(nodes).chain(others).filter(|due| *due > now_ns).min();
        self.agents.set_next_due(due.unwrap_or(u64::MAX));
    }

    fn is_over(&mut self, now_ns: u64, faults_done: bool) -> Result<bool, Error> {
        if now_ns > GIVE_UP_NS || self.turns > GIVE_UP_TURNS {
            self.watch.report.findings.hangs += 1;
            self.watch.flaw(now_ns, format!("not at rest: {}", self.describe()));
            return Ok(true);
        }
        if self.is_stopping {
            return Ok(self.nodes.iter().all(|node| node.app.running_since().is_none()));
        }
        if !self.is_whole() {
            return Ok(false);
        }
        if self.holdings.iter().any(Option::is_none) {
            self.note_holdings(now_ns);
        }
        if !faults_done || !self.watch.ledger.is_whole() {
            return Ok(false);
        }
        let step = self.step();
        let from = *self.watch.clean_from.get_or_insert(step);
        let until = (from + CLEAN_STEPS).max(self.steps_wanted);
        self.is_stopping = self.nodes.iter().all(|node| node.session.next_step() >= until);
        Ok(false)
    }

    fn note_holdings(&mut self, now_ns: u64) {
        for node in &mut self.nodes {
            self.watch.look_at_commands(now_ns, node);
            let noted = self.holdings[node.rank.index()].replace(node.holdings());
            if noted.is_none() {
                let peers = self.expected.iter().filter(|peer| *peer != node.rank);
                peers.for_each(|peer| self.watch.report.count_route(node.session.route(peer).route));
            }
        }
    }

    /// Judges what every process holds at the end, and ends all of them.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        let now_ns = self.ground.pool.now_ns();
        for index in 0..self.nodes.len() {
            let node = &mut self.nodes[index];
            self.watch.look_at_commands(now_ns, node);
            let (rank, now) = (node.rank, node.holdings());
            let grown = self.holdings[rank.index()].as_ref().map_or(0, |before| now.beyond(before));
            let recaptured = node.app.recaptures();
            self.watch.report.findings.graph_recaptures += recaptured;
            if grown != 0 && self.is_stopping {
                self.watch.report.findings.leaked_bytes += grown;
                let before = &self.holdings[rank.index()];
                self.watch.flaw(now_ns, format!("rank {rank} holds {grown} more: {before:?}, now {now:?}"));
            }
            let unrung = self.nodes[index].device.check_unrung();
            if unrung != 0 {
                self.watch.report.findings.hangs += 1;
                self.watch.flaw(now_ns, format!("rank {rank}: {unrung} WQEs without a doorbell"));
            }
        }
        while !self.nodes.is_empty() {
            self.end(now_ns, 0)?;
        }
        Ok(())
    }

    /// Who stands where, for a message.
    fn describe(&self) -> String {
        let of = |node: &Node| {
            let membership = node.keeper.membership();
            format!(
                "rank {} {:?} {:?}, step {}, gate {}, applied {}, suspects {:?}, {:?}",
                node.rank,
                membership.standing(),
                node.motion,
                node.session.next_step(),
                if node.session.is_gate_closed() { "closed" } else { "open" },
                membership.applied().0,
                membership.suspects().iter().collect::<Vec<_>>(),
                node.app.stage(),
            )
        };
        let nodes: Vec<String> = self.nodes.iter().map(of).collect();
        format!("{}; view {:?}; births {:?}", nodes.join("; "), self.watch.view, self.births)
    }
}
