//! Many seeds in simulation, on all cores. Owns the sum of their reports, and what failed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::plan::{Ask, Plan};
use super::report::Report;
use super::sim::{self, Unguarded};
use crate::harness::on_all_cores;

/// A seed with findings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which.
    pub seed: u64,
    /// What was found, in words.
    pub flaws: Vec<String>,
}

/// What became of a range of seeds.
#[derive(Clone, Debug, Default)]
pub struct Campaign {
    /// The sum of all reports.
    pub report: Report,
    /// Seeds with findings, in order.
    pub failures: Vec<Failure>,
}

/// Which seeds to run, and how.
#[derive(Clone, Copy, Debug)]
pub struct Seeds {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
    /// Stop after so many failures on any core.
    pub failures_max: usize,
}

/// How many cores a campaign has: the process may be kept to some of them.
#[must_use]
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, core::num::NonZeroUsize::get)
}

/// Runs seeds; `progress` is told how many are done.
pub fn run(seeds: Seeds, ask: &Ask, progress: &(dyn Fn(u64) + Sync)) -> Campaign {
    run_without(seeds, ask, Unguarded::default(), progress)
}

/// [`run`] without some guard.
#[doc(hidden)]
pub fn run_without(
    seeds: Seeds,
    ask: &Ask,
    unguarded: Unguarded,
    progress: &(dyn Fn(u64) + Sync),
) -> Campaign {
    let (next, done, enough) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let worker = |_| {
        let mut part = Campaign::default();
        loop {
            let nth = next.fetch_add(1, Ordering::Relaxed);
            if nth >= seeds.count || enough.load(Ordering::Relaxed) {
                return part;
            }
            part.add(seeds.first + nth, ask, unguarded);
            if part.failures.len() >= seeds.failures_max {
                enough.store(true, Ordering::Relaxed);
            }
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
    };
    let mut campaign = Campaign::default();
    for part in on_all_cores(cores(), worker) {
        campaign.report.merge(part.report);
        campaign.failures.extend(part.failures);
    }
    campaign.failures.sort_by_key(|failure| failure.seed);
    campaign
}

impl Campaign {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.report.is_good() && self.failures.is_empty()
    }

    fn add(&mut self, seed: u64, ask: &Ask, unguarded: Unguarded) {
        match sim::run_without(&Plan::draw(seed, ask), unguarded) {
            Ok(outcome) => {
                if !outcome.is_good() {
                    let mut flaws = outcome.flaws;
                    if outcome.report.kills != outcome.report.rejoins {
                        let (kills, rejoins) = (outcome.report.kills, outcome.report.rejoins);
                        flaws.push(format!("{kills} members were lost and {rejoins} replaced"));
                    }
                    self.failures.push(Failure { seed, flaws });
                }
                self.report.merge(outcome.report);
            }
            Err(error) => {
                let report = Report { seeds: 1, ..Report::default() };
                self.report.merge(report);
                self.report.findings.hangs += 1;
                self.failures.push(Failure { seed, flaws: vec![format!("refused: {error}")] });
            }
        }
    }
}
