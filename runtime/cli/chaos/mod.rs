//! `ibex chaos`: campaigns of faults, and what they find.
//!
//! In simulation one seed is one plan of faults and one schedule; the same seed and flags replay exactly. Between
//! processes a seed is a plan of faults, and everything else is the machine's. Owns the report files.
//!
//! ```text
//!  procs        flags, what this machine cannot do, what is left behind
//!  supervisor   the group: who runs, who is to come, when it is over
//!  inject       faults on processes          process    ranks, the store, the view in it
//!  pace         how long ranks may be silent on this machine
//! ```

use std::path::PathBuf;

use clap::ValueEnum;
use ibex::chaos::campaign::{self, Campaign, Failure, Seeds};
use ibex::chaos::plan::{Ask, CLEAN_STEPS, Plan};
use ibex::chaos::report::{Report, ReportJson};
use ibex::chaos::timeline::Timeline;
use ibex::chaos::{ALL_KINDS, FaultKind, html, sim};
use ibex::error::{ConfigError, Limit};
use ibex::time::Stopwatch;
use parking_lot::Mutex;
use serde::Serialize;

use super::flags::Hosts;
use super::progress::Progress;
use super::{CliError, Outcome, claim_output, write_output};

mod inject;
mod leaks;
mod pace;
mod process;
mod procs;
mod supervisor;

pub(super) use procs::run_rank;

/// Most steps of one plan.
const STEPS_MAX: u64 = 10_000;
/// Most seeds of one campaign.
const SEEDS_MAX: u64 = 10_000_000;
/// Seeds with findings after which a core stops.
const FAILURES_MAX: usize = 20;
/// Findings of one seed that are printed.
const FLAWS_SHOWN: usize = 10;

/// Where the ranks of a campaign run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fabric {
    /// All on one thread, in virtual time.
    Sim,
    /// Processes that share memory.
    Shm,
    /// Processes that exchange packets.
    Udp,
}

/// Flags of `chaos`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Where ranks run.
    #[arg(long, value_enum, default_value_t = Fabric::Sim)]
    fabric: Fabric,
    /// Ranks [default: 8; in simulation 2 to 4, drawn from the seed].
    #[arg(long)]
    ranks: Option<u32>,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many seeds to run, on all cores; in simulation.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Steps at least, of which the last 10 are without faults; a fault about every 5 [default: 110; in simulation 20].
    #[arg(long)]
    steps: Option<u64>,
    /// Kinds of faults to draw from, separated by commas; all if absent.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    faults: Vec<FaultKind>,
    /// Most tokens per rank.
    #[arg(long, default_value_t = 16)]
    tokens: u32,
    /// Row width [default: 512; in simulation 256].
    #[arg(long)]
    hidden: Option<u32>,
    #[command(flatten)]
    procs: procs::Flags,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with a timeline: of the seed, or of the first that failed.
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
}

impl Args {
    fn ask(&self) -> Result<Ask, CliError> {
        let within = |field, value: u64, min: u64, max: u64| match (min..=max).contains(&value) {
            true => Ok(()),
            false => Err(ConfigError { field, value: value.into(), limit: Limit::Range { min, max } }),
        };
        let usual = Ask::default();
        let steps = self.steps.unwrap_or(usual.steps);
        within("steps", steps, CLEAN_STEPS, STEPS_MAX)?;
        within("seeds", self.seeds, 1, SEEDS_MAX)?;
        within("tokens", self.tokens.into(), 1, 128)?;
        within("ranks", self.ranks.unwrap_or(2).into(), 2, 16)?;
        let kinds = if self.faults.is_empty() { ALL_KINDS.to_vec() } else { self.faults.clone() };
        let hidden = self.hidden.unwrap_or(usual.hidden);
        Ok(Ask { ranks: self.ranks, steps, kinds, tokens: self.tokens, hidden })
    }

    /// The command that replays one seed.
    fn replay(&self, seed: u64) -> String {
        let mut command = format!("ibex chaos --fabric sim --seed {seed}");
        let usual = Ask::default();
        if let Some(ranks) = self.ranks {
            command += &format!(" --ranks {ranks}");
        }
        for (flag, value, default) in [
            ("steps", self.steps.unwrap_or(usual.steps), usual.steps),
            ("tokens", self.tokens.into(), usual.tokens.into()),
            ("hidden", self.hidden.unwrap_or(usual.hidden).into(), usual.hidden.into()),
        ] {
            if value != default {
                command += &format!(" --{flag} {value}");
            }
        }
        if !self.faults.is_empty() {
            let names: Vec<&str> = self.faults.iter().map(|kind| kind.name()).collect();
            command += &format!(" --faults {}", names.join(","));
        }
        command
    }
}

