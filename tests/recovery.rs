//! Replacing a peer's queue pairs in place, between replays of captured graphs.

#![expect(clippy::unwrap_used, reason = "test helpers: a failed expectation is the message")]

use std::collections::BTreeSet;

use ibex::config::{Config, RoutePolicy, WireDtype};
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::RankInput;
use ibex::reference::rng::InputKey;
use ibex::reference::routing::Routing;
use ibex::session::{Replacement, SessionGraph, WorldOptions};
use ibex_abi::prm::{Op, Status};
use ibex_hca::emulated::{CommandRecord, ObjectKind};

/// Debug builds show that the machinery works; release builds run the published numbers.
const SMALL_REPLAYS: u64 = if cfg!(debug_assertions) { 1_000 } else { 10_000 };
const RECREATIONS: u64 = if cfg!(debug_assertions) { 500 } else { 10_000 };

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
        detect_ms: 5000,
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

/// What must be the same, byte for byte, for as long as a graph is replayed.
fn frozen(rig: &Rig, graphs: &[SessionGraph]) -> Vec<(Vec<u8>, Vec<Vec<u8>>, u64)> {
    let of = |(rank, graph): (&ibex::harness::RigRank, &SessionGraph)| {
        let gpu = rank.session.gpu();
        (rank.session.frozen_bytes(), gpu.captured_args(graph.graph()).unwrap(), gpu.captures())
    };
    rig.ranks().iter().zip(graphs).map(of).collect()
}

fn live_bytes(rig: &Rig) -> Vec<u64> {
    rig.ranks().iter().map(|rank| rank.session.control_report().live_bytes).collect()
}

type Object = (ObjectKind, u32);

/// Objects that successful commands of a trace made, and those that they took down.
fn made_and_gone(trace: &[CommandRecord]) -> (Vec<Object>, Vec<Object>) {
    let objects = |ops: &[Op]| {
        let is_one = |r: &&CommandRecord| r.status == Status::Ok && r.op.is_some_and(|op| ops.contains(&op));
        trace.iter().filter(is_one).map(|r| (r.object, r.number.unwrap())).collect()
    };
    (
        objects(&[Op::CreateCq, Op::CreateQp, Op::CreateMkey, Op::AllocUar]),
        objects(&[Op::DestroyCq, Op::DestroyQp, Op::DestroyMkey, Op::DeallocUar]),
    )
}

/// Objects of a kind.
fn count(objects: &[Object], kind: ObjectKind) -> usize {
    objects.iter().filter(|(of, _)| *of == kind).count()
}

/// The trace of one device while pairs were replaced: nothing in it is older or younger than those pairs, and it
/// names as many objects as they have.
fn assert_touches_only(trace: &[CommandRecord], num_pairs: usize, config: &Config) {
    let (made, gone) = made_and_gone(trace);
    let own: BTreeSet<String> = made.iter().chain(&gone).map(|object| format!("{object:?}")).collect();
    for record in trace.iter().filter(|r| r.number.is_some()) {
        let object: Object = (record.object, record.number.unwrap());
        let is_own = own.contains(&format!("{object:?}"));
        assert!(is_own, "{record:?} is neither an old nor a new object of the replaced pairs");
    }
    // One control queue pair and, per channel, one that kernels drive; two keys: region and combine slab.
    let queue_pairs = num_pairs * (config.validate().unwrap().num_channels() as usize + 1);
    for objects in [&made, &gone] {
        assert_eq!(count(objects, ObjectKind::Qp), queue_pairs);
        assert_eq!(count(objects, ObjectKind::Cq), queue_pairs);
        assert_eq!(count(objects, ObjectKind::Mkey), num_pairs * 2);
        assert_eq!(count(objects, ObjectKind::Uar), num_pairs);
    }
}

fn replace_and_judge(rig: &Rig, replaced: Rank, depth: Option<u8>, config: &Config) {
    for device in rig.world().devices() {
        let _ = device.take_trace();
    }
    let healthy: Vec<_> = pairs(rig).filter(|(a, b)| *a != replaced && *b != replaced).collect();
    let numbers = |pairs: &[(Rank, Rank)]| -> Vec<_> {
        pairs.iter().map(|(a, b)| rig.world().session(*a).queue_pairs(*b)).collect()
    };
    let before = numbers(&healthy);
    rig.world().replace_peer(replaced, Replacement { sq_depth_log: depth }).unwrap();
    assert_eq!(before, numbers(&healthy), "healthy pairs keep their queue pairs");
    for (rank, device) in rig.ranks().iter().zip(rig.world().devices()) {
        let num_pairs = if rank.rank() == replaced { rig.ranks().len() - 1 } else { 1 };
        assert_touches_only(&device.take_trace(), num_pairs, config);
    }
}

