//! `ibex bench rejoin`: what a replaced rank costs the others, against recreating all queue pairs.
//!
//! Owns one rig per row. Rates of a busy machine show here too: the time of commands is modelled, that of the host's
//! own work is not.
//!
//! Two things are measured one after the other, each on its own: what sessions do, told at once what to do, and what
//! members need to agree on it, each on a thread, through a store in this process. Where one follows the other in a
//! group (gate, pause, rejoin), a row has their sum.

use core::time::Duration;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use ibex::harness::rejoin::{Agreement, AgreementRig, Rejoin, RejoinCase, RejoinRig};
use ibex::ids::Rank;
use serde::Serialize;

use super::commit::commit;
use super::stats::percentile;
use crate::cli::progress::Progress;
use crate::cli::table::{Table, bytes};
use crate::cli::{CliError, Outcome, claim_output, write_output};

/// Flags of `bench rejoin`.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// Sizes of the groups, one row each.
    #[arg(long, value_delimiter = ',', default_value = "8,16,32,64", value_name = "N,..", value_parser = number(2, 64))]
    ranks: Vec<u32>,
    /// Queue pairs that kernels drive to each peer.
    #[arg(long, default_value_t = 8, value_name = "K", value_parser = number(1, 16))]
    qps_per_peer: u32,
    /// What each command of a device takes, in microseconds.
    #[arg(long, default_value_t = 100, value_name = "US", value_parser = number(0, 100_000))]
    command_us: u32,
    /// Replacements per row.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = number(1, 10_000))]
    iters: u32,
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
    fabric: &'static str,
    commit: Option<String>,
    command_us: u32,
    /// Where members publish and agree.
    store: &'static str,
    rows: Vec<Row>,
    /// Rows and outputs that were wrong or lost in the step after each replacement.
    wrong: u64,
}

/// Two percentiles, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Ms {
    p50: f64,
    p99: f64,
}

impl Ms {
    fn of(samples: &[Duration]) -> Self {
        let ms: Vec<f64> = samples.iter().map(|sample| sample.as_secs_f64() * 1e3).collect();
        let at = |share| percentile(&ms, share).unwrap_or(0.0);
        Self { p50: at(0.5), p99: at(0.99) }
    }
}

/// One size of group.
#[derive(Debug, Serialize)]
struct Row {
    ranks: u32,
    qps_per_peer: u32,
    /// From the first suspicion until the last survivor has the agreed mask.
    agree_ms: Ms,
    /// A survivor's queue pairs to the replaced rank.
    recreate_ms: Ms,
    /// All queue pairs of one rank.
    recreate_all_ms: Ms,
    /// From the first gate that closed to the last that opened.
    gate_ms: Ms,
    /// How long one survivor's gate was closed.
    pause_ms: Ms,
    /// From the replacement's claim of the name to the last commit, with its own queue pairs to everybody.
    rejoin_ms: Ms,
    qps_created: u64,
    qps_destroyed: u64,
    qps_created_all: u64,
    control_bytes: u64,
}

/// Runs the benchmark and reports.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    claim_output(args.json.as_deref())?;
    let mut report = Report {
        provider: "emulated",
        gpu: "host",
        fabric: "inproc",
        commit: commit(),
        command_us: args.command_us,
        store: "memory of this process",
        rows: Vec::new(),
        wrong: 0,
    };
    // CAST: a handful of sizes.
    let mut progress = Progress::new("row", args.ranks.len() as u32);
    for (done, &ranks) in (1..).zip(&args.ranks) {
        let (row, wrong) = measure(args, ranks)?;
        report.rows.push(row);
        report.wrong += wrong;
        progress.step(done);
    }
    drop(progress);
    print(&report);
    if let Some(path) = &args.json {
        // PANIC: numbers, strings and named fields always serialise.
        let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
        write_output(path, &format!("{json}\n"))?;
    }
    Ok(if report.wrong == 0 { Outcome::Good } else { Outcome::Wrong })
}

