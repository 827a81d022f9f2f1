//! What one seed means: devices, connections, work, faults.

use ibex_abi::types::{PathMtu, Psn};
use ibex_hca::emulated::switch::{Fault, FaultPlan, FaultRule};

/// Faults happen before this microsecond, and then no more.
pub const FAULTS_END_US: u64 = 20_000;
/// Bytes of a buffer that the peer writes, reads and counts in; its first word is for atomics.
pub const TARGET: u64 = 8 << 10;
/// Bytes of each receive.
pub const RECEIVE: u64 = 1 << 10;
/// Most operations of one end.
pub const OPS_MAX: usize = 20;

/// A generator that a seed starts: SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    pub fn between(&mut self, min: u64, max: u64) -> u64 {
        min + self.below(max - min + 1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Something that cannot succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poison {
    /// A key that the other end does not have.
    BadKey,
    /// A range that leaves the key's.
    OutOfRange,
    /// An atomic on a word that is not aligned.
    Misaligned,
    /// A message longer than its receive.
    TooLong,
    /// A message for which no receive is ever posted.
    NoReceive,
    /// A local key that this end does not have.
    BadLocalKey,
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Write { offset: u64, len: u64, imm: Option<u32> },
    Send { len: u64, imm: Option<u32> },
    Read { offset: u64, len: u64 },
    Add(u64),
    Swap { compare: u64, swap: u64 },
    Nop,
    Poison(Poison),
}

impl Op {
    pub fn takes_receive(self) -> bool {
        matches!(self, Self::Send { .. } | Self::Write { imm: Some(_), .. })
            || self == Self::Poison(Poison::TooLong)
    }
}

/// What one end does.
#[derive(Debug)]
pub struct EndPlan {
    pub psn: Psn,
    /// Operations and the microsecond in which each is posted.
    pub ops: Vec<(u64, Op)>,
    /// When each receive is posted.
    pub receives: Vec<u64>,
    pub rnr_retry: u8,
}

/// A connection.
#[derive(Debug)]
pub struct LinkPlan {
    pub devices: [usize; 2],
    pub mtu: PathMtu,
    pub ack_timeout: u8,
    pub ends: [EndPlan; 2],
}

#[derive(Debug)]
pub struct Scenario {
    pub devices: usize,
    pub links: Vec<LinkPlan>,
    pub plan: FaultPlan,
}

impl Scenario {
    pub fn of(seed: u64) -> Self {
        let mut random = Random(seed);
        let devices = random.between(2, 8) as usize;
        let num_links = random.between(devices as u64 - 1, devices as u64 + 2);
        let links = (0..num_links).map(|_| link(&mut random, devices)).collect();
        let plan = faults(&mut random, devices as u64);
        Self { devices, links, plan }
    }
}

fn link(random: &mut Random, devices: usize) -> LinkPlan {
    let near = random.below(devices as u64) as usize;
    let far = (near + 1 + random.below(devices as u64 - 1) as usize) % devices;
    let mtu = [PathMtu::B256, PathMtu::B512, PathMtu::B1024, PathMtu::B4096][random.below(4) as usize];
    let poisoned = if random.one_in(6) { Some(random.below(2) as usize) } else { None };
    let mut ends = [0, 1].map(|end: usize| end_plan(random, poisoned == Some(end)));
    for end in 0..2 {
        let wanted = ends[1 - end].ops.iter().filter(|(_, op)| op.takes_receive()).count();
        let late = random.one_in(3);
        ends[end].receives =
            (0..wanted).map(|_| if late { random.below(FAULTS_END_US + 5_000) } else { 0 }).collect();
        ends[end].receives.sort_unstable();
    }
    LinkPlan { devices: [near, far], mtu, ack_timeout: random.between(6, 9) as u8, ends }
}

fn end_plan(random: &mut Random, poisoned: bool) -> EndPlan {
    let count = random.between(1, OPS_MAX as u64);
    let mut ops: Vec<(u64, Op)> = (0..count).map(|_| (when(random), op(random))).collect();
    let mut rnr_retry = 7;
    if poisoned {
        let all = [
            Poison::BadKey,
            Poison::OutOfRange,
            Poison::Misaligned,
            Poison::TooLong,
            Poison::NoReceive,
            Poison::BadLocalKey,
        ];
        let poison = all[random.below(6) as usize];
        let at = random.below(count) as usize;
        ops[at].1 = Op::Poison(poison);
        if poison == Poison::NoReceive {
            // Nothing else may use the receives that are not there.
            rnr_retry = random.below(3) as u8;
            ops.retain(|(_, op)| !op.takes_receive());
        }
    }
    // Posted in the order of the list.
    let mut times: Vec<u64> = ops.iter().map(|(at, _)| *at).collect();
    times.sort_unstable();
    ops.iter_mut().zip(times).for_each(|(op, at)| op.0 = at);
    // Sequence numbers wrap in one run of three.
    let psn = if random.one_in(3) { 0xff_ffff - random.below(8) } else { random.below(1 << 24) };
    EndPlan { psn: Psn::new(psn as u32), ops, receives: Vec::new(), rnr_retry }
}

fn when(random: &mut Random) -> u64 {
    if random.one_in(2) { 0 } else { random.below(FAULTS_END_US + 2_000) }
}

fn op(random: &mut Random) -> Op {
    let imm = if random.one_in(3) { Some(random.below(1 << 32) as u32) } else { None };
    let offset = random.between(8, TARGET - 1);
    let longest = (TARGET - offset).min(3_000);
    let len = random.below(longest + 1);
    match random.below(16) {
        0..6 => Op::Write { offset, len, imm: imm.filter(|_| random.one_in(3)) },
        6..9 => Op::Send { len: random.below(RECEIVE + 1), imm },
        9..12 => Op::Read { offset: if random.one_in(4) { 0 } else { offset }, len },
        12..14 => Op::Add(random.below(1 << 40)),
        14 => Op::Swap { compare: 0, swap: random.below(1 << 40) },
        _ => Op::Nop,
    }
}

/// One to five rules, each somewhere in the time of faults.
fn faults(random: &mut Random, devices: u64) -> FaultPlan {
    let seed = random.below(u64::MAX);
    let count = random.between(1, 5);
    let rules = (0..count).map(|_| rule(random, devices)).collect();
    FaultPlan { seed, rules }
}

fn rule(random: &mut Random, devices: u64) -> FaultRule {
    let node = |random: &mut Random| {
        let node = random.below(devices) as u16;
        if random.one_in(2) { None } else { Some(node) }
    };
    let from_us = if random.one_in(2) { 0 } else { random.below(FAULTS_END_US / 2) };
    let fault = fault(random);
    // Partitions that nobody survives teach little.
    let longest = if fault == Fault::Partition { 4_000 } else { FAULTS_END_US };
    let to_us = (from_us + random.between(100, longest)).min(FAULTS_END_US);
    let (src, dst, both_ways) = (node(random), node(random), random.one_in(3));
    FaultRule { src, dst, both_ways, from_us, to_us: Some(to_us), fault }
}

fn fault(random: &mut Random) -> Fault {
    let ppm = random.between(1_000, 250_000) as u32;
    match random.below(8) {
        0 => Fault::Drop { ppm },
        1 => Fault::Duplicate { ppm },
        2 => {
            let min_us = random.below(50);
            Fault::Delay { ppm, min_us, max_us: min_us + random.below(400) }
        }
        3 => {
            let (overtake_max, hold_us) = (random.between(1, 8) as u32, random.between(1, 200));
            Fault::Reorder { ppm, overtake_max, hold_us }
        }
        4 => Fault::Corrupt { ppm },
        5 => Fault::RateLimit {
            bytes_per_s: random.between(2_000_000, 100_000_000),
            queue_bytes: random.between(2_000, 40_000),
        },
        6 => Fault::Partition,
        _ => Fault::Flap { up_us: random.between(100, 2_000), down_us: random.between(50, 1_000) },
    }
}
