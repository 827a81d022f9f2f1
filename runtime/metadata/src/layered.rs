//! `layered+URL`: a cache of leased snapshots in front of any store.
//!
//! Owns the cache and one task that follows the store's changes and drops what changed. Writes go through
//! and fail if the store fails. A cached snapshot is given out only within the lease that came with it, so
//! an outage is bridged for as long as the owner had been granted, and no longer.
//!
//! In front of the cache proper stands a plain map of what was used lately: moka counts uses and reads the
//! clock on every look, which takes longer than looking.
//!
//! INVARIANTS: a name is fetched by one caller at a time, others wait for that answer; an answer that a
//! change may have overtaken is given out but not kept; what is in the map in front was in the cache, and is
//! dropped with it; failures and absence are never kept. While the store is away nothing is dropped but what
//! runs out; when changes can be followed again, everything is, because some may have been missed.

use core::time::Duration;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use moka::sync::Cache;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::clock::Clock;
use crate::error::{Corruption, Result, StoreError};
use crate::ids::{Revision, Version};
use crate::lease::Leased;
use crate::name::{Prefix, RecordName};
use crate::record::PeerRecord;
use crate::store::{
    Ack, Cell, Claim, Filter, Health, Hold, Page, ReaderState, Snapshot, Store, Watch, check_batch,
};

/// Snapshots that the cache keeps at most.
const CAPACITY: u64 = 1 << 16;
/// Of them, those that are found without the cache's bookkeeping, at most; when full, begun anew.
const HOT_LEN_MAX: usize = 4096;
/// Pauses between attempts to follow the store again: doubled from the first to the last.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

type Outcome = Result<Leased<Arc<Snapshot>>>;
/// Turns to an outcome when whoever fetches has one; closed without one if it gave up.
type Flight = watch::Receiver<Option<Outcome>>;

/// A cache in front of a store.
#[derive(Debug)]
pub struct Layered {
    shared: Arc<Shared>,
    follower: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    inner: Arc<dyn Store>,
    clock: Clock,
    cache: Cache<RecordName, Leased<Arc<Snapshot>>>,
    hot: RwLock<HashMap<RecordName, Leased<Arc<Snapshot>>>>,
    /// Changes seen: an answer is kept only if none came while it was on its way.
    changes: AtomicU64,
    flights: Mutex<HashMap<RecordName, Flight>>,
}

impl Drop for Layered {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Layered {
    /// A cache in front of `inner`, whose guards count by `clock`. Must be called inside tokio.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, clock: Clock) -> Self {
        let shared = Arc::new(Shared {
            inner,
            clock,
            cache: Cache::new(CAPACITY),
            hot: RwLock::default(),
            changes: AtomicU64::new(0),
            flights: Mutex::default(),
        });
        let follower = tokio::spawn(follow(Arc::clone(&shared)));
        Self { shared, follower }
    }

    /// What the cache holds for a name, if its lease still runs: never waits, never asks.
    #[must_use]
    pub fn cached(&self, name: &RecordName) -> Option<Leased<Arc<Snapshot>>> {
        self.shared.cached(name)
    }
}

impl Shared {
    fn cached(&self, name: &RecordName) -> Option<Leased<Arc<Snapshot>>> {
        let now = self.clock.now();
        if let Some(leased) = self.hot.read().get(name)
            && leased.check(now).is_ok()
        {
            return Some(leased.clone());
        }
        let before = self.changes.load(Ordering::SeqCst);
        let leased = self.cache.get(name).filter(|leased| leased.check(now).is_ok())?;
        self.keep_in_front(name, &leased, before);
        Some(leased)
    }

    /// Puts what the cache held when `before` changes had been seen into the map in front.
    fn keep_in_front(&self, name: &RecordName, leased: &Leased<Arc<Snapshot>>, before: u64) {
        let mut hot = self.hot.write();
        // Under the lock that every change takes after it was counted: what it overtook is not kept.
        if self.changes.load(Ordering::SeqCst) == before {
            if hot.len() >= HOT_LEN_MAX {
                hot.clear();
            }
            hot.insert(name.clone(), leased.clone());
        }
    }

