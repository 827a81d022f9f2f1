//! One seed, run to its end, and everything checked on the way.

use std::collections::BTreeMap;
use std::sync::Arc;

use ibex_abi::cqe::{CqeOpcode, Syndrome};
use ibex_abi::types::{Iova, QpState, Rkey};
use ibex_abi::wqe::{AtomicOp, CqUpdate, CtrlFlags, DataSeg, FenceMode, Remote, Request, SegmentBuf};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::switch::{Fault, FaultCounts, FaultRule};
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, CqShape, HostQp, HostQpSpec, Outcome, Rts};
use ibex_hca::objects::RecvSpec;
use ibex_hca::{Access, Hca, Nanos};

use super::model::{Target, is_reachable, pattern};
use super::scenario::{EndPlan, LinkPlan, OPS_MAX, Op, Poison, RECEIVE, Scenario, TARGET};

const RECEIVES_AT: u64 = TARGET;
const SOURCES_AT: u64 = RECEIVES_AT + OPS_MAX as u64 * RECEIVE;
/// Bytes of one operation's payload, and of what it brings back.
const SLOT: u64 = 3 << 10;
const RESULTS_AT: u64 = SOURCES_AT + OPS_MAX as u64 * SLOT;
/// One word goes from here to there when all else is over.
const PROBE_SOURCE: u64 = RESULTS_AT + OPS_MAX as u64 * SLOT;
const PROBE_TARGET: u64 = PROBE_SOURCE + 8;
const BUFFER: u64 = PROBE_TARGET + 8;
const PROBE: [u8; 8] = *b"still on";
/// Nothing takes longer than this once faults have ended.
const PATIENCE: Nanos = Nanos(60_000_000_000);

/// What a run met.
#[derive(Debug, Default)]
pub struct Tally {
    pub faults: FaultCounts,
    pub wqes: u64,
    pub good: u64,
    pub receives: u64,
    /// Connections that carried one more WRITE each way once all was over.
    pub probed: u64,
    pub errors: BTreeMap<u8, u64>,
    pub sent_again: u64,
    pub bad_icrc: u64,
    pub virtual_ms: u64,
}

impl Tally {
    pub fn report(&self) -> String {
        let named = |(syndrome, count): (&u8, &u64)| format!("{:?}: {count}", Syndrome(*syndrome));
        let errors: Vec<String> = self.errors.iter().map(named).collect();
        let Self { faults, wqes, good, receives, probed, sent_again, bad_icrc, virtual_ms, .. } = self;
        format!(
            "{faults:#?}\n{wqes} WQEs, {good} of them good, {receives} receives, first errors: {errors:?}\n\
             {probed} connections carried more after all that\n\
             {sent_again} packets sent again, {bad_icrc} dropped for their ICRC, {virtual_ms} ms of virtual time"
        )
    }

    pub fn add(&mut self, other: &Self) {
        let (sum, one) = (&mut self.faults, &other.faults);
        sum.submitted += one.submitted;
        sum.delivered += one.delivered;
        sum.dropped += one.dropped;
        sum.duplicated += one.duplicated;
        sum.delayed += one.delayed;
        sum.reordered += one.reordered;
        sum.corrupted += one.corrupted;
        sum.paced += one.paced;
        sum.overflowed += one.overflowed;
        sum.partitioned += one.partitioned;
        sum.flapped += one.flapped;
        sum.crowded_out += one.crowded_out;
        self.wqes += other.wqes;
        self.good += other.good;
        self.receives += other.receives;
        self.probed += other.probed;
        self.sent_again += other.sent_again;
        self.bad_icrc += other.bad_icrc;
        self.virtual_ms += other.virtual_ms;
        for (syndrome, count) in &other.errors {
            *self.errors.entry(*syndrome).or_default() += count;
        }
    }
}

