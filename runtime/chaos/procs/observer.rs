//! What an observer sees of a group of processes. It judges, and takes the times.
//!
//! Pure: words and views are handed to it with their times. It believes the store's cell for who is a member, and what
//! was injected it learns from the injector, through the [`Ledger`]. Words of different ranks, and the view, arrive in
//! any order; so a loss is judged by the step it belongs to, and a step under an epoch that has not been seen yet
//! waits for it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::line::{Said, StepWord, Why, Word};
use crate::chaos::FaultKind;
use crate::chaos::ledger::Ledger;
use crate::chaos::report::{Phase, Report};
use crate::chaos::timeline::{Happened, Timeline};
use crate::ids::Rank;
use crate::membership::{Instance, SlotState, View};

/// The newest process of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Which incarnation it says it is; none before it said so.
    pub instance: Instance,
    /// When it was started.
    pub started_ns: u64,
    /// It stands still until it was evicted, or is dead.
    pub is_doomed: bool,
}

/// One fault, as it went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FaultEntry {
    /// When it struck, in milliseconds since the campaign began.
    pub at_ms: u64,
    /// What.
    pub kind: FaultKind,
    /// To whom first.
    pub rank: u16,
    /// Whether a victim has ended by itself, in the moment it was told.
    pub at_moment: bool,
    /// How long until the group was whole again, as far as that was seen before the next fault.
    pub took_ms: Option<u64>,
}

/// A member that was evicted although nothing was done to it; why is said at the end, when its own word is known.
#[derive(Clone, Debug)]
struct FalseDeath {
    at_ns: u64,
    rank: Rank,
    instance: Instance,
    reason: String,
}

/// How late a process was by its own clock, at worst.
#[derive(Clone, Copy, Debug, Default)]
struct Late {
    silent_ns: u64,
    unattended_ns: u64,
    at_ns: u64,
}

/// One rank, as the observer follows it.
#[derive(Clone, Debug, Default)]
struct Watched {
    died_ns: Option<u64>,
    /// The first suspicion since, and why.
    detected: Option<(u64, Why)>,
    /// What the first who suspected it knew.
    reason: String,
    admitted_ns: Option<u64>,
    /// A member of it is gone, and nobody has taken its place yet.
    is_missing: bool,
    /// The newest step and epoch that it has finished.
    finished: Option<(u64, u32)>,
    is_gate_closed: bool,
    /// What was refused to it last.
    refused: String,
    /// When it was last stopped on purpose, or went on.
    stopped_ns: Option<u64>,
}

/// See the module documentation.
pub struct Observer {
    /// What was injected.
    pub ledger: Ledger,
    /// What was found so far.
    pub report: Report,
    /// What happened when.
    pub timeline: Timeline,
    /// What is wrong, in words.
    pub flaws: Vec<String>,
    /// Bytes of expert weights that replacements have read.
    pub weights_bytes: u64,
    /// How suspicions began, by what was seen first.
    pub reasons: BTreeMap<Why, u64>,
    view: View,
    ranks: Vec<Watched>,
    /// Who no longer waits for whom.
    suspicions: BTreeSet<(Rank, Rank)>,
    /// Steps that have lost something, until the view has caught up with them.
    waiting: Vec<(u64, (Rank, Instance), StepWord)>,
    clean_from: Option<u64>,
    false_deaths: Vec<FalseDeath>,
    late: BTreeMap<(Rank, Instance), Late>,
    /// The longest that anybody was silent who was not stopped.
    longest_silence_ns: u64,
    faults: Vec<FaultEntry>,
    hang_ns: u64,
    origin_ns: u64,
}

impl Observer {
    /// An observer of a group that has not met. A step that takes longer than `hang_ns` hangs.
    #[must_use]
    pub fn new(num_ranks: u32, hang_ns: u64, now_ns: u64) -> Self {
        Self {
            ledger: Ledger::new(num_ranks),
            report: Report { seeds: 1, ..Report::default() },
            timeline: Timeline::new(num_ranks),
            flaws: Vec::new(),
            weights_bytes: 0,
            reasons: BTreeMap::new(),
            view: View::empty(num_ranks),
            ranks: vec![Watched::default(); num_ranks as usize],
            suspicions: BTreeSet::new(),
            waiting: Vec::new(),
            clean_from: None,
            false_deaths: Vec::new(),
            late: BTreeMap::new(),
            longest_silence_ns: 0,
            faults: Vec::new(),
            hang_ns,
            origin_ns: now_ns,
        }
    }

