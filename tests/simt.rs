//! The SIMT layer: every collective, barrier and atomic, launches, simulation; on warp fibers here, on lane fibers in
//! a C++ process of its own (the one oracle against the other: both must give what this file computes).
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]
#![expect(
    unsafe_code,
    reason = "kernel arguments are raw pointers; each launch says why they are valid"
)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use ibex::gpu::pool::{
    Pool, PoolConfig, PoolError, PoolLaunch, Progress, Progressed, kernel_args_len, kernel_name,
};

mod rig;

const SELFTEST: u32 = 4;
const PAIR: u32 = 5;
const EMPTY: u32 = 6;
const WORDS: usize = 64;
const POISON: u32 = 0xdead_beef;

/// `SelftestArgs` of kernels/include/ibex/selftest.h.
#[repr(C)]
struct SelftestArgs {
    results: *mut u32,
    counters: *mut u32,
    wide: *mut u64,
    src: *const [u32; 4],
    dst: *mut [u32; 4],
    n16: u32,
    reserved: u32,
}

/// `SelftestPairArgs`.
#[repr(C)]
struct PairArgs {
    my_flag: *const AtomicU32,
    peer_flag: *const AtomicU32,
    my_payload: *mut [u32; 4],
    peer_payload: *mut [u32; 4],
    sum: *mut u64,
    n16: u32,
    rounds: u32,
    device: u32,
    fenced: u32,
}

/// `SelftestEmptyArgs`.
#[repr(C)]
struct EmptyArgs {
    counter: *const AtomicU32,
}

fn bytes_of<T>(args: &T) -> &[u8] {
    // SAFETY: the argument structs above are plain integers and pointers without padding.
    unsafe { core::slice::from_raw_parts(core::ptr::from_ref(args).cast(), size_of::<T>()) }
}

/// Counts finished launches, so that a test can wait for them or ask from inside a simulation.
#[derive(Default)]
struct Finished {
    count: Mutex<u32>,
    changed: Condvar,
}

impl Finished {
    fn one(self: &Arc<Self>) -> Box<dyn FnOnce() + Send> {
        let this = Arc::clone(self);
        Box::new(move || {
            *this.count.lock().unwrap() += 1;
            this.changed.notify_all();
        })
    }

    fn count(&self) -> u32 {
        *self.count.lock().unwrap()
    }

    fn wait_for(&self, wanted: u32) {
        let guard = self.count.lock().unwrap();
        let (_guard, timeout) = self
            .changed
            .wait_timeout_while(guard, Duration::from_secs(60), |count| *count < wanted)
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "{wanted} launches did not finish in a minute"
        );
    }
}

/// Buffers of one selftest launch, and the checks of what it must have left in them.
struct Selftest {
    blocks: u32,
    warps_per_block: u32,
    n16: u32,
    results: Vec<u32>,
    counters: Vec<u32>,
    wide: Vec<u64>,
    src: Vec<[u32; 4]>,
    dst: Vec<[u32; 4]>,
}

impl Selftest {
    fn new(blocks: u32, warps_per_block: u32, n16: u32) -> Self {
        let warps = (blocks * warps_per_block) as usize;
        let src = (0..warps as u32 * n16)
            .map(|i| [i, !i, i * 3, scramble(i)])
            .collect();
        Self {
            blocks,
            warps_per_block,
            n16,
            results: vec![POISON; warps * WORDS],
            counters: vec![0; 8],
            wide: vec![0; 4],
            src,
            dst: vec![[POISON; 4]; warps * n16 as usize],
        }
    }

    fn args(&mut self) -> SelftestArgs {
        SelftestArgs {
            results: self.results.as_mut_ptr(),
            counters: self.counters.as_mut_ptr(),
            wide: self.wide.as_mut_ptr(),
            src: self.src.as_ptr(),
            dst: self.dst.as_mut_ptr(),
            n16: self.n16,
            reserved: 0,
        }
    }

