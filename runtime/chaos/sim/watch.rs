//! What an observer sees of a group: the view in the store, gates, masks, commands. It judges, and takes the times.
//!
//! The observer believes the store's cell and the devices' traces, and nobody's word. What was injected it learns from
//! the injector, through the [`Ledger`].

use std::collections::BTreeSet;

use ibex_abi::prm::Op;

use super::node::Node;
use super::store::SimStore;
use crate::chaos::app::Finished;
use crate::chaos::fault::FaultKind;
use crate::chaos::ledger::Ledger;
use crate::chaos::report::{Phase, Report};
use crate::chaos::tables::Tables;
use crate::chaos::timeline::{Happened, Timeline};
use crate::error::Evidence;
use crate::ids::Rank;
use crate::membership::{Instance, RankSet, SlotState, View};
use crate::placement::Placement;
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
    /// Who serves what, by step.
    pub(super) tables: Tables,
    /// Views seen.
    version: u64,
    ranks: Vec<Watched>,
    /// Steps from here on must be whole.
    pub(super) clean_from: Option<u64>,
    /// What was found, in words.
    pub(super) flaws: Vec<String>,
    /// By rank: whom it has suspected last, and why.
    suspicions: Vec<String>,
}

impl Watch {
    pub(super) fn new(num_ranks: u32, first: Placement) -> Self {
        Self {
            ledger: Ledger::new(num_ranks),
            report: Report { seeds: 1, ..Report::default() },
            timeline: Timeline::new(num_ranks),
            view: View::empty(num_ranks),
            tables: Tables::new(first),
            version: 0,
            ranks: vec![Watched::default(); num_ranks as usize],
            clean_from: None,
            flaws: Vec::new(),
            suspicions: vec![String::new(); num_ranks as usize],
        }
    }

    pub(super) fn flaw(&mut self, now_ns: u64, text: String) {
        self.timeline.push(now_ns, None, Happened::Flaw(text.clone()));
        self.flaws.push(format!("{:.3} ms: {text}", now_ns as f64 / 1e6));
    }

    /// A process of `rank` has just ended, or stands still for too long.
    pub(super) fn died(&mut self, now_ns: u64, rank: Rank) {
        self.ledger.died(rank);
        let watched = &mut self.ranks[rank.index()];
        if watched.died_ns.is_none() {
            watched.died_ns = Some(now_ns);
            watched.detected_ns = None;
        }
    }

    /// Looks at every view that was written since the last look.
    pub(super) fn look(&mut self, now_ns: u64, store: &SimStore, process: impl Fn(Rank) -> Option<Process>) {
        while let Some(bytes) = store.next_view() {
            self.version += 1;
            let Ok(view) = View::from_bytes(&bytes) else {
                self.report.findings.hangs += 1;
                self.flaw(now_ns, format!("view {} cannot be read", self.version));
                continue;
            };
            self.tables.note_view(&view);
            let old = core::mem::replace(&mut self.view, view);
            self.compare(now_ns, &old, &process);
        }
    }

    /// Only more than half of the members may go on without the others, or half with the lowest.
    fn check_quorum(&mut self, now_ns: u64, old: &View, left: RankSet) {
        let before = old.members().difference(&left);
        let stay = before.intersection(&self.view.members());
        let is_quorum = match (2 * stay.len()).cmp(&before.len()) {
            core::cmp::Ordering::Greater => true,
            core::cmp::Ordering::Equal => before.is_empty() || stay.lowest() == before.lowest(),
            core::cmp::Ordering::Less => false,
        };
        if !is_quorum {
            self.report.findings.false_deaths += 1;
            let (stay, count, epoch) = (stay.len(), before.len(), self.view.epoch.0);
            self.flaw(now_ns, format!("{stay} of {count} members went on without the others, epoch {epoch}"));
        }
    }