struct End {
    qp: HostQp<Rts>,
    buffer: Registered,
    /// Index of the first block of every posted WQE.
    posted: Vec<u16>,
    /// Operations completed well.
    good: usize,
    /// The first completion that was not good: when, and with which syndrome.
    broken: Option<(Nanos, Syndrome)>,
    completed: usize,
    receives_posted: usize,
    /// Receives completed well.
    received: usize,
    receives_done: usize,
    _region: ControlRegion,
}

struct Link<'a> {
    plan: &'a LinkPlan,
    /// All that goes wrong anywhere.
    rules: &'a [FaultRule],
    ends: [End; 2],
}

struct World<'a> {
    devices: Vec<Arc<EmulatedHca>>,
    links: Vec<Link<'a>>,
    now: Nanos,
}

/// Runs one seed; panics with what it saw where an expectation fails.
pub fn run(seed: u64) -> Tally {
    let scenario = Scenario::of(seed);
    let config = FabricConfig { seed, ..FabricConfig::default() };
    let fabric = Fabric::switched(config, scenario.plan.clone()).unwrap();
    let device = |_| EmulatedHca::new(Arc::clone(&fabric), EmulatedConfig::default()).unwrap();
    let devices: Vec<Arc<EmulatedHca>> = (0..scenario.devices).map(device).collect();
    let links = scenario.links.iter().map(|plan| connect(&devices, plan, &scenario.plan.rules)).collect();
    let mut world = World { devices, links, now: Nanos(0) };
    world.run();
    let mut tally = Tally { faults: fabric.fault_counts().unwrap(), ..Tally::default() };
    world.check_ends(&mut tally);
    world.probe(&mut tally);
    for device in &world.devices {
        let counters = device.counters();
        tally.sent_again += counters.packets.sent_again;
        tally.bad_icrc += counters.packets.bad_icrc;
        assert_eq!(counters.unrung_wqes, 0);
    }
    tally.virtual_ms = world.now.0 / 1_000_000;
    tally
}

fn connect<'a>(devices: &[Arc<EmulatedHca>], plan: &'a LinkPlan, rules: &'a [FaultRule]) -> Link<'a> {
    let cq = CqShape::Ring { log_size: 6, overrun_ignore: false };
    let recv = Some(RecvSpec { log_size: 5, log_segs: 0 });
    let spec = HostQpSpec { log_sq_size: 6, recv, send_cq: cq, recv_cq: cq, user_index: 0, eqn: None };
    let fresh = plan.devices.map(|device| {
        let hca = Arc::clone(&devices[device]) as Arc<dyn Hca>;
        let pd = hca.alloc_pd().unwrap();
        let region = ControlRegion::host(&hca, 64 << 10).unwrap();
        let buffer = Registered::new(&hca, pd, BUFFER, Access::ALL).unwrap();
        let qp = HostQp::create(&region, pd, spec).unwrap();
        (qp, buffer, region)
    });
    let points = [0, 1].map(|end: usize| fresh[end].0.endpoint(plan.ends[end].psn));
    let mut nth = 0;
    let ends = fresh.map(|(qp, buffer, region)| {
        let end = &plan.ends[nth];
        nth += 1;
        let spec = ConnectSpec {
            psn: end.psn,
            mtu: plan.mtu,
            ack_timeout: plan.ack_timeout,
            retry_count: 7,
            rnr_retry: end.rnr_retry,
            min_rnr_nak: 5,
            log_reads: 2,
            ..ConnectSpec::default()
        };
        let qp = qp.connect(&points[2 - nth], &spec).unwrap();
        for (op, (_, kind)) in end.ops.iter().enumerate() {
            if let Op::Write { len, .. } | Op::Send { len, .. } = kind {
                buffer.view().write(source_at(op), &pattern(op, *len));
            }
        }
        End {
            qp,
            buffer,
            posted: Vec::new(),
            good: 0,
            broken: None,
            completed: 0,
            receives_posted: 0,
            received: 0,
            receives_done: 0,
            _region: region,
        }
    });
    Link { plan, rules, ends }
}

