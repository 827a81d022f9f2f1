//! Counters count: each is seen above zero in the situation that it is named after, and at zero without it.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use ibex::config::Config;
use ibex::ids::{Lane, Rank};
use ibex::session::{CombineSource, Guard, Halves, Session};
use ibex_abi::device_ctx::{LaneArgs, LaneState, PeerTelemetry};
use ibex_hca::emulated::PathState;
use zerocopy::FromBytes;

mod steps;

use steps::{Flaws, Sim, tiny};

/// How often a test looks at a running kernel before it gives up.
const LOOKS_MAX: u32 = 1_000;
const SEEDS: std::ops::RangeInclusive<u64> = 1..=8;

/// Counters of rank 0 towards rank 1.
fn towards_peer(sim: &Sim) -> PeerTelemetry {
    sim.at(0, 0).session.telemetry().unwrap().lanes[0].peers[1]
}

/// One whole step under every seed.
fn counters_of(config: &Config, source: CombineSource) -> Vec<PeerTelemetry> {
    let run = |seed| {
        let sim = Sim::seeded(config, seed, 1);
        sim.launch_step(0, source);
        sim.synchronize().unwrap();
        assert_eq!(sim.check(0), Flaws::default());
        towards_peer(&sim)
    };
    SEEDS.map(run).collect()
}

fn config() -> Config {
    Config { max_tokens: 24, detect_ms: 5_000, ..tiny() }
}

#[test]
fn a_full_send_queue_is_counted_and_its_occupancy_seen() {
    let small = counters_of(&config(), CombineSource::ZeroCopy);
    assert!(small.iter().all(|peer| peer.sq_full > 0), "{small:?}");
    assert!(small.iter().all(|peer| (11..=16).contains(&peer.sq_high_water)), "{small:?}");
    let large = counters_of(&Config { sq_depth_log: 10, ..config() }, CombineSource::ZeroCopy);
    assert!(large.iter().all(|peer| peer.sq_full == 0), "{large:?}");
    assert!(large.iter().all(|peer| peer.sq_high_water > 16), "{large:?}");
    assert!(small.iter().chain(&large).all(|peer| peer.ring_full == 0));
}

#[test]
fn a_full_staging_ring_is_counted() {
    let small = Config { sq_depth_log: 10, staging_rows: 2, ..config() };
    let full = counters_of(&small, CombineSource::Staged);
    assert!(full.iter().all(|peer| peer.ring_full > 0 && peer.sq_full == 0), "{full:?}");
    let roomy = counters_of(&Config { staging_rows: 64, ..small }, CombineSource::Staged);
    assert!(roomy.iter().all(|peer| peer.ring_full == 0), "{roomy:?}");
}

/// Nothing of ours arrives at the peer, so no CQE comes; its credits do arrive. A ring of one has two staging slots:
/// the third dispatch finds both taken.
#[test]
fn a_dispatch_that_waits_for_its_staging_slot_is_counted() {
    for seed in SEEDS {
        let sim = Sim::seeded(&tiny(), seed, 1);
        sim.world().set_path(Rank(0), Rank(1), PathState::Cut);
        for step in 1..=3 {
            for rank in 0..sim.num_ranks() {
                sim.dispatch(rank, 0, Lane(0), &sim.at(rank, 0).stream, Halves::Both).unwrap();
            }
            sim.synchronize().unwrap();
            assert_eq!(towards_peer(&sim).staging_full, u64::from(step == 3), "seed {seed}, step {step}");
        }
    }
}

#[test]
fn a_sign_of_life_tells_whom_its_rank_suspects() {
    let config = Config { num_ranks: 3, num_experts: 6, stall_ms: Some(2_000), ..tiny() };
    let sim = Sim::seeded(&config, 1, 1);
    let suspected_by = |rank: usize, peer| sim.at(rank, 0).session.suspected_by(Rank(peer)).unwrap();
    assert_eq!(suspected_by(0, 1), []);
    for (from, to) in [(1, 2), (2, 1)] {
        sim.world().set_path(Rank(from), Rank(to), PathState::Cut);
    }
    sim.launch_step(0, CombineSource::ZeroCopy);
    sim.synchronize().unwrap();
    // A few more signs of life: the step may have ended right after one.
    sim.run_until_ns(u64::from(config.detect_ms) * 1_000_000);
    assert_eq!(suspected_by(0, 1), [Rank(2)], "rank 0 hears from both what happened between them");
    assert_eq!(suspected_by(0, 2), [Rank(1)]);
    assert_eq!(suspected_by(1, 0), []);
    sim.at(1, 0).session.clear_suspicion(Rank(2)).unwrap();
    sim.run_until_ns(u64::from(config.detect_ms) * 1_000_000);
    assert_eq!(suspected_by(0, 1), [], "what is cleared is no longer told");
}

/// Does a send half of lane 0 run here?
fn is_lane_taken(session: &Session) -> bool {
    let lane = LaneArgs::read_from_prefix(&session.frozen_bytes()).unwrap().0;
    session.gpu().load_u64(lane.state + core::mem::offset_of!(LaneState, busy) as u64).unwrap() != 0
}