    fn launch(&mut self, pool: &Pool, device: u32, finished: &Arc<Finished>) {
        let args = self.args();
        let launch = PoolLaunch {
            kernel: SELFTEST,
            device,
            blocks: self.blocks,
            warps_per_block: self.warps_per_block,
            args: bytes_of(&args),
        };
        // SAFETY: every test waits for the launch before it touches or drops the buffers.
        unsafe { pool.launch(&launch, finished.one()) }.unwrap();
    }

    fn check(&self) {
        let warps = self.blocks * self.warps_per_block;
        for warp in 0..warps {
            self.check_warp(warp);
        }
        let all = 0..warps;
        assert_eq!(self.counters[0], warps);
        assert_eq!(self.counters[1], all.clone().sum::<u32>());
        assert_eq!(
            self.counters[2],
            all.clone().fold(0, |mask, w| mask | 1 << (w % 32))
        );
        assert_eq!(self.counters[3], all.map(scramble).max().unwrap());
        assert_eq!(self.counters[4], 3 * warps);
        assert_eq!(self.counters[5..7], [1, 1], "exactly one exchange saw zero");
        assert_eq!(self.wide[0], u64::from(warps) << 33);
        assert_eq!(self.wide[1], u64::from(warps - 1) << 40);
        assert_eq!(self.wide[2..], [0x0807_0605_0403_0201, 0x0403_0201]);
    }

    fn check_warp(&self, warp: u32) {
        let out = &self.results[warp as usize * WORDS..][..WORDS];
        let x: Vec<u32> = (0..32).map(|l| scramble(warp * 32 + l)).collect();
        let wide: u64 = x
            .iter()
            .map(|v| u64::from(*v) << 16)
            .fold(0, u64::wrapping_add);
        let high = |lanes: &[u32]| {
            lanes
                .iter()
                .map(|v| v % 1000)
                .max()
                .unwrap()
                .wrapping_sub(500)
        };
        let id = warp % self.warps_per_block;
        let partner = id ^ 1;
        assert_eq!(
            out[0],
            (0..32)
                .filter(|l| l % 3 == 0)
                .fold(0, |mask, l| mask | 1 << l),
            "ballot"
        );
        assert_eq!(out[1], x[7], "bcast");
        assert_eq!(
            out[2],
            x.iter().fold(0u32, |a, b| a.wrapping_add(*b)),
            "reduce_add"
        );
        assert_eq!(
            out[3..5],
            [*x.iter().max().unwrap(), *x.iter().min().unwrap()],
            "reduce_max, reduce_min"
        );
        assert_eq!(out[5], 0xff, "reduce_or");
        assert_eq!(
            u64::from(out[6]) | u64::from(out[7]) << 32,
            wide,
            "reduce_add, 64 bits"
        );
        assert_eq!(out[8], x[31], "shuffle");
        assert_eq!(
            out[9..11],
            [high(&x[..16]), high(&x[16..])],
            "reduce_max<16>"
        );
        assert_eq!(out[11], warp + 41, "one_lane");
        assert_eq!(out[12], id << 16 | self.warps_per_block, "id, count");
        assert_eq!(
            out[13],
            (warp / self.warps_per_block) << 16 | self.blocks,
            "block_id, num_blocks"
        );
        assert_eq!(out[14], 0b0110, "any, all");
        assert_eq!(
            out[16],
            (self.warps_per_block - 1 - id).pow(2),
            "shared memory across sync_block"
        );
        // Fifteen barriers besides sync_block's, so fifteen pairs.
        let paired = if partner < self.warps_per_block && id < 30 {
            100 + partner
        } else {
            POISON
        };
        assert_eq!(out[17], paired, "shared memory across sync_warps");
        assert_eq!(out[18], 32 * 33 / 2, "exclusive_add's total");
        assert_eq!(out[19], self.blocks * self.warps_per_block, "grid barrier");
        assert_eq!(out[20], 1, "the clock does not go backwards");
        let prefix: Vec<u32> = (0..32).map(|l| l * (l + 1) / 2).collect();
        assert_eq!(out[32..], prefix[..], "exclusive_add");
        let first = (warp * self.n16) as usize;
        let copied = (self.n16 - self.n16 / 4) as usize;
        let n16 = self.n16 as usize;
        assert_eq!(
            self.dst[first..first + copied],
            self.src[first..first + copied],
            "copy16"
        );
        assert!(
            self.dst[first + copied..first + n16]
                .iter()
                .all(|v| *v == [1, 2, 3, 4]),
            "fill16"
        );
    }
}

