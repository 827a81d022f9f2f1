//! The cache in front of a store: who asks, what is kept, and for how long it bridges an outage.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{InstanceId, Stamp, Version};
use ibex_metadata::layered::Layered;
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::RecordName;
use ibex_metadata::store::{Claim, Hold, Store};
use spy::{Mood, Spy};

mod spy;

const TTL: Duration = Duration::from_secs(10);
/// Nothing here takes seconds; a busy machine may.
const PATIENCE: Duration = Duration::from_secs(60);

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

async fn claimed(store: &dyn Store, name: &str) -> Hold {
    let (name, instance) = (RecordName::new("c", "g", name).unwrap(), InstanceId::new(1).unwrap());
    store.claim(&Claim { name, instance, ttl: TTL, takeover: false }).await.unwrap()
}

/// A cache whose follower has begun, so that nothing is dropped any more but what changes.
async fn settled(clock: &Clock) -> (Arc<Spy>, Layered) {
    let spy = Arc::new(Spy::new(LocalStore::memory(clock.clone())));
    let layered = Layered::new(spy.clone(), clock.clone());
    let probe = claimed(&spy.inner, "probe").await;
    until("the follower", async || {
        layered.get(&probe.name).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        layered.cached(&probe.name).is_some()
    })
    .await;
    spy.asked();
    (spy, layered)
}

async fn until(what: &str, mut look: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !look().await {
        assert!(started.elapsed() < PATIENCE, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn many_who_want_one_name_ask_once() {
    run(async {
        let clock = Clock::manual();
        let (spy, layered) = settled(&clock).await;
        let (hold, layered) = (claimed(&spy.inner, "a").await, Arc::new(layered));
        // Nobody gets an answer until all of them have asked.
        spy.passes.forget_permits(usize::MAX);
        let askers: Vec<_> = (0..8)
            .map(|_| {
                let (layered, name) = (layered.clone(), hold.name.clone());
                tokio::spawn(async move { layered.get(&name).await.map(|leased| leased.stamp()) })
            })
            .collect();
        until("the question", async || !spy.asked().is_empty()).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        spy.passes.add_permits(8);
        for asker in askers {
            assert_eq!(asker.await.unwrap(), Ok(Stamp::new(hold.fence, Version(0))));
        }
        assert_eq!(spy.asked().len(), 0, "the other seven waited for the first one's answer");
    });
}

#[test]
fn an_outage_is_bridged_within_the_lease_and_no_longer() {
    run(async {
        let clock = Clock::manual();
        let (spy, layered) = settled(&clock).await;
        let hold = claimed(&spy.inner, "a").await;
        until("a kept answer", async || {
            layered.get(&hold.name).await.unwrap();
            layered.cached(&hold.name).is_some()
        })
        .await;
        *spy.mood.lock() = Mood::Away;
        clock.advance(TTL - Duration::from_millis(1));
        assert!(layered.get(&hold.name).await.is_ok(), "the lease still runs");
        let other = RecordName::new("c", "g", "other").unwrap();
        let away = |error: &StoreError| matches!(error, StoreError::Unavailable { .. });
        assert!(layered.get(&other).await.is_err_and(|error| away(&error)), "absence is not made up");
        clock.advance(Duration::from_millis(1));
        assert_eq!(layered.cached(&hold.name), None);
        assert!(layered.get(&hold.name).await.is_err_and(|error| away(&error)));
    });
}

#[test]
fn what_another_client_changes_is_dropped() {
    run(async {
        let clock = Clock::manual();
        let (spy, layered) = settled(&clock).await;
        let hold = claimed(&spy.inner, "a").await;
        until("a kept answer", async || {
            layered.get(&hold.name).await.unwrap();
            layered.cached(&hold.name).is_some()
        })
        .await;
        let record = layered.cached(&hold.name).unwrap().unchecked().record.clone();
        spy.inner.publish(&hold, Version(0), &record).await.unwrap();
        until("the invalidation", async || layered.cached(&hold.name).is_none()).await;
        let fresh = layered.get(&hold.name).await.unwrap();
        assert_eq!(fresh.stamp().version, Version(1));
    });
}

#[test]
fn an_answer_that_a_change_overtook_is_given_out_and_not_kept() {
    run(async {
        let clock = Clock::manual();
        let (spy, layered) = settled(&clock).await;
        let (hold, layered) = (claimed(&spy.inner, "a").await, Arc::new(layered));
        spy.replies.forget_permits(usize::MAX);
        let made = spy.made.load(Ordering::SeqCst);
        let asker = {
            let (layered, name) = (layered.clone(), hold.name.clone());
            tokio::spawn(async move { layered.get(&name).await })
        };
        until("the answer", async || spy.made.load(Ordering::SeqCst) > made).await;
        let record = spy.inner.get(&hold.name).await.unwrap().unchecked().record.clone();
        layered.publish(&hold, Version(0), &record).await.unwrap();
        // The news comes before the answer, so that nothing drops the answer afterwards.
        tokio::time::sleep(Duration::from_millis(100)).await;
        spy.replies.add_permits(1 << 20);
        assert_eq!(asker.await.unwrap().unwrap().stamp().version, Version(0));
        assert_eq!(layered.cached(&hold.name), None);
    });
}

#[test]
fn a_lost_watch_drops_nothing_until_changes_can_be_followed_again() {
    run(async {
        let clock = Clock::manual();
        let (spy, layered) = settled(&clock).await;
        let hold = claimed(&spy.inner, "a").await;
        until("a kept answer", async || {
            layered.get(&hold.name).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            layered.cached(&hold.name).is_some()
        })
        .await;
        *spy.mood.lock() = Mood::Away;
        spy.cut.notify_waiters();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(layered.get(&hold.name).await.is_ok(), "the lease bridges the outage");
        // Nobody tells the cache of this change: it happens while nobody watches.
        let record = layered.cached(&hold.name).unwrap().unchecked().record.clone();
        spy.inner.publish(&hold, Version(0), &record).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(layered.cached(&hold.name).is_some());
        *spy.mood.lock() = Mood::Good;
        until("the drop of everything", async || layered.cached(&hold.name).is_none()).await;
        assert_eq!(layered.get(&hold.name).await.unwrap().stamp().version, Version(1));
    });
}
