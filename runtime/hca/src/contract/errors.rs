//! What goes wrong, and how the device says so.

use ibex_abi::cqe::{CqeOpcode, Syndrome, VendorSyndrome};
use ibex_abi::doorbell::Doorbell;
use ibex_abi::types::{QpNum, QpState};
use ibex_abi::wqe::{AtomicOp, CtrlFlags, CtrlSeg, DataSeg, Opcode, Request};
use zerocopy::IntoBytes;

use super::{
    BAD_KEY, BAD_LKEY, BUFFER, End, PATIENCE_NS, Rig, SIGNALED, World, atomic, connect, connected,
    connected_with, gather, inline, write,
};
use crate::Access;
use crate::host_memory::Registered;
use crate::host_qp::{ConnectSpec, CqShape, HostQpSpec, Outcome};
use crate::objects::RecvSpec;

/// Completions in a ring, so that the first error stays visible.
fn ring_rig() -> Rig {
    let cq = CqShape::Ring { log_size: 6, overrun_ignore: false };
    let recv = Some(RecvSpec { log_size: 2, log_segs: 1 });
    let qp = HostQpSpec { send_cq: cq, recv_cq: cq, recv, ..HostQpSpec::default() };
    let connect = ConnectSpec { retry_count: 2, ack_timeout: 8, ..ConnectSpec::default() };
    Rig { qp, connect }
}

fn state(end: &mut End) -> QpState {
    end.qp().query().expect("the queue pair exists").state
}

pub(super) fn a_bad_remote_key_fails_with_its_syndrome_and_flushes(world: &mut dyn World) {
    let [mut near, mut far] = connected(world, ring_rig());
    let mut bad = far.remote(0);
    bad.rkey = BAD_KEY;
    let good = [far.remote(0), far.remote(8), far.remote(16)];
    let mut batch = near.qp().batch();
    batch.push(SIGNALED, write(good[0], inline(&[1; 8]))).expect("room");
    batch.push(SIGNALED, write(bad, inline(&[2; 8]))).expect("room");
    batch.push(SIGNALED, write(good[1], inline(&[3; 8]))).expect("room");
    batch.push(CtrlFlags::UNSIGNALED, write(good[2], inline(&[4; 8]))).expect("room");
    batch.commit().ring();
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().wqe_counter, 0);
    let first = near.failed(Syndrome::REMOTE_ACCESS);
    let opcode = CqeOpcode::ReqErr;
    let (syndrome, vendor) = (Syndrome::REMOTE_ACCESS, VendorSyndrome::REMOTE_ACCESS);
    assert_eq!(first.outcome, Outcome::Error { opcode, syndrome, vendor });
    assert_eq!(first.wqe_counter, 1);
    assert_eq!(near.failed(Syndrome::WR_FLUSH).wqe_counter, 2);
    assert_eq!(near.failed(Syndrome::WR_FLUSH).wqe_counter, 3);
    assert_eq!(near.qp().poll(), None);
    assert_eq!(far.get(0, 8), [1; 8], "what came before the error is there");
    assert_eq!((state(&mut near), state(&mut far)), (QpState::Err, QpState::Err));
    // Posted later, flushed as well.
    near.qp().post(SIGNALED, write(good[0], inline(&[5; 8]))).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(near.failed(Syndrome::WR_FLUSH).wqe_counter, 4);
}