fn scramble(x: u32) -> u32 {
    x.wrapping_mul(2_654_435_761) ^ (x >> 7)
}

/// Two devices that pass a payload to and fro.
struct Pair {
    flags: [AtomicU32; 2],
    payloads: [Vec<[u32; 4]>; 2],
    sums: [u64; 2],
    n16: u32,
    rounds: u32,
}

impl Pair {
    fn new(n16: u32, rounds: u32) -> Box<Self> {
        let payload = vec![[0; 4]; n16 as usize];
        Box::new(Self {
            flags: Default::default(),
            payloads: [payload.clone(), payload],
            sums: [0; 2],
            n16,
            rounds,
        })
    }

    fn launch(&mut self, pool: &Pool, finished: &Arc<Finished>) {
        for device in 0..2 {
            let (mine, peer) = (device as usize, 1 - device as usize);
            let args = PairArgs {
                my_flag: &self.flags[mine],
                peer_flag: &self.flags[peer],
                my_payload: self.payloads[mine].as_mut_ptr(),
                peer_payload: self.payloads[peer].as_mut_ptr(),
                sum: &mut self.sums[mine],
                n16: self.n16,
                rounds: self.rounds,
                device,
                fenced: 0,
            };
            let launch = PoolLaunch {
                kernel: PAIR,
                device,
                blocks: 2,
                warps_per_block: 2,
                args: bytes_of(&args),
            };
            // SAFETY: every test waits for both launches before it touches or drops the pair.
            unsafe { pool.launch(&launch, finished.one()) }.unwrap();
        }
    }

    fn check(&self) {
        let words = |round: u64| -> u64 {
            (0..u64::from(self.n16))
                .map(|i| 4 * (round * 1000 + i) + 6)
                .sum()
        };
        let expected: u64 = (1..=u64::from(self.rounds)).map(words).sum();
        assert_eq!(self.sums, [expected; 2]);
    }
}

#[test]
fn the_build_knows_its_kernels() {
    assert_eq!(kernel_name(SELFTEST), Some("selftest"));
    assert_eq!(kernel_args_len(SELFTEST), Some(size_of::<SelftestArgs>()));
    assert_eq!(kernel_args_len(PAIR), Some(size_of::<PairArgs>()));
    assert_eq!(kernel_args_len(EMPTY), Some(size_of::<EmptyArgs>()));
    assert_eq!(kernel_name(u32::MAX), None);
}

#[test]
fn every_collective_gives_what_the_lanes_say() {
    let pool = Pool::new(PoolConfig::real_time(2)).unwrap();
    for (blocks, warps, n16) in [
        (1, 1, 0),
        (1, 1, 1),
        (1, 2, 31),
        (2, 5, 33),
        (3, 16, 448),
        (4, 32, 130),
    ] {
        let finished = Arc::new(Finished::default());
        let mut run = Selftest::new(blocks, warps, n16);
        run.launch(&pool, 0, &finished);
        finished.wait_for(1);
        run.check();
    }
}

