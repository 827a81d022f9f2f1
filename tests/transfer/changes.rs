//! Records that change while requests wait or are posted: each row of the change table, on real keys.

use std::sync::Arc;

use ibex::transfer::{Request, TransferError, Verb};
use ibex_abi::cqe::Syndrome;
use ibex_abi::types::QpNum;
use ibex_hca::{Access, Nanos};
use ibex_metadata::derived::Kind;
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::Fence;
use ibex_metadata::record::BufferState;
use ibex_metadata::refresh::Observer;
use ibex_metadata::store::Snapshot;

use crate::rig::{End, LEN, Over, PATIENCE, Rig, Server, devices, name, open, outcomes, with_guard, write};

#[test]
fn bytes_go_both_ways_over_every_fabric() {
    for over in [Over::Inproc, Over::Shm, Over::Udp] {
        println!("over {over:?}");
        let rig = Rig::new(&open("memory:"), over);
        let (here, there) = (rig.near.region(), rig.far.region());
        rig.far.offer(&there);
        here.view().write(0, b"to be written");
        there.view().write(4096, b"to be read");
        with_guard(&rig.near, "far", |guard| {
            let segment = rig.near.requester.open(guard, there.id()).unwrap();
            let read = Request {
                verb: Verb::Read,
                local: &here,
                local_offset: 8192,
                segment: &segment,
                remote_offset: 4096,
                len: 10,
            };
            let work = [write(&here, &segment, 0, 13), read];
            let batch = rig.near.requester.submit(guard, &work, PATIENCE).unwrap();
            assert!(!batch.is_done());
            while !batch.is_done() {
                rig.step();
                rig.near.requester.progress();
            }
            assert_eq!(outcomes(batch.wait()), [Ok(13), Ok(10)]);
        });
        assert_eq!(there.view().to_vec(0, 13), b"to be written");
        assert_eq!(here.view().to_vec(8192, 10), b"to be read");
        assert_eq!(rig.refusals(), 0);
    }
}

/// The far end does not know yet that it is to connect: what is posted now would meet nobody.
#[test]
fn the_first_request_waits_until_the_peer_has_made_its_end() {
    let store = open("memory:");
    let [one, other] = devices(Over::Inproc);
    let (near, far) = (End::new(&store, &one, "near", 1, 0), End::new(&store, &other, "far", 2, 1));
    let (here, there) = (near.region(), far.region());
    near.publish(|_| {});
    far.offer(&there);
    near.look("far");
    let rig = Rig { near, far };
    here.view().write(0, b"first");
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let batch = rig.near.requester.submit(guard, &[write(&here, &segment, 0, 5)], PATIENCE).unwrap();
        rig.settle();
        assert_eq!(rig.near.requester.counters().posted, 0, "linked here, and there is nobody yet");
        assert!(!batch.is_done() && !rig.near.requester.greet(&name("far")));
        rig.far.look("near");
        while !batch.is_done() {
            rig.step();
            rig.near.requester.progress();
            // A greeting that nobody answered in time costs a number.
            if !rig.near.requester.take_failed().is_empty() {
                rig.near.publish(|_| {});
                rig.far.look("near");
            }
        }
        assert_eq!(outcomes(batch.wait()), [Ok(5)]);
    });
    assert_eq!(there.view().to_vec(0, 5), b"first");
    assert_eq!((rig.near.requester.counters().posted, rig.refusals()), (1, 0));
}

/// Four requests fit the queue; the others wait while the record changes, and must find the new key.
#[test]
fn waiting_requests_are_posted_with_the_new_key_only() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, before) = (rig.near.region(), rig.far.region());
    rig.far.offer(&before);
    here.view().fill(7);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, before.id()).unwrap();
        let work: Vec<_> = (0..16).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let batch = rig.near.requester.submit(guard, &work, PATIENCE).unwrap();
        assert_eq!(rig.near.requester.counters().posted, 4, "the device stands still");

        let after = rig.far.requester.register_as(before.id(), LEN, Access::ALL).unwrap();
        let links = rig.near.requester.counters().links;
        rig.far.offer(&after);
        rig.near.look("far");
        rig.settle();
        assert_eq!(outcomes(batch.wait()), vec![Ok(64); 16]);

        let counters = rig.near.requester.counters();
        assert_eq!((counters.posted, counters.re_resolved), (16, 12));
        assert_eq!(counters.links, links, "changed buffers keep queue pairs");
        assert_eq!(counters.derived.retired.of(Kind::Rkey), 1);
        assert_eq!(counters.derived.retired.of(Kind::QueuePair), 0);
        assert_eq!(before.view().to_vec(0, 1024), [[7; 256], [0; 256], [0; 256], [0; 256]].concat());
        assert_eq!(after.view().to_vec(0, 1024), [[0; 256], [7; 256], [7; 256], [7; 256]].concat());
        assert_eq!(rig.refusals(), 0, "no request came with a key that was gone");
    });
}

