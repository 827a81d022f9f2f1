//! `ibex chaos --fabric shm|udp`: one plan of faults on ranks that are processes.
//!
//! Owns the namespaces and the store while the campaign runs, and looks afterwards what is left of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ibex::chaos::plan::{Ask, CLEAN_STEPS, Plan};
use ibex::chaos::procs::{Between, FaultEntry, Observer, Shape, Worker, WorkerEnd};
use ibex::chaos::report::ReportJson;
use ibex::chaos::{ALL_KINDS, FaultKind, html};
use ibex::error::{ConfigError, Limit, OsError};
use ibex::time::unix_ns;
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::inject::why_not;
use super::leaks::{Present, inhabitants, numbers};
use super::pace::Pace;
use super::process::StoreProcess;
use super::supervisor::{Ground, run as supervise};
use super::{Args, FLAWS_SHOWN, Fabric, Hosts, STEPS_MAX};
use crate::cli::launch::{Namespaces, check_hosts, random_token};
use crate::cli::progress::Progress;
use crate::cli::{CliError, Outcome, claim_output, write_output};

/// Ranks, unless said otherwise.
const RANKS: u32 = 8;
/// Steps, unless said otherwise: twenty faults.
const STEPS: u64 = 110;
/// Row width, unless said otherwise.
const HIDDEN: u32 = 512;
/// Experts per token.
const TOPK: u32 = 4;
/// A live peer may take so many times as long as a silent one.
const STALL_PER_DETECT: u32 = 5;
/// How long ranks go on without the store: far longer than any outage of a plan.
const STORE_GRACE_MS: u32 = 120_000;

/// Flags that mean something between processes only.
#[derive(clap::Args)]
pub(super) struct Flags {
    /// Experts [default: 32].
    #[arg(long)]
    experts: Option<u32>,
    /// How long a peer may be silent [default: 250 for each rank that shares a core, more where threads wait for one].
    #[arg(long)]
    detect_ms: Option<u32>,
    /// How long a live peer may take [default: 5x --detect-ms].
    #[arg(long)]
    stall_ms: Option<u32>,
    /// Where ranks run: here, or in network namespaces joined by a bridge.
    #[arg(long)]
    hosts: Option<Hosts>,
    /// Network namespaces, each with an equal share of the ranks [default: one per rank].
    #[arg(long, value_name = "H", value_parser = clap::value_parser!(u32).range(1..=64))]
    num_hosts: Option<u32>,
    /// Where the group keeps its records [default: starts `ibex store serve` as a process, and breaks it].
    #[arg(long, value_name = "URL")]
    store: Option<String>,
}

impl Flags {
    /// A flag is honoured or refused, never ignored.
    pub(super) fn refuse_in_simulation(&self) -> Result<(), CliError> {
        let given = [
            ("--experts", self.experts.is_some()),
            ("--detect-ms", self.detect_ms.is_some()),
            ("--stall-ms", self.stall_ms.is_some()),
            ("--hosts", self.hosts.is_some()),
            ("--num-hosts", self.num_hosts.is_some()),
            ("--store", self.store.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((one, _)) => {
                Err(CliError::Conflict { one, other: "--fabric sim", because: "the seed draws it there" })
            }
            None => Ok(()),
        }
    }
}

/// Runs one rank of a campaign: what its supervisor starts.
pub(in crate::cli) fn run_rank() -> Result<Outcome, CliError> {
    let input = io::BufReader::new(io::stdin());
    Ok(match Worker::run(input, io::stdout())? {
        WorkerEnd::Good => Outcome::Good,
        WorkerEnd::Bad => Outcome::Wrong,
    })
}

/// Runs the campaign and reports.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    let between = if args.fabric == Fabric::Udp { Between::Udp } else { Between::Shm };
    let (ranks, hosts) = (args.ranks.unwrap_or(RANKS), args.procs.hosts.unwrap_or(Hosts::Local));
    check(args, between, ranks, hosts)?;
    let kinds = kinds(args, between)?;
    let steps = args.steps.unwrap_or(STEPS);
    let hidden = args.hidden.unwrap_or(HIDDEN);
    let ask = Ask { ranks: Some(ranks), steps, kinds, tokens: args.tokens, hidden };
    let plan = Plan::draw(args.seed, &ask);
    let pace = Pace::measure(plan.ranks);
    let mut shape = shape(args, between, plan.ranks, pace)?;
    shape.config()?;
    claim_output(args.json.as_deref())?;
    claim_output(args.report.as_deref())?;

