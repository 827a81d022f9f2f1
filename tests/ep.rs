//! Dispatch and combine end to end on the embedded emulator, against the reference.

use ibex::config::{CombineMode, Config, RoutePolicy, SignalMode, WireDtype};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{CombineSource, TopkDtype, WorldOptions};

fn inputs(rig: &Rig, routing: Routing, seed: u64, iteration: u64) -> Vec<RankInput> {
    let config = rig.config();
    (0..config.num_ranks)
        .map(|rank| {
            let key = InputKey { seed, iteration, rank: Rank(rank as u16) };
            RankInput::generate(config, routing, key, config.max_tokens)
        })
        .collect()
}

fn small() -> Config {
    Config {
        num_ranks: 2,
        max_tokens: 16,
        hidden: 256,
        num_experts: 8,
        max_topk: 4,
        dtype: WireDtype::Bf16,
        route: RoutePolicy::Ibgda,
        detect_ms: 2000,
        ..Config::default()
    }
}

#[test]
fn two_ranks_exchange_bf16_over_queue_pairs() {
    let rig = Rig::new(&small(), &WorldOptions::default()).unwrap();
    for iteration in 0..5 {
        let inputs = inputs(&rig, Routing::Uniform, 1, iteration);
        let verdict = rig.step(&inputs, &StepPlan::default()).unwrap();
        assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{verdict:?}");
        assert!(verdict.checked > 0);
    }
}

fn run(config: &Config, plan: &StepPlan, routing: Routing, seeds: std::ops::RangeInclusive<u64>) {
    let rig = Rig::new(config, &WorldOptions::default()).unwrap();
    for seed in seeds {
        let inputs = inputs(&rig, routing, seed, seed);
        let verdict = rig.step(&inputs, plan).unwrap();
        assert_eq!((verdict.wrong, verdict.lost), (0, 0), "seed {seed}: {verdict:?} with {config:?}");
    }
    let unrung: u64 = rig.world().devices().iter().map(|d| d.check_unrung() + d.counters().unrung_wqes).sum();
    assert_eq!(unrung, 0);
}

#[test]
fn every_combination_of_modes_agrees_with_the_reference() {
    for dtype in [WireDtype::Bf16, WireDtype::Fp8] {
        for combine in [CombineMode::Exact, CombineMode::Reduced] {
            for signal in [SignalMode::Write, SignalMode::FetchAdd] {
                for route in [RoutePolicy::Auto, RoutePolicy::Ibgda] {
                    for hooks in [false, true] {
                        let config = Config { dtype, combine, signal, route, num_ranks: 3, ..small() };
                        let plan = StepPlan { hooks, ..StepPlan::default() };
                        run(&config, &plan, Routing::Uniform, 1..=4);
                    }
                }
            }
        }
    }
}

#[test]
fn odd_shapes_agree_with_the_reference() {
    for (ranks, hidden, experts, topk, tokens, channels) in [
        (1, 2880, 7, 1, 3, 1),
        (3, 3584, 10, 5, 7, 3),
        (5, 6400, 33, 32, 5, 2),
        (4, 7680, 4, 4, 1, 4),
        (2, 16, 3, 2, 33, 1),
    ] {
        for dtype in [WireDtype::Bf16, WireDtype::Fp8] {
            let config = Config {
                num_ranks: ranks,
                hidden,
                num_experts: experts,
                max_topk: topk,
                max_tokens: tokens,
                channels: Some(channels),
                dtype,
                ..small()
            };
            run(&config, &StepPlan::default(), Routing::Uniform, 1..=2);
        }
    }
}

#[test]
fn staged_combine_and_wide_ids_agree_with_the_reference() {
    let plan = StepPlan { source: CombineSource::Staged, topk_dtype: TopkDtype::I64, ..StepPlan::default() };
    let config = Config { staging_rows: 3, ..small() };
    run(&config, &plan, Routing::KHot, 1..=6);
}

#[test]
fn the_published_setting_agrees_with_the_reference() {
    run(&Config { route: RoutePolicy::Ibgda, detect_ms: 5000, ..Config::default() }, &StepPlan::default(), Routing::Uniform, 1..=2);
}