/// Runs the campaign and reports.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    if args.fabric != Fabric::Sim {
        return procs::run(args);
    }
    args.procs.refuse_in_simulation()?;
    let ask = args.ask()?;
    // A shape that cannot be is refused before a long run.
    sim::check(&Plan::draw(args.seed, &ask))?;
    claim_output(args.json.as_deref())?;
    claim_output(args.report.as_deref())?;
    let watch = Stopwatch::start();
    let (campaign, timeline) = match args.seeds {
        1 => one_seed(args, &ask)?,
        _ => (many_seeds(args, &ask), None),
    };
    let run = RunJson::new(args, &campaign, &watch);
    print("virtual time", &campaign.report);
    println!("{:.1} minutes on {} cores", run.wall_s / 60.0, run.cores);
    for failure in &campaign.failures {
        println!("failed: {}", args.replay(failure.seed));
        failure.flaws.iter().take(FLAWS_SHOWN).for_each(|flaw| println!("  {flaw}"));
    }
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&run).expect("plain data");
        write_output(path, &(json + "\n"))?;
    }
    if let Some(path) = &args.report {
        let shown = campaign.failures.first().map_or(args.seed, |failure| failure.seed);
        let timeline = match timeline {
            Some(timeline) => timeline,
            None => sim::run(&Plan::draw(shown, &ask))?.timeline,
        };
        write_output(path, &page(args, &campaign, shown, &timeline))?;
    }
    Ok(if campaign.is_good() { Outcome::Good } else { Outcome::Wrong })
}

/// The report of a simulated campaign, and what it took.
#[derive(Serialize)]
struct RunJson {
    /// The first seed.
    seed: u64,
    cores: usize,
    wall_s: f64,
    /// Those with findings.
    failed_seeds: Vec<u64>,
    #[serde(flatten)]
    report: ReportJson,
}

impl RunJson {
    fn new(args: &Args, campaign: &Campaign, watch: &Stopwatch) -> Self {
        Self {
            seed: args.seed,
            cores: if args.seeds == 1 { 1 } else { campaign::cores() },
            wall_s: watch.elapsed().as_secs_f64(),
            failed_seeds: campaign.failures.iter().map(|failure| failure.seed).collect(),
            report: campaign.report.to_json(),
        }
    }
}

fn one_seed(args: &Args, ask: &Ask) -> Result<(Campaign, Option<Timeline>), CliError> {
    let plan = Plan::draw(args.seed, ask);
    println!("{}", plan.to_json());
    let outcome = sim::run(&plan)?;
    let is_good = outcome.is_good();
    let mut campaign = Campaign { report: outcome.report, failures: Vec::new() };
    if !is_good {
        campaign.failures.push(Failure { seed: args.seed, flaws: outcome.flaws });
    }
    Ok((campaign, Some(outcome.timeline)))
}

fn many_seeds(args: &Args, ask: &Ask) -> Campaign {
    let seeds = Seeds { first: args.seed, count: args.seeds, failures_max: FAILURES_MAX };
    // CAST: at most SEEDS_MAX.
    let progress = Mutex::new(Progress::new("seeds", args.seeds as u32));
    campaign::run(seeds, ask, &|done| progress.lock().step(done as u32))
}

fn page(args: &Args, campaign: &Campaign, shown: u64, timeline: &Timeline) -> String {
    let title = match args.seeds {
        1 => format!("Chaos, seed {shown}"),
        count => format!("Chaos, {count} seeds from {}; the timeline is that of seed {shown}", args.seed),
    };
    let flaws: Vec<String> = campaign.failures.iter().flat_map(|f| f.flaws.clone()).collect();
    html::page(&title, &args.replay(shown), &campaign.report.to_json(), timeline, &flaws)
}

fn print(clock: &str, report: &Report) {
    let json: ReportJson = report.to_json();
    let found = &json.findings;
    println!(
        "{} seeds, {} steps, {} faults of {} kinds, {} members lost, {} replaced, {} picks reported lost",
        json.seeds,
        json.steps,
        json.faults,
        json.fault_counts.len(),
        json.kills,
        json.rejoins,
        json.lost_picks
    );
    println!(
        "wrong tokens {}, unreported losses {}, excess losses {}, false deaths {}, hangs {}, leaked {}, \
         healthy queue pairs touched {}, graphs captured again {}",
        found.wrong_tokens,
        found.unreported_losses,
        found.excess_losses,
        found.false_deaths,
        found.hangs,
        found.leaked_bytes,
        found.healthy_qps_touched,
        found.graph_recaptures
    );
    println!("{:<20} {:>7} {:>8} {:>8} {:>8}", format!("ms of {clock}"), "count", "p50", "p99", "max");
    for (name, t) in [
        ("detected", json.detected_ms),
        ("agreed", json.agree_ms),
        ("gate", json.gate_ms),
        ("recreated", json.recreate_ms),
        ("rejoined", json.rejoin_ms),
        ("survivor pause", json.survivor_pause_ms),
    ] {
        println!("{name:<20} {:>7} {:>8.2} {:>8.2} {:>8.2}", t.count, t.p50, t.p99, t.max);
    }
}
