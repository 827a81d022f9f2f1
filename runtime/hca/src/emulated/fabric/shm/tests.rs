//! A peer that writes anything: nothing panics, nothing outside a registered range changes.

use std::sync::Arc;

use ibex_abi::types::{Iova, Psn, QpNum};
use ibex_abi::wqe::{CtrlFlags, DataSeg, Remote, Request as Wqe, SegmentBuf};
use zerocopy::IntoBytes;

use super::layout::{
    PART_LEN, PARTS, REPLIES, REPLY_LEN, REQUEST_LEN, REQUESTS, ReplyEntry, RequestEntry, Stretch, region_at,
    slot, slot_at,
};
use super::*;
use crate::control_region::ControlRegion;
use crate::emulated::fabric::{Medium, Placement};
use crate::emulated::memory::Span;
use crate::emulated::message::{Content, Nak, Piece, Reply, Request, RequestOp, Target};
use crate::emulated::responder::Surroundings;
use crate::emulated::{EmulatedConfig, Fabric};
use crate::host_memory::HostMemory;
use crate::host_qp::{ConnectSpec, CqShape, HostQp, HostQpSpec, Rts};
use crate::{Access, Hca, Mkey};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// The middle page of three is registered.
const BEFORE: u64 = 4096;
const LEN: u64 = 4096;
const ALL: u64 = 3 * 4096;

struct End {
    qp: Option<HostQp<Rts>>,
    key: Mkey,
    memory: HostMemory,
    _region: ControlRegion,
    device: Arc<EmulatedHca>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.qp = None;
        self.device.deregister(self.key).unwrap();
    }
}

#[expect(unsafe_code, reason = "registering memory is unsafe by contract")]
fn pair() -> [End; 2] {
    let fresh = [0, 1].map(|first_port| {
        let config = ShmConfig { first_port, peers_max: 1, ..ShmConfig::default() };
        let fabric = Fabric::shm(config).unwrap();
        let device = EmulatedHca::new(fabric, EmulatedConfig::default()).unwrap();
        let hca = Arc::clone(&device) as Arc<dyn Hca>;
        let pd = hca.alloc_pd().unwrap();
        let memory = HostMemory::new(ALL).unwrap();
        memory.view().fill(0xa5);
        let middle = crate::MemoryRegion { addr: memory.view().addr(BEFORE), len: LEN, ..memory.region() };
        // SAFETY: accessed by atomics and the device; deregistered before it is dropped.
        let key = unsafe { hca.register(pd, middle, Iova(middle.addr), Access::ALL) }.unwrap();
        let region = ControlRegion::host(&hca, 1 << 20).unwrap();
        let send_cq = CqShape::Ring { log_size: 8, overrun_ignore: false };
        let spec = HostQpSpec { send_cq, ..HostQpSpec::default() };
        let qp = HostQp::create(&region, pd, spec).unwrap();
        (qp, key, memory, region, device)
    });
    for end in [0, 1] {
        let [here, there] = [&fresh[end].4, &fresh[1 - end].4];
        here.fabric().admit(&there.fabric().advert(there.port_id()).unwrap()).unwrap();
    }
    let ends = [0, 1].map(|end: usize| fresh[end].0.endpoint(Psn::new(0)));
    let mut others = ends.into_iter().rev();
    fresh.map(|(qp, key, memory, _region, device)| {
        let qp = qp.connect(&others.next().unwrap(), &ConnectSpec::default()).unwrap();
        End { qp: Some(qp), key, memory, _region, device }
    })
}

impl End {
    fn port(&self) -> &PortMemory {
        self.device.fabric_port().memory().unwrap()
    }

    /// Where this end says things to its only peer.
    fn slot(&self) -> Span {
        self.port().span().slice(slot_at(0), slot::LEN).unwrap()
    }

    fn qpn(&self) -> QpNum {
        self.qp.as_ref().unwrap().qpn()
    }

    fn guards_hold(&self) {
        let [before, after] = [0, BEFORE + LEN].map(|at| self.memory.view().to_vec(at, 4096));
        assert!(
            before.iter().chain(&after).all(|byte| *byte == 0xa5),
            "written outside the registered range"
        );
    }

    fn settle(&self) {
        // Whatever a peer says, this comes to an end.
        for _ in 0..10_000 {
            if !self.device.step(Nanos(0)).did_work {
                return;
            }
        }
        panic!("the device never stops working");
    }
}

/// Shows `writer`'s peer so many entries more, or a number that cannot be.
fn show(random: &mut Random, writer: &End, counter: u64, shown: &mut u32, entries: u32) {
    *shown = shown.wrapping_add(entries);
    let value = if random.below(16) == 0 { random.next() as u32 } else { *shown };
    let slot = writer.slot();
    slot.store32(counter, value, Ordering::Release);
    slot.update32(slot::ACTIVITY, |old| old.wrapping_add(1));
}

