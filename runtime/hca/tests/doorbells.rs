//! Strict doorbells: a WQE runs only once its doorbell was rung, and every departure is counted.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::sync::atomic::Ordering;

use ibex_abi::doorbell::Doorbell;
use ibex_abi::wqe::CtrlFlags;
use ibex_hca::emulated::Doorbells;
use rig::{Rig, Setup, inline, rig, write};

fn by_record() -> Setup {
    Setup { doorbells: Doorbells::Record, ..Setup::default() }
}

/// Publishes one write in the record and forgets the doorbell.
fn post_without_ringing(rig: &mut Rig) {
    let [near, far] = &mut rig.ends;
    let mut batch = near.qp.batch();
    batch.push(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[9; 8]))).unwrap();
    drop(batch.commit());
}

#[test]
fn a_record_without_a_doorbell_never_runs_and_is_counted() {
    let mut rig = rig(Setup::default());
    post_without_ringing(&mut rig);
    rig.pass(10_000_000);
    assert_eq!(rig.ends[0].qp.poll(), None);
    assert_eq!(rig.ends[1].get(0, 8), [0; 8]);
    assert_eq!(rig.ends[0].device.counters().unrung_wqes, 0, "not yet known to be forgotten");
    assert_eq!(rig.ends[0].device.check_unrung(), 1);
    assert_eq!(rig.ends[0].device.counters().unrung_wqes, 1);
    assert_eq!(rig.ends[1].device.check_unrung(), 0);
}

#[test]
fn a_doorbell_that_was_rung_leaves_nothing_to_count() {
    let mut rig = rig(Setup::default());
    let [near, far] = &mut rig.ends;
    for _ in 0..10 {
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[9; 8]))).unwrap();
    }
    // Not even before the device has looked.
    assert_eq!(near.device.check_unrung(), 0);
    rig.settle();
    assert_eq!(rig.ends[0].device.check_unrung(), 0);
    let counters = rig.ends[0].device.counters();
    assert_eq!((counters.unrung_wqes, counters.late_doorbells, counters.wqes), (0, 0, 10));
}

#[test]
fn a_doorbell_before_its_record_is_counted_and_waits_for_it() {
    let mut rig = rig(Setup::default());
    let qpn = rig.ends[0].qp.qpn();
    rig.ends[0].qp.store_doorbell(Doorbell::of_producer_idx(1, qpn));
    rig.settle();
    assert_eq!(rig.ends[0].device.counters().unrung_wqes, 1);
    post_without_ringing(&mut rig);
    rig.settle();
    assert!(rig.ends[0].qp.poll().is_some(), "the record caught up");
    assert_eq!(rig.ends[0].device.counters().unrung_wqes, 1);
}

#[test]
fn a_doorbell_covers_no_more_than_its_value() {
    let mut rig = rig(Setup::default());
    let qpn = rig.ends[0].qp.qpn();
    for _ in 0..3 {
        post_without_ringing(&mut rig);
    }
    rig.ends[0].qp.store_doorbell(Doorbell::of_producer_idx(2, qpn));
    rig.settle();
    assert_eq!(rig.ends[0].device.counters().wqes, 2);
    assert_eq!(rig.ends[0].device.check_unrung(), 1);
}

#[test]
fn a_late_doorbell_for_an_old_number_is_ignored_and_counted() {
    let rig = rig(Setup::default());
    let old = rig.ends[0].qp.qpn();
    let [near, far] = rig.ends;
    let fresh = near.qp.reset().unwrap().renew().unwrap();
    assert_ne!(fresh.qpn(), old);
    let spec = Setup::default().connect;
    let remote = far.qp.endpoint(spec.psn);
    let mut qp = fresh.connect(&remote, &spec).unwrap();
    qp.store_doorbell(Doorbell::of_producer_idx(7, old));
    near.device.step(rig.now);
    let counters = near.device.counters();
    assert_eq!((counters.late_doorbells, counters.wqes, counters.unrung_wqes), (1, 0, 0));
    // The new one is not disturbed.
    qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
    near.device.step(rig.now);
    assert_eq!(near.device.counters().wqes, 1);
}

#[test]
fn a_doorbell_that_nobody_owns_any_more_is_counted() {
    let mut rig = rig(Setup::default());
    let qpn = rig.ends[0].qp.qpn();
    let [near, _far] = rig.ends;
    // In RST a queue pair takes no doorbell; its page stays mapped.
    let reset = near.qp.reset().unwrap();
    reset.store_doorbell(Doorbell::of_producer_idx(3, qpn));
    near.device.step(rig.now);
    assert_eq!(near.device.counters().late_doorbells, 1);
    rig.now = rig.now.plus(1);
    drop(reset);
    near.device.step(rig.now);
    assert_eq!(near.device.counters().late_doorbells, 1, "once");
}

#[test]
fn a_device_driven_by_records_needs_no_doorbell() {
    let mut rig = rig(by_record());
    post_without_ringing(&mut rig);
    rig.settle();
    assert!(rig.ends[0].qp.poll().is_some());
    assert_eq!(rig.ends[0].device.check_unrung(), 0);
    let counters = rig.ends[0].device.counters();
    assert_eq!((counters.unrung_wqes, counters.doorbells), (0, 0));
}

#[test]
fn both_doorbell_forms_and_both_register_halves_are_heard() {
    let mut rig = rig(Setup::default());
    // `post` uses the form of libmlx5.
    let [near, far] = &mut rig.ends;
    near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
    rig.settle();
    assert!(rig.ends[0].qp.poll().is_some());
    post_without_ringing(&mut rig);
    let qpn = rig.ends[0].qp.qpn();
    rig.ends[0].qp.store_doorbell(Doorbell::of_producer_idx(2, qpn));
    rig.settle();
    assert!(rig.ends[0].qp.poll().is_some());
}

#[test]
fn a_record_that_goes_backwards_runs_nothing() {
    let mut rig = rig(by_record());
    let [near, far] = &mut rig.ends;
    near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
    rig.settle();
    let record = rig.ends[0].qp.record().view().unwrap();
    record.word32(4).store(0, Ordering::Release);
    rig.settle();
    assert_eq!(rig.ends[0].device.counters().wqes, 1);
}