fn source_at(op: usize) -> u64 {
    SOURCES_AT + op as u64 * SLOT
}

fn result_at(op: usize) -> u64 {
    RESULTS_AT + op as u64 * SLOT
}

impl End {
    fn data(&self, offset: u64, len: u64) -> DataSeg {
        DataSeg::new(len as u32, self.buffer.key().lkey.get(), self.buffer.iova(offset))
    }

    fn remote(&self, offset: u64) -> Remote {
        Remote { addr: Iova(self.buffer.iova(offset)), rkey: self.buffer.key().rkey }
    }
}

impl World<'_> {
    /// Lets time pass until nothing more will happen.
    fn run(&mut self) {
        loop {
            self.act();
            let mut worked = true;
            let mut deadline = None;
            while worked {
                (worked, deadline) = (false, None);
                for device in &self.devices {
                    let step = device.step(self.now);
                    worked |= step.did_work;
                    deadline = [deadline, step.next_deadline].into_iter().flatten().min();
                }
                self.poll();
            }
            let next = [deadline, self.next_action()].into_iter().flatten().min();
            match next {
                Some(at) => self.now = at.max(Nanos(self.now.0 + 1)),
                None => return,
            }
            assert!(self.now < PATIENCE, "something never ends: {:?}", self.progress());
        }
    }

    fn progress(&self) -> Vec<[(usize, usize); 2]> {
        let of = |link: &Link<'_>| [0, 1].map(|end: usize| (link.ends[end].completed, link.ends[end].good));
        self.links.iter().map(of).collect()
    }

    fn next_action(&self) -> Option<Nanos> {
        let of_end = |(plan, end): (&EndPlan, &End)| {
            let op = plan.ops.get(end.posted.len()).map(|(at, _)| *at);
            let receive = plan.receives.get(end.receives_posted).copied();
            [op, receive].into_iter().flatten().min()
        };
        let ends = self.links.iter().flat_map(|link| link.plan.ends.iter().zip(&link.ends));
        ends.filter_map(of_end).min().map(|us| Nanos(us * 1000))
    }

    /// Posts what is due.
    fn act(&mut self) {
        let us = self.now.0 / 1000;
        for link in &mut self.links {
            for end in 0..2 {
                let plan = &link.plan.ends[end];
                while plan.receives.get(link.ends[end].receives_posted).is_some_and(|at| *at <= us) {
                    let end = &mut link.ends[end];
                    let at = RECEIVES_AT + end.receives_posted as u64 * RECEIVE;
                    let segment = end.data(at, RECEIVE);
                    end.qp.post_recv(&[segment]).unwrap();
                    end.receives_posted += 1;
                }
                while plan.ops.get(link.ends[end].posted.len()).is_some_and(|(at, _)| *at <= us) {
                    link.post(end);
                }
            }
        }
    }

    fn poll(&mut self) {
        let now = self.now;
        self.links.iter_mut().for_each(|link| link.poll(now));
    }

    /// Requires one more WRITE each way of every connection that still stands; faults have ended.
    fn probe(&mut self, tally: &mut Tally) {
        let standing: Vec<usize> = (0..self.links.len()).filter(|nth| self.links[*nth].stands()).collect();
        for nth in &standing {
            (0..2).for_each(|end| self.links[*nth].post_probe(end));
        }
        let since = self.now;
        self.run();
        for nth in &standing {
            let ends = &self.links[*nth].ends;
            for (end, far) in ends.iter().zip(ends.iter().rev()) {
                assert_eq!((end.completed, end.broken), (end.posted.len(), None), "since {since:?}");
                assert_eq!(far.buffer.view().to_vec(PROBE_TARGET, 8), PROBE);
            }
        }
        tally.probed += standing.len() as u64;
    }

    fn check_ends(&mut self, tally: &mut Tally) {
        for link in &mut self.links {
            for end in 0..2 {
                link.check(end, tally);
            }
        }
    }
}