pub(super) fn each_remote_violation_has_its_syndrome(world: &mut dyn World) {
    let none = Access { local_write: true, ..Access::LOCAL_READ };
    type Make = fn(&End, &End) -> Request;
    let cases: [(&str, Make, Access, Access, Syndrome); 9] = [
        (
            "beyond the end",
            |_, far| write(far.remote(BUFFER - 4), inline(&[1; 8])),
            Access::ALL,
            Access::ALL,
            Syndrome::REMOTE_ACCESS,
        ),
        (
            "key without write",
            |_, far| write(far.remote(0), inline(&[1; 8])),
            none,
            Access::ALL,
            Syndrome::REMOTE_ACCESS,
        ),
        ("key without read", read_eight, none, Access::ALL, Syndrome::REMOTE_ACCESS),
        ("key without atomics", add_eight, none, Access::ALL, Syndrome::REMOTE_ACCESS),
        (
            "queue pair without write",
            |_, far| write(far.remote(0), inline(&[1; 8])),
            Access::ALL,
            none,
            Syndrome::REMOTE_INVAL_REQ,
        ),
        ("queue pair without read", read_eight, Access::ALL, none, Syndrome::REMOTE_INVAL_REQ),
        ("queue pair without atomics", add_eight, Access::ALL, none, Syndrome::REMOTE_INVAL_REQ),
        (
            "misaligned atomic",
            |near, far| atomic(far.remote(4), AtomicOp::FetchAdd { add: 1 }, near.data(0, 8)),
            Access::ALL,
            Access::ALL,
            Syndrome::REMOTE_INVAL_REQ,
        ),
        (
            "another protection domain",
            |_, _| Request::Nop { body: Vec::new() },
            Access::ALL,
            Access::ALL,
            Syndrome::REMOTE_ACCESS,
        ),
    ];
    for (name, make, key, rights, expected) in cases {
        let mut rig = ring_rig();
        rig.connect.access = rights;
        // The near end's own key must allow results to be written.
        let [mut near, mut far] = connected_with(world, [rig, rig], Access { local_write: true, ..key });
        let mut request = make(&near, &far);
        let other_pd = far.hca.alloc_pd().expect("a protection domain");
        let foreign = Registered::new(&far.hca, other_pd, 4096, Access::ALL).expect("a buffer");
        if matches!(request, Request::Nop { .. }) {
            let mut remote = far.remote(0);
            remote.rkey = foreign.key().rkey;
            remote.addr = foreign.key().iova;
            request = write(remote, inline(&[1; 8]));
        }
        near.qp().post(SIGNALED, request).expect("room");
        world.settle(PATIENCE_NS);
        let completion = near.completion();
        assert_eq!(completion.syndrome(), Some(expected), "{name}");
        assert_eq!(far.get(0, 8), [0; 8], "{name}: nothing was written");
        assert_eq!(state(&mut far), QpState::Err, "{name}");
        if world.tells_of_failures() {
            assert!(far.hca.poll_async_event().is_some(), "{name}: the responder reports it");
        }
    }
}

fn read_eight(near: &End, far: &End) -> Request {
    Request::Read { remote: far.remote(0), scatter: vec![near.data(0, 8)] }
}

fn add_eight(near: &End, far: &End) -> Request {
    atomic(far.remote(0), AtomicOp::FetchAdd { add: 1 }, near.data(0, 8))
}

pub(super) fn each_local_violation_has_its_syndrome(world: &mut dyn World) {
    type Make = fn(&End, &End) -> Request;
    let cases: [(&str, Make, Access, Syndrome); 6] = [
        (
            "unknown local key",
            |near, far| {
                let seg = DataSeg::new(8, BAD_LKEY.get(), near.buffer.iova(0));
                write(far.remote(0), gather(&[seg]))
            },
            Access::ALL,
            Syndrome::LOCAL_PROT,
        ),
        (
            "beyond the end",
            |near, far| write(far.remote(0), gather(&[near.data(BUFFER - 4, 8)])),
            Access::ALL,
            Syndrome::LOCAL_PROT,
        ),
        ("result without local write", read_eight, Access::LOCAL_READ, Syndrome::LOCAL_PROT),
        ("atomic result without local write", add_eight, Access::LOCAL_READ, Syndrome::LOCAL_PROT),
        (
            "atomic result of another length",
            |near, far| atomic(far.remote(0), AtomicOp::FetchAdd { add: 1 }, near.data(0, 4)),
            Access::ALL,
            Syndrome::LOCAL_LENGTH,
        ),
        (
            "longer than a message",
            |near, far| {
                // An empty segment means 2^31 bytes, which no key of ours covers: the key is found first.
                write(
                    far.remote(0),
                    gather(&[DataSeg::new(0, near.buffer.key().lkey.get(), near.buffer.iova(0))]),
                )
            },
            Access::ALL,
            Syndrome::LOCAL_PROT,
        ),
    ];
    for (name, make, access, expected) in cases {
        let [mut near, mut far] = connected_with(world, [ring_rig(); 2], access);
        let request = make(&near, &far);
        near.qp().post(SIGNALED, request).expect("room");
        near.qp().post(SIGNALED, Request::Nop { body: Vec::new() }).expect("room");
        world.settle(PATIENCE_NS);
        assert_eq!(near.completion().syndrome(), Some(expected), "{name}");
        near.failed(Syndrome::WR_FLUSH);
        assert_eq!((state(&mut near), state(&mut far)), (QpState::Err, QpState::Rts), "{name}");
    }
}

