//! Event queues: completions that were asked for, failures, wrap-around, overflow, refusals.
//!
//! A device that leaves event queues to its kernel driver answers `BAD_OP`; then there is nothing to hold it to.

use ibex_abi::eqe::{CQ_OVERRUN, Event, EventType};
use ibex_abi::prm::Status;
use ibex_abi::types::{Eqn, UarIdx};
use ibex_abi::wqe::{CqUpdate, CtrlFlags, FenceMode};

use super::{BAD_KEY, End, PATIENCE_NS, Rig, SIGNALED, World, connect, inline, write};
use crate::control_region::ControlError;
use crate::host_eq::HostEq;
use crate::host_qp::{CqShape, HostQpSpec};
use crate::objects::{self, EqSpec};
use crate::{Access, AsyncEvent, HcaError};

/// A completion that tells of itself, armed or not.
const WITH_EVENT: CtrlFlags = CtrlFlags::new(FenceMode::None, CqUpdate::AlwaysWithEqe, false);

fn ends(world: &dyn World) -> [End; 2] {
    [0, 1].map(|end| End::new(world.hca(end), Access::ALL))
}

/// An event queue, unless the device has none to give.
fn event_queue(end: &End, log_size: u8, events: &[EventType]) -> Option<HostEq> {
    match HostEq::create(&end.region, log_size, events) {
        Ok(eq) => Some(eq),
        Err(ControlError::Hca(HcaError::Command(refusal))) if refusal.status == Status::BadOp => None,
        Err(error) => panic!("an event queue: {error}"),
    }
}

/// Connects the ends; sends of the first complete in a ring that tells `eq` of itself.
fn connect_with(ends: &mut [End; 2], eq: &HostEq, log_size: u8) {
    let send_cq = CqShape::Ring { log_size, overrun_ignore: false };
    let near =
        Rig { qp: HostQpSpec { send_cq, eqn: Some(eq.eqn()), ..HostQpSpec::default() }, ..Rig::default() };
    connect(ends, [near, Rig::default()]);
}

fn next(eq: &mut HostEq) -> Option<Event> {
    eq.poll().expect("a known event")
}

fn post(ends: &mut [End; 2], flags: CtrlFlags) {
    let request = write(ends[1].remote(0), inline(&[1; 8]));
    ends[0].qp().post(flags, request).expect("room");
}

fn status(error: &HcaError) -> Status {
    match error {
        HcaError::Command(refusal) => refusal.status,
        other => panic!("not a refusal: {other}"),
    }
}

pub(super) fn an_armed_queue_tells_of_one_completion(world: &mut dyn World) {
    let mut ends = ends(world);
    let Some(mut eq) = event_queue(&ends[0], 4, &[]) else { return };
    connect_with(&mut ends, &eq, 4);
    let told = Event::Completion(ends[0].qp().send_cq().num());
    post(&mut ends, SIGNALED);
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), None, "nobody asked");
    ends[0].qp().arm(0, false);
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), Some(told), "the completion is there and was not taken");
    ends[0].good();
    ends[0].qp().arm(1, false);
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), None, "nothing has completed since");
    for _ in 0..2 {
        post(&mut ends, SIGNALED);
    }
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), Some(told));
    assert_eq!(next(&mut eq), None, "one request is one event");
    ends[0].good();
    ends[0].qp().arm(1, false);
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), None, "a request with an old number was answered already");
    ends[0].qp().arm(2, false);
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), Some(told));
    ends[0].qp = None;
    eq.destroy().expect("nobody uses it");
}

pub(super) fn a_request_for_solicited_completions_waits_for_one_or_an_error(world: &mut dyn World) {
    let mut ends = ends(world);
    let Some(mut eq) = event_queue(&ends[0], 4, &[]) else { return };
    connect_with(&mut ends, &eq, 4);
    let told = Event::Completion(ends[0].qp().send_cq().num());
    ends[0].qp().arm(0, true);
    post(&mut ends, SIGNALED);
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), None, "a send completion is not solicited");
    let mut bad = ends[1].remote(0);
    bad.rkey = BAD_KEY;
    ends[0].qp().post(SIGNALED, write(bad, inline(&[1; 8]))).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), Some(told), "an error is");
    ends[0].qp = None;
}

