//! The fabric of shared memory: payload that is pulled in place or copied, what is withdrawn, who is
//! admitted, and sleeping until a peer wakes us.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::sync::Arc;

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::{Iova, Pd, Psn};
use ibex_abi::wqe::{AtomicOp, CtrlFlags, DataSeg, Remote, Request};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{AdvertError, EmulatedHca, Fabric, FabricConfig, ShmConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, Endpoint, HostQp, HostQpSpec};
use ibex_hca::objects::RecvSpec;
use ibex_hca::shared_memory::{PeerAccess, PeerRegion, SharedRegion};
use ibex_hca::{Access, Hca, HcaError, Mkey, Nanos};
use rig::{Rig, Setup, as_hca, device, gather, inline, introduce, shm_fabric, shm_rig, write};

/// A region that other processes may map, and its key; the key goes first.
struct SharedBuffer {
    hca: Arc<dyn Hca>,
    key: Mkey,
    region: SharedRegion,
}

impl SharedBuffer {
    #[expect(unsafe_code, reason = "registering memory is unsafe by contract")]
    fn new(device: &Arc<EmulatedHca>, pd: Pd, len: u64) -> Self {
        let (hca, region) = (as_hca(device), SharedRegion::new(len, 4096).unwrap());
        let iova = Iova(region.as_ptr().addr() as u64);
        // SAFETY: the region is accessed by atomics and devices, and lives until the key is given back.
        let key = unsafe { hca.register(pd, region.region(), iova, Access::ALL) }.unwrap();
        Self { hca, key, region }
    }

    fn data(&self, offset: u64, len: u32) -> DataSeg {
        DataSeg::new(len, self.key.lkey.get(), self.key.iova.get() + offset)
    }

    fn remote(&self, offset: u64) -> Remote {
        Remote { addr: Iova(self.key.iova.get() + offset), rkey: self.key.rkey }
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        self.hca.deregister(self.key).unwrap();
    }
}

fn shared(rig: &Rig, end: usize, len: u64) -> SharedBuffer {
    SharedBuffer::new(&rig.ends[end].device, rig.ends[end].pd, len)
}

fn plain(rig: &Rig, end: usize, len: u64) -> Registered {
    let end = &rig.ends[end];
    Registered::new(&as_hca(&end.device), end.pd, len, Access::ALL).unwrap()
}

/// A pattern that differs at every offset and for every seed.
fn pattern(seed: u8, len: usize) -> Vec<u8> {
    // CAST: the low byte of a hash is what is wanted.
    (0..len).map(|at| (at.wrapping_mul(0x9e37) >> 3) as u8 ^ seed).collect()
}

#[test]
fn shared_payload_is_pulled_when_it_is_executed_and_other_payload_is_copied_when_it_is_sent() {
    let mut rig = shm_rig(Setup::default());
    let (source, copied) = (shared(&rig, 0, 4096), plain(&rig, 0, 4096));
    source.region.view().fill(1);
    copied.view().fill(1);
    let far = rig.ends[1].remote(0);
    let second = rig.ends[1].remote(4096);
    let lkey = copied.key().lkey.get();
    let near = &mut rig.ends[0];
    near.qp.post(CtrlFlags::SIGNALED, write(far, gather(&[source.data(0, 4096)]))).unwrap();
    let from = gather(&[DataSeg::new(4096, lkey, copied.iova(0))]);
    near.qp.post(CtrlFlags::SIGNALED, write(second, from)).unwrap();
    while near.device.step(Nanos(0)).did_work {}
    assert_eq!(near.qp.poll(), None, "nobody executed it yet");
    // Software that overwrites a source row before its completion is found out, but not by the copy.
    source.region.view().fill(2);
    copied.view().fill(2);
    rig.settle();
    assert_eq!(rig.ends[1].get(0, 4096), [2; 4096]);
    assert_eq!(rig.ends[1].get(4096, 4096), [1; 4096]);
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
}

#[test]
fn what_a_failed_queue_pair_queued_is_void() {
    let mut rig = shm_rig(Setup::default());
    let source = shared(&rig, 0, 4096);
    source.region.view().fill(1);
    let far = rig.ends[1].remote(0);
    let near = &mut rig.ends[0];
    for _ in 0..3 {
        near.qp.post(CtrlFlags::SIGNALED, write(far, gather(&[source.data(0, 4096)]))).unwrap();
    }
    while near.device.step(Nanos(0)).did_work {}
    // From here on software may overwrite the source and connect again.
    near.qp.fail().unwrap();
    rig.settle();
    let [near, far] = &mut rig.ends;
    assert_eq!(near.qp.poll().unwrap().syndrome(), Some(Syndrome::WR_FLUSH));
    assert_eq!(far.get(0, 4096), [0; 4096]);
    assert_eq!(far.device.counters().dropped_requests, 3);
}