fn measure(args: &Args, ranks: u32) -> Result<(Row, u64), CliError> {
    let case = RejoinCase {
        ranks,
        qps_per_peer: args.qps_per_peer,
        command_latency: Duration::from_micros(args.command_us.into()),
    };
    let mut rig = RejoinRig::new(case)?;
    let mut wrong = rig.step()?;
    let (mut rejoins, mut all, mut created_all) = (Vec::new(), Vec::new(), 0);
    for iteration in 0..args.iters {
        let replaced = replaced(iteration, ranks);
        rejoins.push(rig.replace(replaced)?);
        wrong += rig.step()?;
        let other = rig.recreate_all(replaced)?;
        wrong += rig.step()?;
        all.push(other.took);
        created_all = other.created;
    }
    let (membership, control_bytes) = (rig.membership(), rig.control_bytes());
    // Its workers have nothing more to do, and the next part is to have the cores.
    drop(rig);
    let offer_bytes = rejoins.first().map_or(0, |one| one.offer_bytes);
    let mut group = AgreementRig::new(membership, offer_bytes)?;
    let agreements = (0..args.iters)
        .map(|iteration| group.replace(replaced(iteration, ranks)))
        .collect::<Result<Vec<_>, _>>()?;
    let row =
        Row { qps_created_all: created_all, control_bytes, ..row(args, ranks, &rejoins, &agreements, &all) };
    Ok((row, wrong))
}

fn replaced(iteration: u32, ranks: u32) -> Rank {
    // CAST: below 64.
    Rank((iteration % ranks) as u16)
}

fn row(args: &Args, ranks: u32, rejoins: &[Rejoin], agreements: &[Agreement], all: &[Duration]) -> Row {
    let both = || rejoins.iter().zip(agreements);
    let sums = |of: fn((&Rejoin, &Agreement)) -> Duration| Ms::of(&both().map(of).collect::<Vec<_>>());
    let pauses = both().flat_map(|(work, trips)| work.pause.iter().zip(&trips.pauses).map(|(a, b)| *a + *b));
    Row {
        ranks,
        qps_per_peer: args.qps_per_peer,
        agree_ms: Ms::of(&agreements.iter().map(|one| one.agree).collect::<Vec<_>>()),
        recreate_ms: Ms::of(&rejoins.iter().flat_map(|one| one.recreate.iter().copied()).collect::<Vec<_>>()),
        recreate_all_ms: Ms::of(all),
        gate_ms: sums(|(work, trips)| work.gate + trips.gate),
        pause_ms: Ms::of(&pauses.collect::<Vec<_>>()),
        rejoin_ms: sums(|(work, trips)| work.joiner + work.gate + trips.join),
        qps_created: rejoins.last().map_or(0, |one| one.created),
        qps_destroyed: rejoins.last().map_or(0, |one| one.destroyed),
        qps_created_all: 0,
        control_bytes: 0,
    }
}

fn print(report: &Report) {
    let header = [
        "ranks",
        "qps/peer",
        "agree",
        "p99",
        "recreate",
        "p99",
        "recreate all",
        "p99",
        "gate",
        "pause p99",
        "rejoin",
        "control",
    ];
    let mut table = Table::new(&header);
    for row in &report.rows {
        let ms = |value: f64| format!("{value:.2}");
        table.row([
            row.ranks.to_string(),
            row.qps_per_peer.to_string(),
            ms(row.agree_ms.p50),
            ms(row.agree_ms.p99),
            ms(row.recreate_ms.p50),
            ms(row.recreate_ms.p99),
            ms(row.recreate_all_ms.p50),
            ms(row.recreate_all_ms.p99),
            ms(row.gate_ms.p50),
            ms(row.pause_ms.p99),
            ms(row.rejoin_ms.p50),
            bytes(row.control_bytes),
        ]);
    }
    println!(
        "milliseconds; each command takes {} us, one after another per host; store: {}",
        report.command_us, report.store
    );
    print!("{table}");
    println!("result    {} wrong or lost in the steps after each", report.wrong);
}