pub(super) fn an_event_queue_wraps_and_overflows(world: &mut dyn World) {
    let mut ends = ends(world);
    let Some(mut eq) = event_queue(&ends[0], 1, &[]) else { return };
    connect_with(&mut ends, &eq, 6);
    let told = Event::Completion(ends[0].qp().send_cq().num());
    for round in 0..9 {
        post(&mut ends, WITH_EVENT);
        world.settle(PATIENCE_NS);
        ends[0].good();
        assert_eq!(next(&mut eq), Some(told), "round {round}");
        assert_eq!(next(&mut eq), None, "round {round}");
        eq.update(round % 2 == 1);
        let info = eq.query().expect("it exists");
        assert_eq!((info.producer, info.consumer, info.is_armed), (round + 1, round + 1, round % 2 == 1));
    }
    for _ in 0..3 {
        post(&mut ends, WITH_EVENT);
    }
    world.settle(PATIENCE_NS);
    let info = eq.query().expect("it exists");
    assert!(info.overflowed, "two entries hold no three events: {info:?}");
    assert_eq!([next(&mut eq), next(&mut eq), next(&mut eq)], [Some(told), Some(told), None]);
    eq.update(false);
    post(&mut ends, WITH_EVENT);
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut eq), None, "it takes nothing more");
    ends[0].qp = None;
}

pub(super) fn failures_arrive_as_events(world: &mut dyn World) {
    let mut ends = ends(world);
    let types = [EventType::CqError, EventType::QpFatal, EventType::QpAccessError];
    let Some(mut near) = event_queue(&ends[0], 4, &types) else { return };
    let Some(mut far) = event_queue(&ends[1], 4, &types) else { return };
    let Some(mut deaf) = event_queue(&ends[0], 4, &[EventType::QpRequestError]) else { return };
    connect_with(&mut ends, &near, 1);
    for _ in 0..3 {
        post(&mut ends, SIGNALED);
    }
    world.settle(PATIENCE_NS);
    let (cqn, qpn) = (ends[0].qp().send_cq().num(), ends[0].qp().qpn());
    assert_eq!(next(&mut near), Some(Event::CqError(cqn, CQ_OVERRUN)));
    assert_eq!(next(&mut near), Some(Event::QpFatal(qpn)));
    assert_eq!((next(&mut near), next(&mut deaf)), (None, None));
    // Whoever polls the device is told as well.
    assert_eq!(ends[0].hca.poll_async_event(), Some(AsyncEvent::CqError { cqn }));
    connect_with(&mut ends, &near, 4);
    let mut bad = ends[1].remote(0);
    bad.rkey = BAD_KEY;
    ends[0].qp().post(SIGNALED, write(bad, inline(&[1; 8]))).expect("room");
    world.settle(PATIENCE_NS);
    assert_eq!(next(&mut far), Some(Event::QpAccessError(ends[1].qp().qpn())));
    ends.iter_mut().for_each(|end| end.qp = None);
}

pub(super) fn event_queues_are_refused_and_kept_by_rule(world: &mut dyn World) {
    let mut ends = ends(world);
    let Some(mut eq) = event_queue(&ends[0], 2, &[]) else { return };
    let hca = ends[0].hca.clone();
    let ring = ends[0].region.carve(4096, 4096).expect("room");
    let page = hca.alloc_doorbell().expect("a doorbell page");
    let valid = EqSpec { uar: page.uar, log_size: 2, addr: ring.addr(), events: 0 };
    for (spec, expected) in [
        (EqSpec { log_size: 0, ..valid }, Status::BadParam),
        (EqSpec { log_size: 23, ..valid }, Status::BadParam),
        (EqSpec { addr: 0x1000, ..valid }, Status::BadParam),
        (EqSpec { addr: !0xfff, ..valid }, Status::BadParam),
        (EqSpec { uar: UarIdx::new(0xffff), ..valid }, Status::BadRes),
    ] {
        let refused = objects::create_eq(&*hca, &spec).expect_err("bad");
        assert_eq!(status(&refused), expected, "{spec:?}");
    }
    let made = objects::create_eq(&*hca, &valid).expect("valid");
    assert_eq!(status(&hca.free_doorbell(page).expect_err("in use")), Status::ResBusy);
    objects::destroy_eq(&*hca, made).expect("unused");
    hca.free_doorbell(page).expect("unused");
    for gone in [made, Eqn::new(0xff)] {
        assert_eq!(status(&objects::destroy_eq(&*hca, gone).expect_err("gone")), Status::BadRes);
        assert_eq!(status(&objects::query_eq(&*hca, gone).expect_err("gone")), Status::BadRes);
    }
    connect_with(&mut ends, &eq, 4);
    assert_eq!(status(&eq.destroy().expect_err("a completion queue names it")), Status::ResBusy);
    ends[0].qp = None;
    eq.destroy().expect("nobody names it");
}
