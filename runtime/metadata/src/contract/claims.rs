//! Owning a name.

use core::time::Duration;
use std::sync::Arc;

use super::{Case, LONG, claim, instance, ready};
use crate::error::StoreError;
use crate::ids::{LeaseId, Stamp, Version};
use crate::limits::{TTL_MAX, TTL_MIN};
use crate::record::{Identity, PeerRecord};
use crate::store::{Ack, Claim, Hold};

pub(super) async fn a_free_name_is_claimed_with_an_empty_record(case: &Case<'_>) {
    let hold = case.claimed("a").await;
    let guard = case.store.get(&hold.name).await.expect("it was claimed");
    let snapshot = guard.unchecked();
    assert_eq!(snapshot.stamp, Stamp::new(hold.fence, Version(0)));
    assert_eq!(snapshot.identity, Identity::Instance(hold.instance));
    assert_eq!(snapshot.record, PeerRecord::empty(&hold.name, snapshot.identity));
}

pub(super) async fn one_of_many_claims_wins(case: &Case<'_>) {
    let name = case.name("a");
    let claimants: Vec<_> = (1..=16)
        .map(|owner| {
            let (store, claim) = (Arc::clone(&case.store), claim(&name, owner, LONG));
            tokio::spawn(async move { store.claim(&claim).await })
        })
        .collect();
    let mut winners: Vec<Hold> = Vec::new();
    for claimant in claimants {
        match claimant.await.expect("no claim panics") {
            Ok(hold) => winners.push(hold),
            Err(error) => assert!(matches!(error, StoreError::Held { .. }), "{error}"),
        }
    }
    assert_eq!(winners.len(), 1, "{winners:?}");
    let guard = case.store.get(&name).await.expect("somebody won");
    assert_eq!(guard.stamp().fence, winners[0].fence);
    assert_eq!(guard.unchecked().identity, Identity::Instance(winners[0].instance));
}

pub(super) async fn a_held_name_is_refused_with_what_remains(case: &Case<'_>) {
    let hold = case.claimed("a").await;
    let refused = case.store.claim(&claim(&hold.name, 2, LONG)).await;
    let is_good = |fence, left: Duration| fence == hold.fence && !left.is_zero() && left <= LONG;
    let good = matches!(&refused, Err(StoreError::Held { fence, remaining }) if is_good(*fence, *remaining));
    assert!(good, "{refused:?}");
}

pub(super) async fn takeover_fences_the_owner_out(case: &Case<'_>) {
    let old = case.published("a").await;
    let takeover = Claim { takeover: true, ..claim(&old.name, 2, LONG) };
    let new = case.store.claim(&takeover).await.expect("takeover is allowed");
    assert!(new.fence > old.fence);
    let fenced = StoreError::Fenced { current: new.fence };
    assert_eq!(case.store.publish(&old, Version(1), &ready(&old)).await, Err(fenced.clone()));
    assert_eq!(case.store.renew(&old).await, Err(fenced.clone()));
    assert_eq!(case.store.release(&old).await, Err(fenced));
    let guard = case.store.get(&old.name).await.expect("it is owned");
    assert_eq!(guard.stamp(), Stamp::new(new.fence, Version(0)), "nothing of the old owner is left");
    assert_eq!(case.store.publish(&new, Version(0), &ready(&new)).await, Ok(Version(1)));
}

pub(super) async fn a_repeated_claim_gives_the_same_hold(case: &Case<'_>) {
    let hold = case.published("a").await;
    let again = case.store.claim(&claim(&hold.name, 1, LONG)).await;
    assert_eq!(again, Ok(hold.clone()));
    let guard = case.store.get(&hold.name).await.expect("it is owned");
    assert_eq!(guard.stamp().version, Version(1), "the repetition took nothing away");
}

pub(super) async fn a_crashed_owner_claims_again_and_starts_empty(case: &Case<'_>) {
    let ttl = case.subject.short_ttl();
    let crashed = case.claim_as(&case.name("a"), 1, ttl).await;
    let published = case.store.publish(&crashed, Version(0), &ready(&crashed)).await;
    assert_eq!(published, Ok(Version(1)));
    case.let_expire(ttl).await;
    let back = case.claim_as(&crashed.name, 2, LONG).await;
    assert!(back.fence > crashed.fence);
    let guard = case.store.get(&crashed.name).await.expect("it is owned");
    assert_eq!(guard.unchecked().identity, Identity::Instance(instance(2)));
    assert_eq!(guard.unchecked().encoded, [] as [u8; 0], "no buffer of the dead process is inherited");
    let late = case.store.publish(&crashed, Version(1), &ready(&crashed)).await;
    assert_eq!(late, Err(StoreError::Fenced { current: back.fence }));
}

pub(super) async fn a_hold_is_good_for_its_owner_alone(case: &Case<'_>) {
    let hold = case.claimed("a").await;
    let expired = StoreError::LeaseExpired { fence: hold.fence };
    let forged = Hold { instance: instance(2), ..hold.clone() };
    assert_eq!(case.store.renew(&forged).await, Err(expired.clone()));
    assert_eq!(case.store.publish(&forged, Version(0), &ready(&forged)).await, Err(expired.clone()));
    assert_eq!(case.store.release(&forged).await, Err(expired.clone()));
    let lease = LeaseId(hold.lease.0 + 1);
    assert_eq!(case.store.renew(&Hold { lease, ..hold.clone() }).await, Err(expired));
    assert_eq!(case.store.renew(&hold).await, Ok(()), "the owner's still is");
}

pub(super) async fn readers_stay_registered_over_a_takeover(case: &Case<'_>) {
    let hold = case.published("a").await;
    let (reader, stamp) = (instance(7), Stamp::new(hold.fence, Version(1)));
    let ack = Ack { name: hold.name.clone(), reader, stamp, ttl: LONG };
    assert_eq!(case.store.ack(&ack).await, Ok(()));
    let takeover = Claim { takeover: true, ..claim(&hold.name, 2, LONG) };
    case.store.claim(&takeover).await.expect("takeover is allowed");
    // Whoever used the old owner's buffers may do so still: the new one must be able to wait for it.
    let readers = case.store.readers(&hold.name).await.expect("the name exists");
    assert_eq!(readers.iter().map(|seen| (seen.reader, seen.stamp)).collect::<Vec<_>>(), [(reader, stamp)]);
}

pub(super) async fn fences_grow_over_release_and_expiry(case: &Case<'_>) {
    let (name, ttl) = (case.name("a"), case.subject.short_ttl());
    let first = case.claim_as(&name, 1, LONG).await;
    case.store.release(&first).await.expect("it is held");
    let second = case.claim_as(&name, 1, ttl).await;
    assert!(second.fence > first.fence);
    case.let_expire(ttl).await;
    let third = case.claim_as(&name, 1, LONG).await;
    assert!(third.fence > second.fence);
    assert_ne!(third.lease, second.lease);
}

pub(super) async fn lease_lengths_are_bounded(case: &Case<'_>) {
    let name = case.name("a");
    for ttl in [Duration::ZERO, TTL_MIN / 2, TTL_MAX * 2, Duration::MAX] {
        let refused = case.store.claim(&claim(&name, 1, ttl)).await;
        assert!(matches!(refused, Err(StoreError::Input(_))), "{ttl:?}: {refused:?}");
    }
    let unclaimed = case.store.get(&name).await;
    assert_eq!(unclaimed.map(|guard| guard.stamp()), Err(StoreError::NotFound));
}
