//! What the fabric can do to a connection: cut either direction, heal, kill a port.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::QpState;
use ibex_abi::wqe::{AtomicOp, CqUpdate, CtrlFlags, FenceMode, Request};
use ibex_hca::Nanos;
use ibex_hca::emulated::PathState;
use ibex_hca::host_qp::ConnectSpec;
use rig::{Setup, gather, inline, on_both, rig, write};

/// 4.096 us * 2^8.
const ACK_TIMEOUT: u64 = 4096 << 8;

fn patient() -> Setup {
    let connect = ConnectSpec { retry_count: 7, ack_timeout: 8, ..ConnectSpec::default() };
    Setup { connect, ..Setup::default() }
}

#[test]
fn a_request_that_is_cut_off_is_sent_again_with_what_memory_holds_then() {
    on_both(patient(), |mut rig| {
        rig.ends[0].put(0, b"before");
        rig.requests(PathState::Cut);
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), gather(&[near.data(0, 6)]))).unwrap();
        rig.pass(3 * ACK_TIMEOUT);
        assert_eq!(rig.ends[0].qp.poll(), None, "outstanding while cut");
        // Software that breaks the source-row rule is found out here.
        rig.ends[0].put(0, b"after!");
        rig.requests(PathState::Up);
        rig.pass(2 * ACK_TIMEOUT);
        assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
        assert_eq!(rig.ends[1].get(0, 6), b"after!");
        assert!(rig.ends[0].device.counters().retransmissions >= 3);
        assert_eq!(rig.ends[1].device.counters().duplicates, 0);
    });
}

#[test]
fn retries_run_out_after_their_time_and_not_before() {
    on_both(Setup::default(), |mut rig| {
        rig.requests(PathState::Cut);
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::UNSIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(8), inline(&[2; 8]))).unwrap();
        rig.settle();
        // Two retries: three timeouts in all.
        rig.pass(3 * ACK_TIMEOUT - 20_000);
        assert_eq!(rig.ends[0].qp.poll(), None);
        rig.pass(40_000);
        let near = &mut rig.ends[0].qp;
        let first = near.poll().unwrap();
        assert_eq!((first.wqe_counter, first.syndrome()), (0, Some(Syndrome::TRANSPORT_RETRY_EXC)));
        assert_eq!(near.poll().unwrap().syndrome(), Some(Syndrome::WR_FLUSH));
        assert_eq!(near.query().unwrap().state, QpState::Err);
    });
}

#[test]
fn a_lost_answer_leaves_data_without_completion_and_is_not_executed_twice() {
    on_both(patient(), |mut rig| {
        rig.answers(PathState::Cut);
        let [near, far] = &mut rig.ends;
        far.put(64, &100_u64.to_le_bytes());
        let result = near.data(0, 8);
        let add = Request::Atomic { remote: far.remote(64), op: AtomicOp::FetchAdd { add: 1 }, result };
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(b"it is in"))).unwrap();
        near.qp.post(CtrlFlags::SIGNALED, add).unwrap();
        rig.pass(2 * ACK_TIMEOUT + 1000);
        assert_eq!(rig.ends[1].get(0, 8), b"it is in");
        assert_eq!(rig.ends[1].get(64, 8), 101_u64.to_le_bytes());
        assert_eq!(rig.ends[0].qp.poll(), None, "no completion while answers are lost");
        // A consumer may already have used the words; the retransmission must not bring them back.
        rig.ends[1].put(0, b"consumed");
        rig.answers(PathState::Up);
        rig.pass(2 * ACK_TIMEOUT);
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 0);
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 1);
        assert_eq!(rig.ends[1].get(0, 8), b"consumed");
        assert_eq!(rig.ends[1].get(64, 8), 101_u64.to_le_bytes(), "added once");
        assert_eq!(rig.ends[0].get(0, 8), 100_u64.to_le_bytes(), "the old value comes from memory");
        assert!(rig.ends[1].device.counters().duplicates >= 2);
    });
}

#[test]
fn a_read_whose_response_is_lost_is_executed_again() {
    on_both(patient(), |mut rig| {
        rig.answers(PathState::Cut);
        let [near, far] = &mut rig.ends;
        far.put(0, b"first");
        let scatter = vec![near.data(0, 5)];
        near.qp.post(CtrlFlags::SIGNALED, Request::Read { remote: far.remote(0), scatter }).unwrap();
        // When answers come again, an acknowledgement of this one is no answer to the read.
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(100), inline(&[1; 8]))).unwrap();
        rig.settle();
        rig.ends[1].put(0, b"later");
        rig.answers(PathState::Up);
        rig.pass(2 * ACK_TIMEOUT);
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 0);
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 1);
        assert_eq!(rig.ends[0].get(0, 5), b"later");
    });
}

#[test]
fn work_posted_after_a_cut_makes_the_lost_work_come_first() {
    on_both(patient(), |mut rig| {
        rig.requests(PathState::Cut);
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(b"first   "))).unwrap();
        rig.settle();
        rig.requests(PathState::Up);
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(b"second  "))).unwrap();
        // No time passes: the responder asks for what is missing.
        rig.settle();
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 0);
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 1);
        assert_eq!(rig.ends[1].get(0, 8), b"second  ", "in order");
    });
}

