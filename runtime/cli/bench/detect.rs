//! `ibex bench detect`: how long a group takes to notice that a rank is gone, by each kind of evidence.
//!
//! Owns the groups that it breaks. A time ends when the local mask stands: in the word that kernels have set, or in the
//! slots that the host has fenced. Each trial must have been noticed by the evidence that it is about.
//!
//! ```text
//!  deadline     a host falls silent, cut off, while two others wait for its part of a step     DetectionRig
//!  completion   a queue pair to a live host completes in error, likewise                      DetectionRig
//!  exit         the process of an idle rank is killed; seen by its descriptor                 Pair
//!  lease        the process of an idle rank is stopped for good: only its lease tells         Pair
//! ```

use core::time::Duration;
use std::path::PathBuf;
use std::thread;

use clap::builder::RangedU64ValueParser;
use ibex::harness::detection::{Detection, DetectionRig};
use ibex::telemetry::FaultKind;
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::url::StoreUrl;
use serde::Serialize;

use super::commit::commit;
use super::stats::percentile;
use super::store::serve;
use crate::cli::progress::Progress;
use crate::cli::table::Table;
use crate::cli::{CliError, Outcome, claim_output, write_output};

mod pair;

pub(in crate::cli) use pair::{RankArgs, run_rank};

use pair::{End, Pair, config};

/// From an error CQE, or a process exit, to the local mask.
const PROMPT_MS: f64 = 20.0;
/// A deadline may take so much of `detect_ms`.
const DEADLINE_SHARE: f64 = 1.5;
/// A lease may be noticed so long after it could have run out.
const LEASE_SLACK_MS: f64 = 1_000.0;
/// Leases that run out at the same time: one takes a second, and nobody computes meanwhile.
const LEASES_AT_ONCE: u32 = 8;
/// How long one question to the store may take.
const STORE_BUDGET: Duration = Duration::from_secs(30);

/// Flags of `bench detect`.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// Ranks lost per kind of evidence.
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = number(1, 10_000))]
    trials: u32,
    /// How long a peer may be silent.
    #[arg(long, default_value_t = 100, value_name = "MS", value_parser = number(20, 10_000))]
    detect_ms: u32,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn number(min: u64, max: u64) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(min..=max)
}

/// The machine-readable report; keys are part of the interface.
#[derive(Debug, Serialize)]
struct Report {
    provider: &'static str,
    gpu: &'static str,
    commit: Option<String>,
    detect_ms: u32,
    lease_ttl_ms: u32,
    rows: Vec<Row>,
    /// Trials that were not noticed, or by other evidence than they are about.
    wrong: u64,
}

/// One kind of evidence; times in milliseconds.
#[derive(Debug, Serialize)]
struct Row {
    evidence: &'static str,
    trials: u32,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    limit_ms: f64,
    is_within: bool,
    wrong: u64,
}

/// What the trials of one kind gave: none where it was not noticed as it should be.
struct Samples(Vec<Option<Duration>>);

impl Samples {
    fn row(&self, evidence: &'static str, limit_ms: f64) -> Row {
        let ms: Vec<f64> = self.0.iter().flatten().map(|took| took.as_secs_f64() * 1e3).collect();
        let at = |share| percentile(&ms, share).unwrap_or(0.0);
        // CAST: at most as many as were asked for.
        let trials = self.0.len() as u32;
        let wrong = (self.0.len() - ms.len()) as u64;
        let is_within = wrong == 0 && at(0.99) <= limit_ms;
        Row {
            evidence,
            trials,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            max_ms: at(1.0),
            limit_ms,
            is_within,
            wrong,
        }
    }
}

