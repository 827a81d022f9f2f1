//! What recovery costs: a replaced peer against all queue pairs, the gate, and membership while nothing happens.
//!
//! `cargo bench --bench recovery` prints criterion's estimate of one peer recreated, then a verdict of three parts:
//!
//! - at 64 ranks with 8 queue pairs per peer, recreating one peer takes at most a [`RECREATE_SHARE_MAX`]th of what
//!   recreating all does, and at most [`GROWTH_MAX`] times what it takes at 8 ranks;
//! - at 8 ranks, the gate keeps a survivor for at most [`PAUSE_MAX`] in the 99th percentile: what sessions do there,
//!   and what members need to agree on it, through a store in this process. Whoever is behind has nothing left to
//!   launch: how long that takes is the caller's;
//! - masks, suspicions, signs of life, loss bits and places of late rows take at most [`STEADY_MAX`] of a step at the
//!   published setting, against the same steps with kernels that do not look at them and hosts that say nothing, turn
//!   and turn about. What stays in both: which of two tables applies, and its epoch, once per half; the version that
//!   a header is compared by, once per message; the word of loss bits, once per token.
//!
//! The exit status is 1 otherwise. `cargo bench --bench recovery -- verdict` prints the verdict alone. Commands of the
//! emulated devices take [`COMMAND`] each.

use core::time::Duration;
use std::process::ExitCode;

use criterion::Criterion;
use ibex::config::{Config, RoutePolicy};
use ibex::harness::rejoin::{AgreementRig, Rejoin, RejoinCase, RejoinRig};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{Guard, WorldOptions};
use ibex::time::Stopwatch;

/// What one command takes: chosen; mlx5 commands take tens to hundreds of microseconds.
const COMMAND: Duration = Duration::from_micros(100);
/// How many times faster than all queue pairs one peer's are recreated.
const RECREATE_SHARE_MAX: f64 = 10.0;
/// How much longer one peer may take in a group of 64 than in one of 8.
const GROWTH_MAX: f64 = 3.0;
/// Longest pause of a survivor, but for one in a hundred.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// What membership may cost a step in which nothing happens.
const STEADY_MAX: f64 = 1.02;

fn rig(ranks: u32) -> RejoinRig {
    let case = RejoinCase { ranks, qps_per_peer: 8, command_latency: COMMAND };
    RejoinRig::new(case).expect("the emulator takes this case")
}

fn replace(rig: &mut RejoinRig, rank: u16) -> Rejoin {
    let rejoin = rig.replace(Rank(rank)).expect("a healthy peer is replaced");
    assert_eq!(rig.step().expect("a step runs"), 0, "a rank that is whole again loses nothing");
    rejoin
}

fn percentile(mut samples: Vec<f64>, share: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let rank = (share * samples.len() as f64).ceil() as usize;
    samples[rank.max(1) - 1]
}

fn ms(samples: &[Duration]) -> Vec<f64> {
    samples.iter().map(|sample| sample.as_secs_f64() * 1e3).collect()
}

fn line(what: &str, found: f64, limit: f64) -> bool {
    println!("{what:48}{found:>12.3}{limit:>10.2}");
    found <= limit
}

/// One peer at 8 and at 64 ranks, and all queue pairs at 64.
fn recreation() -> bool {
    let one_peer = |ranks: u32, rounds: u16| {
        let mut rig = rig(ranks);
        let samples = (0..rounds).flat_map(|rank| replace(&mut rig, rank).recreate).collect::<Vec<_>>();
        (percentile(ms(&samples), 0.5), rig)
    };
    let (small, _) = one_peer(8, 8);
    let (large, mut rig) = one_peer(64, 2);
    let all = rig.recreate_all(Rank(5)).expect("healthy pairs are recreated").took.as_secs_f64() * 1e3;
    assert_eq!(rig.step().expect("a step runs"), 0, "nothing is lost after that");
    println!("one peer: {small:.2} ms of 8 ranks, {large:.2} ms of 64; all queue pairs of 64: {all:.2} ms");
    let share = line("recreate / recreate all, 64 ranks", large / all, 1.0 / RECREATE_SHARE_MAX);
    line("recreate, 64 ranks / 8 ranks", large / small, GROWTH_MAX) && share
}