#[test]
fn a_draining_buffer_takes_nothing_new_and_finishes_what_was_posted() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let work: Vec<_> = (0..6).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let batch = rig.near.requester.submit(guard, &work, PATIENCE).unwrap();
        rig.far.publish(|record| record.buffers[0].state = BufferState::Draining);
        rig.near.look("far");
        rig.settle();
        let gone = Err(TransferError::NotOffered { buffer: there.id() });
        let good = Ok(64);
        assert_eq!(outcomes(batch.wait()), [&good, &good, &good, &good, &gone, &gone].map(Clone::clone));
        let late = rig.near.requester.submit(guard, &work, PATIENCE).map(|_| ());
        assert!(matches!(late, Err(TransferError::Outdated { .. })), "{late:?}");
    });
    with_guard(&rig.near, "far", |guard| {
        let refused = rig.near.requester.open(guard, there.id()).map(|_| ());
        assert_eq!(refused, Err(TransferError::NotOffered { buffer: there.id() }));
    });
    assert_eq!(rig.refusals(), 0);
}

#[test]
fn a_changed_path_retires_the_queue_pair_and_waiting_requests_take_the_new_one() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let work: Vec<_> = (0..6).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let batch = rig.near.requester.submit(guard, &work, PATIENCE).unwrap();
        // The port got another name: everything over it is made anew, by both.
        rig.far.publish(|record| record.devices[0].name = "hca0-renamed".into());
        rig.near.publish(|record| record.devices[0].name = "hca0-renamed".into());
        rig.meet();
        let retired = rig.near.requester.counters().derived.retired;
        assert_eq!((retired.of(Kind::QueuePair), retired.of(Kind::Rkey)), (1, 0), "keys stay");
        rig.settle();
        let path = Err(TransferError::PathRetired { name: name("far") });
        let ends = outcomes(batch.wait());
        assert!(ends[..4].iter().all(|end| *end == path), "{ends:?}");
        assert_eq!(ends[4..], [Ok(64), Ok(64)]);
    });
    assert_eq!(rig.refusals(), 0);
}

#[test]
fn a_neighbours_queue_pair_and_a_rank_of_somebody_disturb_nothing() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let there = rig.far.region();
    rig.far.offer(&there);
    let segment = with_guard(&rig.near, "far", |guard| rig.near.requester.open(guard, there.id()).unwrap());
    rig.far.publish(|record| record.world_hint = 77);
    rig.near.look("far");
    let another = rig.far.region();
    rig.far.offer(&another);
    rig.near.look("far");
    assert_eq!(rig.near.requester.counters().derived.retired.total(), 0);
    with_guard(&rig.near, "far", |guard| {
        let again = rig.near.requester.open(guard, there.id()).unwrap();
        assert_eq!(again.handle(), segment.handle());
    });
}

#[test]
fn a_request_that_is_out_of_range_or_not_allowed_is_refused_by_name() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let here = rig.near.region();
    let (small, secret) = (
        rig.far.requester.register(4096, Access::ALL).unwrap(),
        rig.far.requester.register(4096, Access { remote_write: false, ..Access::ALL }).unwrap(),
    );
    rig.far.offer(&small);
    rig.far.offer(&secret);
    with_guard(&rig.near, "far", |guard| {
        let [small, secret] =
            [&small, &secret].map(|region| rig.near.requester.open(guard, region.id()).unwrap());
        let refused =
            |request| rig.near.requester.submit(guard, &[request], PATIENCE).map(|_| ()).unwrap_err();
        for (at, len, wanted) in [(0, 0, "len"), (0, 4097, "len"), (4090, 7, "remote_offset")] {
            let error = refused(write(&here, &small, at, len));
            assert!(matches!(error, TransferError::OutOfRange { field, .. } if field == wanted), "{error}");
        }
        let denied = refused(write(&here, &secret, 0, 8));
        assert_eq!(denied, TransferError::Denied { buffer: secret.buffer(), verb: "WRITE" });
    });
    assert_eq!(rig.near.requester.counters().posted, 0);
}

