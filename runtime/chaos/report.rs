//! What a campaign found: the same model for simulated ranks and for processes.
//!
//! Pure. A [`Report`] is a sum: reports of seeds, or of workers, are merged into one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::fault::FaultKind;
use super::plan::ChangeKind;
use crate::recovery::Route;

/// What was found. All counts of the first group are 0 after a good run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Findings {
    /// Outputs or packed rows that differ from the reference, given the losses that were reported.
    pub wrong_tokens: u64,
    /// Picks that were not summed and not reported lost.
    pub unreported_losses: u64,
    /// Picks reported lost although their owner was a member and nothing was injected on its route.
    pub excess_losses: u64,
    /// Ranks evicted although nothing was injected that allows it.
    pub false_deaths: u64,
    /// Calls, steps and switches that took more than three times their deadline, and groups that never came to rest.
    pub hangs: u64,
    /// Bytes and objects that stay behind: heap, keys, queue pairs, memory, descriptors.
    pub leaked_bytes: u64,
    /// Commands on queue pairs whose both ends were healthy members.
    pub healthy_qps_touched: u64,
    /// Graphs captured again.
    pub graph_recaptures: u64,
}

impl Findings {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_good(&self) -> bool {
        *self == Self::default()
    }

    fn add(&mut self, other: &Self) {
        self.wrong_tokens += other.wrong_tokens;
        self.unreported_losses += other.unreported_losses;
        self.excess_losses += other.excess_losses;
        self.false_deaths += other.false_deaths;
        self.hangs += other.hangs;
        self.leaked_bytes += other.leaked_bytes;
        self.healthy_qps_touched += other.healthy_qps_touched;
        self.graph_recaptures += other.graph_recaptures;
    }
}

/// Durations, kept as they came so that reports can be merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    ns: Vec<u64>,
}

/// A summary of [`Times`], in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer.
    pub p50: f64,
    /// All but a hundredth.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Times {
    /// Adds one duration.
    pub fn push(&mut self, ns: u64) {
        self.ns.push(ns);
    }

    /// Their summary; all zero if there are none.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let mut sorted = self.ns.clone();
        sorted.sort_unstable();
        // CAST: durations far below 2^53 ns; a rank within the list.
        let at = |part: f64| match sorted.len() {
            0 => 0.0,
            len => sorted[((len as f64 * part).ceil() as usize).clamp(1, len) - 1] as f64 / 1e6,
        };
        Summary { count: sorted.len() as u64, p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

/// Which durations a campaign takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// From a death to the first local mask.
    Detected,
    /// From the first local mask to the epoch without the dead rank.
    Agree,
    /// From closing a gate to the commit.
    Gate,
    /// From the admission of a replacement to queue pairs that are connected at both ends.
    Recreate,
    /// From the start of a replacement to its first epoch.
    Rejoin,
    /// How long a survivor launched nothing for a switch.
    SurvivorPause,
}

/// Everything a campaign reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Seeds run.
    pub seeds: u64,
    /// Steps finished, over all ranks.
    pub steps: u64,
    /// Faults carried out, by kind.
    pub fault_counts: BTreeMap<FaultKind, u64>,
    /// Changes begun, by kind.
    pub change_counts: BTreeMap<ChangeKind, u64>,
    /// How ranks reach each other once a group is whole, by the name of the way; each direction counts.
    pub routes: BTreeMap<String, u64>,
    /// Members that ended or were evicted, where a replacement was asked for.
    pub kills: u64,
    /// Replacements that became members.
    pub rejoins: u64,
    /// What is wrong.
    pub findings: Findings,
    /// Picks reported lost, with a reason.
    pub lost_picks: u64,
    /// Durations by phase.
    pub times: BTreeMap<Phase, Times>,
}

impl Report {
    /// Counts one fault that was carried out.
    pub fn count_fault(&mut self, kind: FaultKind) {
        *self.fault_counts.entry(kind).or_default() += 1;
    }

    /// Counts one change that was begun.
    pub fn count_change(&mut self, kind: ChangeKind) {
        *self.change_counts.entry(kind).or_default() += 1;
    }

    /// Counts the way from one rank to another.
    pub fn count_route(&mut self, route: Route) {
        *self.routes.entry(route.name().to_owned()).or_default() += 1;
    }