/// Reads what `rig selftest --print` writes: a name and hexadecimal words per line.
fn parse_selftest(text: &str, run: &mut Selftest) {
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let name = fields.next().unwrap();
        let words = fields.map(|w| u64::from_str_radix(w, 16).unwrap());
        let narrow = |w: u64| u32::try_from(w).unwrap();
        match name {
            "results" => run.results = words.map(narrow).collect(),
            "counters" => run.counters = words.map(narrow).collect(),
            "wide" => run.wide = words.collect(),
            "dst" => {
                let words: Vec<u32> = words.map(narrow).collect();
                run.dst = words
                    .chunks_exact(4)
                    .map(|v| v.try_into().unwrap())
                    .collect();
            }
            other => panic!("unknown line {other}"),
        }
    }
}

#[test]
fn lane_fibers_give_what_warp_fibers_give() {
    let rig = match rig::build(rig::Flavor::Plain) {
        Ok(rig) => rig,
        Err(why) => {
            println!("SKIPPED: no C++ compiler at test time: {why}");
            return;
        }
    };
    for (blocks, warps, n16) in [(1, 1, 0), (2, 5, 33), (3, 16, 448)] {
        for seed in ["0", "1", "2"] {
            let (b, w, n) = (blocks.to_string(), warps.to_string(), n16.to_string());
            let shape = [
                "--blocks", &b, "--warps", &w, "--n16", &n, "--seed", seed, "--print",
            ];
            let output = rig::run_case(&rig, &[&["selftest"][..], &shape[..]].concat());
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            let mut run = Selftest::new(blocks, warps, n16);
            run.dst.clear();
            parse_selftest(&String::from_utf8_lossy(&output.stdout), &mut run);
            run.check();
        }
    }
    for case in ["pair", "fence-pair"] {
        assert!(
            rig::run_case(&rig, &[case, "--rounds", "50"])
                .status
                .success()
        );
    }
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
    let launch = PoolLaunch {
        kernel: EMPTY,
        device: 0,
        blocks: 8,
        warps_per_block: 4,
        args: bytes_of(&args),
    };
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
    let good = PoolLaunch {
        kernel: EMPTY,
        device: 0,
        blocks: 1,
        warps_per_block: 1,
        args: bytes_of(&args),
    };
    let refusal = |launch: PoolLaunch<'_>| {
        let called = Arc::new(Finished::default());
        // SAFETY: `counter` outlives the pool, and nothing runs.
        let error = unsafe { pool.launch(&launch, called.one()) }.unwrap_err();
        assert_eq!(
            (called.count(), Arc::strong_count(&called)),
            (0, 1),
            "done is dropped uncalled"
        );
        error
    };
    assert_eq!(
        refusal(PoolLaunch { kernel: 77, ..good }),
        PoolError::UnknownKernel { id: 77 }
    );
    let short = PoolError::ArgsLen {
        id: EMPTY,
        given: 7,
        expected: 8,
    };
    assert_eq!(
        refusal(PoolLaunch {
            args: &good.args[..7],
            ..good
        }),
        short
    );
    let field = |field, value, max| PoolError::OutOfRange {
        field,
        value,
        min: 1,
        max,
    };
    assert_eq!(
        refusal(PoolLaunch { blocks: 0, ..good }),
        field("blocks", 0, 16384)
    );
    assert_eq!(
        refusal(PoolLaunch {
            warps_per_block: 33,
            ..good
        }),
        field("warps_per_block", 33, 32)
    );
    let many = refusal(PoolLaunch {
        blocks: 513,
        warps_per_block: 32,
        ..good
    });
    assert_eq!(many, PoolError::TooManyFibers { fibers: 513 * 32 });
    assert_eq!(
        Pool::new(PoolConfig::real_time(0)).unwrap_err(),
        field("workers", 0, 256)
    );
    assert_eq!(
        pool.simulate(&mut || true).unwrap_err(),
        PoolError::NotSimulation
    );
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
    let launch = PoolLaunch {
        kernel: PAIR,
        device: 0,
        blocks: 1,
        warps_per_block: 1,
        args: bytes_of(&args),
    };
    // SAFETY: `pair` outlives the pool.
    unsafe { pool.launch(&launch, finished.one()) }.unwrap();
    while pool.stats().stalls == 0 {
        std::thread::yield_now();
    }
    drop(pool);
    assert_eq!((finished.count(), Arc::strong_count(&finished)), (0, 1));
}

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