#[test]
fn a_waiting_request_that_the_buffers_successor_has_no_room_for_fails_alone() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let work = [0, 64, 128, 192, 8192, 256].map(|at| write(&here, &segment, at, 64));
        let batch = rig.near.requester.submit(guard, &work, PATIENCE).unwrap();
        let smaller = rig.far.requester.register_as(there.id(), 4096, Access::ALL).unwrap();
        rig.far.offer(&smaller);
        rig.near.look("far");
        rig.settle();
        let ends = outcomes(batch.wait());
        assert!(matches!(ends[4], Err(TransferError::OutOfRange { value: 8256, max: 4096, .. })), "{ends:?}");
        assert_eq!([&ends[..4], &ends[5..]].concat(), vec![Ok(64); 5]);
    });
    assert_eq!(rig.refusals(), 0);
}

#[test]
fn the_end_of_an_earlier_ownership_ends_nothing_and_an_expiry_ends_use_only() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    let far = name("far");
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let work = [write(&here, &segment, 0, 64)];
        let batch = rig.near.requester.submit(guard, &work, PATIENCE).unwrap();
        let fence = guard.leased().stamp().fence;
        rig.near.requester.ended(&far, Fence(fence.0 - 1), true);
        assert!(rig.near.requester.is_linked(&far), "somebody else's end");
        rig.near.requester.ended(&far, fence, false);
        assert!(rig.near.requester.is_linked(&far), "it may be alive behind an outage");
        rig.settle();
        let expired = TransferError::Store(StoreError::LeaseExpired { fence });
        assert_eq!(outcomes(batch.wait()), [Err(expired)], "what was posted may not be trusted");
        rig.near.requester.ended(&far, fence, true);
        assert!(!rig.near.requester.is_linked(&far), "given back");
    });
}

#[test]
fn a_segment_of_the_process_before_is_refused_under_the_guard_of_the_next() {
    let store = open("memory:");
    let rig = Rig::new(&store, Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    let before = with_guard(&rig.near, "far", |guard| rig.near.requester.open(guard, there.id()).unwrap());
    let next = End::new(&store, &rig.far.device, "far", 3, 1);
    let again = next.requester.register_as(there.id(), LEN, Access::ALL).unwrap();
    next.offer(&again);
    with_guard(&rig.near, "far", |guard| {
        let refused = rig.near.requester.submit(guard, &[write(&here, &before, 0, 8)], PATIENCE).map(|_| ());
        assert_eq!(refused, Err(TransferError::PeerReplaced { name: name("far") }));
        assert!(rig.near.requester.open(guard, again.id()).is_ok());
    });
}

#[test]
fn two_contents_under_one_stamp_are_an_alarm_and_are_not_used() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let there = rig.far.region();
    rig.far.offer(&there);
    let stored = rig.near.store.get(&name("far")).unwrap();
    let mut other = Snapshot::clone(stored.unchecked());
    other.record.world_hint += 1;
    rig.near.requester.seen(&Arc::new(other));
    with_guard(&rig.near, "far", |guard| {
        let refused = rig.near.requester.open(guard, there.id()).map(|_| ());
        assert_eq!(refused, Err(TransferError::ConcurrentPublisher { stamp: stored.stamp() }));
    });
    assert_eq!(rig.near.requester.counters().derived.concurrent_publishers, 1);
}

#[test]
fn a_name_that_claims_anothers_rank_does_not_get_its_connection() {
    let store = open("memory:");
    let rig = Rig::new(&store, Over::Inproc);
    let twin = End::new(&store, &rig.far.device, "twin", 7, 1);
    twin.publish(|_| {});
    rig.near.look("twin");
    assert!(!rig.near.requester.is_linked(&name("twin")) && rig.near.requester.is_linked(&name("far")));
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let batch = rig.near.requester.submit(guard, &[write(&here, &segment, 0, 5)], PATIENCE).unwrap();
        rig.settle();
        assert_eq!(outcomes(batch.wait()), [Ok(5)]);
    });
}

