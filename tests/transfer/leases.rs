//! Leases on the way of a request, and a data path that never waits for the store.

use std::sync::Arc;
use std::time::Duration;

use ibex::transfer::{Requester, TransferError};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::name::Prefix;
use ibex_metadata::refresh::{Reader, Refresher};
use ibex_metadata::url::StoreUrl;

use crate::rig::{End, Over, PATIENCE, Rig, Server, TTL, name, open, outcomes, with_guard, write};

#[test]
fn a_lease_that_runs_out_fails_its_own_requests_before_and_after_they_are_posted() {
    let clock = Clock::manual();
    let store = Blocking::open(&StoreUrl::Memory, clock.clone(), PATIENCE).unwrap();
    let rig = Rig::new(&store, Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let work: Vec<_> = (0..6).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let batch = rig.near.requester.submit(guard, &work, TTL * 9).unwrap();
        clock.advance(TTL);
        rig.settle();
        let fence = guard.stamp().fence;
        let expired = Err(TransferError::Store(StoreError::LeaseExpired { fence }));
        assert_eq!(outcomes(batch.wait()), vec![expired.clone(); 6]);
        assert_eq!(rig.near.requester.counters().posted, 4, "what waited was not posted any more");
        let late = rig.near.requester.submit(guard, &work, PATIENCE).map(|_| 0);
        assert_eq!(late, expired);
    });
}

#[test]
fn a_lease_that_was_renewed_in_time_covers_the_whole_use() {
    let clock = Clock::manual();
    let store = Blocking::open(&StoreUrl::Memory, clock.clone(), PATIENCE).unwrap();
    let rig = Rig::new(&store, Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let work: Vec<_> = (0..6).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let batch = rig.near.requester.submit(guard, &work, TTL * 9).unwrap();
        clock.advance(TTL / 2);
        store.renew(rig.far.publisher.hold()).unwrap();
        rig.near.look("far");
        clock.advance(TTL * 3 / 4);
        rig.settle();
        assert_eq!(outcomes(batch.wait()), vec![Ok(64); 6]);
    });
}

#[test]
fn a_deadline_ends_the_wait_and_not_the_memory() {
    let clock = Clock::manual();
    let store = Blocking::open(&StoreUrl::Memory, clock.clone(), PATIENCE).unwrap();
    let rig = Rig::new(&store, Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    here.view().fill(7);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let work: Vec<_> = (0..6).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let budget = TTL / 4;
        let batch = rig.near.requester.submit(guard, &work, budget).unwrap();
        drop(here);
        clock.advance(budget);
        let reports = batch.wait();
        assert!(reports[..4].iter().all(|report| !report.is_quiescent), "{reports:?}");
        assert!(reports[4..].iter().all(|report| report.is_quiescent), "{reports:?}");
        assert!(reports.iter().any(|report| report.outcome == Err(TransferError::Deadline { budget })));
        rig.settle();
        assert!(batch.is_quiescent());
        assert_eq!(there.view().to_vec(0, 384), [[7; 256].as_slice(), &[0; 128]].concat());
        assert!(batch.wait().iter().all(|report| report.outcome.is_err()), "the first outcome is kept");
    });
}

#[test]
fn a_refresher_sees_changes_registers_and_retires_before_anybody_asks() {
    let store = open("memory:");
    let rig = Rig::new(&store, Over::Inproc);
    let there = rig.far.region();
    rig.far.offer(&there);
    let refresher = follow(&store, &rig.near);
    refresher.track(&name("far"));
    until("a lease", || refresher.latest(&name("far")).is_some());
    with_guard(&rig.near, "far", |guard| rig.near.requester.open(guard, there.id()).map(|_| ()).unwrap());
    let stamp = rig.far.publish(|record| record.buffers.clear());
    until("the new record", || rig.near.requester.known(&name("far")) == Some(stamp));
    assert_eq!(rig.near.requester.counters().derived.retired.total(), 1);
    until("the registration", || refresher.is_registered(&name("far"), stamp));
    let readers = store.readers(&name("far")).unwrap();
    assert_eq!((readers.len(), readers[0].stamp), (1, stamp));
}

/// Somebody else's store, which the test can stop.
#[test]
fn with_the_store_gone_leases_carry_the_data_path_on() {
    let mut server = Server::start();
    let store = open(&server.url);
    let rig = Rig::new(&store, Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    let refresher = follow(&store, &rig.near);
    refresher.track(&name("far"));
    until("a lease", || refresher.latest(&name("far")).is_some());
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        server.kill();
        let before = refresher.counters();
        let away = std::time::Instant::now();
        while away.elapsed() < Duration::from_secs(2) {
            let batch = rig.near.requester.submit(guard, &[write(&here, &segment, 0, 64)], PATIENCE).unwrap();
            rig.settle();
            assert_eq!(outcomes(batch.wait()), [Ok(64)]);
            refresher.force(&name("far"));
        }
        let after = refresher.counters();
        let (asked, followed) = (after.batches - before.batches, after.follows - before.follows);
        assert!((1..40).contains(&asked), "{asked} batches in two seconds of ceaseless wishes");
        assert!((1..40).contains(&followed), "{followed} watches");
        assert!(refresher.latest(&name("far")).is_some(), "the outage ended nobody's lease");
    });
}

fn follow(store: &Blocking, end: &End) -> Refresher {
    let observer: Arc<Requester> = Arc::clone(&end.requester);
    let reader = Reader { instance: end.publisher.hold().instance, ttl: TTL };
    store.refresh(Prefix::parse("c/g").unwrap(), observer, Some(reader))
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}
