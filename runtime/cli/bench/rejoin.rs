//! `ibex bench rejoin`: what a replaced rank costs the others, against recreating all queue pairs.
//!
//! Owns one rig per row. Rates of a busy machine show here too: the time of commands is modelled, that of the host's
//! own work is not.

use core::time::Duration;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use ibex::harness::rejoin::{RejoinCase, RejoinRig};
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
    /// What a command takes here, its latency and the emulator's own work.
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
    /// A survivor's queue pairs to the replaced rank.
    recreate_ms: Ms,
    /// All queue pairs of one rank.
    recreate_all_ms: Ms,
    /// From the first gate that closed to the last that opened.
    gate_ms: Ms,
    /// How long one survivor launched nothing.
    pause_ms: Ms,
    /// The replacement's own queue pairs, to everybody, and the gate.
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
    let (mut recreate, mut all, mut pause) = (Vec::new(), Vec::new(), Vec::new());
    let (mut gate, mut rejoin, mut qps) = (Vec::new(), Vec::new(), (0, 0, 0));
    for iteration in 0..args.iters {
        // CAST: below 64.
        let replaced = Rank((iteration % ranks) as u16);
        let one = rig.replace(replaced)?;
        wrong += rig.step()?;
        rejoin.push(one.joiner + one.gate);
        recreate.extend(one.recreate);
        pause.extend(one.pause);
        gate.push(one.gate);
        let other = rig.recreate_all(replaced)?;
        wrong += rig.step()?;
        all.push(other.took);
        qps = (one.created, one.destroyed, other.created);
    }
    let row = Row {
        ranks,
        qps_per_peer: args.qps_per_peer,
        recreate_ms: Ms::of(&recreate),
        recreate_all_ms: Ms::of(&all),
        gate_ms: Ms::of(&gate),
        pause_ms: Ms::of(&pause),
        rejoin_ms: Ms::of(&rejoin),
        qps_created: qps.0,
        qps_destroyed: qps.1,
        qps_created_all: qps.2,
        control_bytes: rig.control_bytes(),
    };
    Ok((row, wrong))
}

fn print(report: &Report) {
    let header = [
        "ranks",
        "qps/peer",
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
    println!("milliseconds; each command takes {} us, one after another per host", report.command_us);
    print!("{table}");
    println!("result    {} wrong or lost in the steps after each", report.wrong);
}
