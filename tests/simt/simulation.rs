//! Seeded schedules and virtual time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ibex::gpu::pool::{Pool, PoolConfig, PoolError, PoolLaunch};

use crate::buffers::*;

/// Runs the pair and a selftest under one seed; returns the schedule's hash and the virtual time taken.
fn simulate(seed: u64) -> (u64, u64) {
    let pool = Pool::new(PoolConfig::simulation(seed)).unwrap();
    let finished = Arc::new(Finished::default());
    let mut pair = Pair::new(40, 8);
    let mut run = Selftest::new(2, 3, 20);
    let began = pool.now_ns();
    pair.launch(&pool, &finished);
    run.launch(&pool, 2, &finished);
    pool.simulate(&mut || finished.count() == 3).unwrap();
    pair.check();
    run.check();
    (pool.stats().schedule_hash, pool.now_ns() - began)
}

#[test]
fn a_seed_replays_exactly_and_seeds_differ() {
    let hashes: Vec<u64> = (0..20).map(|seed| simulate(seed).0).collect();
    let again: Vec<u64> = (0..20).map(|seed| simulate(seed).0).collect();
    assert_eq!(hashes, again);
    let distinct: std::collections::HashSet<u64> = hashes.into_iter().collect();
    assert_eq!(distinct.len(), 20);
}

#[test]
fn virtual_time_stands_still_while_anything_moves() {
    for seed in 0..20 {
        assert_eq!(simulate(seed).1, 0, "seed {seed}");
    }
}

#[test]
fn virtual_time_reaches_a_device_deadline_exactly() {
    let timer = Arc::new(Timer { flag: 0.into(), at_ns: 123_456_789.into(), fired_at_ns: 0.into() });
    let pool = Pool::new(PoolConfig::simulation(7).with_progress(timer.clone())).unwrap();
    let finished = Arc::new(Finished::default());
    let _pair = wait_for_timer(&pool, &timer, &finished);
    pool.simulate(&mut || finished.count() == 1).unwrap();
    assert_eq!(timer.fired_at_ns.load(Ordering::Relaxed), 123_456_789);
}

#[test]
fn a_simulation_that_cannot_end_says_so() {
    let pool = Pool::new(PoolConfig::simulation(3)).unwrap();
    let finished = Arc::new(Finished::default());
    let timer = Timer { flag: 0.into(), at_ns: 0.into(), fired_at_ns: 0.into() };
    let _pair = wait_for_timer(&pool, &timer, &finished);
    assert_eq!(pool.simulate(&mut || finished.count() == 1), Err(PoolError::Stuck));
    assert!(pool.now_ns() > 1_000_000_000_000);
    drop(pool);
    assert_eq!(Arc::strong_count(&finished), 1, "done is dropped with the pool");
}

/// Runs a hazard with four warps under one seed; returns how the simulation ended, the counter, and the
/// time taken.
fn simulate_hazard(hazard: u32, rounds: u32, seed: u64) -> (Result<(), PoolError>, u32, u64) {
    let counter = AtomicU32::new(0);
    let mut config = PoolConfig::simulation(seed);
    config.steps_max = Some(100_000);
    let pool = Pool::new(config).unwrap();
    let began = pool.now_ns();
    let finished = Arc::new(Finished::default());
    let args = HazardArgs { counter: &counter, hazard, rounds };
    let launch =
        PoolLaunch { kernel: HAZARD, device: 0, blocks: 1, warps_per_block: 4, args: bytes_of(&args) };
    // SAFETY: `counter` outlives the pool.
    unsafe { pool.launch(&launch, finished.one()) }.unwrap();
    let ended = pool.simulate(&mut || finished.count() == 1);
    (ended, counter.load(Ordering::Relaxed), pool.now_ns() - began)
}

#[test]
fn a_barrier_that_a_warp_left_is_a_deadlock_at_once() {
    let (ended, _, took_ns) = simulate_hazard(BARRIER, 0, 1);
    assert_eq!((ended, took_ns), (Err(PoolError::Stuck), 0));
}

#[test]
fn memory_that_changes_for_ever_is_a_livelock() {
    let (ended, counter, took_ns) = simulate_hazard(LIVELOCK, 0, 1);
    assert_eq!((ended, took_ns), (Err(PoolError::Livelock), 0));
    assert!(counter > 1000);
}

/// A load and a store in place of one update: some schedules lose counts, some do not, each seed always the
/// same.
#[test]
fn schedules_differ_in_what_they_uncover() {
    let counts: Vec<u32> = (0..64).map(|seed| simulate_hazard(LOST_UPDATE, 3, seed).1).collect();
    let again: Vec<u32> = (0..64).map(|seed| simulate_hazard(LOST_UPDATE, 3, seed).1).collect();
    assert_eq!(counts, again);
    let right = counts.iter().filter(|count| **count == 12).count();
    let distinct: std::collections::HashSet<&u32> = counts.iter().collect();
    println!("{right} of 64 schedules lose nothing; outcomes {distinct:?}");
    assert!((4..60).contains(&right) && distinct.len() >= 4, "{counts:?}");
}