/// How long a fault is felt after its rule has ended, in microseconds.
fn lingers_us(fault: Fault) -> u64 {
    match fault {
        Fault::Delay { max_us, .. } => max_us,
        Fault::Reorder { hold_us, .. } => hold_us,
        Fault::RateLimit { bytes_per_s, queue_bytes } => queue_bytes * 1_000_000 / bytes_per_s,
        _ => 0,
    }
}

impl Link<'_> {
    fn ops(&self, end: usize) -> Vec<Op> {
        self.plan.ends[end].ops.iter().map(|(_, op)| *op).collect()
    }

    /// Posts the next operation of one end.
    fn post(&mut self, end: usize) {
        let nth = self.ends[end].posted.len();
        let ops = &self.plan.ends[end].ops;
        // What comes after a READ may otherwise change what it reads.
        let after_read = nth != 0 && matches!(ops[nth - 1].1, Op::Read { .. });
        let fence = if after_read { FenceMode::Fence } else { FenceMode::None };
        let flags = CtrlFlags::new(fence, CqUpdate::Always, nth.is_multiple_of(2));
        let (near, far) = (&self.ends[end], &self.ends[1 - end]);
        // A segment of length 0 would mean 2 GiB.
        let segments = |at, len| if len == 0 { vec![] } else { vec![near.data(at, len)] };
        let payload = |len| segments(source_at(nth), len).into_iter().map(SegmentBuf::Data).collect();
        let result = near.data(result_at(nth), 8);
        let (imm, request) = match ops[nth].1 {
            Op::Nop => (0, Request::Nop { body: Vec::new() }),
            Op::Write { offset, len, imm: None } => {
                (0, Request::Write { remote: far.remote(offset), payload: payload(len) })
            }
            Op::Write { offset, len, imm: Some(imm) } => {
                (imm, Request::WriteImm { remote: far.remote(offset), payload: payload(len) })
            }
            Op::Send { len, imm: None } => (0, Request::Send { payload: payload(len) }),
            Op::Send { len, imm: Some(imm) } => (imm, Request::SendImm { payload: payload(len) }),
            Op::Read { offset, len } => {
                let scatter = segments(result_at(nth), len);
                (0, Request::Read { remote: far.remote(offset), scatter })
            }
            Op::Add(add) => {
                let op = AtomicOp::FetchAdd { add };
                (0, Request::Atomic { remote: far.remote(0), op, result })
            }
            Op::Swap { compare, swap } => {
                let op = AtomicOp::CmpSwap { swap, compare };
                (0, Request::Atomic { remote: far.remote(0), op, result })
            }
            Op::Poison(poison) => (0, self.poisoned(end, poison, result)),
        };
        let idx = self.ends[end].qp.post_imm(flags, imm, request).unwrap();
        self.ends[end].posted.push(idx);
    }

    /// Whether both ends may still send and receive; if not, something that was seen took one of them down.
    fn stands(&self) -> bool {
        let stands = |end: &End| end.qp.query().unwrap().state == QpState::Rts;
        let both = self.ends.iter().all(stands);
        let explained =
            self.ends.iter().any(|end| end.broken.is_some()) || (0..2).any(|end| self.refuses(end));
        assert!(both || explained, "{}", self.describe(0));
        both
    }

    /// Posts a WRITE that has nothing to do with the plan.
    fn post_probe(&mut self, end: usize) {
        let (near, far) = (&self.ends[end], &self.ends[1 - end]);
        near.buffer.view().write(PROBE_SOURCE, &PROBE);
        let payload = vec![SegmentBuf::Data(near.data(PROBE_SOURCE, 8))];
        let request = Request::Write { remote: far.remote(PROBE_TARGET), payload };
        let idx = self.ends[end].qp.post_imm(CtrlFlags::SIGNALED, 0, request).unwrap();
        self.ends[end].posted.push(idx);
    }

    fn poisoned(&self, end: usize, poison: Poison, result: DataSeg) -> Request {
        let (near, far) = (&self.ends[end], &self.ends[1 - end]);
        let payload = vec![SegmentBuf::Data(near.data(0, 2_000))];
        match poison {
            Poison::BadKey => {
                let remote = Remote { rkey: Rkey(0x00ba_d000), ..far.remote(0) };
                Request::Write { remote, payload }
            }
            Poison::OutOfRange => Request::Write { remote: far.remote(BUFFER - 1_999), payload },
            Poison::Misaligned => {
                Request::Atomic { remote: far.remote(12), op: AtomicOp::FetchAdd { add: 1 }, result }
            }
            Poison::TooLong | Poison::NoReceive => Request::Send { payload },
            Poison::BadLocalKey => {
                let segment = DataSeg::new(64, 0x00ba_d000, near.buffer.iova(0));
                Request::Write { remote: far.remote(8), payload: vec![SegmentBuf::Data(segment)] }
            }
        }
    }

    /// Takes in completions: each WQE once, in order, good until the first that is not, flushed after it.
    fn poll(&mut self, now: Nanos) {
        for end in &mut self.ends {
            while let Some(completion) = end.qp.poll() {
                assert_eq!(Some(&completion.wqe_counter), end.posted.get(end.completed), "{completion:?}");
                end.completed += 1;
                match (completion.outcome, end.broken) {
                    (Outcome::Good(opcode), None) => {
                        assert_eq!(opcode, CqeOpcode::Req);
                        end.good += 1;
                    }
                    (Outcome::Error { syndrome, .. }, None) => end.broken = Some((now, syndrome)),
                    (outcome, Some(_)) => {
                        let flushed = matches!(outcome,
                            Outcome::Error { syndrome, .. } if syndrome == Syndrome::WR_FLUSH);
                        assert!(flushed, "after the first error: {outcome:?}");
                    }
                }
            }
            while let Some(completion) = end.qp.poll_recv() {
                // CAST: a few dozen receives.
                assert_eq!(usize::from(completion.wqe_counter), end.receives_done);
                end.receives_done += 1;
                if completion.syndrome().is_none() {
                    end.received += 1;
                    assert_eq!(end.received, end.receives_done, "good after an error");
                }
            }
        }
    }

    /// Checks what became of one end's operations, here and at the other end.
    fn check(&self, end: usize, tally: &mut Tally) {
        let (near, far, ops) = (&self.ends[end], &self.ends[1 - end], self.ops(end));
        assert_eq!(near.completed, ops.len(), "every WQE completes: {}", self.describe(end));
        match near.broken {
            None => assert_eq!(near.good, ops.len()),
            Some((at, syndrome)) => self.check_error(end, at, syndrome),
        }
        if let Some(poison) = ops.iter().position(|op| matches!(op, Op::Poison(_))) {
            assert!(near.good <= poison, "what cannot succeed did");
        }
        let mtu = u64::from(self.plan.mtu.bytes());
        let mut target = Target::new();
        for (nth, op) in ops.iter().enumerate().take(near.good) {
            let expected = target.execute(nth, *op, u64::MAX, mtu);
            let found = near.buffer.view().to_vec(result_at(nth), expected.len() as u64);
            assert_eq!(found, expected, "what operation {nth} brought back: {op:?}");
        }
        let found = far.buffer.view().to_vec(0, TARGET);
        match near.broken {
            None => assert!(found == target.bytes, "memory differs from the model"),
            Some(_) => assert!(is_reachable(&ops, near.good, mtu, &found), "memory no prefix explains"),
        }
        self.check_receives(end, &ops);
        tally.wqes += ops.len() as u64;
        tally.good += near.good as u64;
        tally.receives += far.received as u64;
        if let Some((_, syndrome)) = near.broken {
            *tally.errors.entry(syndrome.0).or_default() += 1;
        }
    }

    fn describe(&self, end: usize) -> String {
        let (near, far) = (&self.ends[end], &self.ends[1 - end]);
        let states = [near, far].map(|end| end.qp.query().map(|info| info.state));
        let broken = [near, far].map(|end| end.broken);
        let progress = [near, far].map(|end| (end.completed, end.received, end.receives_posted));
        format!("{states:?} {broken:?} {progress:?} of {:#?}", self.plan)
    }

    /// Whether the first error of an end is one that something explains.
    fn check_error(&self, end: usize, at: Nanos, syndrome: Syndrome) {
        let (near, far) = (&self.ends[end], &self.ends[1 - end]);
        let failed = self.plan.ends[end].ops[near.good].1;
        let right = match failed {
            Op::Poison(Poison::BadKey | Poison::OutOfRange) => Some(Syndrome::REMOTE_ACCESS),
            Op::Poison(Poison::Misaligned | Poison::TooLong) => Some(Syndrome::REMOTE_INVAL_REQ),
            Op::Poison(Poison::NoReceive) => Some(Syndrome::RNR_RETRY_EXC),
            Op::Poison(Poison::BadLocalKey) => Some(Syndrome::LOCAL_PROT),
            _ => None,
        };
        if right == Some(syndrome) {
            return;
        }
        let is_broken_there = far.broken.is_some() || self.refuses(1 - end);
        let faulty_until = self.faulty_until();
        let explained = match syndrome {
            Syndrome::TRANSPORT_RETRY_EXC => is_broken_there || right.is_some() || Some(at) <= faulty_until,
            // This end refused something, which took its queue pair down.
            Syndrome::WR_FLUSH => self.refuses(1 - end),
            _ => false,
        };
        assert!(explained, "{syndrome:?} at {at:?} for {failed:?}, expected {right:?}");
    }

    /// Until when a fault of this very connection may take it down; `None` if no rule concerns it.
    fn faulty_until(&self) -> Option<Nanos> {
        // CAST: at most eight devices.
        let [a, b] = self.plan.devices.map(|device| device as u16);
        let concerns =
            |rule: &&FaultRule| rule.concerns(a, b, rule.from_us) || rule.concerns(b, a, rule.from_us);
        let ends = |rule: &FaultRule| rule.to_us.unwrap() + lingers_us(rule.fault);
        let last = self.rules.iter().filter(concerns).map(ends).max()?;
        // The last answer may have been lost before that; then all retries must run out.
        let patience = 10 * (4096_u64 << self.plan.ack_timeout);
        Some(Nanos(1000 * (last + 1_000) + patience))
    }

    /// Whether an end sends what the other end must refuse.
    fn refuses(&self, end: usize) -> bool {
        let refused = [Poison::BadKey, Poison::OutOfRange, Poison::Misaligned, Poison::TooLong];
        let is = |op: &Op| matches!(op, Op::Poison(poison) if refused.contains(poison));
        self.ops(end).iter().any(is)
    }

    /// Receives at the other end are those of this end's messages, in order, each once.
    fn check_receives(&self, end: usize, ops: &[Op]) {
        let (near, far) = (&self.ends[end], &self.ends[1 - end]);
        let messages: Vec<(usize, Op)> =
            ops.iter().copied().enumerate().filter(|(_, op)| op.takes_receive()).collect();
        let sure = messages.iter().filter(|(nth, _)| *nth < near.good).count();
        assert!(far.received >= sure && far.received <= messages.len(), "{} of {sure}", far.received);
        for (slot, (nth, op)) in messages.iter().enumerate().take(far.received) {
            if let Op::Send { len, .. } = op {
                let found = far.buffer.view().to_vec(RECEIVES_AT + slot as u64 * RECEIVE, *len);
                assert!(found == pattern(*nth, *len), "receive {slot} differs from message {nth}");
            }
        }
    }
}