pub(super) fn a_malformed_entry_fails_locally(world: &mut dyn World) {
    let nop = |idx, qpn, ds| CtrlSeg::new(0, idx, Opcode::Nop, qpn, ds, SIGNALED);
    type Make = fn(QpNum) -> CtrlSeg;
    let _: Make = |_| unreachable!();
    for (name, make, vendor) in [
        (
            "wrong index",
            (&|qpn| nop(1, qpn, 1)) as &dyn Fn(QpNum) -> CtrlSeg,
            Some(VendorSyndrome::WQE_INDEX),
        ),
        (
            "another queue pair",
            &|qpn: QpNum| nop(0, QpNum::new(qpn.get() ^ 1), 1),
            Some(VendorSyndrome::WQE_INDEX),
        ),
        ("no size", &|qpn| nop(0, qpn, 0), None),
        ("longer than the doorbell covers", &|qpn| nop(0, qpn, 9), None),
        (
            "unknown opcode",
            &|qpn| {
                let mut ctrl = nop(0, qpn, 1);
                ctrl.opcode_to(0x7f);
                ctrl
            },
            None,
        ),
        (
            "a write without its address",
            &|qpn| {
                let mut ctrl = nop(0, qpn, 1);
                ctrl.opcode_to(Opcode::RdmaWrite.byte());
                ctrl
            },
            None,
        ),
    ] {
        let [mut near, _far] = connected(world, ring_rig());
        let qpn = near.qp().qpn();
        let start = near.qp().rings().len() - (64 << near.qp().spec().log_sq_size);
        let rings = near.qp().rings().view().expect("host memory");
        rings.write(start, make(qpn).as_bytes());
        let record = near.qp().record().view().expect("host memory");
        record.word32(4).store(1_u32.to_be(), std::sync::atomic::Ordering::Release);
        near.qp().store_doorbell(Doorbell::of_producer_idx(1, qpn));
        world.settle(PATIENCE_NS);
        let failed = near.failed(Syndrome::LOCAL_QP_OP);
        assert_eq!(failed.wqe_counter, 0, "{name}");
        if let Some(expected) = vendor {
            let Outcome::Error { vendor, .. } = failed.outcome else { unreachable!("it failed") };
            assert_eq!(vendor, expected, "{name}");
        }
        assert_eq!(state(&mut near), QpState::Err, "{name}");
    }
}

/// Tests write opcodes that no constructor makes.
trait AnyOpcode {
    fn opcode_to(&mut self, byte: u8);
}

impl AnyOpcode for CtrlSeg {
    fn opcode_to(&mut self, byte: u8) {
        let rest = self.opmod_idx_opcode.get() & !0xff;
        self.opmod_idx_opcode.set(rest | u32::from(byte));
    }
}

pub(super) fn a_revoked_key_is_refused(world: &mut dyn World) {
    let [mut near, far] = connected(world, ring_rig());
    let spare = Registered::new(&far.hca, far.pd, 4096, Access::ALL).expect("a buffer");
    let mut remote = far.remote(0);
    (remote.rkey, remote.addr) = (spare.key().rkey, spare.key().iova);
    near.qp().post(SIGNALED, write(remote, inline(&[1; 8]))).expect("room");
    world.settle(PATIENCE_NS);
    near.good();
    drop(spare);
    near.qp().post(SIGNALED, write(remote, inline(&[1; 8]))).expect("room");
    world.settle(PATIENCE_NS);
    near.failed(Syndrome::REMOTE_ACCESS);
}

