//! Why a kernel stops waiting for a peer: each kind of fault in the situation that it is named after, and no other.
//!
//! All of it in seeded simulation, so that limits are in virtual time. A silent host and an error completion, which
//! need no simulation, are in `losses.rs`.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use core::mem::offset_of;
use core::time::Duration;

use ibex::config::Config;
use ibex::ids::{Lane, Rank};
use ibex::session::{CombineSource, Halves, Session};
use ibex::telemetry::{Fault, FaultKind};
use ibex_abi::cqe::Syndrome;
use ibex_abi::device_ctx::{HandleArrays, LaneArgs, MemberTable};
use ibex_hca::Nanos;
use ibex_hca::emulated::PathState;
use zerocopy::FromBytes;

mod steps;

use steps::{Flaws, Sim, tiny};

const SEEDS: std::ops::RangeInclusive<u64> = 1..=8;
/// Long enough for signs of life, which come every 5 ms, to be late.
const DETECT: Duration = Duration::from_millis(20);
const STALL: Duration = Duration::from_millis(40);

/// Queue pairs that try again for far longer than the kernels of these tests wait, so that nothing here ends by an
/// error completion.
fn config() -> Config {
    Config { max_tokens: 8, sq_depth_log: 6, stall_ms: Some(5_000), ..tiny() }
}

/// Rank 0 gives up soon; everybody else keeps the configured limits.
fn with_hasty_rank_0(config: &Config, seed: u64, sets: usize) -> Sim {
    let sim = Sim::seeded(config, seed, sets);
    sim.at(0, 0).session.set_limits(DETECT, STALL).unwrap();
    sim
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap()
}

fn dispatch(sim: &Sim, rank: usize, set: usize) {
    sim.dispatch(rank, set, Lane(0), &sim.at(rank, set).stream, Halves::Both).unwrap();
}

fn wait_for(sim: &Sim, rank: usize) {
    let at = sim.at(rank, 0);
    at.session.gpu().synchronize(&at.stream).unwrap();
}

/// The one fault that a rank has recorded.
fn only_fault(sim: &Sim, rank: usize) -> Fault {
    let faults = sim.at(rank, 0).session.faults().unwrap();
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults[0]
}

fn clear(sim: &Sim) {
    for rank in 0..sim.num_ranks() {
        for peer in 0..sim.num_ranks() {
            sim.at(rank, 0).session.clear_suspicion(Rank(peer as u16)).unwrap();
        }
    }
}

/// Rank 1 lives and has sent, but its queue pair to rank 0 is broken: only its signs of life arrive there.
#[test]
fn a_peer_that_has_sent_and_is_not_heard_has_stalled() {
    let config = Config { num_ranks: 3, num_experts: 6, ..config() };
    for seed in SEEDS {
        let sim = with_hasty_rank_0(&config, seed, 1);
        let world = sim.world();
        for qpn in world.session(Rank(1)).queue_pairs(Rank(0)) {
            let now = Nanos(world.pool().now_ns());
            assert!(world.devices()[1].set_qp_error(qpn, Syndrome::TRANSPORT_RETRY_EXC, now));
        }
        dispatch(&sim, 0, 0);
        dispatch(&sim, 2, 0);
        // Rank 1 has not sent yet, so it may itself be waiting: the clock stands.
        sim.run_until_ns(ns(STALL) * 3 / 2);
        assert_eq!(sim.at(0, 0).session.faults().unwrap(), [], "seed {seed}");
        dispatch(&sim, 1, 0);
        sim.synchronize().unwrap();
        let fault = only_fault(&sim, 0);
        assert_eq!(
            (fault.peer, fault.kind, fault.combine),
            (Rank(1), FaultKind::Stalled, false),
            "seed {seed}"
        );
        assert!(fault.waited_ns > ns(STALL) * 5 / 2, "seed {seed}: {fault:?}");
        let flaws = sim.check_dispatch_of(0, 0);
        assert!(flaws.wrong == 0 && flaws.lost != 0, "seed {seed}: {flaws:?}");
        assert_eq!(sim.check_dispatch_of(2, 0), Flaws::default(), "seed {seed}");
        assert_eq!(sim.at(2, 0).session.faults().unwrap(), []);
    }
}

/// Rank 1 lives and never launches: neither clock runs against it, and yet the wait ends.
#[test]
fn a_peer_that_lives_and_never_launches_meets_the_cap() {
    for seed in SEEDS {
        let sim = with_hasty_rank_0(&config(), seed, 1);
        dispatch(&sim, 0, 0);
        wait_for(&sim, 0);
        let fault = only_fault(&sim, 0);
        assert_eq!((fault.peer, fault.kind), (Rank(1), FaultKind::Cap), "seed {seed}");
        let cap = 2 * ns(STALL);
        assert!((cap..2 * cap).contains(&fault.waited_ns), "seed {seed}: {fault:?}");
        let flaws = sim.check_dispatch_of(0, 0);
        assert!(flaws.wrong == 0 && flaws.lost != 0, "seed {seed}: {flaws:?}");
    }
}

/// Where kernels of `session` find what: the arguments of lane 0, and the arrays of the first handle.
fn addresses(session: &Session) -> (LaneArgs, HandleArrays) {
    let frozen = session.frozen_bytes();
    let (lane, rest) = LaneArgs::read_from_prefix(&frozen).unwrap();
    (lane, HandleArrays::read_from_prefix(rest).unwrap().0)
}

fn is_source_ok(sim: &Sim, rank: usize, source: u64) -> bool {
    let at = sim.at(rank, 0);
    at.session.gpu().load_u32(at.tensors.source_ok.addr() + 4 * source).unwrap() == 1
}