/// 8 ranks pass the gate again and again, with a step between.
fn pause() -> bool {
    const ROUNDS: u16 = 60;
    let mut rig = rig(8);
    let (mut work, mut offer_bytes) = (Vec::new(), 0);
    for round in 0..ROUNDS {
        let rejoin = replace(&mut rig, round % 8);
        work.extend(rejoin.pause);
        offer_bytes = rejoin.offer_bytes;
    }
    let mut group = AgreementRig::new(rig.membership(), offer_bytes).expect("a group in this process");
    // Its workers have nothing more to do, and the next part is to have the cores.
    drop(rig);
    let (mut trips, mut agree) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let agreement = group.replace(Rank(round % 8)).expect("a group in which nothing else fails");
        trips.extend(agreement.pauses);
        agree.push(agreement.agree);
    }
    let at = |samples: &[Duration], share| percentile(ms(samples), share);
    println!(
        "pause, p99: {:.2} ms of work, {:.2} ms of trips to the store",
        at(&work, 0.99),
        at(&trips, 0.99)
    );
    println!("agreement on a death, 8 ranks: {:.2} ms, p99 {:.2} ms", at(&agree, 0.5), at(&agree, 0.99));
    let both: Vec<Duration> = work.iter().zip(&trips).map(|(work, trips)| *work + *trips).collect();
    line("pause p99, 8 ranks, ms", at(&both, 0.99), PAUSE_MAX.as_secs_f64() * 1e3)
}

/// What membership adds to kernels and hosts, as far as it can be left out.
const MEMBERSHIP: [Guard; 2] = [Guard::Membership, Guard::LateRows];

/// Steps at the published setting, with and without what membership adds, turn and turn about.
fn steady() -> bool {
    const ROUNDS: usize = 401;
    let config = Config { route: RoutePolicy::Ibgda, ..Config::default() };
    let rig = Rig::new(&config, &WorldOptions::default()).expect("the published setting");
    let input = |rank: u32| {
        let key = InputKey { seed: 1, iteration: 0, rank: Rank(rank as u16) };
        RankInput::generate(rig.config(), Routing::Uniform, key, config.max_tokens)
    };
    let inputs: Vec<RankInput> = (0..config.num_ranks).map(input).collect();
    let plan = StepPlan::default();
    rig.load(&inputs, &plan).expect("inputs fit");
    let step_ns = |with: bool| {
        for (rank, guard) in rig.ranks().iter().flat_map(|rank| MEMBERSHIP.map(|guard| (rank, guard))) {
            match with {
                true => rank.session.switch_guard_on(guard),
                false => rank.session.switch_guard_off(guard),
            }
        }
        let watch = Stopwatch::start();
        rig.launch(config.max_topk, &plan).and_then(|()| rig.synchronize()).expect("a step runs");
        watch.elapsed_ns() as f64
    };
    let _ = (step_ns(true), step_ns(false));
    let both: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|round| match round % 2 {
            0 => (step_ns(true), step_ns(false)),
            _ => {
                let without = step_ns(false);
                (step_ns(true), without)
            }
        })
        .collect();
    for rank in rig.ranks() {
        let suspected = rank.session.suspected().expect("words in memory");
        assert_eq!(suspected, [], "rank {} was kept waiting: steps without a peer cost less", rank.rank());
    }
    let half = |of: fn(&(f64, f64)) -> f64| percentile(both.iter().map(of).collect(), 0.5);
    let (with, without) = (half(|pair| pair.0), half(|pair| pair.1));
    println!("a step: {:.2} ms with membership, {:.2} ms without", with / 1e6, without / 1e6);
    line("step with / without membership, median", half(|pair| pair.0 / pair.1), STEADY_MAX)
}

fn verdict() -> bool {
    println!("{:48}{:>12}{:>10}", "", "found", "limit");
    let parts = [recreation(), pause(), steady()];
    parts.into_iter().all(|part| part)
}

fn estimate(criterion: &mut Criterion) {
    let mut rig = rig(4);
    criterion.bench_function("one peer of 4 ranks, 8 queue pairs", |bencher| {
        bencher.iter_custom(|rounds| (0..rounds).map(|_| replace(&mut rig, 1).recreate[0]).sum());
    });
}

fn main() -> ExitCode {
    let mut criterion = Criterion::default().sample_size(20).configure_from_args();
    estimate(&mut criterion);
    criterion.final_summary();
    // `cargo test --benches` only asks whether the code runs; times of such a build mean nothing.
    if std::env::args().any(|arg| arg == "--bench") && !verdict() {
        eprintln!("recovery: a part of the verdict is outside its limit");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