/// Runs the benchmark and reports.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    let lease_ttl_ms = config(args.detect_ms).validate()?.lease_ttl_ms();
    claim_output(args.json.as_deref())?;
    let mut progress = Progress::new("kind", 4);
    let mut rows = Vec::new();
    for (evidence, limit_ms) in [
        ("deadline", DEADLINE_SHARE * f64::from(args.detect_ms)),
        ("completion", PROMPT_MS),
        ("exit", PROMPT_MS),
        ("lease", f64::from(lease_ttl_ms) + LEASE_SLACK_MS),
    ] {
        let samples = match evidence {
            "deadline" => in_kernels(args, FaultKind::Silent, DetectionRig::silence)?,
            "completion" => in_kernels(args, FaultKind::Completion, DetectionRig::failure)?,
            "exit" => of_processes(args, End::Killed, 1)?,
            _ => of_processes(args, End::Stopped, LEASES_AT_ONCE)?,
        };
        rows.push(samples.row(evidence, limit_ms));
        // CAST: four.
        progress.step(rows.len() as u32);
    }
    drop(progress);
    let wrong = rows.iter().map(|row| row.wrong).sum();
    let (provider, gpu, detect_ms) = ("emulated", "host", args.detect_ms);
    let report = Report { provider, gpu, commit: commit(), detect_ms, lease_ttl_ms, rows, wrong };
    print(&report);
    if let Some(path) = &args.json {
        // PANIC: numbers, strings and named fields always serialise.
        let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
        write_output(path, &format!("{json}\n"))?;
    }
    Ok(if report.rows.iter().all(|row| row.is_within) { Outcome::Good } else { Outcome::Wrong })
}

/// Trials in which kernels notice.
fn in_kernels(
    args: &Args,
    kind: FaultKind,
    lose: fn(&mut DetectionRig, Duration) -> Result<Detection, ibex::error::Error>,
) -> Result<Samples, CliError> {
    let mut rig = DetectionRig::new(args.detect_ms)?;
    let mut samples = Vec::new();
    for trial in 0..args.trials {
        // Somewhere between two signs of life, everywhere in turn.
        let between = Duration::from_millis(args.detect_ms.into()) / 4;
        let detection = lose(&mut rig, between * (trial * 7 % 16) / 16)?;
        samples.push(detection.took.filter(|_| detection.is_by(kind)));
    }
    Ok(Samples(samples))
}

/// Trials in which a process ends, or stands still, in so many groups at a time.
fn of_processes(args: &Args, end: End, at_once: u32) -> Result<Samples, CliError> {
    let (url, _served) = serve()?;
    let trials = |first: u32| -> Result<Vec<Option<Duration>>, CliError> {
        let store = Blocking::open(&StoreUrl::parse(&url)?, Clock::system(), STORE_BUDGET)?;
        let trial =
            |index: u32| Pair::meet(&store, &url, &format!("trial-{index}"), args.detect_ms)?.lose(end);
        (first..args.trials).step_by(at_once as usize).map(trial).collect()
    };
    let mut samples = Vec::new();
    let trials = &trials;
    thread::scope(|scope| -> Result<(), CliError> {
        let threads: Vec<_> = (0..at_once).map(|first| scope.spawn(move || trials(first))).collect();
        for thread in threads {
            // PANIC: a trial that panicked has said so.
            samples.extend(thread.join().expect("a trial ended")?);
        }
        Ok(())
    })?;
    Ok(Samples(samples))
}

fn print(report: &Report) {
    let mut table = Table::new(&["ms", "trials", "p50", "p99", "max", "limit of p99", ""]);
    for row in &report.rows {
        let ms = |value: f64| format!("{value:.2}");
        table.row([
            row.evidence.to_owned(),
            row.trials.to_string(),
            ms(row.p50_ms),
            ms(row.p99_ms),
            ms(row.max_ms),
            ms(row.limit_ms),
            if row.is_within { "within".to_owned() } else { "outside".to_owned() },
        ]);
    }
    println!(
        "from the fault to the local mask; detect {} ms, lease {} ms, store: this process, over loopback",
        report.detect_ms, report.lease_ttl_ms
    );
    print!("{table}");
    println!("result    {} not noticed, or by other evidence", report.wrong);
}