/// Headers name the placement by which their sender chose owners. A message of another one is refused, with its source.
#[test]
fn a_header_of_another_placement_is_a_violation() {
    for seed in SEEDS {
        let mut sim = Sim::seeded(&config(), seed, 1);
        let session = sim.at(1, 0).session.clone();
        let version = addresses(&session).0.tables + offset_of!(MemberTable, placement_version) as u64;
        let honest = session.gpu().load_u32(version).unwrap();
        session.gpu().store_u32(version, honest + 1).unwrap();
        sim.launch_step(0, CombineSource::Staged);
        sim.synchronize().unwrap();
        for (rank, found) in [(0, honest + 1), (1, honest)] {
            let fault = only_fault(&sim, rank);
            assert_eq!(
                (fault.peer, fault.kind),
                (Rank(1 - rank as u16), FaultKind::Violation),
                "seed {seed}"
            );
            // The generation of the first step, and the version that the header names.
            assert_eq!(fault.detail, 2 << 32 | u64::from(found), "seed {seed}");
            let received = [0, 1].map(|source| is_source_ok(&sim, rank, source));
            assert_eq!(received, [rank == 0, rank == 1], "seed {seed}: each has its own tokens only");
        }
        let flaws = sim.check_combine(0);
        assert!(flaws.wrong == 0 && flaws.lost != 0, "seed {seed}: {flaws:?}");
        session.gpu().store_u32(version, honest).unwrap();
        clear(&sim);
        sim.load(0, seed, 1);
        sim.launch_step(0, CombineSource::Staged);
        sim.synchronize().unwrap();
        assert_eq!(sim.check(0), Flaws::default(), "seed {seed}");
    }
}

/// Rank 1 forgets one message of rank 0, sends back too little, and says so in its signal: nothing of it is summed.
#[test]
fn a_combine_that_counts_other_rows_than_were_sent_is_a_violation() {
    for seed in SEEDS {
        let sim = Sim::seeded(&config(), seed, 1);
        let handles: Vec<_> = (0..2)
            .map(|rank| sim.dispatch(rank, 0, Lane(0), &sim.at(rank, 0).stream, Halves::Both).unwrap())
            .collect();
        sim.synchronize().unwrap();
        let session = &sim.at(1, 0).session;
        // {generation:32 | count:32} of (rank 0, channel 0).
        let received = addresses(session).1.verdicts;
        let count = session.gpu().load_u32(received).unwrap();
        assert!(count > 1, "seed {seed}: rank 0 sends to rank 1");
        session.gpu().store_u32(received, count - 1).unwrap();
        for (rank, handle) in handles.iter().enumerate() {
            let stream = &sim.at(rank, 0).stream;
            sim.combine(rank, 0, handle, stream, CombineSource::Staged, Halves::Both).unwrap();
        }
        sim.synchronize().unwrap();
        let fault = only_fault(&sim, 0);
        assert_eq!(
            (fault.peer, fault.kind, fault.combine),
            (Rank(1), FaultKind::Violation, true),
            "seed {seed}"
        );
        let (sent, counted) = (fault.detail >> 32, fault.detail & 0xffff_ffff);
        assert!(counted < sent, "seed {seed}: {counted} of {sent}");
        let flaws = sim.check_combine(0);
        assert_eq!(
            (flaws.wrong, flaws.lost),
            (0, sent),
            "seed {seed}: no pick of rank 1 counts, not even what came"
        );
        assert_eq!(sim.at(1, 0).session.faults().unwrap(), []);
    }
}

/// Nothing of rank 0 arrives at rank 1, so no CQE gives rows back. A ring of one has two staging slots: the third
/// dispatch finds both taken, waits for its deadline, sends nothing and loses every pick.
#[test]
fn rows_that_no_completion_gives_back_poison_the_step_that_needs_them() {
    for seed in SEEDS {
        let mut sim = with_hasty_rank_0(&config(), seed, 3);
        // Different ones, so that what an earlier step left in the handle is no answer.
        sim.mask_pick(1, 0);
        sim.mask_pick(2, 1);
        sim.world().set_path(Rank(0), Rank(1), PathState::Cut);
        for step in 0..2 {
            dispatch(&sim, 0, step);
            dispatch(&sim, 1, step);
            sim.synchronize().unwrap();
            assert_eq!(sim.at(0, 0).session.faults().unwrap(), [], "seed {seed}");
        }
        sim.launch_step(2, CombineSource::Staged);
        sim.synchronize().unwrap();
        let fault = only_fault(&sim, 0);
        assert_eq!((fault.peer, fault.kind), (Rank(1), FaultKind::SourceRows), "seed {seed}");
        assert!(fault.waited_ns > ns(STALL), "seed {seed}: {fault:?}");
        let (picks, lost) = sim.picks_and_losses(0, 2);
        assert_eq!(lost, picks, "seed {seed}: every pick, and no masked one");
        let flaws = sim.check(2);
        assert_eq!(flaws.wrong, 0, "seed {seed}");
        // The old rows arrive, their CQEs come, and the group is whole.
        sim.world().set_path(Rank(0), Rank(1), PathState::Up);
        sim.run_until_ns(2 * sim.config().rc_timers().timeout_ns());
        clear(&sim);
        for iteration in 3..6 {
            sim.load(0, seed, iteration);
            sim.launch_step(0, CombineSource::Staged);
            sim.synchronize().unwrap();
            assert_eq!(sim.check(0), Flaws::default(), "seed {seed}, iteration {iteration}");
        }
    }
}
