//! Rings: wrap-around, owner bits, overrun, reuse of memory.

use ibex_abi::cqe::Syndrome;
use ibex_abi::wqe::{CtrlFlags, Request};

use super::{PATIENCE_NS, PSN, Rig, SIGNALED, World, connect, connected, inline, pattern, write};
use crate::AsyncEvent;
use crate::host_qp::{ConnectSpec, CqShape, HostQpSpec};

fn small_queue(log_sq_size: u8, send_cq: CqShape) -> Rig {
    Rig { qp: HostQpSpec { log_sq_size, send_cq, ..HostQpSpec::default() }, ..Rig::default() }
}

pub(super) fn a_queue_of_four_blocks_wraps_past_2_to_the_16(world: &mut dyn World) {
    let [mut near, far] = connected(world, small_queue(2, CqShape::Collapsed));
    let total = (1_u64 << 16) + 100;
    let mut posted = 0_u64;
    while posted < total {
        let mut batch = near.qp().batch();
        for last in [false, false, true] {
            let flags = if last { SIGNALED } else { CtrlFlags::UNSIGNALED };
            let request = write(far.remote((posted % 16) * 8), inline(&posted.to_ne_bytes()));
            let idx = batch.push(flags, request).expect("the queue was drained");
            assert_eq!(u64::from(idx), posted & 0xffff);
            posted += 1;
        }
        batch.commit().ring();
        world.settle(PATIENCE_NS);
        let completion = near.good();
        assert_eq!(u64::from(completion.wqe_counter), (posted - 1) & 0xffff);
        let newest = far.get(((posted - 1) % 16) * 8, 8);
        assert_eq!(newest, (posted - 1).to_ne_bytes());
    }
}

pub(super) fn a_long_entry_wraps_at_the_end_of_the_queue(world: &mut dyn World) {
    let [mut near, far] = connected(world, small_queue(4, CqShape::Collapsed));
    // Lengths whose entries take 1 to 15 of the 16 blocks, so that every cut occurs.
    for round in 0..200_usize {
        let len = 1 + (round * 61) % 900;
        let bytes = pattern(round.to_le_bytes()[0], len);
        near.qp().post(SIGNALED, write(far.remote(0), inline(&bytes))).expect("the queue is empty");
        world.settle(PATIENCE_NS);
        near.good();
        assert_eq!(far.get(0, len as u64), bytes, "round {round}, {len} bytes");
    }
}

pub(super) fn a_ring_cq_shows_every_completion_with_its_owner_bit(world: &mut dyn World) {
    let ring = CqShape::Ring { log_size: 2, overrun_ignore: false };
    let [mut near, far] = connected(world, small_queue(3, ring));
    for round in 0..20_u16 {
        for _ in 0..3 {
            near.qp().post(SIGNALED, write(far.remote(0), inline(&[1; 8]))).expect("room");
        }
        world.settle(PATIENCE_NS);
        for nth in 0..3 {
            assert_eq!(near.good().wqe_counter, round * 3 + nth);
        }
        assert_eq!(near.qp().poll(), None, "no completion twice");
    }
}

pub(super) fn an_overrun_fails_the_queue_and_its_user(world: &mut dyn World) {
    let ring = CqShape::Ring { log_size: 1, overrun_ignore: false };
    let [mut near, far] = connected(world, small_queue(4, ring));
    for _ in 0..3 {
        near.qp().post(SIGNALED, write(far.remote(0), inline(&[1; 8]))).expect("room");
    }
    world.settle(PATIENCE_NS);
    let (cqn, qpn) = (near.qp().send_cq().num(), near.qp().qpn());
    if world.tells_of_failures() {
        assert_eq!(near.hca.poll_async_event(), Some(AsyncEvent::CqError { cqn }));
        assert_eq!(near.hca.poll_async_event(), Some(AsyncEvent::QpFatal { qpn }));
    }
    let info = near.qp().query().expect("the queue pair still exists");
    assert_eq!(info.state, ibex_abi::types::QpState::Err);
    assert_eq!((near.good().wqe_counter, near.good().wqe_counter), (0, 1));
    assert_eq!(near.qp().poll(), None, "an overrun queue takes nothing more");
}

pub(super) fn an_overrun_is_ignored_where_asked(world: &mut dyn World) {
    let ring = CqShape::Ring { log_size: 1, overrun_ignore: true };
    let [mut near, far] = connected(world, small_queue(4, ring));
    for _ in 0..5 {
        near.qp().post(SIGNALED, write(far.remote(0), inline(&[1; 8]))).expect("room");
    }
    world.settle(PATIENCE_NS);
    assert_eq!(near.hca.poll_async_event(), None);
    let info = near.qp().query().expect("the queue pair exists");
    assert_eq!(info.state, ibex_abi::types::QpState::Rts);
}

pub(super) fn a_collapsed_cq_shows_the_latest_completion(world: &mut dyn World) {
    let [mut near, far] = connected(world, Rig::default());
    for _ in 0..5 {
        near.qp().post(SIGNALED, write(far.remote(0), inline(&[1; 8]))).expect("room");
    }
    world.settle(PATIENCE_NS);
    assert_eq!(near.good().wqe_counter, 4);
    assert_eq!(near.qp().poll(), None);
    // Errors too: a flush overwrites the error that caused it.
    let mut bad = far.remote(0);
    bad.rkey = super::BAD_KEY;
    near.qp().post(SIGNALED, write(bad, inline(&[1; 8]))).expect("room");
    near.qp().post(SIGNALED, Request::Nop { body: Vec::new() }).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(near.failed(Syndrome::WR_FLUSH).wqe_counter, 6);
}

pub(super) fn reset_and_renewal_reuse_the_same_memory(world: &mut dyn World) {
    let mut ends = connected(world, small_queue(2, CqShape::Collapsed));
    for round in 0..6_u8 {
        let remote = ends[1].remote(0);
        for nth in 0..round + 1 {
            let request = write(remote, inline(&[round, nth, 3, 4, 5, 6, 7, 8]));
            ends[0].qp().post(SIGNALED, request).expect("room");
            world.settle(PATIENCE_NS);
            ends[0].good();
        }
        assert_eq!(ends[1].get(0, 2), [round, round]);
        let places = [0, 1].map(|end: usize| ends[end].qp().rings().place());
        let numbers = [0, 1].map(|end: usize| ends[end].qp().qpn());
        let fresh = [0, 1].map(|end: usize| {
            let old = ends[end].qp.take().expect("connected").reset().expect("reset");
            if round % 2 == 0 { old.renew().expect("renewal") } else { old }
        });
        for (end, qp) in fresh.iter().enumerate() {
            assert_eq!(qp.rings().place(), places[end], "the same memory");
            assert_eq!(qp.qpn() == numbers[end], round % 2 == 1, "a new number only when renewed");
        }
        let endpoints = [0, 1].map(|end: usize| fresh[end].endpoint(PSN[end]));
        for (end, qp) in fresh.into_iter().enumerate() {
            let spec = ConnectSpec { psn: PSN[end], ..ConnectSpec::default() };
            ends[end].qp = Some(qp.connect(&endpoints[1 - end], &spec).expect("reconnection"));
        }
    }
    for end in &mut ends {
        end.qp = None;
    }
    connect(&mut ends, [Rig::default(); 2]);
}
