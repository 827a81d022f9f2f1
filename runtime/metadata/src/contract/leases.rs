//! Liveness, counted by the store's clock.

use core::time::Duration;

use super::{Case, LONG, SKEW_NS, claim, ready};
use crate::error::StoreError;
use crate::ids::Version;
use crate::store::Filter;

pub(super) async fn a_lease_runs_out_unless_renewed(case: &Case<'_>) {
    let ttl = case.subject.short_ttl();
    let hold = case.claim_as(&case.name("a"), 1, ttl).await;
    let published = case.store.publish(&hold, Version(0), &ready(&hold)).await;
    assert_eq!(published, Ok(Version(1)));
    case.let_expire(ttl).await;
    let expired = StoreError::LeaseExpired { fence: hold.fence };
    assert_eq!(case.store.get(&hold.name).await, Err(expired.clone()));
    assert_eq!(case.store.publish(&hold, Version(1), &ready(&hold)).await, Err(expired.clone()));
    assert_eq!(case.store.renew(&hold).await, Err(expired.clone()), "an expired lease does not come back");
    assert_eq!(case.store.release(&hold).await, Err(expired));
}

pub(super) async fn a_renewed_lease_goes_on(case: &Case<'_>) {
    let ttl = case.subject.short_ttl();
    let hold = case.claim_as(&case.name("a"), 1, ttl).await;
    for _ in 0..4 {
        case.subject.pass(ttl / 3).await;
        assert_eq!(case.store.renew(&hold).await, Ok(()));
    }
    let guard = case.store.get(&hold.name).await.expect("it was renewed all along");
    assert!(guard.remaining(case.subject.clock(0).now()) <= ttl);
    assert_eq!(guard.stamp().version, Version(0), "a heartbeat writes no record");
}

pub(super) async fn a_released_name_is_gone_and_free(case: &Case<'_>) {
    let hold = case.published("a").await;
    assert_eq!(case.store.release(&hold).await, Ok(()));
    assert_eq!(case.store.get(&hold.name).await, Err(StoreError::NotFound));
    let expired = Err(StoreError::LeaseExpired { fence: hold.fence });
    assert_eq!(case.store.release(&hold).await, expired);
    let page = case.store.list(&Filter::under((&hold.name).into())).await.expect("listing works");
    assert_eq!(page.entries, []);
    let next = case.claim_as(&hold.name, 2, LONG).await;
    let guard = case.store.get(&hold.name).await.expect("it is owned again");
    assert_eq!(guard.stamp().fence, next.fence);
    assert_eq!(guard.unchecked().encoded, [] as [u8; 0]);
}

pub(super) async fn skewed_clients_see_the_same_leases(case: &Case<'_>) {
    let ttl = case.subject.short_ttl() * 4;
    for (who, skew) in [("early", -SKEW_NS), ("late", SKEW_NS)] {
        let (owner, reader) = (case.subject.client(skew).await, case.subject.client(-skew).await);
        let hold = owner.claim(&claim(&case.name(who), 1, ttl)).await.expect("the name is free");
        let clock = case.subject.clock(-skew);
        let guard = reader.get(&hold.name).await.expect("the lease is alive by the store's clock");
        assert!(guard.check(clock.now()).is_ok(), "{who}");
        assert!(guard.remaining(clock.now()) <= ttl, "{who}");
        let held = reader.claim(&claim(&hold.name, 2, LONG)).await;
        assert!(matches!(held, Err(StoreError::Held { .. })), "{who}: {held:?}");
        case.let_expire(ttl).await;
        let expired = StoreError::LeaseExpired { fence: hold.fence };
        assert_eq!(reader.get(&hold.name).await, Err(expired.clone()), "{who}");
        assert_eq!(guard.check(clock.now()), Err(expired.clone()), "{who}");
        assert_eq!(owner.renew(&hold).await, Err(expired), "{who}");
    }
}

pub(super) async fn guards_run_out_on_the_readers_clock(case: &Case<'_>) {
    let ttl = case.subject.short_ttl();
    let hold = case.claim_as(&case.name("a"), 1, ttl).await;
    let clock = case.subject.clock(0);
    let before = clock.now();
    let guard = case.store.get(&hold.name).await.expect("the lease is alive");
    assert!(guard.valid_until() <= clock.now().after(ttl), "never longer than granted");
    assert!(guard.valid_until() > before);
    case.subject.pass(ttl * 3 / 4).await;
    assert_eq!(case.store.renew(&hold).await, Ok(()));
    case.subject.pass(ttl * 3 / 4).await;
    // The owner is alive, but this guard was given before it renewed.
    let expired = StoreError::LeaseExpired { fence: hold.fence };
    assert_eq!(guard.check(clock.now()).map(|_| ()), Err(expired));
}

pub(super) async fn stale_records_are_listed_not_hidden(case: &Case<'_>) {
    let ttl = case.subject.short_ttl();
    let stale = case.claim_as(&case.name("stale"), 1, ttl).await;
    case.let_expire(ttl).await;
    let alive = case.claimed("alive").await;
    let group = crate::name::Prefix::parse(&format!("{}/group", alive.name.parts().0));
    let page = case.store.list(&Filter::under(group.expect("a good prefix"))).await.expect("listing works");
    let seen: Vec<_> = page.entries.iter().map(|e| (&e.snapshot.name, e.remaining.is_some())).collect();
    assert_eq!(seen, [(&alive.name, true), (&stale.name, false)]);
    assert!(page.entries[0].remaining > Some(Duration::ZERO));
}
