//! Reliable connections through a faulty switch, by seed, in virtual time, on one thread each.
//!
//! Each seed makes two to eight devices, a few connections between them, work for both ends of each and a
//! plan of faults. Every posted WQE must complete exactly once and in order, with success or with a
//! syndrome that a fault of that connection or its work explains; memory must equal the model; once the
//! faults have ended everything must come to an end, and connections that still stand must carry more.
//!
//! ```text
//! cargo test --release -p ibex-hca --test sim_rc                       a few hundred seeds
//! IBEX_FULL=1 cargo test --release -p ibex-hca --test sim_rc -- --nocapture    10 000 of them
//! IBEX_SEED=123 cargo test --release -p ibex-hca --test sim_rc         one seed again
//! ```
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]
#![allow(unreachable_pub, reason = "modules of one test binary")]
#![allow(clippy::cast_possible_truncation, reason = "small random numbers")]

mod model;
mod run;
mod scenario;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use run::Tally;

const QUICK: u64 = 200;
const FULL: u64 = 10_000;
/// Times that each kind of fault must have happened in a quick run: a kind that never happens proves nothing.
const QUICK_FAULTS_MIN: u64 = 10;
/// The same for a full run.
const FULL_FAULTS_MIN: u64 = 500;
/// A full run that takes longer than this will not be run.
const FULL_SECONDS_MAX: u64 = 480;

fn seeds() -> std::ops::Range<u64> {
    if let Ok(seed) = std::env::var("IBEX_SEED") {
        let seed = seed.parse().expect("IBEX_SEED is a number");
        return seed..seed + 1;
    }
    0..if std::env::var_os("IBEX_FULL").is_some() { FULL } else { QUICK }
}

/// Runs seeds until there are none left; a seed that fails is named.
fn work(next: &AtomicU64, end: u64) -> Tally {
    let mut sum = Tally::default();
    loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= end {
            return sum;
        }
        match std::panic::catch_unwind(|| run::run(seed)) {
            Ok(tally) => sum.add(&tally),
            Err(panic) => {
                eprintln!("failed: IBEX_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
}

#[test]
fn every_wqe_completes_once_in_order_and_memory_equals_the_model_under_any_faults() {
    let seeds = seeds();
    println!("seeds {seeds:?}");
    let started = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let end = seeds.end;
    let mut sum = Tally::default();
    std::thread::scope(|scope| {
        let workers = [0, 1].map(|_| scope.spawn(|| work(&next, end)));
        for worker in workers {
            match worker.join() {
                Ok(tally) => sum.add(&tally),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    let (count, took) = (end - seeds.start, started.elapsed());
    println!("{}\n{:.1} minutes", sum.report(), took.as_secs_f64() / 60.0);
    let faults = sum.faults;
    let least = match count {
        FULL => FULL_FAULTS_MIN,
        QUICK => QUICK_FAULTS_MIN,
        _ => 0,
    };
    for (kind, count) in [
        ("drop", faults.dropped),
        ("duplicate", faults.duplicated),
        ("delay", faults.delayed),
        ("reorder", faults.reordered),
        ("corrupt", faults.corrupted),
        ("rate limit", faults.paced),
        ("rate limit, queue full", faults.overflowed),
        ("partition", faults.partitioned),
        ("flap", faults.flapped),
    ] {
        assert!(count >= least, "{kind} happened {count} times, wanted {least}");
    }
    assert!(count != FULL || took.as_secs() <= FULL_SECONDS_MAX, "{took:?} for {count} seeds");
    assert!(sum.good * 2 > sum.wqes || count == 1, "most work succeeds in spite of the faults");
}
