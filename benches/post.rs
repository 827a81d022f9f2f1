//! The shipped post kernel against one emulated device, beside memcpy of the same messages; see also `ibex bench post`.
//!
//! `cargo bench --bench post` prints criterion's estimates, then a verdict from interleaved rounds: messages of 7168
//! bytes must move at no less than [`RATIO_MIN`] of memcpy's rate. The exit status is 1 otherwise.
//! `cargo bench --bench post -- verdict` prints the verdict alone.
//!
//! A round is timed from the launch of the kernel to its end: drawing, wiping and checking messages is the rig's work.

use core::time::Duration;
use std::process::ExitCode;

use criterion::{BenchmarkId, Criterion, Throughput};
use ibex::config::Link;
use ibex::harness::post::{Copies, INLINE_LEN, PostCase, PostRig};

/// The least part of memcpy's rate that a device of one thread must reach at the published row length.
const RATIO_MIN: f64 = 0.85;
/// The published fp8 row.
const ROW_LEN: u32 = 7168;
/// Messages of a round: 64 MiB of published rows, as in `ibex bench post`; more than caches hold, and so long that
/// waking the worker that runs the kernel hardly counts.
const MESSAGES: u32 = 9363;

fn case(bytes: u32, num_qps: u32) -> PostCase {
    let slots = MESSAGES / num_qps;
    PostCase { bytes, inline: bytes == INLINE_LEN, num_qps, slots, batch: 32, sq_depth_log: 10 }
}

fn rig(case: PostCase) -> PostRig {
    PostRig::new(case, Link::Roce, 1).expect("the emulator takes this case")
}

/// Nanoseconds of one round, whose every message arrived as it was sent.
fn round_ns(rig: &mut PostRig) -> u64 {
    let round = rig.round().expect("every WQE completes");
    assert_eq!(round.wrong, 0, "a rate of wrong messages is none");
    round.elapsed_ns
}

/// Adds up what `rounds` rounds say of themselves.
fn total(rounds: u64, mut round_ns: impl FnMut() -> u64) -> Duration {
    Duration::from_nanos((0..rounds).map(|_| round_ns()).sum())
}

fn estimate(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("post");
    group.sample_size(20);
    for bytes in [INLINE_LEN, ROW_LEN] {
        let case = case(bytes, 1);
        group.throughput(Throughput::Bytes(u64::from(bytes) * case.wqes()));
        group.bench_function(BenchmarkId::new("kernel", bytes), |bencher| {
            let mut rig = rig(case);
            bencher.iter_custom(|rounds| total(rounds, || round_ns(&mut rig)));
        });
        group.bench_function(BenchmarkId::new("memcpy", bytes), |bencher| {
            let mut copies = Copies::new(&case);
            bencher.iter_custom(|rounds| total(rounds, || copies.round_ns()));
        });
    }
    group.finish();
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// Prints medians of interleaved rounds and says whether the device keeps up.
fn verdict() -> bool {
    const ROUNDS: usize = 41;
    println!("{:20}{:>12}{:>12}{:>8}{:>8}", "GB/s, median", "kernel", "memcpy", "ratio", "limit");
    let mut good = true;
    for num_qps in [1, 4] {
        let case = case(ROW_LEN, num_qps);
        let (mut rig, mut copies) = (rig(case), Copies::new(&case));
        let bytes = (u64::from(ROW_LEN) * case.wqes()) as f64;
        let rate = |ns: u64| bytes / ns.max(1) as f64;
        let rates = (0..ROUNDS).map(|_| (rate(round_ns(&mut rig)), rate(copies.round_ns())));
        let (kernel, memcpy): (Vec<f64>, Vec<f64>) = rates.unzip();
        let (kernel, memcpy) = (median(kernel), median(memcpy));
        let (name, ratio) = (format!("{ROW_LEN} B, {num_qps} QPs"), kernel / memcpy);
        println!("{name:20}{kernel:>12.2}{memcpy:>12.2}{ratio:>8.2}{RATIO_MIN:>8.2}");
        good &= ratio >= RATIO_MIN;
    }
    good
}

fn main() -> ExitCode {
    let mut criterion = Criterion::default().configure_from_args();
    estimate(&mut criterion);
    criterion.final_summary();
    // `cargo test --benches` only asks whether the code runs; times of such a build mean nothing.
    if std::env::args().any(|arg| arg == "--bench") && !verdict() {
        eprintln!("post: messages of {ROW_LEN} B must move at no less than {RATIO_MIN} of memcpy's rate");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