#[test]
fn more_work_than_may_be_outstanding_waits_its_turn() {
    let mut setup = patient();
    setup.qp.log_sq_size = 9;
    on_both(setup, |mut rig| {
        rig.requests(PathState::Cut);
        let [near, far] = &mut rig.ends;
        for nth in 0..500_u64 {
            let flags = if nth % 100 == 99 { CtrlFlags::SIGNALED } else { CtrlFlags::UNSIGNALED };
            near.qp.post(flags, write(far.remote(nth * 8), inline(&nth.to_le_bytes()))).unwrap();
        }
        rig.pass(ACK_TIMEOUT / 2);
        rig.requests(PathState::Up);
        rig.pass(2 * ACK_TIMEOUT);
        let counters = [0; 5].map(|_: i32| rig.ends[0].qp.poll().unwrap().wqe_counter);
        assert_eq!(counters, [99, 199, 299, 399, 499]);
        for nth in 0..500_u64 {
            assert_eq!(rig.ends[1].get(nth * 8, 8), nth.to_le_bytes());
        }
    });
}

#[test]
fn an_entry_overwritten_before_its_completion_is_found_out() {
    on_both(patient(), |mut rig| {
        rig.requests(PathState::Cut);
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
        rig.settle();
        // The queue has 64 blocks; the index of the entry that will stand here next time is 64.
        let rings = rig.ends[0].qp.rings().view().unwrap();
        rings.write(1, &[0, 64]);
        rig.requests(PathState::Up);
        rig.pass(2 * ACK_TIMEOUT);
        assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), Some(Syndrome::LOCAL_QP_OP));
    });
}

#[test]
fn nothing_reaches_or_leaves_a_killed_port() {
    let mut rig = rig(Setup::default());
    let [_, far_port] = rig.ports;
    rig.fabric.kill(far_port);
    let [near, far] = &mut rig.ends;
    near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
    far.qp.post(CtrlFlags::SIGNALED, write(near.remote(0), inline(&[1; 8]))).unwrap();
    rig.pass(4 * ACK_TIMEOUT);
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), Some(Syndrome::TRANSPORT_RETRY_EXC));
    assert_eq!(rig.ends[1].qp.poll(), None, "a dead device does not even fail");
    assert_eq!((rig.ends[0].get(0, 8), rig.ends[1].get(0, 8)), (vec![0; 8], vec![0; 8]));
}

#[test]
fn a_device_that_is_gone_is_a_port_that_does_not_answer() {
    on_both(Setup::default(), |mut rig| {
        let remote = rig.ends[1].remote(0);
        let [near, far] = rig.ends;
        drop(far);
        let mut near = near;
        near.qp.post(CtrlFlags::SIGNALED, write(remote, inline(&[1; 8]))).unwrap();
        for _ in 0..5 {
            while near.device.step(rig.now).did_work {}
            rig.now = rig.now.plus(ACK_TIMEOUT);
        }
        assert_eq!(near.qp.poll().unwrap().syndrome(), Some(Syndrome::TRANSPORT_RETRY_EXC));
    });
}

#[test]
fn nothing_after_a_failed_request_is_placed_where_order_is_kept() {
    on_both(Setup::default(), |mut rig| {
        let [near, far] = &mut rig.ends;
        let mut bad = far.remote(0);
        bad.rkey = ibex_abi::types::Rkey(0x00ba_d000);
        let mut batch = near.qp.batch();
        batch.push(CtrlFlags::SIGNALED, write(bad, inline(&[1; 8]))).unwrap();
        batch.push(CtrlFlags::SIGNALED, write(far.remote(8), inline(&[2; 8]))).unwrap();
        batch.commit().ring();
        rig.settle();
        assert_eq!(rig.ends[1].get(0, 16), [0; 16]);
    });
}

#[test]
fn a_deadline_is_reported_while_an_answer_is_awaited() {
    on_both(Setup::default(), |mut rig| {
        rig.requests(PathState::Cut);
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
        near.device.step(Nanos(500));
        let step = near.device.step(Nanos(600));
        assert!(!step.did_work);
        assert_eq!(step.next_deadline, Some(Nanos(500 + ACK_TIMEOUT)));
    });
}

#[test]
fn an_acknowledgement_without_the_response_before_it_asks_for_that_again() {
    on_both(patient(), |mut rig| {
        rig.answers(PathState::Cut);
        let [near, far] = &mut rig.ends;
        far.put(0, b"response");
        let scatter = vec![near.data(0, 8)];
        near.qp.post(CtrlFlags::SIGNALED, Request::Read { remote: far.remote(0), scatter }).unwrap();
        rig.settle();
        rig.answers(PathState::Up);
        let [near, far] = &mut rig.ends;
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(100), inline(&[1; 8]))).unwrap();
        // No time passes: the acknowledgement of the write implies that the read's response was lost.
        rig.settle();
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 0);
        assert_eq!(rig.ends[0].qp.poll().unwrap().wqe_counter, 1);
        assert_eq!(rig.ends[0].get(0, 8), b"response");
    });
}

#[test]
fn a_fenced_write_waits_for_a_read_whose_response_was_lost() {
    on_both(patient(), |mut rig| {
        rig.answers(PathState::Cut);
        let [near, far] = &mut rig.ends;
        far.put(0, b"response");
        let (scatter, payload) = (vec![near.data(0, 8)], gather(&[near.data(0, 8)]));
        let fenced = CtrlFlags::new(FenceMode::SmallAndFence, CqUpdate::Always, false);
        near.qp.post(CtrlFlags::SIGNALED, Request::Read { remote: far.remote(0), scatter }).unwrap();
        near.qp.post(fenced, write(far.remote(100), payload)).unwrap();
        rig.pass(3 * ACK_TIMEOUT / 2);
        assert_eq!(rig.ends[1].get(100, 8), [0; 8], "not before the read's result is here");
        rig.answers(PathState::Up);
        rig.pass(2 * ACK_TIMEOUT);
        assert_eq!(rig.ends[1].get(100, 8), b"response");
    });
}