    fn drop_name(&self, name: &RecordName) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.cache.invalidate(name);
        self.hot.write().remove(name);
    }

    fn drop_all(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.cache.invalidate_all();
        self.hot.write().clear();
    }

    /// Fetches names in one batch, on behalf of everybody who waits for them.
    async fn fetch(&self, names: &[RecordName]) -> Result<Vec<Outcome>> {
        let before = self.changes.load(Ordering::SeqCst);
        let outcomes = self.inner.batch_get(names).await?;
        let (asked, got) = (names.len() as u64, outcomes.len() as u64);
        if asked != got {
            return Err(StoreError::Corrupt(Corruption::BatchLength { asked, got }));
        }
        for (name, outcome) in names.iter().zip(&outcomes) {
            let Ok(leased) = outcome else { continue };
            self.cache.insert(name.clone(), leased.clone());
            // After the insertion: a change from here on drops the entry itself.
            if self.changes.load(Ordering::SeqCst) != before {
                self.cache.invalidate(name);
            }
        }
        Ok(outcomes)
    }

    /// Splits names into those that this caller fetches, each under a flight that it must land, and those
    /// that somebody else is fetching.
    fn board(&self, names: &[RecordName]) -> (Vec<RecordName>, Landing<'_>, HashMap<RecordName, Flight>) {
        let (mut mine, mut senders, mut others) = (Vec::new(), Vec::new(), HashMap::new());
        let mut flights = self.flights.lock();
        for name in names {
            if let Some(flight) = flights.get(name) {
                others.insert(name.clone(), flight.clone());
                continue;
            }
            let (sender, flight) = watch::channel(None);
            flights.insert(name.clone(), flight);
            senders.push(sender);
            mine.push(name.clone());
        }
        drop(flights);
        let landing = Landing { shared: self, names: mine.clone(), senders };
        (mine, landing, others)
    }
}

/// The flights of one fetch. Dropped without outcomes, for example because the caller gave up, it lets
/// those who wait try for themselves.
struct Landing<'a> {
    shared: &'a Shared,
    names: Vec<RecordName>,
    senders: Vec<watch::Sender<Option<Outcome>>>,
}

impl Landing<'_> {
    fn land(self, outcomes: &Result<Vec<Outcome>>) {
        for (i, sender) in self.senders.iter().enumerate() {
            let outcome = match outcomes {
                Ok(outcomes) => outcomes[i].clone(),
                Err(error) => Err(error.clone()),
            };
            sender.send_replace(Some(outcome));
        }
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let mut flights = self.shared.flights.lock();
        for name in &self.names {
            flights.remove(name);
        }
    }
}

/// Drops what changes; and everything whenever it can follow again, as changes may have been missed.
async fn follow(shared: Arc<Shared>) {
    let mut pause = BACKOFF.0;
    loop {
        if follow_once(&shared).await {
            pause = BACKOFF.0;
        }
        // Nothing is dropped here: the leases bridge an outage.
        // Some of the pause is left to chance: caches that lost a store together do not return together.
        let share = shared.clock.now().0 % 256;
        let jittered = pause / 2 + pause * u32::try_from(share).unwrap_or(0) / 512;
        crate::clock::pause(jittered).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

/// Follows until the watch ends; `true` if it ever began.
async fn follow_once(shared: &Shared) -> bool {
    let Ok(health) = shared.inner.health().await else { return false };
    let Ok(mut watch) = shared.inner.watch(&Prefix::all(), health.revision).await else { return false };
    // What was cached before the watch began may have changed unseen.
    shared.drop_all();
    while let Ok(event) = watch.next().await {
        match event.change.name() {
            Some(name) => shared.drop_name(name),
            None => shared.drop_all(),
        }
    }
    true
}

#[async_trait]
impl Store for Layered {
    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        let claimed = self.shared.inner.claim(claim).await;
        self.shared.drop_name(&claim.name);
        claimed
    }

    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        let published = self.shared.inner.publish(hold, expect, record).await;
        // Also after a failure: whether a lost write took effect is not known.
        self.shared.drop_name(&hold.name);
        published
    }

    async fn renew(&self, hold: &Hold) -> Result<()> {
        self.shared.inner.renew(hold).await
    }

    async fn release(&self, hold: &Hold) -> Result<()> {
        let released = self.shared.inner.release(hold).await;
        self.shared.drop_name(&hold.name);
        released
    }

    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Outcome>> {
        check_batch(names.len())?;
        let mut found: HashMap<&RecordName, Outcome> = HashMap::new();
        let mut missing: Vec<RecordName> = Vec::new();
        for name in names {
            if found.contains_key(name) || missing.contains(name) {
                continue;
            }
            match self.shared.cached(name) {
                Some(leased) => drop(found.insert(name, Ok(leased))),
                None => missing.push(name.clone()),
            }
        }
        let fetched = self.fetch_missing(missing).await?;
        let outcome = |name: &RecordName| {
            found.get(name).or_else(|| fetched.get(name)).cloned().unwrap_or(Err(StoreError::NotFound))
        };
        Ok(names.iter().map(outcome).collect())
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        self.shared.inner.list(filter).await
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        self.shared.inner.watch(prefix, from).await
    }

    async fn ack(&self, ack: &Ack) -> Result<()> {
        self.shared.inner.ack(ack).await
    }

    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        self.shared.inner.readers(name).await
    }

    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        self.shared.inner.read_cell(name).await
    }

    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        self.shared.inner.swap_cell(name, expect, value).await
    }

    async fn health(&self) -> Result<Health> {
        self.shared.inner.health().await
    }
}

