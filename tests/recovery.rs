//! Replacing a peer's queue pairs in place, between replays of captured graphs, and losing peers honestly.

use ibex::config::{Config, RoutePolicy, WireDtype};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{Replacement, SessionGraph, WorldOptions};

fn config() -> Config {
    Config {
        num_ranks: 3,
        max_tokens: 12,
        hidden: 128,
        num_experts: 9,
        max_topk: 3,
        dtype: WireDtype::Bf16,
        route: RoutePolicy::Ibgda,
        sq_depth_log: 5,
        detect_ms: 2000,
        ..Config::default()
    }
}

fn inputs(rig: &Rig, iteration: u64) -> Vec<RankInput> {
    let config = rig.config();
    (0..config.num_ranks)
        .map(|rank| {
            let key = InputKey { seed: 7, iteration, rank: Rank(rank as u16) };
            // Ranks bring different numbers of tokens, none included.
            let tokens = (iteration as u32 * 5 + rank * 3) % (config.max_tokens + 1);
            RankInput::generate(config, Routing::Uniform, key, tokens)
        })
        .collect()
}

fn capture(rig: &Rig) -> Vec<SessionGraph> {
    let plan = StepPlan::default();
    rig.ranks()
        .iter()
        .map(|rank| {
            rank.session.begin_capture(&rank.stream).unwrap();
            rank.launch(rig.config().max_topk, &plan).unwrap();
            rank.session.end_capture().unwrap()
        })
        .collect()
}

fn replay(rig: &Rig, graphs: &[SessionGraph], iteration: u64) {
    let inputs = inputs(rig, iteration);
    rig.load(&inputs, &StepPlan::default()).unwrap();
    for (rank, graph) in rig.ranks().iter().zip(graphs) {
        rank.session.replay(graph, &rank.stream).unwrap();
    }
    rig.synchronize().unwrap();
    let verdict = rig.check(&inputs).unwrap();
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "iteration {iteration}: {verdict:?}");
}

#[test]
fn a_captured_graph_survives_replacing_a_peer_at_equal_and_other_depth() {
    let rig = Rig::new(&config(), &WorldOptions::default()).unwrap();
    let graphs = capture(&rig);
    let mut iteration = 0;
    for (round, depth) in [None, Some(6), Some(4), None, Some(7)].into_iter().enumerate() {
        for _ in 0..20 {
            replay(&rig, &graphs, iteration);
            iteration += 1;
        }
        let rank = Rank(round as u16 % 3);
        rig.world().replace_peer(rank, Replacement { sq_depth_log: depth }).unwrap();
    }
    replay(&rig, &graphs, iteration);
    for rank in rig.ranks() {
        assert_eq!(rank.session.gpu().captures(), 1);
    }
}
