//! Groups of ranks on given GPUs: every mode, eager and from graphs, with a peer replaced between two replays.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::sync::Arc;

use ibex::config::{CombineMode, Config, RoutePolicy, WireDtype};
use ibex::gpu::Gpu;
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{Gpus, Replacement, SessionGraph, WorldOptions};
use ibex_hca::emulated::Doorbells;

/// A group that is quick to check.
pub(crate) fn config(num_ranks: u32) -> Config {
    Config {
        num_ranks,
        max_tokens: 12,
        hidden: 256,
        num_experts: 9,
        max_topk: 3,
        num_sms: 2,
        warps_per_block: 8,
        // Kernels on processors that others use too are slow, and that is no fault.
        detect_ms: 20_000,
        ..Config::default()
    }
}

/// Both wire types, both ways to combine, both ways for rows to travel.
pub(crate) fn modes(base: &Config) -> Vec<Config> {
    let mut all = Vec::new();
    for route in [RoutePolicy::Ibgda, RoutePolicy::Auto] {
        all.push(Config { route, dtype: WireDtype::Bf16, combine: CombineMode::Exact, ..base.clone() });
        all.push(Config { route, dtype: WireDtype::Fp8, combine: CombineMode::Reduced, ..base.clone() });
    }
    all
}

fn inputs(rig: &Rig, iteration: u64) -> Vec<RankInput> {
    let config = rig.config();
    let input = |rank: u32| {
        let key = InputKey { seed: 5, iteration, rank: Rank(rank as u16) };
        // Ranks bring different numbers of tokens, none included.
        RankInput::generate(config, Routing::Uniform, key, (iteration as u32 * 5 + rank * 3) % 13)
    };
    (0..config.num_ranks).map(input).collect()
}

/// A group on `gpus`, its devices strict about doorbells.
pub(crate) fn rig(config: &Config, gpus: Vec<Arc<dyn Gpu>>) -> Rig {
    let options =
        WorldOptions { gpus: Gpus::Given(gpus), doorbells: Doorbells::Strict, ..WorldOptions::default() };
    Rig::new(config, &options).unwrap()
}

fn check(rig: &Rig, inputs: &[RankInput], what: &str) {
    let verdict = rig.check(inputs).unwrap();
    assert!(verdict.checked > 0, "{what}");
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "{what}, {:?}: {verdict:?}", rig.config());
}

fn replay(rig: &Rig, graphs: &[SessionGraph], iteration: u64) {
    let inputs = inputs(rig, iteration);
    rig.load(&inputs, &StepPlan::default()).unwrap();
    for (rank, graph) in rig.ranks().iter().zip(graphs) {
        rank.session.replay(graph, &rank.stream).unwrap();
    }
    rig.synchronize().unwrap();
    check(rig, &inputs, &format!("replay {iteration}"));
}

/// Steps of one group, each launched by its own rank, in its turn.
pub(crate) fn run_eager(rig: &Rig) {
    for iteration in 0..3 {
        let inputs = inputs(rig, iteration);
        let verdict = rig.step(&inputs, &StepPlan::default()).unwrap();
        assert_eq!((verdict.wrong, verdict.lost), (0, 0), "step {iteration}: {verdict:?}");
    }
}

/// Steps of one group: eager, then from one capture that outlives a replaced peer.
pub(crate) fn run(rig: &Rig) {
    run_eager(rig);
    let plan = StepPlan::default();
    let capture = |rank: &ibex::harness::RigRank| {
        rank.session.begin_capture(&rank.stream).unwrap();
        rank.launch(rig.config().max_topk, &plan).unwrap();
        rank.session.end_capture().unwrap()
    };
    let graphs: Vec<SessionGraph> = rig.ranks().iter().map(capture).collect();
    for iteration in 3..5 {
        replay(rig, &graphs, iteration);
    }
    rig.world().replace_peer(Rank(1), Replacement::default()).unwrap();
    for iteration in 5..8 {
        replay(rig, &graphs, iteration);
    }
    let captures: Vec<u64> = rig.ranks().iter().map(|rank| rank.session.gpu().captures()).collect();
    assert!(captures.iter().all(|count| *count == 1), "{captures:?}");
    let unrung: u64 = rig.world().devices().iter().map(|d| d.check_unrung() + d.counters().unrung_wqes).sum();
    assert_eq!(unrung, 0);
}