fn pairs(rig: &Rig) -> impl Iterator<Item = (Rank, Rank)> {
    let n = rig.ranks().len() as u16;
    (0..n).flat_map(move |a| (0..n).filter(move |b| a != *b).map(move |b| (Rank(a), Rank(b))))
}

#[test]
fn one_capture_survives_ten_thousand_replays_replacements_and_the_wrap_of_the_generation() {
    let config = config();
    let first_seq = (1 << 32) - SMALL_REPLAYS / 2;
    let rig = Rig::new(&config, &WorldOptions { first_seq, ..WorldOptions::default() }).unwrap();
    let graphs = capture(&rig);
    let (before, live) = (frozen(&rig, &graphs), live_bytes(&rig));
    let depths = [None, Some(6), Some(4), Some(5), Some(7)];
    for iteration in 0..SMALL_REPLAYS {
        replay(&rig, &graphs, iteration);
        if iteration % (SMALL_REPLAYS / 20) == 7 {
            let round = (iteration / (SMALL_REPLAYS / 20)) as usize;
            replace_and_judge(&rig, Rank(round as u16 % 3), depths[round % depths.len()], &config);
            assert!(before == frozen(&rig, &graphs), "an address or an argument moved");
        }
    }
    let next = rig.ranks()[0].session.next_seqs().unwrap();
    assert!(next[0][0] > 1 << 32, "the generation has wrapped");
    for rank in 0..3 {
        replace_and_judge(&rig, Rank(rank), None, &config);
    }
    replay(&rig, &graphs, SMALL_REPLAYS);
    assert_eq!(live, live_bytes(&rig), "at equal depth the heap holds the same live bytes");
    assert!(before == frozen(&rig, &graphs));
    for rank in rig.ranks() {
        assert_eq!(rank.session.gpu().captures(), 1);
    }
}

/// 8 ranks x 0.7 GB of tensors.
#[test]
fn one_capture_at_the_published_setting_survives_replacements() {
    if cfg!(debug_assertions) {
        println!(
            "SKIPPED: 200 replays at the published setting take minutes unoptimised; run with --release"
        );
        return;
    }
    let config = Config { route: RoutePolicy::Ibgda, detect_ms: 5000, ..Config::default() };
    let rig = Rig::new(&config, &WorldOptions::default()).unwrap();
    let graphs = capture(&rig);
    let before = frozen(&rig, &graphs);
    let depths = [None, Some(10), Some(8), Some(9)];
    for iteration in 0..200 {
        replay(&rig, &graphs, iteration);
        if iteration % 25 == 20 {
            let round = iteration as usize / 25;
            replace_and_judge(&rig, Rank(round as u16), depths[round % depths.len()], &config);
        }
    }
    assert!(before == frozen(&rig, &graphs), "an address or an argument moved");
}

#[test]
fn ten_thousand_recreations_at_changing_depth_leak_nothing() {
    let config = Config { channels: Some(1), ..config() };
    let rig = Rig::new(&config, &WorldOptions::default()).unwrap();
    let live = live_bytes(&rig);
    // Twice, half and the configured depth, rank after rank, while the other slots live.
    for round in 0..RECREATIONS / 4 {
        let depth = [Some(6), Some(4), None][round as usize % 3];
        rig.world().replace_peer(Rank(round as u16 % 3), Replacement { sq_depth_log: depth }).unwrap();
    }
    for rank in 0..3 {
        rig.world().replace_peer(Rank(rank), Replacement::default()).unwrap();
    }
    assert_eq!(live, live_bytes(&rig));
    for (rank, live) in rig.ranks().iter().zip(live) {
        let high_water = rank.session.control_report().peak_live_bytes;
        assert!(high_water <= 2 * live, "{high_water} bytes at most for {live} at equal depth");
    }
    let verdict = rig.step(&inputs(&rig, 1), &StepPlan::default()).unwrap();
    assert_eq!((verdict.wrong, verdict.lost), (0, 0));
}
