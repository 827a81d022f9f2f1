//! What each operation does when nothing is wrong.

use ibex_abi::cqe::{CqeOpcode, Syndrome};
use ibex_abi::wqe::{AtomicOp, CqUpdate, CtrlFlags, FenceMode, Request};

use super::{PATIENCE_NS, Rig, SIGNALED, World, atomic, connected, gather, inline, pattern, write};
use crate::host_qp::{HostQpSpec, Outcome};
use crate::objects::RecvSpec;

pub(super) fn a_write_arrives(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    let bytes = pattern(1, 7168);
    near.put(0, &bytes);
    let request = write(far.remote(4096), gather(&[near.data(0, 7168)]));
    near.qp().post(SIGNALED, request).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().wqe_counter, 0);
    assert_eq!(far.get(4096, 7168), bytes);
    assert_eq!((far.get(4095, 1), far.get(4096 + 7168, 1)), (vec![0], vec![0]), "nothing around it");
}

pub(super) fn inline_writes_of_every_length_arrive(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    for len in (1..=64_usize).chain([100, 255, 512, 900]) {
        let bytes = pattern(len.to_le_bytes()[0], len);
        let request = write(far.remote(8), inline(&bytes));
        near.qp().post(SIGNALED, request).expect("room");
        world.settle(PATIENCE_NS);
        near.good();
        assert_eq!(far.get(8, len as u64), bytes, "{len} bytes inline");
    }
}

pub(super) fn a_gather_list_is_written_in_order(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    near.put(0, b"one, two, three and four");
    let list = [near.data(15, 9), near.data(5, 5), near.data(0, 5)];
    let mut payload = gather(&list);
    payload.extend(inline(b"inline"));
    near.qp().post(SIGNALED, write(far.remote(1), payload)).expect("room");
    world.settle(PATIENCE_NS);
    near.good();
    assert_eq!(far.get(1, 25), b" and fourtwo, one, inline");
}

pub(super) fn a_zero_length_write_completes_without_a_key(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    let mut remote = far.remote(0);
    remote.rkey = super::BAD_KEY;
    near.qp().post(SIGNALED, write(remote, Vec::new())).expect("room");
    world.settle(PATIENCE_NS);
    near.good();
}

/// A queue pair with a receive queue of 8 entries with 2 segments each.
fn with_receives() -> Rig {
    let recv = Some(RecvSpec { log_size: 3, log_segs: 1 });
    Rig { qp: HostQpSpec { recv, user_index: 0x77, ..HostQpSpec::default() }, ..Rig::default() }
}

pub(super) fn a_write_with_immediate_consumes_a_receive(world: &mut dyn World) {
    let [mut near, mut far] = connected(world, with_receives());
    let into = far.data(0, 16);
    far.qp().post_recv(&[into]).expect("room");
    let request = Request::WriteImm { remote: far.remote(256), payload: inline(b"with word") };
    near.qp().post_imm(SIGNALED, 0xdead_beef, request).expect("room");
    world.settle(PATIENCE_NS);
    near.good();
    assert_eq!(far.get(256, 9), b"with word");
    assert_eq!(far.get(0, 16), [0; 16], "the receive's own memory is not touched");
    let receive = far.qp().poll_recv().expect("a receive completion");
    assert_eq!(receive.outcome, Outcome::Good(CqeOpcode::RespWriteImm));
    assert_eq!((receive.imm, receive.byte_cnt, receive.user_index), (0xdead_beef, 9, 0x77));
}

pub(super) fn a_read_brings_memory_back(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    let bytes = pattern(3, 10_000);
    far.put(100, &bytes);
    let scatter = vec![near.data(20_000, 6000), near.data(0, 4000)];
    near.qp().post(SIGNALED, Request::Read { remote: far.remote(100), scatter }).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().byte_cnt, 10_000);
    assert_eq!(near.get(20_000, 6000), bytes[..6000]);
    assert_eq!(near.get(0, 4000), bytes[6000..]);
}

pub(super) fn sends_fill_receives_in_order(world: &mut dyn World) {
    let [mut near, mut far] = connected(world, with_receives());
    for slot in 0..4 {
        let into = [far.data(slot * 1024, 8), far.data(slot * 1024 + 512, 100)];
        far.qp().post_recv(&into).expect("room");
    }
    let long = pattern(9, 60);
    near.put(0, &long);
    let from = gather(&[near.data(0, 60)]);
    near.qp().post(SIGNALED, Request::Send { payload: inline(b"short") }).expect("room");
    near.qp().post_imm(SIGNALED, 7, Request::SendImm { payload: from }).expect("room");
    near.qp().post(SIGNALED, Request::Send { payload: Vec::new() }).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().wqe_counter, 2);
    assert_eq!(far.get(0, 5), b"short");
    assert_eq!((far.get(1024, 8), far.get(1536, 52)), (long[..8].to_vec(), long[8..].to_vec()));
    let last = far.qp().poll_recv().expect("a receive completion");
    assert_eq!((last.outcome, last.wqe_counter), (Outcome::Good(CqeOpcode::RespSend), 2));
    assert_eq!(last.byte_cnt, 0);
}