fn some_request(random: &mut Random, near: &End, far: &End, expected: Psn) -> RequestEntry {
    // Mostly inside the range, so that many get through.
    let (room, longest) = if random.below(8) == 0 { (LEN, 5000) } else { (LEN / 2, LEN / 2) };
    let to = Target { va: far.key.iova.0 + (random.below(room) & !7), rkey: far.key.rkey.0 };
    let len = random.below(longest);
    let op = match random.below(5) {
        0 | 1 => RequestOp::Write { to, imm: None },
        2 => RequestOp::Read { from: to },
        3 => RequestOp::Send { imm: Some(1) },
        _ => RequestOp::Atomic { on: to, op: ibex_abi::wqe::AtomicOp::FetchAdd { add: random.next() } },
    };
    let psn = if random.below(4) == 0 { Psn::new(random.below(1 << 24) as u32) } else { expected };
    let request = Request { psn, packets: 1, len, op, solicited: false, resent: false };
    let generation = near.port().generation(near.qpn());
    let mut entry = RequestEntry::new(far.qpn(), near.qpn(), generation, &request, Piece::Whole);
    if !op.has_response() {
        let region = random.below(8).saturating_sub(5) as u32;
        let offset = if random.below(8) == 0 { random.next() } else { random.below(1 << 20) };
        let stretch = Stretch { region: region.into(), len: (len as u32).into(), offset: offset.into() };
        entry.put_stretch(0, stretch);
        entry.stretches = 1;
    }
    entry
}

fn mutate(random: &mut Random, bytes: &mut [u8]) {
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] = random.next() as u8;
    }
}

#[test]
fn a_peer_may_ask_for_anything() {
    let (mut executed, mut refused, mut dropped) = (0, 0, 0);
    for seed in 0..250 {
        let mut random = Random(seed);
        let [near, far] = pair();
        let mut shown = 0_u32;
        // Regions that the entries may name: nothing, or something that cannot be mapped.
        near.port().span().store64(region_at(0), random.next(), Ordering::Release);
        for _ in 0..20 {
            let entries = random.below(8) as u32;
            for nth in 0..entries {
                let qp = far.device.find_qp(far.qpn()).unwrap();
                let expected = qp.responder.lock().expected;
                let mut bytes = [0; REQUEST_LEN as usize];
                match random.below(8) {
                    0 => random.fill(&mut bytes),
                    _ => bytes.copy_from_slice(some_request(&mut random, &near, &far, expected).as_bytes()),
                }
                mutate(&mut random, &mut bytes);
                let at = u64::from(shown.wrapping_add(nth) % REQUESTS) * REQUEST_LEN;
                near.slot().write(slot::REQUESTS_AT + at, &bytes);
            }
            show(&mut random, &near, slot::REQUESTS_WRITTEN, &mut shown, entries);
            if random.below(4) == 0 {
                near.slot().store32(slot::REPLIES_TAKEN, random.next() as u32, Ordering::Release);
            }
            far.settle();
            far.guards_hold();
        }
        let counters = far.device.counters();
        let qp = far.device.find_qp(far.qpn()).unwrap();
        executed += u64::from(qp.responder.lock().msn);
        (refused, dropped) = (refused + counters.refused_requests, dropped + counters.dropped_requests);
    }
    // What is tried must get through to every check.
    assert!(executed > 100 && refused > 40 && dropped > 100, "{executed} {refused} {dropped}");
}

fn some_reply(random: &mut Random, near: &End, psn: Psn) -> ReplyEntry {
    let next = if random.below(2) == 0 { psn.plus(1) } else { Psn::new(random.below(1 << 24) as u32) };
    let reply = match random.below(8) {
        0 => Reply::Ack { next },
        1 => Reply::Atomic { next, original: random.next() },
        2..=4 => Reply::Data { next, memory: Span::EMPTY },
        5 => Reply::NotReady { timer: 1 },
        6 => Reply::OutOfSequence { expected: next },
        _ => Reply::Refused(Nak::RemoteOperation),
    };
    let offset = if random.below(2) == 0 { 0 } else { random.below(5000) };
    let (part, last) = (random.below(u64::from(PARTS) + 1) as u32, random.below(2) == 0);
    let len = if random.below(4) == 0 { random.below(2 * PART_LEN) } else { 4096.min(4096 - offset % 4096) };
    let generation = near.port().generation(near.qpn());
    ReplyEntry::new(near.qpn(), generation, psn, &reply).with_data(offset, len, part, last)
}

