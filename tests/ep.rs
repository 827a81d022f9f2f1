//! Dispatch and combine end to end on the embedded emulator, against the reference.

#![expect(clippy::unwrap_used, reason = "test helpers: a failed expectation is the message")]

use ibex::config::{CombineMode, Config, Link, RoutePolicy, ScaleKind, SignalMode, WireDtype};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{CombineSource, TopkDtype, WorldOptions};
use ibex_hca::emulated::Doorbells;

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

fn check_seeds(rig: &Rig, plan: &StepPlan, routing: Routing, seeds: std::ops::RangeInclusive<u64>) {
    for seed in seeds {
        let inputs = inputs(rig, routing, seed, seed);
        let verdict = rig.step(&inputs, plan).unwrap();
        assert_eq!(
            (verdict.wrong, verdict.lost),
            (0, 0),
            "seed {seed}, {routing}: {verdict:?} with {:?}",
            rig.config()
        );
        assert!(verdict.checked > 0);
    }
}

/// Violations of the doorbell rule that the devices counted, at the end of a run too.
fn unrung_wqes(rig: &Rig) -> u64 {
    rig.world().devices().iter().map(|d| d.check_unrung() + d.counters().unrung_wqes).sum()
}

fn run(config: &Config, plan: &StepPlan, routing: Routing, seeds: std::ops::RangeInclusive<u64>) {
    let rig = Rig::new(config, &WorldOptions::default()).unwrap();
    check_seeds(&rig, plan, routing, seeds);
    assert_eq!(unrung_wqes(&rig), 0);
}

/// Eight ranks at a shape that is quick to check.
fn eight_ranks() -> Config {
    Config { num_ranks: 8, hidden: 256, num_experts: 64, max_topk: 8, ..small() }
}

/// Runs one mode over seeds 1-20, all routings and both links.
fn all_routings_and_links(config: &Config) {
    for link in [Link::Ib, Link::Roce] {
        let rig = Rig::new(&Config { link, ..config.clone() }, &WorldOptions::default()).unwrap();
        for routing in Routing::ALL {
            check_seeds(&rig, &StepPlan::default(), *routing, 1..=20);
        }
        assert_eq!(unrung_wqes(&rig), 0);
    }
}

/// The modes of one wire dtype: combine, signals.
fn all_modes(dtype: WireDtype) {
    for combine in [CombineMode::Exact, CombineMode::Reduced] {
        for signal in [SignalMode::Write, SignalMode::FetchAdd] {
            all_routings_and_links(&Config { dtype, combine, signal, ..eight_ranks() });
        }
    }
}

#[test]
fn bf16_agrees_with_the_reference_in_every_mode_over_twenty_seeds() {
    all_modes(WireDtype::Bf16);
}

#[test]
fn fp8_agrees_with_the_reference_in_every_mode_over_twenty_seeds() {
    all_modes(WireDtype::Fp8);
}

#[test]
fn every_kind_of_scale_agrees_with_the_reference() {
    for scales in [ScaleKind::F32, ScaleKind::Pow2, ScaleKind::Ue8m0] {
        // A short last block, too.
        for hidden in [256, 272] {
            let config = Config { dtype: WireDtype::Fp8, scales, hidden, ..small() };
            run(&config, &StepPlan::default(), Routing::Uniform, 1..=4);
        }
    }
}

#[test]
fn mapped_peers_and_split_halves_agree_with_the_reference() {
    for route in [RoutePolicy::Auto, RoutePolicy::Ibgda] {
        for combine in [CombineMode::Exact, CombineMode::Reduced] {
            let config = Config { route, combine, num_ranks: 3, ..small() };
            let plan = StepPlan { hooks: true, ..StepPlan::default() };
            run(&config, &plan, Routing::Uniform, 1..=6);
        }
    }
}

#[test]
fn record_driven_devices_agree_with_the_reference() {
    let options = WorldOptions { doorbells: Doorbells::Record, ..WorldOptions::default() };
    let rig = Rig::new(&eight_ranks(), &options).unwrap();
    check_seeds(&rig, &StepPlan::default(), Routing::Zipf, 1..=10);
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
