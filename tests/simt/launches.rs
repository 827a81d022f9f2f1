//! Launches in real time: from many threads, many of them, refused ones, abandoned ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use ibex::gpu::pool::{Pool, PoolConfig, PoolError, PoolLaunch, kernel_args_len, kernel_name};

use crate::buffers::*;

#[test]
fn the_build_knows_its_kernels() {
    assert_eq!(kernel_name(SELFTEST), Some("selftest"));
    assert_eq!(kernel_args_len(SELFTEST), Some(size_of::<SelftestArgs>()));
    assert_eq!(kernel_args_len(PAIR), Some(size_of::<PairArgs>()));
    assert_eq!(kernel_args_len(EMPTY), Some(size_of::<EmptyArgs>()));
    assert_eq!(kernel_name(u32::MAX), None);
}
#[test]
fn launches_from_several_threads_all_finish() {
    let pool = Pool::new(PoolConfig::real_time(2)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..25 {
                    let finished = Arc::new(Finished::default());
                    let mut run = Selftest::new(2, 4, 40);
                    run.launch(pool, thread + round, &finished);
                    finished.wait_for(1);
                    run.check();
                }
            });
        }
    });
    assert_eq!(pool.stats().launches, 100);
}

#[test]
fn two_devices_talk_through_flags() {
    for workers in [1, 2] {
        let pool = Pool::new(PoolConfig::real_time(workers)).unwrap();
        let finished = Arc::new(Finished::default());
        let mut pair = Pair::new(100, 200);
        pair.launch(&pool, &finished);
        finished.wait_for(2);
        pair.check();
    }
}

#[test]
fn ten_thousand_launches_cost_microseconds_and_no_memory() {
    let pool = Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap());
    let counter = AtomicU32::new(0);
    let args = EmptyArgs { counter: &counter };
    let launch =
        PoolLaunch { kernel: EMPTY, device: 0, blocks: 8, warps_per_block: 4, args: bytes_of(&args) };
    let finished = Arc::new(Finished::default());
    let mut mapped = 0;
    let begin = Instant::now();
    for i in 0..10_000 {
        // SAFETY: `counter` outlives the wait below.
        unsafe { pool.launch(&launch, finished.one()) }.unwrap();
        finished.wait_for(i + 1);
        if i == 100 {
            mapped = pool.stats().stacks;
        }
    }
    let one = begin.elapsed() / 10_000;
    println!("launch to completion, 8 blocks x 4 warps, waited for one by one: {one:?}");
    assert_eq!(counter.load(Ordering::Relaxed), 10_000 * 32);
    assert_eq!(pool.stats().stacks, mapped, "stacks are reused");
    assert_eq!(mapped, 32);
}

#[test]
fn a_refused_launch_says_why() {
    let pool = Pool::new(PoolConfig::real_time(1)).unwrap();
    let counter = AtomicU32::new(0);
    let args = EmptyArgs { counter: &counter };
    let good = PoolLaunch { kernel: EMPTY, device: 0, blocks: 1, warps_per_block: 1, args: bytes_of(&args) };
    let refusal = |launch: PoolLaunch<'_>| {
        let called = Arc::new(Finished::default());
        // SAFETY: `counter` outlives the pool, and nothing runs.
        let error = unsafe { pool.launch(&launch, called.one()) }.unwrap_err();
        assert_eq!((called.count(), Arc::strong_count(&called)), (0, 1), "done is dropped uncalled");
        error
    };
    assert_eq!(refusal(PoolLaunch { kernel: 77, ..good }), PoolError::UnknownKernel { id: 77 });
    let short = PoolError::ArgsLen { id: EMPTY, given: 7, expected: 8 };
    assert_eq!(refusal(PoolLaunch { args: &good.args[..7], ..good }), short);
    let field = |field, value, max| PoolError::OutOfRange { field, value, min: 1, max };
    assert_eq!(refusal(PoolLaunch { blocks: 0, ..good }), field("blocks", 0, 16384));
    assert_eq!(refusal(PoolLaunch { warps_per_block: 33, ..good }), field("warps_per_block", 33, 32));
    let many = refusal(PoolLaunch { blocks: 513, warps_per_block: 32, ..good });
    assert_eq!(many, PoolError::TooManyFibers { fibers: 513 * 32 });
    assert_eq!(Pool::new(PoolConfig::real_time(0)).unwrap_err(), field("workers", 0, 256));
    assert_eq!(pool.simulate(&mut || true).unwrap_err(), PoolError::NotSimulation);
    assert_eq!(counter.load(Ordering::Relaxed), 0);
}

#[test]
fn a_dropped_pool_abandons_what_waits_for_ever() {
    let pool = Pool::new(PoolConfig::real_time(1)).unwrap();
    let finished = Arc::new(Finished::default());
    let mut pair = Pair::new(4, 1);
    let args = PairArgs {
        my_flag: &pair.flags[0],
        peer_flag: &pair.flags[1],
        my_payload: pair.payloads[0].as_mut_ptr(),
        peer_payload: pair.payloads[1].as_mut_ptr(),
        sum: &mut pair.sums[0],
        n16: 4,
        rounds: 1,
        device: 1,
        fenced: 0,
    };
    let launch = PoolLaunch { kernel: PAIR, device: 0, blocks: 1, warps_per_block: 1, args: bytes_of(&args) };
    // SAFETY: `pair` outlives the pool.
    unsafe { pool.launch(&launch, finished.one()) }.unwrap();
    while pool.stats().stalls == 0 {
        std::thread::yield_now();
    }
    drop(pool);
    assert_eq!((finished.count(), Arc::strong_count(&finished)), (0, 1));
}
#[test]
fn progress_runs_while_fibers_wait_in_real_time() {
    let timer = Arc::new(Timer { flag: 0.into(), at_ns: u64::MAX.into(), fired_at_ns: 0.into() });
    let pool = Pool::new(PoolConfig::real_time(1).with_progress(timer.clone())).unwrap();
    let finished = Arc::new(Finished::default());
    let _pair = wait_for_timer(&pool, &timer, &finished);
    // Only once the kernel waits may the device see a reason to work.
    while pool.stats().stalls == 0 {
        std::thread::yield_now();
    }
    let at_ns = pool.now_ns() + 5_000_000;
    timer.at_ns.store(at_ns, Ordering::Relaxed);
    finished.wait_for(1);
    assert!(timer.fired_at_ns.load(Ordering::Relaxed) >= at_ns);
}