#[test]
fn messages_longer_than_any_buffer_between_arrive() {
    const LEN: u64 = 5 << 20;
    let mut rig = shm_rig(Setup::default());
    let (near, far) = (plain(&rig, 0, LEN), plain(&rig, 1, LEN));
    let bytes = pattern(1, LEN as usize);
    near.view().write(0, &bytes);
    let remote = Remote { addr: Iova(far.iova(0)), rkey: far.key().rkey };
    let lkey = near.key().lkey.get();
    let all = [DataSeg::new(LEN as u32, lkey, near.iova(0))];
    let qp = &mut rig.ends[0].qp;
    qp.post(CtrlFlags::SIGNALED, write(remote, gather(&all))).unwrap();
    rig.settle();
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
    assert!(far.view().to_vec(0, LEN) == bytes, "written in parts");
    near.view().fill(0);
    let qp = &mut rig.ends[0].qp;
    qp.post(CtrlFlags::SIGNALED, Request::Read { remote, scatter: all.to_vec() }).unwrap();
    rig.settle();
    assert_eq!(rig.ends[0].qp.poll().unwrap().byte_cnt, LEN as u32);
    assert!(near.view().to_vec(0, LEN) == bytes, "read in parts");
    assert_eq!(rig.ends[0].device.counters().retransmissions, 0);
}

#[test]
fn lists_of_many_pieces_and_kinds_of_memory_arrive_in_order() {
    let mut rig = shm_rig(Setup::default());
    let (one, other) = (shared(&rig, 0, 8192), shared(&rig, 0, 8192));
    one.region.view().write(0, &pattern(1, 8192));
    other.region.view().write(0, &pattern(2, 8192));
    rig.ends[0].put(0, &pattern(3, 1000));
    let near = &rig.ends[0];
    let list = [
        one.data(100, 50),
        other.data(4000, 4000),
        one.data(0, 1),
        near.data(0, 1000),
        other.data(1, 7),
        one.data(8000, 192),
    ];
    let expected = [
        &pattern(1, 8192)[100..150],
        &pattern(2, 8192)[4000..8000],
        &pattern(1, 1),
        &pattern(3, 1000),
        &pattern(2, 8)[1..],
        &pattern(1, 8192)[8000..],
    ];
    let far = rig.ends[1].remote(3);
    for take in [1, 2, 3, 6] {
        let mut payload = gather(&list[..take]);
        payload.extend(inline(b"!"));
        rig.ends[0].qp.post(CtrlFlags::SIGNALED, write(far, payload)).unwrap();
        rig.settle();
        assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
        let mut whole = expected[..take].concat();
        whole.push(b'!');
        assert_eq!(rig.ends[1].get(3, whole.len() as u64), whole);
        // The same without the inline end: up to four pieces of shared memory are pulled in place.
        rig.ends[0].qp.post(CtrlFlags::SIGNALED, write(far, gather(&list[..take]))).unwrap();
        rig.settle();
        assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
        assert_eq!(rig.ends[1].get(3, whole.len() as u64 - 1), whole[..whole.len() - 1]);
    }
}

#[test]
fn a_region_that_was_replaced_at_the_same_address_is_not_mistaken_for_the_old_one() {
    let mut rig = shm_rig(Setup::default());
    for round in 1..40_u8 {
        // Most likely mapped where the one before was.
        let source = shared(&rig, 0, 1 << 20);
        source.region.view().write(500, &[round; 64]);
        let far = rig.ends[1].remote(0);
        rig.ends[0].qp.post(CtrlFlags::SIGNALED, write(far, gather(&[source.data(500, 64)]))).unwrap();
        rig.settle();
        assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
        assert_eq!(rig.ends[1].get(0, 64), [round; 64]);
    }
}

#[test]
fn a_long_send_waits_for_its_receive_and_fills_it() {
    const LEN: u64 = 600 << 10;
    let recv = Some(RecvSpec { log_size: 2, log_segs: 1 });
    let connect = ConnectSpec { ack_timeout: 18, min_rnr_nak: 1, ..ConnectSpec::default() };
    let setup = Setup::default();
    let mut rig = shm_rig(Setup { qp: HostQpSpec { recv, ..setup.qp }, connect, ..setup });
    let (from, into) = (plain(&rig, 0, LEN), plain(&rig, 1, LEN));
    from.view().write(0, &pattern(7, LEN as usize));
    let payload = gather(&[DataSeg::new(LEN as u32, from.key().lkey.get(), from.iova(0))]);
    rig.ends[0].qp.post(CtrlFlags::SIGNALED, Request::Send { payload }).unwrap();
    rig.settle();
    assert_eq!(rig.ends[0].qp.poll(), None);
    let seg = DataSeg::new(LEN as u32, into.key().lkey.get(), into.iova(0));
    rig.ends[1].qp.post_recv(&[seg]).unwrap();
    rig.pass(20_000_000);
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
    assert_eq!(rig.ends[1].qp.poll_recv().unwrap().byte_cnt, LEN as u32);
    assert!(into.view().to_vec(0, LEN) == pattern(7, LEN as usize));
}