    /// The newest view.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// Puts an entry on the timeline.
    pub fn note(&mut self, now_ns: u64, rank: Option<Rank>, what: Happened) {
        self.timeline.push(now_ns.saturating_sub(self.origin_ns), rank, what);
    }

    /// A fault strikes.
    pub fn struck(&mut self, now_ns: u64, rank: Rank, kind: FaultKind) {
        self.report.count_fault(kind);
        self.note(now_ns, Some(rank), Happened::Fault(format!("{kind} {rank}")));
        let at_ms = now_ns.saturating_sub(self.origin_ns) / 1_000_000;
        self.faults.push(FaultEntry { at_ms, kind, rank: rank.0, at_moment: false, took_ms: None });
    }

    /// The group is whole, and nothing of any fault is left.
    pub fn is_whole_again(&mut self, now_ns: u64) {
        let at_ms = now_ns.saturating_sub(self.origin_ns) / 1_000_000;
        for fault in self.faults.iter_mut().rev().take_while(|fault| fault.took_ms.is_none()) {
            fault.took_ms = Some(at_ms.saturating_sub(fault.at_ms));
        }
    }

    /// Every fault so far.
    #[must_use]
    pub fn fault_log(&self) -> &[FaultEntry] {
        &self.faults
    }

    /// The process of `rank` was stopped, or goes on: by its own clock it is silent meanwhile.
    pub fn stopped(&mut self, now_ns: u64, rank: Rank, is_stopped: bool) {
        self.note(now_ns, Some(rank), Happened::Frozen(is_stopped));
        self.ranks[rank.index()].stopped_ns = Some(now_ns);
    }

    /// The longest that any rank was silent by its own clock, those aside that were stopped meanwhile.
    #[must_use]
    pub fn longest_silence_ns(&self) -> u64 {
        self.longest_silence_ns
    }

    /// Something is wrong.
    pub fn flaw(&mut self, now_ns: u64, text: String) {
        // CAST: times far below 2^53 ns.
        let at = now_ns.saturating_sub(self.origin_ns) as f64 / 1e6;
        self.note(now_ns, None, Happened::Flaw(text.clone()));
        self.flaws.push(format!("{at:.3} ms: {text}"));
    }

    /// Something did not end, or ended as it should not.
    pub fn hang(&mut self, now_ns: u64, text: String) {
        self.report.findings.hangs += 1;
        self.flaw(now_ns, text);
    }

    /// A process of `rank` ends now, or stands still for too long.
    pub fn died(&mut self, now_ns: u64, rank: Rank) {
        self.ledger.died(rank);
        let watched = &mut self.ranks[rank.index()];
        if watched.died_ns.is_none() {
            (watched.died_ns, watched.detected) = (Some(now_ns), None);
        }
    }

    /// The process whose death was foreseen has ended just now.
    pub fn died_at(&mut self, now_ns: u64, rank: Rank) {
        if let Some(died_ns) = &mut self.ranks[rank.index()].died_ns {
            *died_ns = now_ns;
        }
    }

    /// Steps from here on must be whole.
    pub fn expect_clean(&mut self, from: u64) {
        self.clean_from = Some(from);
    }

