//! Dispatch and combine on the embedded emulator, beside a memcpy of the bytes that one step puts on the wire.
//!
//! `cargo bench --bench dispatch_combine` prints criterion's estimates at a quarter of the published shape, so that a
//! run takes seconds; then a verdict at the published setting, from `ibex bench ep --check --route ibgda`: neither
//! operation may take longer than [`FLOOR_RATIO_MAX`] times the floor that its algorithm cannot beat. The exit status
//! is 1 otherwise. `cargo bench --bench dispatch_combine -- verdict` prints the verdict alone.

use std::hint::black_box;
use std::path::Path;
use std::process::{Command, ExitCode};

use criterion::{Criterion, Throughput};
use ibex::config::{Config, RoutePolicy};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::WorldOptions;
use ibex_hca::emulated::Doorbells;
use serde_json::Value;

/// How much longer than plain memcpy of the bytes that it must move an operation may take, in the median.
const FLOOR_RATIO_MAX: f64 = 2.5;

fn steps(c: &mut Criterion) {
    let config = Config {
        max_tokens: 64,
        hidden: 3584,
        num_experts: 64,
        route: RoutePolicy::Ibgda,
        detect_ms: 5000,
        ..Config::default()
    };
    let options = WorldOptions { doorbells: Doorbells::Record, ..WorldOptions::default() };
    let rig = Rig::new(&config, &options).expect("the emulator takes this configuration");
    let inputs: Vec<RankInput> = (0..config.num_ranks)
        .map(|rank| {
            let key = InputKey { seed: 1, iteration: 0, rank: Rank(rank as u16) };
            RankInput::generate(rig.config(), Routing::Uniform, key, config.max_tokens)
        })
        .collect();
    let plan = StepPlan::default();
    rig.load(&inputs, &plan).expect("inputs fit");
    let before = wire_bytes(&rig);
    rig.launch(config.max_topk, &plan).and_then(|()| rig.synchronize()).expect("a step runs");
    let bytes = wire_bytes(&rig) - before;

    let mut group = c.benchmark_group("step of 8 ranks");
    group.throughput(Throughput::Bytes(bytes));
    group.sample_size(20);
    group.bench_function("dispatch + expert + combine", |b| {
        b.iter(|| rig.launch(config.max_topk, &plan).and_then(|()| rig.synchronize()).expect("a step runs"));
    });
    let (from, mut to) = (vec![1u8; bytes as usize], vec![0u8; bytes as usize]);
    group.bench_function("memcpy of its wire bytes, one thread", |b| {
        b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
    });
    group.finish();
}

fn wire_bytes(rig: &Rig) -> u64 {
    rig.world().devices().iter().map(|device| device.counters().bytes_written).sum()
}

/// Runs the published setting, prints its ratios and says whether they are within the limit.
fn verdict() -> bool {
    let report = match published_run() {
        Ok(report) => report,
        Err(said) => {
            eprintln!("dispatch_combine: {said}");
            return false;
        }
    };
    println!("{:20}{:>12}{:>12}{:>8}{:>8}", "us, median", "step", "memcpy", "ratio", "limit");
    let mut good = true;
    for (operation, key) in [("dispatch", "dispatch_us"), ("combine", "combine_us")] {
        // A number that is missing must not pass for a good one.
        let number = |value: &Value| value.as_f64().unwrap_or(f64::INFINITY);
        let step = number(&report[key]["p50"]);
        let floor = number(&report["memcpy_floor_us"][operation]);
        let ratio = number(&report["floor_ratio"][operation]);
        println!("{operation:20}{step:>12.0}{floor:>12.0}{ratio:>8.2}{FLOOR_RATIO_MAX:>8.2}");
        good &= ratio <= FLOOR_RATIO_MAX;
    }
    good
}

/// The report of `ibex bench ep` with its defaults, all over queue pairs; every row and output was right.
fn published_run() -> Result<Value, String> {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("dispatch_combine.json");
    let status = Command::new(env!("CARGO_BIN_EXE_ibex"))
        .args(["bench", "ep", "--check", "--route", "ibgda", "--fabric", "inproc", "--json"])
        .arg(&file)
        .status()
        .map_err(|error| error.to_string())?;
    if !status.success() {
        return Err(format!("ibex bench ep ended with {status}"));
    }
    let text = std::fs::read_to_string(&file).map_err(|error| error.to_string())?;
    serde_json::from_str(&text).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let mut criterion = Criterion::default().configure_from_args();
    steps(&mut criterion);
    criterion.final_summary();
    // `cargo test --benches` only asks whether the code runs; times of such a build mean nothing.
    if std::env::args().any(|arg| arg == "--bench") && !verdict() {
        eprintln!("dispatch_combine: an operation must take at most {FLOOR_RATIO_MAX} times its floor");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