    let is_interrupted = interruption()?;
    let before = Present::now();
    let num_hosts = args.procs.num_hosts.unwrap_or(ranks);
    let namespaces = match hosts {
        Hosts::Local => None,
        Hosts::Netns => Some(Namespaces::create(num_hosts, ranks / num_hosts)?),
    };
    let homes = namespaces.as_ref().map_or_else(Vec::new, |spaces| numbers(spaces, num_hosts));
    let store = match &args.procs.store {
        Some(_) => None,
        None => Some(StoreProcess::start()?),
    };
    shape.store =
        store.as_ref().map_or_else(|| args.procs.store.clone().unwrap_or_default(), StoreProcess::url);
    say_how(&shape, &plan, pace);
    let told = Told { pace, detect_ms: shape.detect_ms, stall_ms: shape.stall_ms };
    // CAST: at most STEPS_MAX.
    let mut progress = Progress::new("step", steps as u32);
    let mut observer = supervise(Ground {
        plan: &plan,
        shape,
        hosts: namespaces.as_ref().map(|namespaces| (namespaces, ranks / num_hosts)),
        store,
        progress: &mut |step| progress.step(step.min(steps) as u32),
        is_interrupted: &|| is_interrupted.load(Ordering::Relaxed),
    })?;
    drop(namespaces);
    look_for_leaks(&mut observer, &before, &homes);
    let outcome = tell(args, &observer, told)?;
    Ok(if is_interrupted.load(Ordering::Relaxed) { Outcome::Ended(130) } else { outcome })
}

fn check(args: &Args, between: Between, ranks: u32, hosts: Hosts) -> Result<(), CliError> {
    let within = |field, value: u64, min: u64, max: u64| match (min..=max).contains(&value) {
        true => Ok(()),
        false => Err(ConfigError { field, value: value.into(), limit: Limit::Range { min, max } }),
    };
    within("ranks", ranks.into(), 2, 64)?;
    within("steps", args.steps.unwrap_or(STEPS), CLEAN_STEPS, STEPS_MAX)?;
    within("tokens", args.tokens.into(), 1, 128)?;
    if args.seeds != 1 {
        let because = "processes of one seed have the machine to themselves";
        return Err(CliError::Conflict { one: "--seeds", other: "--fabric shm|udp", because });
    }
    if hosts == Hosts::Netns && between == Between::Shm {
        let because = "hosts share no memory: --fabric udp";
        return Err(CliError::Conflict { one: "--hosts netns", other: "--fabric shm", because });
    }
    if hosts == Hosts::Local && args.procs.num_hosts.is_some() {
        let because = "only namespaces have a number";
        return Err(CliError::Conflict { one: "--num-hosts", other: "--hosts local", because });
    }
    check_hosts(hosts, ranks, args.procs.num_hosts.unwrap_or(ranks))
}

/// The kinds to draw from. What cannot be done is refused where it was asked for by name, and said where it was not.
fn kinds(args: &Args, between: Between) -> Result<Vec<FaultKind>, CliError> {
    let has_own_store = args.procs.store.is_none();
    let because = |kind: FaultKind| why_not(kind, between, has_own_store);
    if let Some((kind, because)) = args.faults.iter().find_map(|kind| Some((kind, because(*kind)?))) {
        let other = if between == Between::Shm { "--fabric shm" } else { "--fabric udp" };
        return Err(CliError::Conflict { one: kind.name(), other, because });
    }
    if !args.faults.is_empty() {
        return Ok(args.faults.clone());
    }
    let (kinds, left_out): (Vec<FaultKind>, Vec<FaultKind>) =
        ALL_KINDS.iter().partition(|kind| because(**kind).is_none());
    for kind in left_out {
        eprintln!("ibex: without {kind}: {}", because(kind).unwrap_or_default());
    }
    Ok(kinds)
}

fn shape(args: &Args, between: Between, ranks: u32, pace: Pace) -> Result<Shape, CliError> {
    let detect_ms = args.procs.detect_ms.unwrap_or_else(|| pace.detect_ms());
    Ok(Shape {
        seed: args.seed,
        ranks,
        tokens: args.tokens,
        hidden: args.hidden.unwrap_or(HIDDEN),
        experts: args.procs.experts.unwrap_or(32),
        topk: TOPK.min(args.procs.experts.unwrap_or(32)),
        detect_ms,
        stall_ms: args.procs.stall_ms.unwrap_or(detect_ms.saturating_mul(STALL_PER_DETECT)),
        store_grace_ms: STORE_GRACE_MS,
        between,
        store: String::new(),
        // Another campaign on the same store is another group.
        group: format!("g-{}", &random_token()?[..12]),
    })
}