    /// The newest step that any rank has finished.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.ranks.iter().filter_map(|watched| watched.finished).map(|(step, _)| step).max().unwrap_or(0)
    }

    /// The newest step that every rank has finished.
    #[must_use]
    pub fn step_of_all(&self) -> u64 {
        self.ranks.iter().map(|watched| watched.finished.map_or(0, |(step, _)| step)).min().unwrap_or(0)
    }

    /// Whether everybody is a member, is not switching, and has finished a step of the present epoch.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        let has_caught_up = |watched: &Watched| {
            !watched.is_gate_closed && watched.finished.is_some_and(|(_, epoch)| epoch == self.view.epoch.0)
        };
        self.view.members().len() == self.ranks.len()
            && self.view.plan.is_none()
            && self.ranks.iter().all(has_caught_up)
    }

    /// Whether every member waits for every other.
    #[must_use]
    pub fn is_trusting(&self) -> bool {
        self.suspicions.is_empty()
    }

    /// Another version of the view. `process` is the newest process of a rank.
    pub fn see(&mut self, now_ns: u64, view: View, process: &dyn Fn(Rank) -> Option<Seen>) {
        let old = core::mem::replace(&mut self.view, view);
        let mut joined = Vec::new();
        // CAST: at most 512 ranks.
        for rank in (0..self.ranks.len() as u16).map(Rank) {
            let (before, after) = (old.slot(rank), self.view.slot(rank));
            let is_another = before.instance != after.instance;
            if before.state == SlotState::Member && (after.state != SlotState::Member || is_another) {
                self.evicted(now_ns, rank, before.instance);
            }
            let watched = &mut self.ranks[rank.index()];
            match after.state {
                SlotState::Joining if before.state != SlotState::Joining || is_another => {
                    watched.admitted_ns = Some(now_ns);
                }
                SlotState::Member if before.state != SlotState::Member || is_another => joined.push(rank),
                _ => {}
            }
        }
        if let Some(plan) = self.view.plan.filter(|plan| old.plan.map(|p| p.id) != Some(plan.id)) {
            for rank in plan.join.iter() {
                if let Some(admitted) = self.ranks[rank.index()].admitted_ns.take() {
                    self.report.took(Phase::Recreate, now_ns.saturating_sub(admitted));
                }
            }
        }
        if self.view.epoch != old.epoch {
            let what = Happened::Epoch(self.view.epoch, self.view.members());
            self.note(now_ns, None, what);
        }
        if !joined.is_empty() {
            self.joined(now_ns, &joined, process);
        }
        self.judge_waiting();
    }

    fn evicted(&mut self, now_ns: u64, rank: Rank, instance: Instance) {
        self.report.kills += 1;
        self.note(now_ns, Some(rank), Happened::Evicted);
        self.suspicions.retain(|(by, of)| *by != rank && *of != rank);
        if !self.ledger.evicted(rank) {
            self.report.findings.false_deaths += 1;
            let reason = self.ranks[rank.index()].reason.clone();
            self.false_deaths.push(FalseDeath { at_ns: now_ns, rank, instance, reason });
        }
        let watched = &mut self.ranks[rank.index()];
        watched.is_missing = true;
        watched.finished = None;
        watched.reason.clear();
        let died = watched.died_ns.take();
        if let Some((detected, why)) = watched.detected.take() {
            self.report.took(Phase::Agree, now_ns.saturating_sub(detected));
            if let Some(died) = died {
                *self.reasons.entry(why).or_default() += 1;
                self.report.took(Phase::Detected, detected.saturating_sub(died));
            }
        }
        self.forget_suspicions();
    }

    /// Whom only the evicted suspected is suspected no more; for the dead the first suspicion counts.
    fn forget_suspicions(&mut self) {
        for (rank, watched) in (0..).map(Rank).zip(&mut self.ranks) {
            if watched.died_ns.is_none() && !self.suspicions.iter().any(|(_, of)| *of == rank) {
                watched.detected = None;
            }
        }
    }

    fn joined(&mut self, now_ns: u64, joined: &[Rank], process: &dyn Fn(Rank) -> Option<Seen>) {
        let from_step = self.view.start.as_ref().map_or(0, |start| start.from_step);
        self.ledger.joined(joined, from_step);
        for &rank in joined {
            self.note(now_ns, Some(rank), Happened::Joined);
            // Of a predecessor that died before it was a member.
            (self.ranks[rank.index()].died_ns, self.ranks[rank.index()].detected) = (None, None);
            let present = process(rank).filter(|p| p.instance == self.view.slot(rank).instance);
            if core::mem::take(&mut self.ranks[rank.index()].is_missing) {
                self.report.rejoins += 1;
                if let Some(process) = present {
                    self.report.took(Phase::Rejoin, now_ns.saturating_sub(process.started_ns));
                }
            }
        }
        // Who has died, or stands still, since its last word for this switch was written.
        for rank in self.view.members().iter() {
            let present = process(rank).filter(|p| p.instance == self.view.slot(rank).instance);
            if present.is_none_or(|process| process.is_doomed) {
                self.died(now_ns, rank);
            }
        }
    }

    /// Takes in a word of an incarnation of `rank`; `is_newest`: no other has been started since.
    pub fn hear(&mut self, (rank, instance): (Rank, Instance), is_newest: bool, word: Word) {
        let at_ns = word.at_ns;
        match word.said {
            Said::Step(step) => self.hear_step(at_ns, (rank, instance), is_newest, step),
            Said::Suspects { peer, why, details } if is_newest => {
                self.suspects(at_ns, rank, Rank(peer), (why, details));
            }
            Said::Gate { closed_ns, switched, has_served } if is_newest => {
                self.ranks[rank.index()].is_gate_closed = closed_ns.is_none();
                self.gate(at_ns, rank, closed_ns, switched, has_served);
            }
            Said::Touched { count, example } => {
                self.report.findings.healthy_qps_touched += count;
                self.flaw(at_ns, format!("rank {rank}: {example}"));
            }
            Said::Dies => {
                self.died_at(at_ns, rank);
                self.note(at_ns, Some(rank), Happened::Died);
                // Faults that harm nobody may have struck since.
                if let Some(fault) = self.faults.iter_mut().rev().find(|fault| fault.rank == rank.0) {
                    fault.at_moment = true;
                }
            }
            Said::Stopped { is_fenced, why } => {
                self.note(at_ns, Some(rank), Happened::Stopped(why.clone()));
                if !is_fenced {
                    self.hang(at_ns, format!("rank {rank} stopped: {why}"));
                }
            }
            Said::Failed { why } => self.hang(at_ns, format!("rank {rank} failed: {why}")),
            Said::Done { grown, held, recaptures, .. } => {
                self.report.findings.graph_recaptures += recaptures;
                self.report.findings.leaked_bytes += grown;
                if grown != 0 {
                    self.flaw(at_ns, format!("rank {rank} holds {grown} more: {held}"));
                }
            }
            Said::Gone { left, unrung } => {
                self.report.findings.leaked_bytes += left;
                if left != 0 {
                    self.flaw(at_ns, format!("rank {rank} left {left} objects of its device behind"));
                }
                if unrung != 0 {
                    self.hang(at_ns, format!("rank {rank}: {unrung} WQEs without a doorbell"));
                }
            }
            Said::Late { silent_ns, unattended_ns } => {
                let since_ns = at_ns.saturating_sub(silent_ns.max(unattended_ns));
                if self.ranks[rank.index()].stopped_ns.is_none_or(|stopped_ns| stopped_ns < since_ns) {
                    self.longest_silence_ns = self.longest_silence_ns.max(silent_ns);
                }
                self.late.insert((rank, instance), Late { silent_ns, unattended_ns, at_ns });
                let [silent, unattended] = [silent_ns, unattended_ns].map(|ns| ns / 1_000_000);
                let what = format!("silent for {silent} ms, its device left alone for {unattended} ms");
                self.note(at_ns, Some(rank), Happened::Late(what));
            }
            Said::Ready { read_bytes } => self.weights_bytes += read_bytes,
            Said::Refused { doing, attempts } => {
                self.ranks[rank.index()].refused = format!("refused {attempts} times: {doing}");
            }
            Said::Hello { .. } => self.ranks[rank.index()].refused.clear(),
            // A zombie's word for the group.
            Said::Suspects { .. } | Said::Gate { .. } => {}
        }
    }

    fn suspects(&mut self, at_ns: u64, rank: Rank, peer: Rank, (why, details): (Why, String)) {
        let is_member = |of| self.view.slot(of).state == SlotState::Member;
        if !is_member(peer) || !is_member(rank) {
            return;
        }
        self.suspicions.insert((rank, peer));
        let watched = &mut self.ranks[peer.index()];
        if watched.died_ns.is_some_and(|died| at_ns < died) {
            return;
        }
        let is_first = watched.detected.is_none();
        if watched.detected.is_none_or(|(before, _)| at_ns < before) {
            watched.detected = Some((at_ns, why));
            watched.reason = format!("rank {rank} suspected it: {details}");
        }
        if is_first {
            self.note(at_ns, Some(rank), Happened::Suspects(peer));
        }
    }

    fn gate(&mut self, at_ns: u64, rank: Rank, closed_ns: Option<u64>, switched: bool, has_served: bool) {
        let Some(closed_ns) = closed_ns else { return self.note(at_ns, Some(rank), Happened::GateClosed) };
        self.note(at_ns, Some(rank), Happened::GateOpened);
        if has_served {
            self.report.took(Phase::SurvivorPause, closed_ns);
            if switched {
                self.report.took(Phase::Gate, closed_ns);
            }
        }
    }

    fn hear_step(&mut self, at_ns: u64, from: (Rank, Instance), is_newest: bool, step: StepWord) {
        let rank = from.0;
        self.report.steps += 1;
        let lost = step.lost.iter().map(|lost| lost.count).sum();
        let since_ns = at_ns.saturating_sub(step.took_ns).saturating_sub(self.origin_ns);
        self.note(at_ns, Some(rank), Happened::Step { step: step.step, since_ns, lost });
        if is_newest {
            self.ranks[rank.index()].finished = Some((step.step, step.epoch));
        }
        self.report.findings.wrong_tokens += step.wrong;
        self.report.findings.unreported_losses += step.unreported;
        if step.wrong + step.unreported != 0 {
            let StepWord { step, wrong, unreported, .. } = step;
            let text = format!("rank {rank}, step {step}: {wrong} wrong, {unreported} unreported losses");
            self.flaw(at_ns, text);
        }
        if step.took_ns > self.hang_ns {
            self.hang(
                at_ns,
                format!("rank {rank}, step {}: took {} ms", step.step, step.took_ns / 1_000_000),
            );
        }
        self.report.lost_picks += lost;
        if lost != 0 {
            self.waiting.push((at_ns, from, step));
            self.judge_waiting();
        }
    }

    /// Judges losses of epochs that the observer has seen begin.
    fn judge_waiting(&mut self) {
        let epoch = self.view.epoch.0;
        let (ripe, rest): (Vec<_>, Vec<_>) =
            core::mem::take(&mut self.waiting).into_iter().partition(|(_, _, step)| step.epoch <= epoch);
        self.waiting = rest;
        for (at_ns, from, step) in ripe {
            self.judge(at_ns, from, &step);
        }
    }

    fn judge(&mut self, at_ns: u64, (rank, instance): (Rank, Instance), step: &StepWord) {
        // Whoever was evicted and does not know it yet loses everything, and says so.
        if self.view.holder(rank) != Some(instance) {
            return;
        }
        let is_clean = self.clean_from.is_some_and(|from| step.step >= from);
        let mut whose = Vec::new();
        let mut excess = 0;
        for lost in &step.lost {
            let owner = lost.owner.map(Rank);
            let is_explained =
                owner.is_some_and(|owner| !is_clean && self.ledger.explains(rank, owner, step.step));
            if !is_explained {
                excess += lost.count;
                whose.push(owner.map_or("nobody's".into(), |owner| format!("rank {owner}'s")));
            }
        }
        if excess != 0 {
            self.report.findings.excess_losses += excess;
            let text = format!("rank {rank}, step {}: {excess} picks lost without a reason", step.step);
            self.flaw(at_ns, format!("{text}: {}", whose.join(", ")));
        }
    }

    /// Who has finished what, waits for whom no more, and was refused what last; for a message.
    #[must_use]
    pub fn describe(&self) -> String {
        let of = |(rank, watched): (u16, &Watched)| {
            let gate = if watched.is_gate_closed { ", gate closed" } else { "" };
            format!("rank {rank}: step and epoch {:?}{gate}, {}", watched.finished, watched.refused)
        };
        let ranks: Vec<String> = (0..).zip(&self.ranks).map(of).collect();
        format!("{}; suspicions {:?}", ranks.join("; "), self.suspicions)
    }

    /// Judges what nothing more will be learnt about.
    pub fn close(&mut self) {
        for (at_ns, from, step) in core::mem::take(&mut self.waiting) {
            self.judge(at_ns, from, &step);
        }
        for death in core::mem::take(&mut self.false_deaths) {
            let FalseDeath { at_ns, rank, instance, reason } = death;
            let own_word = self.own_word(rank, instance);
            self.flaw(
                at_ns,
                format!("rank {rank} was evicted and nothing was done to it; {reason}; {own_word}"),
            );
        }
    }

    /// What the process itself, and those who gave it up, have said of how late they were.
    fn own_word(&self, rank: Rank, instance: Instance) -> String {
        let Some(late) = self.late.get(&(rank, instance)) else {
            return "it was never late by its own clock".into();
        };
        let Late { silent_ns, unattended_ns, at_ns } = *late;
        let ms = |ns: u64| ns / 1_000_000;
        let at = ms(at_ns.saturating_sub(self.origin_ns));
        let (silent, unattended) = (ms(silent_ns), ms(unattended_ns));
        format!(
            "by its own clock, at {at} ms, silent for {silent} ms, its device left alone for {unattended} ms"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::line::Lost;
    use super::*;
    use crate::ids::Epoch;
    use crate::membership::{Plan, RankSet, Slot, Start};

    fn view(epoch: u32, from_step: u64, instances: [u128; 3]) -> View {
        let slot = |instance| Slot {
            state: if instance == 0 { SlotState::Vacant } else { SlotState::Member },
            instance: Instance(instance),
            ..Slot::default()
        };
        let plan = Plan {
            id: epoch.into(),
            join: RankSet::default(),
            leave: RankSet::default(),
            placement_version: 1,
        };
        let start = Start { plan, epoch: Epoch(epoch), from_step, from_seq: vec![[from_step + 1; 2]] };
        View {
            epoch: Epoch(epoch),
            slots: instances.map(slot).to_vec(),
            start: Some(start),
            ..View::empty(3)
        }
    }

    fn step(step: u64, epoch: u32, lost: Option<u16>) -> Said {
        let lost = lost.map(|owner| Lost { owner: Some(owner), count: 1 }).into_iter().collect();
        Said::Step(StepWord { step, epoch, lost, ..StepWord::default() })
    }

    fn runs(instances: [u128; 3], rank: Rank) -> Seen {
        Seen { instance: Instance(instances[rank.index()]), started_ns: 5, is_doomed: false }
    }

    fn group() -> Observer {
        let mut observer = Observer::new(3, 1_000, 0);
        observer.see(1, view(1, 0, [1, 2, 3]), &|rank| Some(runs([1, 2, 3], rank)));
        observer
    }

    fn hear(observer: &mut Observer, rank: u16, at_ns: u64, said: Said) {
        let instance = observer.view.slot(Rank(rank)).instance;
        observer.hear((Rank(rank), instance), true, Word { at_ns, said });
    }

    #[test]
    fn a_loss_without_a_reason_is_found_and_one_with_a_reason_is_not() {
        let mut observer = group();
        hear(&mut observer, 0, 2, step(4, 1, Some(2)));
        assert_eq!(observer.report.findings.excess_losses, 1);
        observer.died(3, Rank(2));
        hear(&mut observer, 0, 4, step(5, 1, Some(2)));
        assert_eq!((observer.report.findings.excess_losses, observer.report.lost_picks), (1, 2));
    }

    #[test]
    fn a_death_that_nobody_caused_is_false_and_its_replacement_ends_the_excuse() {
        let mut observer = group();
        observer.see(5, view(2, 6, [1, 2, 0]), &|_| None);
        assert_eq!((observer.report.kills, observer.report.findings.false_deaths), (1, 1));
        let process = |rank| Some(runs([1, 2, 9], rank));
        observer.see(9, view(3, 8, [1, 2, 9]), &process);
        assert_eq!((observer.report.rejoins, observer.ledger.is_whole()), (1, true));
        hear(&mut observer, 0, 10, step(7, 3, Some(2)));
        assert_eq!(observer.report.findings.excess_losses, 0, "before the switch");
        hear(&mut observer, 0, 11, step(8, 3, Some(2)));
        assert_eq!(observer.report.findings.excess_losses, 1);
    }

    #[test]
    fn who_died_before_a_switch_that_still_names_it_excuses_losses_behind_it() {
        let mut observer = group();
        observer.died(2, Rank(1));
        observer.see(3, view(2, 4, [1, 2, 0]), &|_| None);
        let process = |rank| Some(Seen { is_doomed: rank == Rank(1), ..runs([1, 2, 9], rank) });
        observer.see(6, view(3, 8, [1, 2, 9]), &process);
        hear(&mut observer, 2, 7, step(9, 3, Some(1)));
        assert_eq!(observer.report.findings.excess_losses, 0);
        hear(&mut observer, 2, 7, step(9, 3, Some(0)));
        assert_eq!(observer.report.findings.excess_losses, 1);
    }

    #[test]
    fn what_a_zombie_loses_is_its_own_affair_and_what_it_gets_wrong_is_not() {
        let mut observer = group();
        let lost = vec![Lost { owner: Some(0), count: 3 }];
        let said = Said::Step(StepWord { step: 4, epoch: 1, wrong: 1, lost, ..StepWord::default() });
        observer.hear((Rank(2), Instance(77)), false, Word { at_ns: 2, said });
        let found = &observer.report.findings;
        assert_eq!((found.excess_losses, found.wrong_tokens), (0, 1));
    }

    #[test]
    fn versions_of_the_view_that_nobody_saw_are_made_up_for() {
        let mut observer = group();
        observer.died(2, Rank(1));
        let process = |rank| Some(runs([1, 8, 3], rank));
        observer.see(6, view(3, 5, [1, 8, 3]), &process);
        let report = &observer.report;
        assert_eq!((report.kills, report.rejoins, report.findings.false_deaths), (1, 1, 0));
    }

    #[test]
    fn detection_is_from_the_death_to_the_first_suspicion() {
        let mut observer = group();
        observer.died(1_000_000, Rank(2));
        let suspects = Said::Suspects { peer: 2, why: Why::Exit, details: String::new() };
        let later = Said::Suspects { peer: 2, why: Why::Deadline, details: String::new() };
        hear(&mut observer, 0, 9_000_000, later);
        hear(&mut observer, 1, 4_000_000, suspects);
        observer.see(14_000_000, view(2, 6, [1, 2, 0]), &|_| None);
        let json = observer.report.to_json();
        assert_eq!((json.detected_ms.p50, json.agree_ms.p50), (3.0, 10.0));
        assert_eq!(observer.reasons, BTreeMap::from([(Why::Exit, 1)]));
    }

    #[test]
    fn suspicions_of_the_evicted_and_deaths_of_those_who_only_joined_are_forgotten() {
        let mut observer = group();
        let suspects = |peer| Said::Suspects { peer, why: Why::Deadline, details: String::new() };
        hear(&mut observer, 0, 1_000_000, suspects(1));
        observer.died(1_000_000, Rank(0));
        hear(&mut observer, 2, 2_000_000, suspects(0));
        observer.see(3_000_000, view(2, 6, [0, 2, 3]), &|rank| Some(runs([1, 2, 3], rank)));
        // It dies again while it joins, and nobody had to notice.
        observer.died(4_000_000, Rank(0));
        observer.see(5_000_000, view(3, 8, [9, 2, 3]), &|rank| Some(runs([9, 2, 3], rank)));
        for rank in [1, 0] {
            observer.died(900_000_000, Rank(rank));
            hear(&mut observer, 2, 901_000_000, suspects(rank));
        }
        observer.see(902_000_000, view(4, 9, [0, 0, 3]), &|rank| Some(runs([9, 2, 3], rank)));
        let json = observer.report.to_json();
        assert_eq!((json.detected_ms.count, json.detected_ms.max), (3, 1.0));
        assert_eq!((json.agree_ms.count, json.agree_ms.max), (3, 1.0));
    }

    #[test]
    fn what_is_wrong_slow_or_left_behind_is_counted() {
        let mut observer = group();
        let bad = StepWord { step: 1, epoch: 1, took_ns: 1_001, wrong: 2, unreported: 3, lost: vec![] };
        hear(&mut observer, 0, 2, Said::Step(bad));
        hear(&mut observer, 0, 3, Said::Gone { left: 4, unrung: 0 });
        hear(&mut observer, 1, 3, Said::Touched { count: 5, example: "2RST".into() });
        let done = Said::Done { step: 9, grown: 6, held: String::new(), recaptures: 7 };
        hear(&mut observer, 1, 4, done);
        let found = &observer.report.findings;
        assert_eq!((found.wrong_tokens, found.unreported_losses, found.hangs), (2, 3, 1));
        assert_eq!((found.leaked_bytes, found.healthy_qps_touched, found.graph_recaptures), (10, 5, 7));
        assert_eq!(observer.flaws.len(), 5);
    }
}