#[test]
fn rings_wrap_many_times_in_both_directions() {
    let mut rig = shm_rig(Setup::default());
    let word = shared(&rig, 1, 4096);
    for nth in 0..3000_u64 {
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(8), inline(&nth.to_le_bytes()))).unwrap();
        let (op, result) = (AtomicOp::FetchAdd { add: nth }, near.data(0, 8));
        let add = Request::Atomic { remote: word.remote(0), op, result };
        near.qp.post(CtrlFlags::SIGNALED, add).unwrap();
        far.qp.post(CtrlFlags::SIGNALED, write(near.remote(16), inline(&nth.to_le_bytes()))).unwrap();
        rig.settle();
        for end in [0, 0, 1] {
            assert_eq!(rig.ends[end].qp.poll().unwrap().syndrome(), None, "{nth}");
        }
        assert_eq!(rig.ends[1].get(8, 8), nth.to_le_bytes());
        assert_eq!(rig.ends[0].get(16, 8), nth.to_le_bytes());
    }
    assert_eq!(word.region.view().to_vec(0, 8), (2999_u64 * 3000 / 2).to_le_bytes());
    assert_eq!(rig.ends.each_ref().map(|end| end.device.counters().retransmissions), [0, 0]);
}

#[test]
fn a_wrong_key_or_range_changes_nothing_and_is_counted() {
    for wrong in 0..3 {
        let mut rig = shm_rig(Setup::default());
        let [near, far] = &mut rig.ends;
        let mut remote = far.remote(0);
        match wrong {
            0 => remote.rkey.0 ^= 0x100,
            1 => remote.rkey.0 ^= 1,
            _ => remote.addr = far.remote(rig::BUFFER - 4).addr,
        }
        near.qp.post(CtrlFlags::SIGNALED, write(remote, inline(&[9; 8]))).unwrap();
        rig.settle();
        assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), Some(Syndrome::REMOTE_ACCESS));
        assert_eq!(rig.ends[1].get(0, rig::BUFFER), vec![0; rig::BUFFER as usize]);
        assert_eq!(rig.ends[1].device.counters().refused_requests, 1);
    }
}

#[test]
fn a_request_of_a_peer_that_is_connected_elsewhere_changes_nothing_and_is_counted() {
    let fabrics = [0, 1, 2].map(shm_fabric);
    let [near, far, other] = fabrics.each_ref().map(|fabric| device(fabric, Setup::default().doorbells));
    introduce(&[Arc::clone(&near), Arc::clone(&far)]);
    introduce(&[Arc::clone(&other), Arc::clone(&far)]);
    let [_near, far] = rig::connect(&[near, far], Setup::default());
    // The third process claims to be connected to the queue pair that serves the first.
    let hca = as_hca(&other);
    let region = ControlRegion::host(&hca, 1 << 20).unwrap();
    let qp = HostQp::create(&region, hca.alloc_pd().unwrap(), HostQpSpec::default()).unwrap();
    let address = far.device.port().address();
    let there = Endpoint { address, qpn: far.qp.qpn(), psn: Psn::new(0) };
    let mut qp = qp.connect(&there, &ConnectSpec::default()).unwrap();
    qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[6; 8]))).unwrap();
    while [&other, &far.device].iter().any(|device| device.step(Nanos(0)).did_work) {}
    assert_eq!(qp.poll(), None);
    assert_eq!(far.get(0, 8), [0; 8]);
    assert_eq!(far.device.counters().dropped_requests, 1);
}

#[test]
fn ports_of_one_process_talk_to_each_other_and_to_themselves() {
    let fabric = shm_fabric(0);
    let devices = [0, 1].map(|_| device(&fabric, Setup::default().doorbells));
    for [one, other] in [[0, 1], [1, 1]] {
        let pair = [&devices[one], &devices[other]].map(Arc::clone);
        let mut ends = rig::connect(&pair, Setup::default());
        let remote = ends[1].remote(0);
        ends[0].qp.post(CtrlFlags::SIGNALED, write(remote, inline(b"hello"))).unwrap();
        while devices.iter().any(|device| device.step(Nanos(0)).did_work) {}
        assert_eq!(ends[0].qp.poll().unwrap().syndrome(), None);
        assert_eq!(ends[1].get(0, 5), b"hello");
    }
}

