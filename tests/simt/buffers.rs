//! Argument structs of the self-test kernels, the buffers they point to, and what must stand in them
//! afterwards.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ibex::gpu::pool::{Pool, PoolLaunch, Progress, Progressed};

pub(crate) const SELFTEST: u32 = 4;
pub(crate) const PAIR: u32 = 5;
pub(crate) const EMPTY: u32 = 6;
pub(crate) const HAZARD: u32 = 7;
pub(crate) const WORDS: usize = 64;
pub(crate) const POISON: u32 = 0xdead_beef;

/// `SelftestArgs` of kernels/include/ibex/selftest.h.
#[repr(C)]
pub(crate) struct SelftestArgs {
    pub(crate) results: *mut u32,
    pub(crate) counters: *mut u32,
    pub(crate) wide: *mut u64,
    pub(crate) src: *const [u32; 4],
    pub(crate) dst: *mut [u32; 4],
    pub(crate) n16: u32,
    pub(crate) reserved: u32,
}

/// `SelftestPairArgs`.
#[repr(C)]
pub(crate) struct PairArgs {
    pub(crate) my_flag: *const AtomicU32,
    pub(crate) peer_flag: *const AtomicU32,
    pub(crate) my_payload: *mut [u32; 4],
    pub(crate) peer_payload: *mut [u32; 4],
    pub(crate) sum: *mut u64,
    pub(crate) n16: u32,
    pub(crate) rounds: u32,
    pub(crate) device: u32,
    pub(crate) fenced: u32,
}

/// `SelftestEmptyArgs`.
#[repr(C)]
pub(crate) struct EmptyArgs {
    pub(crate) counter: *const AtomicU32,
}

/// `SelftestHazardArgs`.
#[repr(C)]
pub(crate) struct HazardArgs {
    pub(crate) counter: *const AtomicU32,
    pub(crate) hazard: u32,
    pub(crate) rounds: u32,
}
pub(crate) const BARRIER: u32 = 0;
pub(crate) const LIVELOCK: u32 = 1;
pub(crate) const LOST_UPDATE: u32 = 2;

pub(crate) fn bytes_of<T>(args: &T) -> &[u8] {
    // SAFETY: the argument structs above are plain integers and pointers without padding.
    unsafe { core::slice::from_raw_parts(core::ptr::from_ref(args).cast(), size_of::<T>()) }
}

/// Counts finished launches, so that a test can wait for them or ask from inside a simulation.
#[derive(Default)]
pub(crate) struct Finished {
    pub(crate) count: Mutex<u32>,
    pub(crate) changed: Condvar,
}

impl Finished {
    pub(crate) fn one(self: &Arc<Self>) -> Box<dyn FnOnce() + Send> {
        let this = Arc::clone(self);
        Box::new(move || {
            *this.count.lock().unwrap() += 1;
            this.changed.notify_all();
        })
    }

    pub(crate) fn count(&self) -> u32 {
        *self.count.lock().unwrap()
    }

    pub(crate) fn wait_for(&self, wanted: u32) {
        let guard = self.count.lock().unwrap();
        let (_guard, timeout) =
            self.changed.wait_timeout_while(guard, Duration::from_secs(60), |count| *count < wanted).unwrap();
        assert!(!timeout.timed_out(), "{wanted} launches did not finish in a minute");
    }
}

/// Buffers of one selftest launch, and the checks of what it must have left in them.
pub(crate) struct Selftest {
    pub(crate) blocks: u32,
    pub(crate) warps_per_block: u32,
    pub(crate) n16: u32,
    pub(crate) results: Vec<u32>,
    pub(crate) counters: Vec<u32>,
    pub(crate) wide: Vec<u64>,
    pub(crate) src: Vec<[u32; 4]>,
    pub(crate) dst: Vec<[u32; 4]>,
}

