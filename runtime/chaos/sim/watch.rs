//! What an observer sees of a group: the view in the store, gates, masks, commands. It judges, and takes the times.
//!
//! The observer believes the store's cell and the devices' traces, and nobody's word. What was injected it learns from
//! the injector, through the [`Ledger`].

use ibex_abi::prm::Op;

use super::node::Node;
use super::store::SimStore;
use crate::chaos::app::Finished;
use crate::chaos::ledger::Ledger;
use crate::chaos::report::{Phase, Report};
use crate::chaos::timeline::{Happened, Timeline};
use crate::ids::Rank;
use crate::membership::{Instance, RankSet, SlotState, View};
use crate::session::Happening;

/// The newest process of a rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Process {
    pub(super) instance: Instance,
    pub(super) started_ns: u64,
    /// It stands still, for longer than its peers bear.
    pub(super) is_frozen: bool,
}

/// One rank, as the observer follows it.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    died_ns: Option<u64>,
    detected_ns: Option<u64>,
    admitted_ns: Option<u64>,
    /// A member of it is gone, and nobody has taken its place yet.
    is_missing: bool,
}

/// See the module documentation.
pub(super) struct Watch {
    pub(super) ledger: Ledger,
    pub(super) report: Report,
    pub(super) timeline: Timeline,
    pub(super) view: View,
    version: u64,
    ranks: Vec<Watched>,
    /// Steps from here on must be whole.
    pub(super) clean_from: Option<u64>,
    /// What was found, in words.
    pub(super) flaws: Vec<String>,
}

impl Watch {
    pub(super) fn new(num_ranks: u32) -> Self {
        Self {
            ledger: Ledger::new(num_ranks),
            report: Report { seeds: 1, ..Report::default() },
            timeline: Timeline::new(num_ranks),
            view: View::empty(num_ranks),
            version: 0,
            ranks: vec![Watched::default(); num_ranks as usize],
            clean_from: None,
            flaws: Vec::new(),
        }
    }

    pub(super) fn flaw(&mut self, now_ns: u64, text: String) {
        self.timeline.push(now_ns, None, Happened::Flaw(text.clone()));
        self.flaws.push(format!("{:.3} ms: {text}", now_ns as f64 / 1e6));
    }

    /// A process of `rank` has just ended, or stands still for too long.
    pub(super) fn died(&mut self, now_ns: u64, rank: Rank) {
        self.ledger.touch_rank(rank);
        let watched = &mut self.ranks[rank.index()];
        if watched.died_ns.is_none() {
            watched.died_ns = Some(now_ns);
            watched.detected_ns = None;
        }
    }

    /// Looks at the view's cell; whether it has changed.
    pub(super) fn look(
        &mut self,
        now_ns: u64,
        store: &SimStore,
        process: impl Fn(Rank) -> Option<Process>,
    ) -> bool {
        let (version, bytes) = store.view();
        if version == self.version {
            return false;
        }
        self.version = version;
        let Ok(view) = View::from_bytes(&bytes) else {
            self.report.findings.hangs += 1;
            self.flaw(now_ns, format!("version {version} of the view cannot be read"));
            return false;
        };
        let old = core::mem::replace(&mut self.view, view);
        self.compare(now_ns, &old, &process);
        true
    }

    fn compare(&mut self, now_ns: u64, old: &View, process: &dyn Fn(Rank) -> Option<Process>) {
        let left = match &self.view.start {
            Some(start) if Some(start.plan.id) != old.start.as_ref().map(|s| s.plan.id) => start.plan.leave,
            _ => RankSet::default(),
        };
        let mut joined = Vec::new();
        for index in 0..self.ranks.len() {
            // CAST: at most 512 ranks.
            let rank = Rank(index as u16);
            let (before, after) = (old.slot(rank), self.view.slot(rank));
            match (before.state, after.state) {
                (SlotState::Member, SlotState::Vacant) if !left.contains(rank) => self.evicted(now_ns, rank),
                (SlotState::Member, SlotState::Member | SlotState::Joining)
                    if before.instance != after.instance =>
                {
                    self.evicted(now_ns, rank);
                }
                (_, SlotState::Joining) if before.state != SlotState::Joining => {
                    self.ranks[index].admitted_ns = Some(now_ns);
                }
                (SlotState::Joining, SlotState::Member) => joined.push(rank),
                _ => {}
            }
        }
        if let Some(plan) = self.view.plan.filter(|plan| old.plan.map(|p| p.id) != Some(plan.id)) {
            for rank in plan.join.iter() {
                if let Some(admitted) = self.ranks[rank.index()].admitted_ns.take() {
                    self.report.took(Phase::Recreate, now_ns - admitted);
                }
            }
        }
        if self.view.epoch != old.epoch {
            let epoch = self.view.epoch;
            self.timeline.push(now_ns, None, Happened::Epoch(epoch, self.view.members()));
        }
        if !joined.is_empty() {
            self.joined(now_ns, &joined, process);
        }
    }

    fn evicted(&mut self, now_ns: u64, rank: Rank) {
        self.report.kills += 1;
        self.timeline.push(now_ns, Some(rank), Happened::Evicted);
        if !self.ledger.evicted(rank) {
            self.report.findings.false_deaths += 1;
            self.flaw(now_ns, format!("rank {rank} was evicted and nothing was done to it"));
        }
        let watched = &mut self.ranks[rank.index()];
        watched.is_missing = true;
        watched.died_ns = None;
        if let Some(detected) = watched.detected_ns.take() {
            self.report.took(Phase::Agree, now_ns - detected);
        }
    }