pub(super) fn atomics_return_the_old_value(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    far.put(8, &40_u64.to_ne_bytes());
    let result = near.data(64, 8);
    for (op, old, new) in [
        (AtomicOp::FetchAdd { add: 2 }, 40, 42),
        (AtomicOp::FetchAdd { add: u64::MAX }, 42, 41),
        (AtomicOp::CmpSwap { swap: 7, compare: 42 }, 41, 41),
        (AtomicOp::CmpSwap { swap: 7, compare: 41 }, 41, 7),
    ] {
        near.qp().post(SIGNALED, atomic(far.remote(8), op, result)).expect("room");
        world.settle(PATIENCE_NS);
        assert_eq!(near.good().byte_cnt, 8, "{op:?}");
        assert_eq!(near.get(64, 8), u64::to_ne_bytes(old), "old value of {op:?}");
        assert_eq!(far.get(8, 8), u64::to_ne_bytes(new), "new value of {op:?}");
    }
}

pub(super) fn masked_atomics_respect_their_masks(world: &mut dyn World) {
    if !world.has_masked_atomics() {
        return masked_atomics_without_packets_fail_locally(world);
    }
    let [mut near, far] = connected(world, Rig::default());
    far.put(0, &0x0000_00ff_ffff_0001_u64.to_ne_bytes());
    let add =
        AtomicOp::MaskedFetchAdd64 { add: 0x0000_0001_0001_0001, field_boundary: 0x8000_8000_8000_8000 };
    let request = atomic(far.remote(0), add, near.data(64, 8));
    near.qp().post(SIGNALED, request).expect_posted();
    let swap = AtomicOp::MaskedCmpSwap64 {
        swap: 0xaaaa_bbbb_cccc_dddd,
        compare: 2,
        swap_mask: 0xffff,
        compare_mask: 0xffff,
    };
    let request = atomic(far.remote(0), swap, near.data(72, 8));
    near.qp().post(SIGNALED, request).expect_posted();
    far.put(16, &[0xff, 0xff, 0xff, 0xff, 9, 9, 9, 9]);
    let add = AtomicOp::MaskedFetchAdd32 { add: 1, field_boundary: 0 };
    let request = atomic(far.remote(16), add, near.data(80, 4));
    near.qp().post(SIGNALED, request).expect_posted();
    let swap = AtomicOp::MaskedCmpSwap32 { swap: 5, compare: 0, swap_mask: u32::MAX, compare_mask: 0 };
    let request = atomic(far.remote(16), swap, near.data(84, 4));
    near.qp().post(SIGNALED, request).expect_posted();
    world.settle(PATIENCE_NS);
    // The masked compare-and-swap of 8 bytes takes two basic blocks.
    assert_eq!(near.good().wqe_counter, 4);
    assert_eq!(near.get(64, 8), 0x0000_00ff_ffff_0001_u64.to_ne_bytes());
    assert_eq!(near.get(72, 8), 0x0000_0100_0000_0002_u64.to_ne_bytes());
    assert_eq!(far.get(0, 8), 0x0000_0100_0000_dddd_u64.to_ne_bytes());
    assert_eq!(near.get(80, 8), [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    assert_eq!(far.get(16, 8), [5, 0, 0, 0, 9, 9, 9, 9], "the neighbour is not touched");
}

/// Shorter than repeating the reason.
trait Posted {
    fn expect_posted(self);
}

impl Posted for Result<u16, crate::host_qp::PostError> {
    fn expect_posted(self) {
        self.expect("room in the send queue");
    }
}

fn masked_atomics_without_packets_fail_locally(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    // A mask that hides nothing is the plain operation.
    let add = AtomicOp::MaskedFetchAdd64 { add: 3, field_boundary: 0 };
    let request = atomic(far.remote(0), add, near.data(64, 8));
    near.qp().post(SIGNALED, request).expect_posted();
    world.settle(PATIENCE_NS);
    near.good();
    let add = AtomicOp::MaskedFetchAdd64 { add: 3, field_boundary: 1 << 31 };
    let request = atomic(far.remote(0), add, near.data(64, 8));
    near.qp().post(SIGNALED, request).expect_posted();
    world.settle(PATIENCE_NS);
    near.failed(Syndrome::LOCAL_QP_OP);
    assert_eq!(far.get(0, 8), 3_u64.to_ne_bytes());
}

pub(super) fn a_nop_completes(world: &mut dyn World) {
    let [mut near, _far] = connected(world, Rig::default());
    near.qp().post(SIGNALED, Request::Nop { body: vec![[0xa5; 16]; 2] }).expect_posted();
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().wqe_counter, 0);
}

pub(super) fn only_signalled_requests_complete(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    for at in 0..3 {
        let request = write(far.remote(at * 8), inline(&[1; 8]));
        near.qp().post(CtrlFlags::UNSIGNALED, request).expect_posted();
    }
    world.settle(PATIENCE_NS);
    assert_eq!(near.qp().poll(), None);
    assert_eq!(far.get(0, 24), [1; 24]);
    near.qp().post(SIGNALED, write(far.remote(24), inline(&[2; 8]))).expect_posted();
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().wqe_counter, 3);
    assert_eq!(near.qp().poll(), None);
}

pub(super) fn a_fenced_write_sees_the_read_before_it(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    let bytes = pattern(5, 9000);
    far.put(0, &bytes);
    let scatter = vec![near.data(0, 9000)];
    let payload = gather(&[near.data(0, 9000)]);
    let fenced = CtrlFlags::new(FenceMode::SmallAndFence, CqUpdate::Always, false);
    let mut batch = near.qp().batch();
    batch.push(SIGNALED, Request::Read { remote: far.remote(0), scatter }).expect_posted();
    batch.push(fenced, write(far.remote(20_000), payload)).expect_posted();
    batch.commit().ring();
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().wqe_counter, 1);
    assert_eq!(far.get(20_000, 9000), bytes);
}