impl Layered {
    /// Fetches what nobody fetches yet, and waits for what others do.
    async fn fetch_missing(&self, mut missing: Vec<RecordName>) -> Result<HashMap<RecordName, Outcome>> {
        let mut fetched = HashMap::new();
        while !missing.is_empty() {
            let (mine, landing, others) = self.shared.board(&missing);
            missing.clear();
            if mine.is_empty() {
                drop(landing);
            } else {
                let outcomes = self.shared.fetch(&mine).await;
                landing.land(&outcomes);
                fetched.extend(mine.into_iter().zip(outcomes?));
            }
            for (name, mut flight) in others {
                let landed = flight.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone());
                match landed {
                    Some(outcome) => drop(fetched.insert(name, outcome)),
                    // Whoever fetched it gave up: it is this caller's turn.
                    None => missing.push(name),
                }
            }
        }
        Ok(fetched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::InstanceId;
    use crate::local::LocalStore;

    const TTL: Duration = Duration::from_secs(10);

    /// A cache that nobody follows a store for: it is told of changes by the test alone.
    struct Rig {
        clock: Clock,
        shared: Shared,
        hold: Hold,
    }

    impl Rig {
        async fn new() -> Self {
            let clock = Clock::manual();
            let inner = LocalStore::memory(clock.clone());
            let name = RecordName::parse("c/g/a").unwrap();
            let instance = InstanceId::new(1).unwrap();
            let hold = inner.claim(&Claim { name, instance, ttl: TTL, takeover: false }).await.unwrap();
            let shared = Shared {
                inner: Arc::new(inner),
                clock: clock.clone(),
                cache: Cache::new(CAPACITY),
                hot: RwLock::default(),
                changes: AtomicU64::new(0),
                flights: Mutex::default(),
            };
            Self { clock, shared, hold }
        }

        /// Fetches the record into the cache.
        async fn fetch(&self) -> Leased<Arc<Snapshot>> {
            let mut outcomes = self.shared.fetch(std::slice::from_ref(&self.hold.name)).await.unwrap();
            outcomes.remove(0).unwrap()
        }
    }

    #[tokio::test]
    async fn what_ran_out_is_given_out_by_neither_map() {
        let rig = Rig::new().await;
        rig.fetch().await;
        rig.clock.advance(TTL);
        assert_eq!(rig.shared.cached(&rig.hold.name), None, "from the cache");
        rig.shared
            .inner
            .claim(&Claim {
                name: rig.hold.name.clone(),
                instance: rig.hold.instance,
                ttl: TTL,
                takeover: false,
            })
            .await
            .unwrap();
        rig.fetch().await;
        assert!(rig.shared.cached(&rig.hold.name).is_some());
        rig.shared.cache.invalidate_all();
        assert!(rig.shared.cached(&rig.hold.name).is_some(), "from the map in front");
        rig.clock.advance(TTL);
        assert_eq!(rig.shared.cached(&rig.hold.name), None, "nor from there");
    }

    #[tokio::test]
    async fn what_a_change_overtook_on_the_way_to_the_front_is_not_kept() {
        let rig = Rig::new().await;
        let leased = rig.fetch().await;
        let before = rig.shared.changes.load(Ordering::SeqCst);
        rig.shared.drop_name(&rig.hold.name);
        rig.shared.keep_in_front(&rig.hold.name, &leased, before);
        assert_eq!(rig.shared.cached(&rig.hold.name), None);
        let before = rig.shared.changes.load(Ordering::SeqCst);
        rig.shared.drop_all();
        rig.shared.keep_in_front(&rig.hold.name, &leased, before);
        assert_eq!(rig.shared.cached(&rig.hold.name), None);
        let now = rig.shared.changes.load(Ordering::SeqCst);
        rig.shared.keep_in_front(&rig.hold.name, &leased, now);
        assert_eq!(rig.shared.cached(&rig.hold.name), Some(leased), "kept when nothing came between");
    }
}
