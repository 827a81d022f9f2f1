//! Devices that die or stop in the middle of a simulation.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ibex::gpu::pool::{Pool, PoolConfig, PoolError};

use crate::buffers::*;

/// Runs for so many turns of the scheduler, or until so many launches have finished.
fn turns(pool: &Pool, num: u64, finished: &Finished, all: u32) {
    let mut left = num;
    let over = &mut || {
        left = left.saturating_sub(1);
        left == 0 || finished.count() == all
    };
    pool.simulate(over).unwrap();
}

#[test]
fn a_killed_device_never_moves_again_and_says_so_before_the_call_returns() {
    let mut caught = 0;
    for seed in 0..40 {
        let pool = Pool::new(PoolConfig::simulation(seed)).unwrap();
        let (lost, finished) = (Arc::new(Finished::default()), Arc::new(Finished::default()));
        let mut pair = Pair::new(40, 8);
        pair.launch(&pool, &lost);
        turns(&pool, 2 * seed + 1, &lost, 2);
        let one_was_done = lost.count() > 0;
        pool.kill(0).unwrap();
        pool.kill(1).unwrap();
        assert_eq!(Arc::strong_count(&lost), 1, "every done was called or dropped, seed {seed}");
        caught += u64::from(!one_was_done);
        // Their memory may go; another device finds stacks and scheduler whole.
        drop(pair);
        let mut run = Selftest::new(2, 3, 20);
        run.launch(&pool, 1, &finished);
        pool.simulate(&mut || finished.count() == 1).unwrap();
        run.check();
    }
    assert!(caught > 20, "only {caught} seeds killed a pair that ran");
}

#[test]
fn a_launch_that_no_worker_has_seen_yet_is_killed_too() {
    let pool = Pool::new(PoolConfig::simulation(1)).unwrap();
    let (killed, kept) = (Arc::new(Finished::default()), Arc::new(Finished::default()));
    let mut runs = [Selftest::new(1, 2, 4), Selftest::new(1, 2, 4), Selftest::new(1, 2, 4)];
    for (run, device) in runs.iter_mut().zip([0, 7, 0]) {
        run.launch(&pool, device, if device == 7 { &killed } else { &kept });
    }
    pool.kill(7).unwrap();
    assert_eq!(Arc::strong_count(&killed), 1);
    pool.simulate(&mut || kept.count() == 2).unwrap();
    assert!(runs[1].counters.iter().all(|word| *word == 0));
    runs[0].check();
    runs[2].check();
}

#[test]
fn a_frozen_device_stands_still_while_time_passes_and_goes_on_where_it_stood() {
    for seed in 0..40 {
        let pool = Pool::new(PoolConfig::simulation(seed)).unwrap();
        let finished = Arc::new(Finished::default());
        let mut pair = Pair::new(40, 8);
        pair.launch(&pool, &finished);
        turns(&pool, seed + 1, &finished, 2);
        if finished.count() > 0 {
            continue;
        }
        pool.freeze(1, true).unwrap();
        // Device 1 writes its peer's flag.
        let flag = pair.flags[0].load(Ordering::Relaxed);
        let limit = pool.now_ns() + 1_000_000;
        pool.simulate(&mut || pool.now_ns() >= limit).unwrap();
        assert_eq!((pair.flags[0].load(Ordering::Relaxed), finished.count()), (flag, 0), "seed {seed}");
        pool.freeze(1, false).unwrap();
        pool.simulate(&mut || finished.count() == 2).unwrap();
        pair.check();
    }
}

#[test]
fn what_a_frozen_device_is_given_waits_for_the_thaw_or_dies_with_it() {
    let pool = Pool::new(PoolConfig::simulation(3)).unwrap();
    let finished = Arc::new(Finished::default());
    let mut run = Selftest::new(1, 2, 4);
    pool.freeze(2, true).unwrap();
    run.launch(&pool, 2, &finished);
    let limit = pool.now_ns() + 1_000_000;
    pool.simulate(&mut || pool.now_ns() >= limit).unwrap();
    assert_eq!(finished.count(), 0);
    pool.freeze(2, false).unwrap();
    pool.simulate(&mut || finished.count() == 1).unwrap();
    run.check();
    pool.freeze(2, true).unwrap();
    run.launch(&pool, 2, &finished);
    turns(&pool, 3, &finished, 2);
    pool.kill(2).unwrap();
    assert_eq!(Arc::strong_count(&finished), 1);
    // A device of that number that is made later starts thawed.
    let mut run = Selftest::new(1, 2, 4);
    run.launch(&pool, 2, &finished);
    pool.simulate(&mut || finished.count() == 2).unwrap();
    run.check();
}

#[test]
fn only_the_simulation_and_its_own_thread_may_do_it() {
    let real = Pool::new(PoolConfig::real_time(1)).unwrap();
    assert_eq!(real.kill(0), Err(PoolError::NotSimulation));
    assert_eq!(real.freeze(0, true), Err(PoolError::NotSimulation));
    let pool = Pool::new(PoolConfig::simulation(3)).unwrap();
    let mut asked = None;
    let other_thread = || std::thread::scope(|scope| scope.spawn(|| pool.kill(0)).join().unwrap());
    pool.simulate(&mut || {
        asked = Some((pool.kill(0), other_thread()));
        true
    })
    .unwrap();
    assert_eq!(asked, Some((Ok(()), Err(PoolError::AlreadyRunning))));
}