    /// Notes one duration.
    pub fn took(&mut self, phase: Phase, ns: u64) {
        self.times.entry(phase).or_default().push(ns);
    }

    /// Whether nothing was found and everybody who was to come back did.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.findings.is_good() && self.kills == self.rejoins
    }

    /// Faults carried out.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.fault_counts.values().sum()
    }

    /// Adds another seed's, or another worker's, report.
    pub fn merge(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.kills += other.kills;
        self.rejoins += other.rejoins;
        self.lost_picks += other.lost_picks;
        self.findings.add(&other.findings);
        for (kind, count) in other.fault_counts {
            *self.fault_counts.entry(kind).or_default() += count;
        }
        for (kind, count) in other.change_counts {
            *self.change_counts.entry(kind).or_default() += count;
        }
        for (route, count) in other.routes {
            *self.routes.entry(route).or_default() += count;
        }
        for (phase, mut times) in other.times {
            self.times.entry(phase).or_default().ns.append(&mut times.ns);
        }
    }

    fn summary(&self, phase: Phase) -> Summary {
        self.times.get(&phase).map_or(Summary::default(), Times::summary)
    }

    /// The report as machines read it.
    #[must_use]
    pub fn to_json(&self) -> ReportJson {
        ReportJson {
            seeds: self.seeds,
            steps: self.steps,
            faults: self.faults(),
            fault_counts: self.fault_counts.clone(),
            change_counts: self.change_counts.clone(),
            routes: self.routes.clone(),
            kills: self.kills,
            rejoins: self.rejoins,
            findings: self.findings.clone(),
            lost_picks: self.lost_picks,
            detected_ms: self.summary(Phase::Detected),
            agree_ms: self.summary(Phase::Agree),
            gate_ms: self.summary(Phase::Gate),
            recreate_ms: self.summary(Phase::Recreate),
            rejoin_ms: self.summary(Phase::Rejoin),
            survivor_pause_ms: self.summary(Phase::SurvivorPause),
        }
    }
}

/// [`Report`] with summaries in place of durations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields of `Report`, `Findings` and `Phase`, by name")]
pub struct ReportJson {
    pub seeds: u64,
    pub steps: u64,
    pub faults: u64,
    pub fault_counts: BTreeMap<FaultKind, u64>,
    pub change_counts: BTreeMap<ChangeKind, u64>,
    pub routes: BTreeMap<String, u64>,
    pub kills: u64,
    pub rejoins: u64,
    #[serde(flatten)]
    pub findings: Findings,
    pub lost_picks: u64,
    pub detected_ms: Summary,
    pub agree_ms: Summary,
    pub gate_ms: Summary,
    pub recreate_ms: Summary,
    pub rejoin_ms: Summary,
    pub survivor_pause_ms: Summary,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let mut times = Times::default();
        assert_eq!(times.summary(), Summary::default());
        (1..=200).rev().for_each(|ms| times.push(ms * 1_000_000));
        assert_eq!(times.summary(), Summary { count: 200, p50: 100.0, p99: 198.0, max: 200.0 });
    }

    #[test]
    fn merged_reports_are_sums_and_json_has_the_names_of_the_issue() {
        let one = |kind, wrong| {
            let mut report = Report { seeds: 1, steps: 7, kills: 1, rejoins: 1, ..Report::default() };
            report.count_fault(kind);
            report.took(Phase::Rejoin, 3_000_000);
            report.findings.wrong_tokens = wrong;
            report
        };
        let mut sum = one(FaultKind::Kill, 0);
        assert!(sum.is_good());
        sum.merge(one(FaultKind::Kill, 2));
        sum.merge(one(FaultKind::Slow, 0));
        assert!(!sum.is_good());
        let json = serde_json::to_value(sum.to_json()).unwrap();
        assert_eq!((&json["faults"], &json["fault_counts"]["kill"]), (&3.into(), &2.into()));
        assert_eq!((&json["wrong_tokens"], &json["steps"]), (&2.into(), &21.into()));
        assert_eq!(json["rejoin_ms"]["p99"], 3.0);
        for name in ["unreported_losses", "excess_losses", "false_deaths", "hangs", "leaked_bytes"] {
            assert_eq!(json[name], 0, "{name}");
        }
        for name in ["detected_ms", "agree_ms", "gate_ms", "recreate_ms", "survivor_pause_ms"] {
            assert!(json[name].is_object(), "{name}");
        }
    }
}
