//! Lease-checked reads of one request: what is asked, how often, and what fails alone.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::time::Duration;

use ibex_metadata::clock::Clock;
use ibex_metadata::error::{Corruption, Result, StoreError};
use ibex_metadata::ids::{InstanceId, Version};
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::RecordName;
use ibex_metadata::scope::Request;
use ibex_metadata::store::{Claim, Hold, Store};

use spy::{Mood, Spy};

mod spy;

const TTL: Duration = Duration::from_secs(10);

fn name(text: &str) -> RecordName {
    RecordName::new("c", "g", text).unwrap()
}

async fn claimed(store: &Spy, text: &str) -> Hold {
    let instance = InstanceId::new(1).unwrap();
    store.claim(&Claim { name: name(text), instance, ttl: TTL, takeover: false }).await.unwrap()
}

fn spy(clock: &Clock) -> Spy {
    Spy::new(LocalStore::memory(clock.clone()))
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn what_is_known_is_not_asked_again_not_even_a_miss() {
    run(async {
        let clock = Clock::manual();
        let store = spy(&clock);
        claimed(&store, "a").await;
        let request = Request::new(clock);
        let scope = request.scope(&store);
        let names = ["a", "none", "a", "none"].map(name);
        for _ in 0..3 {
            let guards = scope.resolve_all(&names).await.unwrap();
            let found: Vec<_> = guards.iter().map(Result::is_ok).collect();
            assert_eq!(found, [true, false, true, false]);
            assert_eq!(guards[1].as_ref().map(|_| ()), Err(&StoreError::NotFound));
        }
        assert_eq!(store.asked(), [["a", "none"]], "each name once, in one batch");
        assert!(scope.resolve(&names[0]).await.is_ok());
        assert_eq!(store.asked().len(), 0);
    });
}

#[test]
fn what_ran_out_is_asked_again_before_use_and_fails_alone_during_use() {
    run(async {
        let clock = Clock::manual();
        let store = spy(&clock);
        let (short, long) = (claimed(&store, "short").await, claimed(&store, "long").await);
        let request = Request::new(clock.clone());
        let scope = request.scope(&store);
        let one = scope.resolve(&short.name).await.unwrap();
        assert!(one.snapshot().is_ok());
        clock.advance(TTL * 3 / 4);
        store.renew(&long).await.unwrap();
        let two = scope.resolve(&long.name).await.unwrap();
        assert!(one.wants_renewal() && !two.wants_renewal());
        clock.advance(TTL / 2);
        let expired = StoreError::LeaseExpired { fence: short.fence };
        assert_eq!(one.snapshot().map(|_| ()), Err(expired.clone()), "before it is posted");
        assert_eq!(one.finish(), Err(expired.clone()), "after it completed");
        assert_eq!(two.finish(), Ok(()), "the other key is untouched");
        store.asked();
        let again = scope.resolve(&short.name).await;
        assert_eq!(again.map(|_| ()), Err(expired), "the store was asked, and says so");
        assert_eq!(store.asked(), [["short"]]);
    });
}

#[test]
fn a_guard_is_renewed_on_the_same_snapshot_only() {
    run(async {
        let clock = Clock::manual();
        let store = spy(&clock);
        let hold = claimed(&store, "a").await;
        let request = Request::new(clock.clone());
        let scope = request.scope(&store);
        let mut guard = scope.resolve(&hold.name).await.unwrap();
        clock.advance(TTL * 3 / 4);
        store.renew(&hold).await.unwrap();
        assert_eq!(guard.renew().await, Ok(()));
        clock.advance(TTL * 3 / 4);
        assert!(guard.snapshot().is_ok());
        store.renew(&hold).await.unwrap();
        let record = guard.snapshot().unwrap().record.clone();
        store.publish(&hold, Version(0), &record).await.unwrap();
        let changed = StoreError::LeaseExpired { fence: hold.fence };
        assert_eq!(guard.renew().await, Err(changed), "the record is another one now");
    });
}

#[test]
fn an_outage_is_not_an_answer() {
    run(async {
        let clock = Clock::manual();
        let store = spy(&clock);
        let hold = claimed(&store, "a").await;
        let request = Request::new(clock);
        let scope = request.scope(&store);
        *store.mood.lock() = Mood::Away;
        let away = scope.resolve(&hold.name).await.map(|_| ());
        assert!(matches!(away, Err(StoreError::Unavailable { .. })), "{away:?}");
        *store.mood.lock() = Mood::Short;
        let names = [hold.name.clone(), name("b")];
        let short = scope.resolve_all(&names).await.map(|_| ());
        let wrong = Corruption::BatchLength { asked: 2, got: 1 };
        assert_eq!(short, Err(StoreError::Corrupt(wrong)), "one outcome too few fails the batch");
        *store.mood.lock() = Mood::Good;
        assert!(scope.resolve(&hold.name).await.is_ok(), "nothing of the failures is remembered");
    });
}