#[test]
fn who_cannot_be_admitted_is_refused_by_name() {
    let local = Fabric::inproc(FabricConfig::default());
    let near = device(&local, Setup::default().doorbells);
    assert_eq!(local.advert(near.port_id()), Err(HcaError::Advert(AdvertError::Local)));
    let fabrics = [0, 1, 1].map(shm_fabric);
    let devices = fabrics.each_ref().map(|fabric| device(fabric, Setup::default().doorbells));
    let adverts = [0, 1, 2].map(|nth: usize| fabrics[nth].advert(devices[nth].port_id()).unwrap());
    let admit = |bytes: &[u8]| fabrics[0].admit(bytes);
    assert_eq!(admit(&adverts[0]), Ok(devices[0].port_id()), "one's own port is known");
    let port = admit(&adverts[1]).unwrap();
    assert_eq!(admit(&adverts[1]), Ok(port), "admitting twice changes nothing");
    assert!(fabrics[0].passes(devices[0].port_id(), port));
    // The same address from another process: the first one was replaced.
    let replacement = admit(&adverts[2]).unwrap();
    assert_ne!(replacement, port);
    assert!(!fabrics[0].passes(devices[0].port_id(), port));
    // Somebody who claims our own address.
    let taken = fabrics[1].admit(&adverts[2]).unwrap_err();
    assert!(matches!(taken, HcaError::Advert(AdvertError::AddressTaken { .. })));
    for at in 0..adverts[1].len() {
        let mut bytes = adverts[1].clone();
        bytes[at] ^= 0x40;
        // Some bytes are padding or part of the address; none may panic or disturb what is known.
        let _ = fabrics[0].admit(&bytes);
        let _ = fabrics[0].admit(&bytes[..at]);
    }
    assert_eq!(admit(&adverts[0]), Ok(devices[0].port_id()));
    let none = Fabric::shm(ShmConfig { peers_max: 0, ..ShmConfig::default() }).unwrap_err();
    assert!(matches!(none, HcaError::OutOfRange { field: "peers_max", value: 0, min: 1, max: 512 }));
}

#[test]
fn no_more_peers_are_admitted_than_there_are_slots() {
    let fabric = Fabric::shm(ShmConfig { peers_max: 1, ..ShmConfig::default() }).unwrap();
    let near = device(&fabric, Setup::default().doorbells);
    let others = [1, 2].map(shm_fabric);
    let devices = others.each_ref().map(|other| device(other, Setup::default().doorbells));
    let adverts = [0, 1].map(|nth: usize| others[nth].advert(devices[nth].port_id()).unwrap());
    let first = fabric.admit(&adverts[0]).unwrap();
    let full = HcaError::Exhausted { what: "slots for peers", requested: 1, limit: 1 };
    assert_eq!(fabric.admit(&adverts[1]), Err(full));
    fabric.kill(first);
    assert!(fabric.admit(&adverts[1]).is_ok(), "a killed port gives its slot back");
    assert_eq!(near.port_id().0, 0);
}

#[test]
fn a_sleeper_is_woken_by_what_arrives() {
    /// Nobody waits so long: who is not woken hangs this test.
    const FOR_EVER: u64 = 1 << 50;
    const ROUNDS: u64 = 200;
    let fabrics = [0, 1].map(shm_fabric);
    let devices = [0, 1].map(|end: usize| device(&fabrics[end], Setup::default().doorbells));
    introduce(&devices);
    let connect = ConnectSpec { ack_timeout: 0, ..ConnectSpec::default() };
    let mut ends = rig::connect(&devices, Setup { connect, ..Setup::default() });
    let idle = |end: usize| {
        if !devices[end].step(Nanos(0)).did_work {
            fabrics[end].wait_for_arrivals(FOR_EVER);
        }
    };
    let [near, far] = &mut ends;
    let buffer = far.buffer.view();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while buffer.to_vec(0, 8) != (ROUNDS - 1).to_le_bytes() {
                idle(1);
            }
        });
        for nth in 0..ROUNDS {
            near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&nth.to_le_bytes()))).unwrap();
            while near.qp.poll().is_none() {
                idle(0);
            }
        }
    });
}

#[test]
fn a_peer_cannot_write_what_it_mapped_for_reading() {
    let region = SharedRegion::new(4096, 1).unwrap();
    let peer = PeerRegion::open(&region.handle().unwrap(), PeerAccess::ReadOnly).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let start = format!("{:x}-", peer.as_ptr().addr());
    let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
    assert!(line.contains(" r--s "), "{line}");
}