/// A device that sets a flag at a virtual time, and records when it was asked.
struct Timer {
    flag: AtomicU32,
    at_ns: u64,
    fired_at_ns: AtomicU64,
}

impl Progress for Timer {
    fn progress(&self, _worker: u32, now_ns: u64, _random: u64) -> Progressed {
        if self.fired_at_ns.load(Ordering::Relaxed) != 0 {
            return Progressed::Idle {
                next_deadline_ns: None,
            };
        }
        if now_ns < self.at_ns {
            return Progressed::Idle {
                next_deadline_ns: Some(self.at_ns),
            };
        }
        self.fired_at_ns.store(now_ns, Ordering::Relaxed);
        self.flag.store(1, Ordering::Release);
        Progressed::Worked
    }
}

fn wait_for_timer(pool: &Pool, timer: &Timer, finished: &Arc<Finished>) -> Box<Pair> {
    let mut pair = Pair::new(1, 1);
    let args = PairArgs {
        my_flag: &timer.flag,
        peer_flag: &pair.flags[1],
        my_payload: pair.payloads[0].as_mut_ptr(),
        peer_payload: pair.payloads[1].as_mut_ptr(),
        sum: &mut pair.sums[0],
        n16: 1,
        rounds: 1,
        device: 1,
        fenced: 0,
    };
    let launch = PoolLaunch {
        kernel: PAIR,
        device: 0,
        blocks: 1,
        warps_per_block: 4,
        args: bytes_of(&args),
    };
    // SAFETY: the pair is returned and lives as long as the caller's pool runs it.
    unsafe { pool.launch(&launch, finished.one()) }.unwrap();
    pair
}

#[test]
fn virtual_time_reaches_a_device_deadline_exactly() {
    let timer = Arc::new(Timer {
        flag: 0.into(),
        at_ns: 123_456_789,
        fired_at_ns: 0.into(),
    });
    let pool = Pool::new(PoolConfig::simulation(7).with_progress(timer.clone())).unwrap();
    let finished = Arc::new(Finished::default());
    let _pair = wait_for_timer(&pool, &timer, &finished);
    pool.simulate(&mut || finished.count() == 1).unwrap();
    assert_eq!(timer.fired_at_ns.load(Ordering::Relaxed), 123_456_789);
}

#[test]
fn progress_runs_while_fibers_wait_in_real_time() {
    let timer = Arc::new(Timer {
        flag: 0.into(),
        at_ns: 1,
        fired_at_ns: 0.into(),
    });
    let pool = Pool::new(PoolConfig::real_time(1).with_progress(timer.clone())).unwrap();
    let finished = Arc::new(Finished::default());
    let _pair = wait_for_timer(&pool, &timer, &finished);
    finished.wait_for(1);
    assert!(pool.stats().progress_calls > 0);
}

#[test]
fn a_simulation_that_cannot_end_says_so() {
    let pool = Pool::new(PoolConfig::simulation(3)).unwrap();
    let finished = Arc::new(Finished::default());
    let timer = Timer {
        flag: 0.into(),
        at_ns: 0,
        fired_at_ns: 0.into(),
    };
    let _pair = wait_for_timer(&pool, &timer, &finished);
    assert_eq!(
        pool.simulate(&mut || finished.count() == 1),
        Err(PoolError::Stuck)
    );
    assert!(pool.now_ns() > 1_000_000_000_000);
    drop(pool);
    assert_eq!(
        Arc::strong_count(&finished),
        1,
        "done is dropped with the pool"
    );
}
