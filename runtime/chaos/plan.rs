//! A campaign of one seed as data: the group, and when which fault strikes.
//!
//! Pure. [`Plan::draw`] makes it from a seed; its JSON is what a failing run prints, and what replays it.

use serde::{Deserialize, Serialize};

use super::draws::Draws;
use super::fault::{ALL_KINDS, Fault, FaultKind};

/// Steps after the last fault: all ranks take part, and nothing is lost.
pub const CLEAN_STEPS: u64 = 10;
/// One fault about every so many steps.
pub const STEPS_PER_FAULT: u64 = 5;

/// Something that is done to a group on purpose, and costs nobody a pick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// A rank comes for which there was room; experts move to it.
    Grow,
    /// Experts move away from a member, it leaves, and comes back.
    Leave,
    /// Experts move, and get replicas.
    Place,
}

impl ChangeKind {
    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Grow => "grow",
            Self::Leave => "leave",
            Self::Place => "place",
        }
    }
}

/// One change of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// What happens.
    pub kind: ChangeKind,
    /// It begins once some member has begun this step, nobody is missing, and no earlier change is under way.
    pub at_step: u64,
    /// Who comes or leaves.
    pub rank: u16,
}

/// What a campaign is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Ranks; drawn from 2 to 4 if absent.
    pub ranks: Option<u32>,
    /// Steps at least, the last [`CLEAN_STEPS`] of them clean.
    pub steps: u64,
    /// Kinds to draw from.
    pub kinds: Vec<FaultKind>,
    /// Most tokens per rank.
    pub tokens: u32,
    /// Row width.
    pub hidden: u32,
}

impl Default for Ask {
    fn default() -> Self {
        Self { ranks: None, steps: 20, kinds: ALL_KINDS.to_vec(), tokens: 16, hidden: 256 }
    }
}

/// One seed's group and faults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Everything else was drawn from it.
    pub seed: u64,
    /// Ranks.
    pub ranks: u32,
    /// Steps at least.
    pub steps: u64,
    /// Most tokens per rank.
    pub tokens: u32,
    /// Row width.
    pub hidden: u32,
    /// Whether requests travel as packets through a switch; otherwise message by message, in pieces.
    pub packets: bool,
    /// In the order in which they strike.
    pub faults: Vec<Fault>,
    /// Members at first; the others are there once the group has grown.
    #[serde(default)]
    pub initial: u32,
    /// In the order in which they begin.
    #[serde(default)]
    pub changes: Vec<Change>,
    /// Lanes that every step runs on.
    #[serde(default = "one")]
    pub lanes: u32,
    /// Dispatches in a row on each lane of a step.
    #[serde(default = "one")]
    pub per_lane: u32,
    /// Hosts that the ranks live on in turn: processes of one host map each other's memory, others go by queue pairs.
    /// 0: all go by queue pairs.
    #[serde(default)]
    pub hosts: u32,
    /// Victims are taken as planned, also where the group loses its quorum with them; one that stands still wakes up
    /// when its time is over, evicted or not. Never drawn: for directed plans.
    #[serde(default)]
    pub is_reckless: bool,
}

const fn one() -> u32 {
    1
}

impl Plan {
    /// The plan of `seed`.
    #[must_use]
    pub fn draw(seed: u64, ask: &Ask) -> Self {
        let mut draws = Draws::new(seed, 1);
        let num_faults = (ask.steps.saturating_sub(CLEAN_STEPS) / STEPS_PER_FAULT).max(1);
        let wanted: Vec<FaultKind> = (0..num_faults).map(|_| draws.pick(&ask.kinds)).collect();
        let ranks_min = wanted.iter().map(|kind| kind.ranks_min()).max().unwrap_or(2);
        let ranks = ask.ranks.unwrap_or_else(|| draws.between(2, 4) as u32).max(ranks_min);
        // A message is placed in parts that one can stop between only where nothing travels as packets.
        let in_parts = wanted.contains(&FaultKind::PartialMessage);
        let packets = wanted.iter().any(|kind| kind.needs_packets()) || (!in_parts && draws.one_in(4));
        let faults = (1..).zip(wanted).map(|(nth, kind)| draw_fault(&mut draws, kind, nth, ranks)).collect();
        let (tokens, hidden) = (draws.between(1, ask.tokens.max(1).into()) as u32, ask.hidden);
        let (steps, initial) = (ask.steps, ranks);
        let whole = Self {
            seed,
            ranks,
            steps,
            tokens,
            hidden,
            packets,
            faults,
            initial,
            changes: Vec::new(),
            lanes: 1,
            per_lane: 1,
            hosts: 0,
            is_reckless: false,
        };
        whole.with_hosts(in_parts).with_changes()
    }

