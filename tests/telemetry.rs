//! Counters count: each is seen above zero in the situation that it is named after, and at zero without it.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use ibex::config::Config;
use ibex::ids::{Lane, Rank};
use ibex::session::{CombineSource, Halves};
use ibex_abi::device_ctx::PeerTelemetry;
use ibex_hca::emulated::PathState;

mod steps;

use steps::{Flaws, Sim, tiny};

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