    fn joined(&mut self, now_ns: u64, joined: &[Rank], process: &dyn Fn(Rank) -> Option<Process>) {
        let from_step = self.view.start.as_ref().map_or(0, |start| start.from_step);
        self.ledger.joined(joined, from_step);
        for &rank in joined {
            self.timeline.push(now_ns, Some(rank), Happened::Joined);
            let present = process(rank).filter(|p| p.instance == self.view.slot(rank).instance);
            if core::mem::take(&mut self.ranks[rank.index()].is_missing) {
                self.report.rejoins += 1;
                if let Some(process) = present {
                    self.report.took(Phase::Rejoin, now_ns - process.started_ns);
                }
            }
            if present.is_none_or(|process| process.is_frozen) {
                // It died, or stands still, since its last word was written.
                self.died(now_ns, rank);
            }
        }
    }

    /// Looks at one running process: whom it masks, its gate, its commands.
    pub(super) fn look_at(&mut self, now_ns: u64, node: &mut Node) {
        for suspect in node.keeper.membership().suspects().iter() {
            let watched = &mut self.ranks[suspect.index()];
            if watched.detected_ns.is_none() && self.view.slot(suspect).state == SlotState::Member {
                watched.detected_ns = Some(now_ns);
                self.timeline.push(now_ns, Some(node.rank), Happened::Suspects(suspect));
                if let Some(died) = watched.died_ns {
                    self.report.took(Phase::Detected, now_ns - died);
                }
            }
        }
        for event in node.keeper.take_events() {
            let rank = Some(node.rank);
            match event.what {
                Happening::GateClosed { .. } => self.timeline.push(event.at_ns, rank, Happened::GateClosed),
                Happening::GateOpened { closed_ns } => {
                    self.timeline.push(event.at_ns, rank, Happened::GateOpened);
                    self.report.took(Phase::SurvivorPause, closed_ns);
                }
                Happening::Switched { closed_ns, .. } => {
                    self.timeline.push(event.at_ns, rank, Happened::GateOpened);
                    if core::mem::replace(&mut node.has_served, true) {
                        self.report.took(Phase::SurvivorPause, closed_ns);
                        self.report.took(Phase::Gate, closed_ns);
                    }
                }
                _ => {}
            }
        }
        self.look_at_commands(now_ns, node);
    }

    /// A command on a queue pair whose both ends are members is one too many.
    pub(super) fn look_at_commands(&mut self, now_ns: u64, node: &mut Node) {
        let members: Vec<(Rank, Instance)> = {
            let of = |rank: Rank| (rank, self.view.slot(rank).instance);
            self.view.members().iter().map(of).collect()
        };
        let me = (node.rank, node.instance);
        let mut touched = Vec::new();
        node.take_commands(|record, peer| {
            let harms = matches!(
                record.op,
                Some(Op::ToErrQp | Op::ToRstQp | Op::DestroyQp | Op::Rst2InitQp | Op::Init2RtrQp)
            );
            let is_healthy = |one: &(Rank, Instance)| members.contains(one) && members.contains(&me);
            if let Some(peer) = peer.filter(|peer| harms && is_healthy(peer)) {
                touched.push((record.op, peer.0));
            }
        });
        for (op, peer) in touched {
            self.report.findings.healthy_qps_touched += 1;
            self.flaw(now_ns, format!("rank {}: {op:?} on a queue pair to healthy rank {peer}", me.0));
        }
        for (peer, instance) in members.into_iter().filter(|(peer, _)| *peer != me.0) {
            node.learn_peer(peer, instance);
        }
    }

    /// Judges a finished step.
    pub(super) fn finished(&mut self, now_ns: u64, rank: Rank, step: &Finished) {
        self.report.steps += 1;
        let lost = step.lost.len() as u64;
        self.timeline.push(
            now_ns,
            Some(rank),
            Happened::Step { step: step.step, since_ns: step.launched_ns, lost },
        );
        self.report.findings.wrong_tokens += step.wrong;
        self.report.findings.unreported_losses += step.unreported;
        if step.wrong + step.unreported != 0 {
            let Finished { step, wrong, unreported, .. } = step;
            self.flaw(
                now_ns,
                format!("rank {rank}, step {step}: {wrong} wrong, {unreported} unreported losses"),
            );
        }
        let is_clean = self.clean_from.is_some_and(|from| step.step >= from);
        let excess = step.lost.iter().filter(|owner| match owner {
            Some(owner) => is_clean || !self.ledger.explains(rank, *owner, step.step),
            None => true,
        });
        let excess = excess.count() as u64;
        self.report.lost_picks += lost;
        if excess != 0 {
            self.report.findings.excess_losses += excess;
            let step = step.step;
            self.flaw(now_ns, format!("rank {rank}, step {step}: {excess} picks lost without a reason"));
        }
    }

    /// Whether somebody of the group is gone and not replaced, or on its way.
    pub(super) fn is_settled(&self) -> bool {
        self.view.members().len() == self.ranks.len() && self.view.plan.is_none()
    }
}