impl Selftest {
    pub(crate) fn new(blocks: u32, warps_per_block: u32, n16: u32) -> Self {
        let warps = (blocks * warps_per_block) as usize;
        let src = (0..warps as u32 * n16).map(|i| [i, !i, i * 3, scramble(i)]).collect();
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

    pub(crate) fn args(&mut self) -> SelftestArgs {
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

    pub(crate) fn launch(&mut self, pool: &Pool, device: u32, finished: &Arc<Finished>) {
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

    pub(crate) fn check(&self) {
        let warps = self.blocks * self.warps_per_block;
        for warp in 0..warps {
            self.check_warp(warp);
        }
        let all = 0..warps;
        assert_eq!(self.counters[0], warps);
        assert_eq!(self.counters[1], all.clone().sum::<u32>());
        assert_eq!(self.counters[2], all.clone().fold(0, |mask, w| mask | 1 << (w % 32)));
        assert_eq!(self.counters[3], all.map(scramble).max().unwrap());
        assert_eq!(self.counters[4], 3 * warps);
        assert_eq!(self.counters[5..7], [1, 1], "exactly one exchange saw zero");
        assert_eq!(self.wide[0], u64::from(warps) << 33);
        assert_eq!(self.wide[1], u64::from(warps - 1) << 40);
        assert_eq!(self.wide[2..], [0x0807_0605_0403_0201, 0x0403_0201]);
    }

    pub(crate) fn check_warp(&self, warp: u32) {
        let out = &self.results[warp as usize * WORDS..][..WORDS];
        let x: Vec<u32> = (0..32).map(|l| scramble(warp * 32 + l)).collect();
        let wide: u64 = x.iter().map(|v| u64::from(*v) << 16).fold(0, u64::wrapping_add);
        let high = |lanes: &[u32]| lanes.iter().map(|v| v % 1000).max().unwrap().wrapping_sub(500);
        let id = warp % self.warps_per_block;
        let partner = id ^ 1;
        assert_eq!(out[0], (0..32).filter(|l| l % 3 == 0).fold(0, |mask, l| mask | 1 << l), "ballot");
        assert_eq!(out[1], x[7], "bcast");
        assert_eq!(out[2], x.iter().fold(0u32, |a, b| a.wrapping_add(*b)), "reduce_add");
        assert_eq!(out[3..5], [*x.iter().max().unwrap(), *x.iter().min().unwrap()], "reduce_max, reduce_min");
        assert_eq!(out[5], 0xff, "reduce_or");
        assert_eq!(u64::from(out[6]) | u64::from(out[7]) << 32, wide, "reduce_add, 64 bits");
        assert_eq!(out[8], x[31], "shuffle");
        assert_eq!(out[9..11], [high(&x[..16]), high(&x[16..])], "reduce_max<16>");
        assert_eq!(out[11], warp + 41, "one_lane");
        assert_eq!(out[12], id << 16 | self.warps_per_block, "id, count");
        assert_eq!(out[13], (warp / self.warps_per_block) << 16 | self.blocks, "block_id, num_blocks");
        assert_eq!(out[14], 0b0110, "any, all");
        assert_eq!(out[16], (self.warps_per_block - 1 - id).pow(2), "shared memory across sync_block");
        // Fifteen barriers besides sync_block's, so fifteen pairs.
        let paired = if partner < self.warps_per_block && id < 30 { 100 + partner } else { POISON };
        assert_eq!(out[17], paired, "shared memory across sync_warps");
        assert_eq!(out[18], 32 * 33 / 2, "exclusive_add's total");
        assert_eq!(out[19], self.blocks * self.warps_per_block, "grid barrier");
        assert_eq!(out[20], 1, "the clock does not go backwards");
        let prefix: Vec<u32> = (0..32).map(|l| l * (l + 1) / 2).collect();
        assert_eq!(out[32..], prefix[..], "exclusive_add");
        let first = (warp * self.n16) as usize;
        let copied = (self.n16 - self.n16 / 4) as usize;
        let n16 = self.n16 as usize;
        assert_eq!(self.dst[first..first + copied], self.src[first..first + copied], "copy16");
        assert!(self.dst[first + copied..first + n16].iter().all(|v| *v == [1, 2, 3, 4]), "fill16");
    }
}

pub(crate) fn scramble(x: u32) -> u32 {
    x.wrapping_mul(2_654_435_761) ^ (x >> 7)
}

/// Two devices that pass a payload to and fro.
pub(crate) struct Pair {
    pub(crate) flags: [AtomicU32; 2],
    pub(crate) payloads: [Vec<[u32; 4]>; 2],
    pub(crate) sums: [u64; 2],
    pub(crate) n16: u32,
    pub(crate) rounds: u32,
}

impl Pair {
    pub(crate) fn new(n16: u32, rounds: u32) -> Box<Self> {
        let payload = vec![[0; 4]; n16 as usize];
        Box::new(Self {
            flags: Default::default(),
            payloads: [payload.clone(), payload],
            sums: [0; 2],
            n16,
            rounds,
        })
    }

    pub(crate) fn launch(&mut self, pool: &Pool, finished: &Arc<Finished>) {
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
            let launch =
                PoolLaunch { kernel: PAIR, device, blocks: 2, warps_per_block: 2, args: bytes_of(&args) };
            // SAFETY: every test waits for both launches before it touches or drops the pair.
            unsafe { pool.launch(&launch, finished.one()) }.unwrap();
        }
    }

    pub(crate) fn check(&self) {
        let words =
            |round: u64| -> u64 { (0..u64::from(self.n16)).map(|i| 4 * (round * 1000 + i) + 6).sum() };
        let expected: u64 = (1..=u64::from(self.rounds)).map(words).sum();
        assert_eq!(self.sums, [expected; 2]);
    }
}

/// A device that sets a flag at a virtual time, and records when it was asked.
pub(crate) struct Timer {
    pub(crate) flag: AtomicU32,
    pub(crate) at_ns: AtomicU64,
    pub(crate) fired_at_ns: AtomicU64,
}

impl Progress for Timer {
    fn progress(&self, _worker: u32, now_ns: u64, _random: u64) -> Progressed {
        if self.fired_at_ns.load(Ordering::Relaxed) != 0 {
            return Progressed::Idle { next_deadline_ns: None };
        }
        let at_ns = self.at_ns.load(Ordering::Relaxed);
        if now_ns < at_ns {
            return Progressed::Idle { next_deadline_ns: Some(at_ns) };
        }
        self.fired_at_ns.store(now_ns, Ordering::Relaxed);
        self.flag.store(1, Ordering::Release);
        Progressed::Worked
    }
}

pub(crate) fn wait_for_timer(pool: &Pool, timer: &Timer, finished: &Arc<Finished>) -> Box<Pair> {
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
    let launch = PoolLaunch { kernel: PAIR, device: 0, blocks: 1, warps_per_block: 4, args: bytes_of(&args) };
    // SAFETY: the pair is returned and lives as long as the caller's pool runs it.
    unsafe { pool.launch(&launch, finished.one()) }.unwrap();
    pair
}
