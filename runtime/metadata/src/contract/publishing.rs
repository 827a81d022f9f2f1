//! Writing records, and reading them back as they were.

use std::sync::Arc;

use super::{Case, instance, ready, samples};
use crate::error::{Bounded, Corruption, Problem, StoreError};
use crate::ids::{Fence, Version};
use crate::limits::RECORD_LEN_MAX;
use crate::record::{Identity, Manifest, PeerRecord};
use crate::store::Hold;

pub(super) async fn versions_follow_one_another(case: &Case<'_>) {
    let hold = case.claimed("a").await;
    let mut record = ready(&hold);
    for version in 0..5 {
        record.rank = Some(version);
        let published = case.store.publish(&hold, Version(version.into()), &record).await;
        assert_eq!(published, Ok(Version(u64::from(version) + 1)));
    }
    for wrong in [0, 4, 6] {
        let refused = case.store.publish(&hold, Version(wrong), &record).await;
        assert_eq!(refused, Err(StoreError::Conflict { current: Version(5) }));
    }
    let guard = case.store.get(&hold.name).await.expect("it is published");
    assert_eq!(guard.stamp().version, Version(5));
    assert_eq!(guard.unchecked().record, record);
}

pub(super) async fn one_of_many_publishers_wins_each_version(case: &Case<'_>) {
    let hold = case.claimed("a").await;
    for version in (0..3).map(Version) {
        let publishers: Vec<_> = (0..8)
            .map(|rank| {
                let (store, hold) = (Arc::clone(&case.store), hold.clone());
                let record = PeerRecord { rank: Some(rank), ..ready(&hold) };
                tokio::spawn(async move { store.publish(&hold, version, &record).await })
            })
            .collect();
        let mut winner = None;
        for (rank, publisher) in (0..).zip(publishers) {
            match publisher.await.expect("no publish panics") {
                Ok(_) => assert_eq!(winner.replace(rank), None, "two winners of {version}"),
                Err(error) => assert_eq!(error, StoreError::Conflict { current: Version(version.0 + 1) }),
            }
        }
        let guard = case.store.get(&hold.name).await.expect("it is published");
        assert_eq!((guard.unchecked().record.rank, guard.stamp().version.0), (winner, version.0 + 1));
    }
}

pub(super) async fn extreme_fences_and_versions_are_compared_exactly(case: &Case<'_>) {
    let hold = case.published("a").await;
    for fence in [0, hold.fence.0 - 1, hold.fence.0 + 1, 1 << 53, (1 << 63) + 1, u64::MAX] {
        let stranger = Hold { fence: Fence(fence), ..hold.clone() };
        let refused = case.store.publish(&stranger, Version(1), &ready(&hold)).await;
        assert_eq!(refused, Err(StoreError::Fenced { current: hold.fence }), "{fence}");
    }
    for version in [(1 << 53) + 1, 1 << 63, u64::MAX - 1, u64::MAX] {
        let refused = case.store.publish(&hold, Version(version), &ready(&hold)).await;
        assert_eq!(refused, Err(StoreError::Conflict { current: Version(1) }), "{version}");
    }
}

pub(super) async fn a_name_that_was_never_claimed_is_not_found(case: &Case<'_>) {
    let name = case.name("nobody");
    let (fence, lease) = (Fence(1), crate::ids::LeaseId(1));
    let hold = Hold { name: name.clone(), instance: instance(1), fence, lease, ttl: super::LONG };
    let not_found = StoreError::NotFound;
    assert_eq!(case.store.publish(&hold, Version(0), &ready(&hold)).await, Err(not_found.clone()));
    assert_eq!(case.store.renew(&hold).await, Err(not_found.clone()));
    assert_eq!(case.store.release(&hold).await, Err(not_found.clone()));
    assert_eq!(case.store.readers(&name).await, Err(not_found.clone()));
    assert_eq!(case.store.get(&name).await, Err(not_found));
}

pub(super) async fn a_record_for_somebody_else_is_refused(case: &Case<'_>) {
    let hold = case.claimed("a").await;
    let other_name = PeerRecord { name: "b".into(), ..ready(&hold) };
    let other_owner = PeerRecord { identity: Identity::Instance(instance(9)), ..ready(&hold) };
    for record in [other_name, other_owner] {
        let refused = case.store.publish(&hold, Version(0), &record).await;
        let is_mismatch = matches!(
            &refused,
            Err(StoreError::Corrupt(Corruption::Record(error))) if error.problem == Problem::Mismatch
        );
        assert!(is_mismatch, "{refused:?}");
    }
    let guard = case.store.get(&hold.name).await.expect("it is owned");
    assert_eq!(guard.stamp().version, Version(0));
}

pub(super) async fn sizes_are_bounded_and_nothing_is_lost(case: &Case<'_>) {
    let hold = case.published("a").await;
    let padded = |len: usize| {
        let manifest = |len| Manifest { digest: vec![7; len], ..Manifest::default() };
        let manifests = vec![manifest(len / 2), manifest(len - len / 2)];
        PeerRecord { manifests, ..ready(&hold) }
    };
    let overhead = padded(RECORD_LEN_MAX - 512).encode().expect("it fits").len() - (RECORD_LEN_MAX - 512);
    let largest = padded(RECORD_LEN_MAX - overhead);
    let refused = case.store.publish(&hold, Version(1), &padded(RECORD_LEN_MAX - overhead + 1)).await;
    let (len, limit) = (RECORD_LEN_MAX as u64 + 1, RECORD_LEN_MAX as u64);
    assert_eq!(refused, Err(StoreError::TooLarge { what: Bounded::Record, len, limit }));
    let guard = case.store.get(&hold.name).await.expect("the record is as it was");
    assert_eq!(guard.unchecked().record, ready(&hold));
    assert_eq!(case.store.publish(&hold, Version(1), &largest).await, Ok(Version(2)));
    let guard = case.store.get(&hold.name).await.expect("the largest record is readable");
    assert_eq!(guard.unchecked().record, largest);
}

pub(super) async fn every_variant_comes_back_identical(case: &Case<'_>) {
    for (what, sample) in samples::every_variant() {
        let hold = case.claimed(what).await;
        let record = samples::for_owner(sample, &hold);
        let published = case.store.publish(&hold, Version(0), &record).await;
        assert_eq!(published, Ok(Version(1)), "{what}");
        let guard = case.store.get(&hold.name).await.expect(what);
        assert_eq!(guard.unchecked().record, record, "{what}");
        assert_eq!(guard.unchecked().encoded, record.encode().expect(what), "{what}");
    }
}

pub(super) async fn legacy_records_come_back_as_they_were_read(case: &Case<'_>) {
    for (what, bytes) in samples::legacy() {
        let hold = case.claimed(what).await;
        let read = PeerRecord::decode(&bytes).expect(what);
        let (cluster, group, name) = hold.name.parts();
        let record = PeerRecord { cluster: cluster.into(), group: group.into(), name: name.into(), ..read };
        assert_eq!(case.store.publish(&hold, Version(0), &record).await, Ok(Version(1)), "{what}");
        let guard = case.store.get(&hold.name).await.expect(what);
        assert_eq!(guard.unchecked().record, record, "{what}");
        assert_eq!(guard.unchecked().identity, Identity::Legacy, "{what}: no identity is made up");
    }
}