    /// The same with a way between the ranks. Faults of packets and of messages need some that go through devices.
    fn with_hosts(mut self, in_parts: bool) -> Self {
        let mut draws = Draws::new(self.seed, 13);
        if draws.one_in(2) && !self.packets && !in_parts {
            self.hosts = draws.between(1, 2) as u32;
        }
        self
    }

    /// The same with what is drawn apart from the faults: changes, lanes, dispatches in a row.
    fn with_changes(mut self) -> Self {
        let mut draws = Draws::new(self.seed, 11);
        self.lanes = if draws.one_in(6) { 2 } else { 1 };
        self.per_lane = if draws.one_in(4) { 2 } else { 1 };
        if !draws.one_in(4) {
            return self;
        }
        let until = self.steps.saturating_sub(CLEAN_STEPS).max(1);
        // Faults need their ranks while one of them has yet to come.
        let ranks_min = self.faults.iter().map(|fault| fault.kind.ranks_min()).max().unwrap_or(2);
        if self.ranks > ranks_min && draws.one_in(2) {
            self.initial = self.ranks - 1;
            // CAST: a small number.
            let rank = self.initial as u16;
            self.changes.push(Change { kind: ChangeKind::Grow, at_step: draws.below(until), rank });
        }
        let kinds: &[ChangeKind] = match self.initial {
            2 => &[ChangeKind::Place],
            _ => &[ChangeKind::Place, ChangeKind::Leave],
        };
        let (kind, rank) = (draws.pick(kinds), draws.below(self.initial.into()) as u16);
        self.changes.push(Change { kind, at_step: draws.below(until), rank });
        self
    }

    /// Who forms the group.
    #[must_use]
    pub const fn initial(&self) -> u32 {
        // A plan without the field begins with all its ranks.
        if self.initial == 0 { self.ranks } else { self.initial }
    }

    /// The plan as JSON: what [`Plan::from_json`] reads.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan is plain data with string keys")
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// What is not the JSON of a plan.
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

fn draw_fault(draws: &mut Draws, kind: FaultKind, nth: u64, ranks: u32) -> Fault {
    let rank = draws.below(ranks.into());
    let other = (rank + draws.between(1, u64::from(ranks) - 1)) % u64::from(ranks);
    let first = (nth - 1) * STEPS_PER_FAULT + 1;
    // Transport, protection and retry errors, as hardware names them.
    let syndrome = draws.pick(&[0x04, 0x05, 0x10, 0x12, 0x13, 0x14, 0x15, 0x16]);
    Fault {
        kind,
        at_step: draws.between(first, first + STEPS_PER_FAULT - 1),
        // CAST: ranks and parts per million are small numbers.
        rank: rank as u16,
        other: other as u16,
        lasts_us: draws.between(1_000, 60_000),
        ppm: draws.between(5_000, 50_000) as u32,
        syndrome,
        draw: draws.bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_follows_from_its_seed_and_survives_its_own_text() {
        let ask = Ask { steps: 40, ..Ask::default() };
        for seed in 0..200 {
            let plan = Plan::draw(seed, &ask);
            assert_eq!(plan, Plan::draw(seed, &ask));
            assert_eq!(Plan::from_json(&plan.to_json()).unwrap(), plan);
            assert_eq!(plan.faults.len(), 6);
            for fault in &plan.faults {
                assert!(fault.rank != fault.other && u32::from(fault.rank.max(fault.other)) < plan.ranks);
                assert!(fault.kind.ranks_min() <= plan.ranks && fault.at_step <= 30);
                assert!(plan.packets || !fault.kind.needs_packets());
                assert!(plan.hosts == 0 || fault.kind != FaultKind::PartialMessage && !plan.packets);
            }
        }
        assert_ne!(Plan::draw(1, &ask), Plan::draw(2, &ask));
    }

    #[test]
    fn every_kind_is_drawn_about_as_often_as_every_other() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..5_000 {
            for fault in Plan::draw(seed, &Ask::default()).faults {
                *counts.entry(fault.kind).or_insert(0) += 1;
            }
        }
        assert_eq!(counts.len(), ALL_KINDS.len());
        assert!(counts.values().all(|count| (200..700).contains(count)), "{counts:?}");
    }
}