    fn compare(&mut self, now_ns: u64, old: &View, process: &dyn Fn(Rank) -> Option<Process>) {
        let left = match &self.view.start {
            Some(start) if Some(start.plan.id) != old.start.as_ref().map(|s| s.plan.id) => start.plan.leave,
            _ => RankSet::default(),
        };
        self.check_quorum(now_ns, old, left);
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
            let said = self.suspicions.join("; ");
            self.flaw(now_ns, format!("rank {rank} was evicted and nothing was done to it; said: {said}"));
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
                Happening::Switched { epoch, from_step, closed_ns } => {
                    self.tables.note_switch(node.rank, epoch, from_step);
                    self.timeline.push(event.at_ns, rank, Happened::GateOpened);
                    if core::mem::replace(&mut node.has_served, true) {
                        self.report.took(Phase::SurvivorPause, closed_ns);
                        self.report.took(Phase::Gate, closed_ns);
                    }
                }
                Happening::Suspected { peer, evidence, fault } => {
                    node.suspected.insert(peer, self.view.slot(peer).instance);
                    self.check_evidence(event.at_ns, node.rank, peer, evidence);
                    let at_ms = event.at_ns as f64 / 1e6;
                    self.suspicions[node.rank.index()] =
                        format!("{at_ms:.3} ms: {} suspects {peer}: {evidence:?}, {fault:?}", node.rank);
                }
                _ => {}
            }
        }
        self.check_suspicions(now_ns, node);
        self.look_at_commands(now_ns, node);
    }

    /// A member that lives tells everybody in every step whether it has lost them: nobody waits for it until its
    /// patience is over. Where a queue pair has failed, it may be unable to.
    fn check_evidence(&mut self, at_ns: u64, rank: Rank, peer: Rank, evidence: Evidence) {
        let has_failed = self.report.fault_counts.contains_key(&FaultKind::QpError);
        if matches!(evidence, Evidence::Stalled { .. }) && !has_failed {
            self.report.findings.hangs += 1;
            self.flaw(at_ns, format!("rank {rank} waited in vain for {peer}, which lives: {evidence:?}"));
        }
    }

    /// A process that a rank has stopped waiting for stays suspected until it is gone.
    fn check_suspicions(&mut self, now_ns: u64, node: &mut Node) {
        let suspects = node.keeper.membership().suspects();
        let forgotten = node.suspected.extract_if(.., |peer, instance| {
            self.view.holder(*peer) != Some(*instance) || !suspects.contains(*peer)
        });
        for (peer, instance) in forgotten.collect::<Vec<_>>() {
            let known = node.keeper.membership().view().holder(peer);
            if self.view.holder(peer) == Some(instance) && known == Some(instance) {
                self.report.findings.hangs += 1;
                self.flaw(now_ns, format!("rank {} trusts {peer} again, which it had given up", node.rank));
            }
        }
    }

    /// A command on a queue pair whose both ends are members is one too many.
    pub(super) fn look_at_commands(&mut self, now_ns: u64, node: &mut Node) {
        let Some(records) = node.commands(self.version) else { return };
        let members: Vec<(Rank, Instance)> = {
            let of = |rank: Rank| (rank, self.view.slot(rank).instance);
            self.view.members().iter().map(of).collect()
        };
        let me = (node.rank, node.instance);
        let mut touched = Vec::new();
        node.take_in(&records, |record, peer| {
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
        let is_excess = |owner: &&Option<Rank>| match owner {
            Some(owner) => is_clean || !self.ledger.explains(rank, *owner, step.step),
            None => true,
        };
        let excess: Vec<Option<Rank>> = step.lost.iter().filter(is_excess).copied().collect();
        self.report.lost_picks += lost;
        if !excess.is_empty() {
            self.report.findings.excess_losses += excess.len() as u64;
            let owners: BTreeSet<String> =
                excess.iter().map(|owner| owner.map_or("nobody".into(), |rank| rank.to_string())).collect();
            let (step, count, said) = (step.step, excess.len(), self.suspicions.join("; "));
            let owners = owners.into_iter().collect::<Vec<_>>().join(", ");
            self.flaw(
                now_ns,
                format!(
                    "rank {rank}, step {step}: {count} picks of {owners} lost without a reason; said: {said}"
                ),
            );
        }
    }

    /// Whether somebody of the group is gone and not replaced, or on its way.
    pub(super) fn is_settled(&self, expected: &RankSet) -> bool {
        self.view.members() == *expected && self.view.plan.is_none()
    }
}