pub(super) fn moving_to_err_flushes_what_is_posted(world: &mut dyn World) {
    let [mut near, mut far] = connected(world, ring_rig());
    let into = far.data(0, 64);
    far.qp().post_recv(&[into]).expect("room");
    far.qp().fail().expect("2ERR is legal in every state");
    near.qp().fail().expect("2ERR is legal in every state");
    near.qp().post(SIGNALED, Request::Nop { body: Vec::new() }).expect("room");
    near.qp().post(SIGNALED, Request::Nop { body: Vec::new() }).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(near.failed(Syndrome::WR_FLUSH).wqe_counter, 0);
    assert_eq!(near.failed(Syndrome::WR_FLUSH).wqe_counter, 1);
    let receive = far.qp().poll_recv().expect("the receive is flushed");
    assert_eq!(receive.syndrome(), Some(Syndrome::WR_FLUSH));
}

pub(super) fn an_unanswered_request_exhausts_its_retries(world: &mut dyn World) {
    let [mut near, far] = connected(world, ring_rig());
    let remote = far.remote(0);
    far.qp.as_ref().expect("connected").fail().expect("2ERR");
    near.qp().post(SIGNALED, write(remote, inline(&[1; 8]))).expect("room");
    near.qp().post(SIGNALED, write(remote, inline(&[2; 8]))).expect("room");
    world.settle(PATIENCE_NS);
    let first = near.failed(Syndrome::TRANSPORT_RETRY_EXC);
    let (opcode, syndrome) = (CqeOpcode::ReqErr, Syndrome::TRANSPORT_RETRY_EXC);
    assert_eq!(first.outcome, Outcome::Error { opcode, syndrome, vendor: VendorSyndrome::RETRY_EXC });
    assert_eq!(near.failed(Syndrome::WR_FLUSH).wqe_counter, 1);
    assert_eq!(far.get(0, 8), [0; 8]);
}

pub(super) fn a_send_without_receive_waits_or_gives_up(world: &mut dyn World) {
    let mut rig = ring_rig();
    rig.connect.rnr_retry = 2;
    let mut ends = connected_with(world, [rig, rig], Access::ALL);
    let hello = || Request::Send { payload: inline(b"hello") };
    ends[0].qp().post(SIGNALED, hello()).expect("room");
    world.settle(PATIENCE_NS);
    ends[0].failed(Syndrome::RNR_RETRY_EXC);
    // With endless patience it arrives once a receive is posted.
    for end in &mut ends {
        end.qp = None;
    }
    rig.connect.rnr_retry = 7;
    connect(&mut ends, [rig; 2]);
    let [near, far] = &mut ends;
    near.qp().post(SIGNALED, hello()).expect("room");
    world.settle(50_000_000);
    assert_eq!(near.qp().poll(), None);
    let into = far.data(128, 16);
    far.qp().post_recv(&[into]).expect("room");
    world.settle(50_000_000);
    near.good();
    assert_eq!(far.get(128, 5), b"hello");
}

pub(super) fn a_receive_that_is_too_short_fails_both_ends(world: &mut dyn World) {
    let [mut near, mut far] = connected(world, ring_rig());
    let into = far.data(0, 4);
    far.qp().post_recv(&[into]).expect("room");
    near.qp().post(SIGNALED, Request::Send { payload: inline(b"too long") }).expect("room");
    world.settle(PATIENCE_NS);
    near.failed(Syndrome::REMOTE_INVAL_REQ);
    let receive = far.qp().poll_recv().expect("a receive completion");
    assert_eq!(receive.syndrome(), Some(Syndrome::LOCAL_LENGTH));
    assert_eq!((state(&mut near), state(&mut far)), (QpState::Err, QpState::Err));
}
