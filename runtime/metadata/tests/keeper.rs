//! Keeping a name: when it is renewed, what an outage does, and what ends it.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::InstanceId;
use ibex_metadata::keeper::{Keeper, Keeping};
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::RecordName;
use ibex_metadata::store::{Claim, Store};
use spy::{Mood, Spy};

mod spy;

const TTL: Duration = Duration::from_secs(12);
const GRACE: Duration = Duration::from_secs(60);
/// Nothing here takes seconds; a busy machine may.
const PATIENCE: Duration = Duration::from_secs(20);

struct Rig {
    clock: Clock,
    spy: Arc<Spy>,
    keeper: Keeper,
}

fn claim(instance: u128) -> Claim {
    let (name, instance) = (RecordName::new("c", "g", "a").unwrap(), InstanceId::new(instance).unwrap());
    Claim { name, instance, ttl: TTL, takeover: false }
}

impl Rig {
    async fn new() -> Self {
        let clock = Clock::manual();
        let spy = Arc::new(Spy::new(LocalStore::memory(clock.clone())));
        let store: Arc<dyn Store> = spy.clone();
        let keeper = Keeper::claim(&store, &claim(1), &clock, GRACE).await.unwrap();
        Self { clock, spy, keeper }
    }

    fn asked(&self) -> u64 {
        self.spy.renewals.load(Ordering::SeqCst)
    }

    /// Lets time pass in steps that give the keeper its turn.
    async fn pass(&self, duration: Duration) {
        for _ in 0..24 {
            self.clock.advance(duration / 24);
            for _ in 0..32 {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Why the name was lost; a keeper that never says so fails the test.
    async fn lost(&self) -> StoreError {
        tokio::time::timeout(PATIENCE, self.keeper.lost()).await.unwrap()
    }

    async fn until(&self, what: &str, holds: impl Fn(&Keeping) -> bool) -> Keeping {
        let started = Instant::now();
        while !holds(&self.keeper.state()) {
            assert!(started.elapsed() < PATIENCE, "{what} did not happen: {:?}", self.keeper.state());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.keeper.state()
    }
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn a_name_is_renewed_every_third_of_its_lease() {
    run(async {
        let rig = Rig::new().await;
        let claimed = rig.keeper.state();
        assert_eq!(claimed.confirmed_until, rig.clock.now().after(TTL));
        rig.pass(TTL / 8).await;
        assert_eq!(rig.asked(), 0, "it is early");
        for _ in 0..8 {
            rig.pass(TTL).await;
        }
        let state = rig.until("renewals", |state| state.renewals >= 24).await;
        assert!(state.renewals <= 33, "a quarter of the lease apart at least: {}", state.renewals);
        assert!(state.confirmed_until > claimed.confirmed_until.after(TTL * 7));
        assert_eq!((state.attempts, state.lost), (0, None));
        assert!(rig.spy.inner.get(&rig.keeper.hold().name).await.is_ok());
    });
}

#[test]
fn an_outage_costs_few_attempts_and_is_not_the_loss() {
    run(async {
        let rig = Rig::new().await;
        *rig.spy.mood.lock() = Mood::Away;
        rig.pass(TTL).await;
        let doubtful = rig.until("doubt", |state| state.attempts > 0).await;
        assert_eq!(doubtful.lost, None);
        let before = rig.asked();
        rig.pass(GRACE / 2).await;
        let asked = rig.asked() - before;
        assert!((1..=20).contains(&asked), "{asked} attempts in {:?}", GRACE / 2);
        *rig.spy.mood.lock() = Mood::Good;
        rig.pass(TTL).await;
        // The store behind the spy was never away: it counted on, and what it says is passed on as it is.
        let expired = StoreError::LeaseExpired { fence: rig.keeper.hold().fence };
        assert_eq!(rig.lost().await, expired);
    });
}

#[test]
fn a_short_outage_leaves_no_trace() {
    run(async {
        let rig = Rig::new().await;
        *rig.spy.mood.lock() = Mood::Away;
        rig.pass(TTL / 2).await;
        rig.until("doubt", |state| state.attempts > 0).await;
        *rig.spy.mood.lock() = Mood::Good;
        rig.pass(TTL / 3).await;
        let state = rig.until("a renewal", |state| state.renewals == 1).await;
        assert_eq!((state.attempts, state.lost), (0, None));
    });
}

#[test]
fn nobody_keeps_trying_for_ever() {
    run(async {
        let rig = Rig::new().await;
        *rig.spy.mood.lock() = Mood::Away;
        rig.pass(TTL + GRACE * 2 / 3).await;
        assert_eq!(rig.keeper.state().lost, None);
        rig.pass(GRACE).await;
        assert!(matches!(rig.lost().await, StoreError::Unavailable { .. }));
        let asked = rig.asked();
        rig.pass(GRACE).await;
        assert_eq!(rig.asked(), asked, "it has stopped");
    });
}

#[test]
fn a_new_owner_ends_it_at_once() {
    run(async {
        let rig = Rig::new().await;
        let next = rig.spy.claim(&Claim { takeover: true, ..claim(2) }).await.unwrap();
        rig.pass(TTL).await;
        assert_eq!(rig.lost().await, StoreError::Fenced { current: next.fence });
        let asked = rig.asked();
        rig.pass(TTL).await;
        assert_eq!(rig.asked(), asked, "a refusal is not repeated");
    });
}

#[test]
fn releasing_and_stopping_end_it_and_dropping_says_nothing() {
    run(async {
        let rig = Rig::new().await;
        let (name, asked) = (rig.keeper.hold().name.clone(), rig.asked());
        rig.keeper.release().await.unwrap();
        assert_eq!(rig.spy.inner.get(&name).await.map(|_| ()), Err(StoreError::NotFound));
        assert_eq!(rig.spy.renewals.load(Ordering::SeqCst), asked);

        let rig = Rig::new().await;
        let hold = Keeper::stop(rig.keeper).await;
        rig.clock.advance(TTL - Duration::from_millis(1));
        assert_eq!(rig.spy.inner.renew(&hold).await, Ok(()), "it was neither renewed nor given back");

        let rig = Rig::new().await;
        let fence = rig.keeper.hold().fence;
        drop(rig.keeper);
        rig.clock.advance(TTL);
        tokio::task::yield_now().await;
        let expired = StoreError::LeaseExpired { fence };
        assert_eq!(rig.spy.inner.get(&name).await.map(|_| ()), Err(expired));
    });
}