/// The replacement has the same name, device, addresses and buffer identity; on a fresh device even the queue pair
/// numbers and keys come out the same. Only the instance tells.
#[test]
fn a_replacement_with_the_same_everything_retires_all_within_one_refresh() {
    let mut urls = vec!["memory:".to_owned()];
    let dir =
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("transfer-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    urls.push(format!("redb:{}", dir.join("store.redb").display()));
    let server = Server::start();
    urls.push(server.url.clone());
    for url in urls {
        println!("{}", url.split(':').next().unwrap());
        replaced(&open(&url));
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

pub(crate) fn replaced(store: &ibex_metadata::blocking::Blocking) {
    let rig = Rig::new(store, Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    let Rig { near, far } = rig;
    with_guard(&near, "far", |guard| {
        let segment = near.requester.open(guard, there.id()).unwrap();
        let work: Vec<_> = (0..6).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let batch = near.requester.submit(guard, &work, PATIENCE).unwrap();
        let linked = near.requester.counters();

        // It crashes, and comes back under its name.
        let old = fresh_record(store, &name("far"));
        let next = End::new(store, &far.device, "far", 3, 1);
        let fresh = store.get(&name("far")).unwrap();
        assert_eq!(fresh.unchecked().encoded.len(), 0, "the record starts empty");
        let fenced = store.update(&far.publisher, |record| record.rank = Some(1));
        assert!(matches!(fenced, Err(ibex_metadata::error::StoreError::Fenced { .. })), "{fenced:?}");

        near.look("far");
        let counters = near.requester.counters();
        assert_eq!(counters.derived.replaced, 1);
        assert_eq!(counters.derived.retired.total(), 2, "the queue pair and the key, in one refresh");
        assert_eq!(counters.links, linked.links, "an empty record offers nothing to connect to");

        // The same content as before, to the byte but for the instance.
        let publish = |record: &mut ibex_metadata::record::PeerRecord| {
            let identity = record.identity;
            *record = ibex_metadata::record::PeerRecord { identity, ..old.clone() };
        };
        store.update(&next.publisher, publish).unwrap();
        near.look("far");
        assert_eq!(near.requester.counters().derived.replaced, 1, "once is enough");
        near.requester.progress();
        let replaced = Err(TransferError::PeerReplaced { name: name("far") });
        assert_eq!(outcomes(batch.wait()), vec![replaced; 6]);
        let refused = near.requester.submit(guard, &work, PATIENCE).map(|_| ());
        assert!(matches!(refused, Err(TransferError::Outdated { .. })), "{refused:?}");
        assert_eq!(there.view().to_vec(0, 512), [0; 512]);
        assert_eq!(near.requester.counters().posted, 4, "nothing was posted for the new one");
        drop(next);
    });
}

fn fresh_record(
    store: &ibex_metadata::blocking::Blocking,
    name: &ibex_metadata::name::RecordName,
) -> ibex_metadata::record::PeerRecord {
    store.get(name).unwrap().unchecked().record.clone()
}

#[test]
fn a_dead_peers_name_works_again_with_the_replacement() {
    let store = open("memory:");
    let [one, other] = devices(Over::Inproc);
    let near = End::new(&store, &one, "near", 1, 0);
    let far = End::new(&store, &other, "far", 2, 1);
    near.publish(|_| {});
    far.publish(|_| {});
    near.look("far");
    far.look("near");
    let before = near.requester.adverts();
    drop(far);
    let far = End::new(&store, &other, "far", 3, 1);
    far.publish(|_| {});
    near.look("far");
    assert!(near.requester.adverts() > before, "a new number for the new peer");
    near.publish(|_| {});
    let rig = Rig { near, far };
    rig.meet();
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    here.view().write(0, b"hello");
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let batch = rig.near.requester.submit(guard, &[write(&here, &segment, 0, 5)], PATIENCE).unwrap();
        rig.settle();
        assert_eq!(outcomes(batch.wait()), [Ok(5)]);
    });
    assert_eq!(there.view().to_vec(0, 5), b"hello");
}

/// An error completion costs the connection, and what was posted on it; the next one has a new number, which the peer
/// learns from the record, and the same segment goes on.
#[test]
fn a_failed_queue_pair_is_replaced_and_the_segment_goes_on() {
    let rig = Rig::new(&open("memory:"), Over::Inproc);
    let (here, there) = (rig.near.region(), rig.far.region());
    rig.far.offer(&there);
    with_guard(&rig.near, "far", |guard| {
        let segment = rig.near.requester.open(guard, there.id()).unwrap();
        let qpn = rig.qpn_of_near();
        let work: Vec<_> = (0..6).map(|i| write(&here, &segment, i * 64, 64)).collect();
        let batch = rig.near.requester.submit(guard, &work, PATIENCE).unwrap();
        let before = rig.near.requester.adverts();
        assert!(rig.near.device.set_qp_error(QpNum::new(qpn), Syndrome::TRANSPORT_RETRY_EXC, Nanos(0)));
        while rig.near.requester.take_failed().is_empty() {
            rig.step();
            rig.near.requester.progress();
        }
        assert!(rig.near.requester.adverts() > before);
        rig.near.publish(|_| {});
        rig.far.look("near");
        assert_ne!(rig.qpn_of_near(), qpn);
        rig.settle();
        let ends = outcomes(batch.wait());
        let is_lost = |end: &Result<u32, TransferError>| {
            matches!(end, Err(TransferError::Completion { .. } | TransferError::PathRetired { .. }))
        };
        assert!(ends[..4].iter().all(is_lost), "{ends:?}");
        assert_eq!(ends[4..], [Ok(64), Ok(64)], "what waited takes the new connection");
    });
}