/// Two dispatches on both ranks, the second of which waits at rank 0 for the credit of the first. Meanwhile, or not at
/// all, a graph replays another dispatch on the same lane there. Returns WQEs posted, halves refused, and what the
/// refused one has put out.
fn beside_a_running_send(seed: u64, overlaps: bool) -> (u64, u64, u32) {
    let sim = Sim::seeded(&tiny(), seed, 3);
    let at = sim.at(0, 1);
    let (session, aside) = (&at.session, at.session.stream());
    session.begin_capture(&aside).unwrap();
    let captured = sim.dispatch(0, 1, Lane(0), &aside, Halves::Both).unwrap();
    let graph = session.end_capture().unwrap();
    let dispatch = |rank, set| {
        sim.dispatch(rank, set, Lane(0), &sim.at(rank, set).stream, Halves::Both).unwrap();
    };
    dispatch(0, 0);
    dispatch(1, 0);
    sim.synchronize().unwrap();
    dispatch(0, 2);
    let taken = (0..LOOKS_MAX).find(|_| {
        sim.run_for(10);
        is_lane_taken(session)
    });
    assert!(taken.is_some(), "seed {seed}: the send waits for its credit");
    let next = session.next_seq(Lane(0)).unwrap();
    if overlaps {
        session.replay(&graph, &aside).unwrap();
        session.gpu().synchronize(&aside).unwrap();
        assert!(is_lane_taken(session), "seed {seed}: the lane is still the first one's");
    }
    assert_eq!(session.next_seq(Lane(0)).unwrap(), next, "seed {seed}");
    dispatch(1, 2);
    sim.synchronize().unwrap();
    assert_eq!(sim.check_dispatch(2), Flaws::default(), "seed {seed}");
    assert_eq!(session.next_seq(Lane(0)).unwrap()[0], next[0] + 1, "seed {seed}: one number was drawn");
    drop(captured);
    let telemetry = session.telemetry().unwrap();
    let source_ok = session.gpu().load_u32(at.tensors.source_ok.addr()).unwrap();
    (telemetry.total(|peer| peer.wqes), telemetry.lanes[0].lane_busy, source_ok)
}

#[test]
fn a_send_half_beside_another_of_its_lane_posts_nothing_and_is_counted() {
    for seed in SEEDS {
        let (alone, none_refused, _) = beside_a_running_send(seed, false);
        let (posted, refused, source_ok) = beside_a_running_send(seed, true);
        assert_eq!((none_refused, refused), (0, 1), "seed {seed}");
        assert_eq!(posted, alone, "seed {seed}");
        assert_eq!(source_ok, 0xa5a5_a5a5, "seed {seed}: it received nothing either");
    }
}

/// Three ranks, of which rank 0 does not hear rank 2 from here on.
fn deaf_to_rank_2(sim: &Sim) {
    sim.world().set_path(Rank(2), Rank(0), PathState::Cut);
}

fn dispatch_on_all(sim: &Sim) {
    for rank in 0..sim.num_ranks() {
        sim.dispatch(rank, 0, Lane(0), &sim.at(rank, 0).stream, Halves::Both).unwrap();
    }
}

#[test]
fn waits_are_told_by_peer_and_counters_while_a_kernel_runs() {
    let config = Config { num_ranks: 3, num_experts: 6, stall_ms: Some(2_000), sq_depth_log: 6, ..tiny() };
    let detect_ns = u64::from(config.detect_ms) * 1_000_000;
    for seed in SEEDS {
        let sim = Sim::seeded(&config, seed, 1);
        let at = sim.at(0, 0);
        let peers = || at.session.telemetry().unwrap().lanes[0].peers.clone();
        deaf_to_rank_2(&sim);
        dispatch_on_all(&sim);
        let has_sent = |peer: &PeerTelemetry| peer.wqes > 0 && peer.doorbells > 0;
        let looks = (0..LOOKS_MAX).find(|_| {
            sim.run_for(10);
            peers()[1..].iter().all(has_sent)
        });
        assert!(looks.is_some(), "seed {seed}: {:?}", peers());
        let source_ok = at.session.gpu().load_u32(at.tensors.source_ok.addr()).unwrap();
        assert_eq!(source_ok, 0xa5a5_a5a5, "seed {seed}: the kernel still waits for rank 2");
        sim.synchronize().unwrap();
        let after = peers();
        assert!(after[2].receive_wait_ns >= detect_ns, "seed {seed}: {after:?}");
        assert!(after[1].receive_wait_ns < detect_ns / 10, "seed {seed}: {after:?}");
        assert!(after.iter().all(|peer| peer.send_wait_ns == 0), "seed {seed}: {after:?}");
    }
}

/// The credit of the first step would come with the second.
#[test]
fn a_send_half_that_gives_up_on_a_credit_tells_how_long_it_waited() {
    let config = Config { num_ranks: 3, num_experts: 6, stall_ms: Some(2_000), sq_depth_log: 6, ..tiny() };
    let detect_ns = u64::from(config.detect_ms) * 1_000_000;
    for seed in SEEDS {
        let sim = Sim::seeded(&config, seed, 1);
        dispatch_on_all(&sim);
        sim.synchronize().unwrap();
        deaf_to_rank_2(&sim);
        dispatch_on_all(&sim);
        sim.synchronize().unwrap();
        let peers = sim.at(0, 0).session.telemetry().unwrap().lanes[0].peers.clone();
        assert!(peers[2].send_wait_ns >= detect_ns, "seed {seed}: {peers:?}");
        assert_eq!((peers[0].send_wait_ns, peers[1].send_wait_ns), (0, 0), "seed {seed}");
    }
}

#[test]
fn wqes_that_no_doorbell_covers_are_told() {
    let config = Config { detect_ms: 4, stall_ms: Some(8), ..tiny() };
    for (guard, expected) in [(None, false), (Some(Guard::Doorbell), true)] {
        let sim = Sim::seeded(&config, 1, 1);
        sim.switch_guard_off(guard);
        sim.launch_step(0, CombineSource::Staged);
        sim.synchronize().unwrap();
        let found = sim.recorded().unrung;
        let told = |rank: usize| sim.at(rank, 0).session.telemetry().unwrap().unrung_wqes.unwrap();
        assert_eq!(told(0) + told(1), found);
        assert_eq!(found != 0, expected);
    }
}
