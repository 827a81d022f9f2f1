//! Taking registered memory back in two phases, on real keys.

use std::sync::Arc;
use std::time::Duration;

use ibex::transfer::{Region, TransferError};
use ibex_metadata::drain::{Deregistration, Quarantine, Stage};
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{InstanceId, Stamp};
use ibex_metadata::record::BufferState;
use ibex_metadata::store::{Ack, Claim};

use crate::rig::{End, Over, PATIENCE, Rig, TTL, name, open, outcomes, with_guard, write};

fn ack(end: &End, of: &str, stamp: Stamp) {
    let reader = end.publisher.hold().instance;
    end.store.ack(&Ack { name: name(of), reader, stamp, ttl: TTL }).unwrap();
}

fn deregister(end: &End, region: Region, quarantine: &Arc<Quarantine>, budget: Duration) -> Deregistration {
    end.store.deregister(&end.publisher, vec![Box::new(region)], quarantine, budget).unwrap()
}

fn buffer_states(end: &End) -> Vec<BufferState> {
    let snapshot = end.store.get(&end.publisher.hold().name).unwrap();
    snapshot.unchecked().record.buffers.iter().map(|buffer| buffer.state).collect()
}

#[test]
fn readers_let_go_then_access_ends_then_the_record_forgets() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there, kept) = (rig.near.region(), rig.far.region(), rig.far.region());
    rig.far.offer(&kept);
    let offered = rig.far.offer(&there);
    ack(&rig.near, "far", offered);
    here.view().fill(7);
    with_guard(&rig.near, "far", |guard| {
        let segments = [&there, &kept].map(|region| rig.near.requester.open(guard, region.id()).unwrap());
        let quarantine = Arc::default();
        let taking = deregister(&rig.far, there, &quarantine, PATIENCE);
        assert_eq!(buffer_states(&rig.far), [BufferState::Ready, BufferState::Draining]);
        let still = rig.far.store.deregistered(&taking, Duration::from_millis(50));
        assert_eq!(still, Stage::Draining { in_flight: 0, readers: Some(1) }, "a reader has not let go");

        // While it drains, what readers still do works.
        let submit =
            |at| rig.near.requester.submit(guard, &[write(&here, &segments[0], at, 64)], PATIENCE).unwrap();
        let batch = submit(0);
        rig.settle();
        assert_eq!(outcomes(batch.wait()), [Ok(64)]);

        // The reader says that it let go, and does not keep its word.
        ack(&rig.near, "far", taking.stamp());
        let removed = Stage::Removed { unpublished: None };
        assert_eq!(rig.far.store.deregistered(&taking, PATIENCE), removed);
        assert_eq!(buffer_states(&rig.far), [BufferState::Ready]);
        let written = rig.far.device.counters().bytes_written;
        let batch = submit(64);
        rig.settle();
        let reports = outcomes(batch.wait());
        let is_refused = |report| matches!(report, Err(TransferError::Completion { syndrome: 0x13, .. }));
        assert!(reports.into_iter().all(is_refused));
        assert_eq!(rig.far.device.counters().bytes_written, written, "no byte changed");
        assert_eq!((rig.refusals(), quarantine.len()), (1, 0));
        assert_eq!(kept.view().to_vec(0, 128), [0; 128]);
    });
}

#[test]
fn a_reader_that_fell_silent_is_waited_for_as_long_as_it_registered() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let there = rig.far.region();
    let stamp = rig.far.offer(&there);
    let reader = InstanceId::new(9).unwrap();
    let ttl = Duration::from_millis(300);
    rig.far.store.ack(&Ack { name: name("far"), reader, stamp, ttl }).unwrap();
    let quarantine = Arc::default();
    let taking = deregister(&rig.far, there, &quarantine, PATIENCE);
    assert_eq!(rig.far.store.deregistered(&taking, PATIENCE), Stage::Removed { unpublished: None });
    assert_eq!(rig.far.store.readers(&name("far")).unwrap(), []);
}

#[test]
fn own_requests_in_flight_are_waited_for_and_a_deadline_pins_the_memory() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    rig.near.offer(&here);
    here.view().write(0, b"still on its way");
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let batch = rig.near.requester.submit(guard, &[write(&here, &segment, 0, 16)], PATIENCE).unwrap();
        let quarantine = Arc::default();
        let id = here.id();
        let taking = deregister(&rig.near, here, &quarantine, Duration::from_millis(50));
        let stuck = Stage::Quarantined { in_flight: 1, readers: Some(0), refused: false };
        assert_eq!(rig.near.store.deregistered(&taking, PATIENCE), stuck);
        assert_eq!((quarantine.ids(), quarantine.sweep()), (vec![id], 0), "counted, reported and not freed");
        rig.settle();
        assert_eq!(outcomes(batch.wait()), [Ok(16)], "the memory was there to the end");
        assert_eq!(there.view().to_vec(0, 16), b"still on its way");
        assert_eq!((quarantine.sweep(), quarantine.len()), (1, 0));
    });
}

#[test]
fn dropping_the_handle_frees_nothing_early() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    let stamp = rig.far.offer(&there);
    ack(&rig.near, "far", stamp);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let quarantine = Arc::default();
        drop(deregister(&rig.far, there, &quarantine, PATIENCE));
        std::thread::sleep(Duration::from_millis(50));
        let batch = rig.near.requester.submit(guard, &[write(&here, &segment, 0, 64)], PATIENCE).unwrap();
        rig.settle();
        assert_eq!(outcomes(batch.wait()), [Ok(64)], "the key is as good as before");
        assert_eq!(buffer_states(&rig.far), [BufferState::Draining]);
    });
}

#[test]
fn a_refused_publish_leaves_the_buffer_as_it_was() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let instance = InstanceId::new(7).unwrap();
        let claim = Claim { name: name("far"), instance, ttl: TTL, takeover: true };
        rig.far.store.claim(&claim).unwrap();
        let quarantine = Arc::default();
        let store = &rig.far.store;
        let refused = store.deregister(&rig.far.publisher, vec![Box::new(there)], &quarantine, PATIENCE);
        let (error, buffers) = refused.map(|_| ()).unwrap_err();
        assert!(matches!(error, StoreError::Fenced { .. }), "{error}");
        assert_eq!((buffers.len(), quarantine.len()), (1, 0));
        let batch = rig.near.requester.submit(guard, &[write(&here, &segment, 0, 64)], PATIENCE).unwrap();
        rig.settle();
        assert_eq!(outcomes(batch.wait()), [Ok(64)]);
        assert!(buffers[0].revoke());
    });
}

#[test]
fn a_range_registered_again_while_it_drains_is_another_buffer() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let there = rig.far.region();
    let stamp = rig.far.offer(&there);
    ack(&rig.near, "far", stamp);
    let (mut again, draining) = (there.describe(ibex_metadata::record::BufferKind::Kv), there.id());
    let quarantine = Arc::default();
    let taking = deregister(&rig.far, there, &quarantine, PATIENCE);
    let other = rig.far.region();
    again.buffer_id = other.id();
    assert_ne!(other.id(), draining);
    rig.far.publish(|record| record.buffers.push(again));
    assert_eq!(buffer_states(&rig.far), [BufferState::Draining, BufferState::Ready]);
    ack(&rig.near, "far", taking.stamp());
    assert_eq!(rig.far.store.deregistered(&taking, PATIENCE), Stage::Removed { unpublished: None });
    assert_eq!(buffer_states(&rig.far), [BufferState::Ready], "the removal spares the new one");
}
