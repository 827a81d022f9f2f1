//! Lease-checked reads of one request: what is asked, how often, and what fails alone.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::clock::Clock;
use ibex_metadata::error::{Corruption, Result, StoreError};
use ibex_metadata::ids::{InstanceId, Revision, Version};
use ibex_metadata::lease::Leased;
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::record::PeerRecord;
use ibex_metadata::scope::Request;
use ibex_metadata::store::{
    Ack, Cell, Claim, Filter, Health, Hold, Page, ReaderState, Snapshot, Store, Watch,
};
use parking_lot::Mutex;

const TTL: Duration = Duration::from_secs(10);

/// A store that writes down what it is asked for, can be away, and can miscount.
#[derive(Debug)]
struct Spy {
    inner: LocalStore,
    asked: Mutex<Vec<Vec<String>>>,
    mood: Mutex<Mood>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mood {
    Good,
    Away,
    Short,
}

#[async_trait]
impl Store for Spy {
    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        self.asked.lock().push(names.iter().map(|name| name.parts().2.to_owned()).collect());
        let mood = *self.mood.lock();
        if mood == Mood::Away {
            return Err(StoreError::Unavailable { retry_after: TTL });
        }
        let mut outcomes = self.inner.batch_get(names).await?;
        if mood == Mood::Short {
            outcomes.pop();
        }
        Ok(outcomes)
    }

    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        self.inner.claim(claim).await
    }
    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        self.inner.publish(hold, expect, record).await
    }
    async fn renew(&self, hold: &Hold) -> Result<()> {
        self.inner.renew(hold).await
    }
    async fn release(&self, hold: &Hold) -> Result<()> {
        self.inner.release(hold).await
    }
    async fn list(&self, filter: &Filter) -> Result<Page> {
        self.inner.list(filter).await
    }
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        self.inner.watch(prefix, from).await
    }
    async fn ack(&self, ack: &Ack) -> Result<()> {
        self.inner.ack(ack).await
    }
    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        self.inner.readers(name).await
    }
    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        self.inner.read_cell(name).await
    }
    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        self.inner.swap_cell(name, expect, value).await
    }
    async fn health(&self) -> Result<Health> {
        self.inner.health().await
    }
}

fn name(text: &str) -> RecordName {
    RecordName::new("c", "g", text).unwrap()
}

impl Spy {
    fn new(clock: &Clock) -> Self {
        let inner = LocalStore::memory(clock.clone());
        Self { inner, asked: Mutex::default(), mood: Mutex::new(Mood::Good) }
    }

    async fn claimed(&self, text: &str) -> Hold {
        let instance = InstanceId::new(1).unwrap();
        self.claim(&Claim { name: name(text), instance, ttl: TTL, takeover: false }).await.unwrap()
    }

    fn asked(&self) -> Vec<Vec<String>> {
        std::mem::take(&mut self.asked.lock())
    }
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn what_is_known_is_not_asked_again_not_even_a_miss() {
    run(async {
        let clock = Clock::manual();
        let store = Spy::new(&clock);
        store.claimed("a").await;
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
        let store = Spy::new(&clock);
        let (short, long) = (store.claimed("short").await, store.claimed("long").await);
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
        let store = Spy::new(&clock);
        let hold = store.claimed("a").await;
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
        let store = Spy::new(&clock);
        let hold = store.claimed("a").await;
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