fn say_how(shape: &Shape, plan: &Plan, pace: Pace) {
    let (faults, ranks) = (plan.faults.len(), shape.ranks);
    println!(
        "seed {}: {ranks} processes, {faults} faults, detect {} ms, stall {} ms, store {}",
        plan.seed, shape.detect_ms, shape.stall_ms, shape.store
    );
    let Pace { cores, ranks_per_core, delay } = pace;
    println!(
        "{cores} cores: {ranks_per_core} ranks share one; beside {ranks} busy threads one waits up to {:.1} ms for it",
        delay.as_secs_f64() * 1e3
    );
}

/// What a report says of the machine, and of the limits chosen for it.
#[derive(Clone, Copy)]
struct Told {
    pace: Pace,
    detect_ms: u32,
    stall_ms: u32,
}

/// The report of a campaign between processes: that of any campaign, and how it came about.
#[derive(Serialize)]
struct Json<'a> {
    #[serde(flatten)]
    report: ReportJson,
    detect_ms: u32,
    stall_ms: u32,
    cores: u32,
    /// The longest that a thread waited for a core before the campaign began.
    sched_delay_ms: f64,
    /// The longest that any rank was silent by its own clock, those aside that were stopped on purpose.
    longest_silence_ms: f64,
    /// Bytes of expert weights that replacements have read from survivors before they were ready.
    weights_bytes: u64,
    /// Every fault: when, what, to whom, and how long until the group was whole again.
    fault_log: &'a [FaultEntry],
}

fn interruption() -> Result<Arc<AtomicBool>, CliError> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&flag))
            .map_err(|error| ibex::error::Error::from(OsError::from_io("sigaction", &error)))?;
    }
    Ok(flag)
}

fn look_for_leaks(observer: &mut Observer, before: &Present, homes: &[u64]) {
    let after = Present::now();
    let left = after.beyond(before) + inhabitants(homes);
    if left != 0 {
        observer.report.findings.leaked_bytes += left;
        observer.flaw(unix_ns(), format!("{left} things stay: {before:?}, now {after:?}"));
    }
}

fn tell(args: &Args, observer: &Observer, told: Told) -> Result<Outcome, CliError> {
    super::print("the clock", &observer.report);
    let reasons: Vec<String> =
        observer.reasons.iter().map(|(why, count)| format!("{why:?} {count}")).collect();
    println!("deaths were seen first by: {}", reasons.join(", ").to_lowercase());
    observer.flaws.iter().take(FLAWS_SHOWN).for_each(|flaw| println!("  {flaw}"));
    let json = observer.report.to_json();
    // CAST: durations far below 2^53 ns.
    let longest_silence_ms = observer.longest_silence_ns() as f64 / 1e6;
    println!("a rank was silent for {longest_silence_ms:.0} ms at most, stops on purpose aside");
    if let Some(path) = &args.json {
        let json = Json {
            report: json.clone(),
            detect_ms: told.detect_ms,
            stall_ms: told.stall_ms,
            cores: told.pace.cores,
            sched_delay_ms: told.pace.delay.as_secs_f64() * 1e3,
            longest_silence_ms,
            weights_bytes: observer.weights_bytes,
            fault_log: observer.fault_log(),
        };
        let text = serde_json::to_string_pretty(&json).expect("plain data");
        write_output(path, &(text + "\n"))?;
    }
    if let Some(path) = &args.report {
        let title = format!("Chaos between processes, seed {}", args.seed);
        let command = format!("ibex chaos --fabric {} --seed {}", fabric_name(args.fabric), args.seed);
        write_output(path, &html::page(&title, &command, &json, &observer.timeline, &observer.flaws))?;
    }
    let is_good = observer.report.is_good() && observer.flaws.is_empty();
    Ok(if is_good { Outcome::Good } else { Outcome::Wrong })
}

const fn fabric_name(fabric: Fabric) -> &'static str {
    match fabric {
        Fabric::Sim => "sim",
        Fabric::Shm => "shm",
        Fabric::Udp => "udp",
    }
}