#[test]
fn a_peer_may_answer_anything() {
    let (mut good, mut failed) = (0, 0);
    for seed in 0..250 {
        let mut random = Random(seed);
        let [mut near, far] = pair();
        let remote = Remote { addr: far.key.iova, rkey: far.key.rkey };
        let seg = DataSeg::new(LEN as u32, near.key.lkey.0, near.key.iova.0);
        let mut posted = 0;
        let mut shown = 0_u32;
        let qp = near.device.find_qp(near.qpn()).unwrap();
        for _ in 0..20 {
            let request = match random.below(2) {
                0 => Wqe::Read { remote, scatter: vec![seg] },
                _ => Wqe::Write { remote, payload: vec![SegmentBuf::Data(seg)] },
            };
            if near.qp.as_mut().unwrap().post(CtrlFlags::SIGNALED, request).is_ok() {
                posted += 1;
            }
            near.settle();
            let entries = random.below(4) as u32;
            for nth in 0..entries {
                let psn = qp.requester.lock().outstanding.front().map_or(Psn::new(0), |entry| entry.work.psn);
                let mut bytes = [0; REPLY_LEN as usize];
                match random.below(8) {
                    0 => random.fill(&mut bytes),
                    _ => bytes.copy_from_slice(some_reply(&mut random, &near, psn).as_bytes()),
                }
                mutate(&mut random, &mut bytes);
                let at = u64::from(shown.wrapping_add(nth) % REPLIES) * REPLY_LEN;
                far.slot().write(slot::REPLIES_AT + at, &bytes);
            }
            show(&mut random, &far, slot::REPLIES_WRITTEN, &mut shown, entries);
            if random.below(4) == 0 {
                far.slot().store32(slot::REQUESTS_TAKEN, random.next() as u32, Ordering::Release);
            }
            near.settle();
            near.guards_hold();
        }
        let mut next = 0;
        while let Some(completion) = near.qp.as_mut().unwrap().poll() {
            assert_eq!(completion.wqe_counter, next, "in order, each once");
            next += 1;
            *if completion.syndrome().is_none() { &mut good } else { &mut failed } += 1;
        }
        assert!(next <= posted, "nothing completes that was not posted");
    }
    assert!(good > 100 && failed > 100, "{good} {failed}");
}

/// Payload that its requester takes back while it is read.
#[derive(Clone, Copy)]
struct Withdrawn;

impl Content for Withdrawn {
    fn gather(&self, _: u64, to: Span) -> bool {
        to.write(0, &[7]);
        false
    }
}

#[test]
fn a_request_that_is_withdrawn_while_it_is_pulled_was_never_executed() {
    let [_near, far] = pair();
    let qp = far.device.find_qp(far.qpn()).unwrap();
    let keys = far.device.keys.read();
    let around = Surroundings {
        device: &far.device,
        qp: &qp,
        keys: &keys,
        placement: Placement::InOrder,
        now: Nanos(0),
    };
    let to = Target { va: far.key.iova.0, rkey: far.key.rkey.0 };
    let (psn, op) = (Psn::new(0), RequestOp::Write { to, imm: None });
    let request = Request { psn, packets: 1, len: 8, op, solicited: false, resent: false };
    let mut responder = qp.responder.lock();
    assert!(
        responder.take(&around, &request, Withdrawn, Piece::Whole).is_none(),
        "nobody waits for an answer"
    );
    assert_eq!((responder.expected, responder.msn), (psn, 0), "what follows it is out of sequence");
}

#[test]
fn pulling_notices_that_the_requester_withdrew() {
    let [near, far] = pair();
    let Medium::Shm(shm) = far.device.fabric().medium() else { unreachable!("a fabric of shared memory") };
    let link = shm.link(far.device.fabric_port(), &path_to(&near)).unwrap();
    let generation = near.port().generation(near.qpn());
    assert!(link.theirs.still_says(near.qpn(), generation));
    near.qp.as_ref().unwrap().fail().unwrap();
    assert!(!link.theirs.still_says(near.qpn(), generation));
    assert_eq!(far.port().generation(far.qpn()), 0, "each side speaks for itself");
}

#[test]
fn an_answer_to_what_was_sent_before_a_reset_completes_nothing() {
    let [mut near, far] = pair();
    let remote = Remote { addr: far.key.iova, rkey: far.key.rkey };
    let payload = vec![SegmentBuf::Inline(vec![1; 8])];
    near.qp.as_mut().unwrap().post(CtrlFlags::SIGNALED, Wqe::Write { remote, payload }).unwrap();
    near.settle();
    let generation = near.port().generation(near.qpn());
    let (psn, reply) = (Psn::new(0), Reply::Ack { next: Psn::new(1) });
    for (nth, generation) in [(0, generation.wrapping_sub(1)), (1, generation)] {
        let entry = ReplyEntry::new(near.qpn(), generation, psn, &reply);
        far.slot().write(slot::REPLIES_AT + nth * REPLY_LEN, entry.as_bytes());
        far.slot().store32(slot::REPLIES_WRITTEN, nth as u32 + 1, Ordering::Release);
        far.slot().update32(slot::ACTIVITY, |old| old.wrapping_add(1));
        near.settle();
        assert_eq!(near.qp.as_mut().unwrap().poll().is_some(), nth == 1, "reply {nth}");
    }
}

fn path_to(end: &End) -> PathAddress {
    let port = end.device.fabric_port().info();
    let (rgid, rmac) = (port.gid, port.mac);
    PathAddress::Roce { rgid, rmac, sgid_index: 0, hop_limit: 255, tclass: 0, udp_sport: 0xc000 }
}
