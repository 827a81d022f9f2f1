//! A store between a test and a store of this process, that can misbehave.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::error::{Result, StoreError};
use ibex_metadata::ids::{Revision, Version};
use ibex_metadata::lease::Leased;
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::record::PeerRecord;
use ibex_metadata::store::{
    Ack, Cell, Claim, Event, Filter, Health, Hold, Page, ReaderState, Snapshot, Store, Watch, WatchSource,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

/// A store that writes down what it is asked for, can be away, and can miscount.
#[derive(Debug)]
pub(crate) struct Spy {
    pub(crate) inner: LocalStore,
    asked: Mutex<Vec<Vec<String>>>,
    pub(crate) mood: Mutex<Mood>,
    /// Batches need one of these each; none left: they wait.
    pub(crate) passes: Semaphore,
    /// Their answers need one of these each to leave.
    pub(crate) replies: Semaphore,
    /// Answers that are made, also if they have not left.
    pub(crate) made: AtomicU64,
    /// Ends the watches that it gave out.
    pub(crate) cut: Arc<Notify>,
    /// Renewals that it was asked for.
    pub(crate) renewals: AtomicU64,
    /// Readers' words for owners.
    pub(crate) acks: AtomicU64,
}

impl Spy {
    pub(crate) fn new(inner: LocalStore) -> Self {
        let passes = Semaphore::new(Semaphore::MAX_PERMITS);
        let mood = Mutex::new(Mood::Good);
        let replies = Semaphore::new(Semaphore::MAX_PERMITS);
        let [made, renewals, acks] = [0; 3].map(AtomicU64::new);
        Self {
            inner,
            asked: Mutex::default(),
            mood,
            passes,
            replies,
            made,
            cut: Arc::default(),
            renewals,
            acks,
        }
    }

    fn there(&self) -> Result<()> {
        match *self.mood.lock() {
            Mood::Away => Err(StoreError::Unavailable { retry_after: Duration::ZERO }),
            Mood::Busy => Err(StoreError::Unavailable { retry_after: Duration::from_secs(1) }),
            _ => Ok(()),
        }
    }

    /// The batches since the last look, by the last parts of their names.
    pub(crate) fn asked(&self) -> Vec<Vec<String>> {
        std::mem::take(&mut self.asked.lock())
    }
}

/// How it answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Mood {
    Good,
    /// As if it could not be reached.
    Away,
    /// Away, and it says for how long.
    Busy,
    /// It reads, and does not listen.
    Deaf,
    /// With one outcome too few.
    Short,
    /// With the outcomes in another order.
    Reversed,
}

#[async_trait]
impl Store for Spy {
    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        self.asked.lock().push(names.iter().map(|name| name.parts().2.to_owned()).collect());
        let _pass = self.passes.acquire().await;
        let mood = *self.mood.lock();
        self.there()?;
        let mut outcomes = self.inner.batch_get(names).await?;
        if mood == Mood::Short {
            outcomes.pop();
        }
        if mood == Mood::Reversed {
            outcomes.reverse();
        }
        self.made.fetch_add(1, Ordering::SeqCst);
        let _reply = self.replies.acquire().await;
        Ok(outcomes)
    }

    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        self.inner.claim(claim).await
    }
    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        self.there()?;
        self.inner.publish(hold, expect, record).await
    }
    async fn renew(&self, hold: &Hold) -> Result<()> {
        self.renewals.fetch_add(1, Ordering::SeqCst);
        self.there()?;
        self.inner.renew(hold).await
    }
    async fn release(&self, hold: &Hold) -> Result<()> {
        self.inner.release(hold).await
    }
    async fn list(&self, filter: &Filter) -> Result<Page> {
        self.inner.list(filter).await
    }
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        let (inner, cut) = (self.inner.watch(prefix, from).await?, self.cut.clone());
        Ok(Watch::new(CutWatch { inner, cut }))
    }
    async fn ack(&self, ack: &Ack) -> Result<()> {
        self.acks.fetch_add(1, Ordering::SeqCst);
        if *self.mood.lock() == Mood::Deaf {
            return Err(StoreError::Unavailable { retry_after: Duration::ZERO });
        }
        self.inner.ack(ack).await
    }
    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        self.there()?;
        self.inner.readers(name).await
    }
    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        self.inner.read_cell(name).await
    }
    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        self.inner.swap_cell(name, expect, value).await
    }
    async fn health(&self) -> Result<Health> {
        self.there()?;
        self.inner.health().await
    }
}

/// A watch that ends when the spy is told to.
struct CutWatch {
    inner: Watch,
    cut: Arc<Notify>,
}

#[async_trait]
impl WatchSource for CutWatch {
    async fn next(&mut self) -> Result<Event> {
        tokio::select! {
            event = self.inner.next() => event,
            () = self.cut.notified() => Err(StoreError::Unavailable { retry_after: Duration::ZERO }),
        }
    }
}
