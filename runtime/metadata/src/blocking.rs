//! Stores for threads that are not asynchronous: the runtime, the command, C.
//!
//! [`Blocking`] owns a small tokio runtime with one thread, on which connections live. Its calls wait, for
//! at most the budget. Calling them from inside another tokio runtime would block it, and panics.

use core::time::Duration;
use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};

use crate::clock::{Clock, within};
use crate::drain::{self, Deregistration, Pinned, Quarantine, Stage};
use crate::error::{Result, StoreError};
use crate::ids::{Revision, Stamp, Version};
use crate::keeper::Keeper;
use crate::lease::Leased;
use crate::name::{Prefix, RecordName};
use crate::open::open;
use crate::publisher::Publisher;
use crate::record::PeerRecord;
use crate::refresh::{Observer, Reader, Refresher};
use crate::scope::{Guard, ResolveScope};
use crate::store::{
    Ack, Cell, Claim, Event, Filter, Health, Hold, Page, ReaderState, Snapshot, Store, Watch,
};
use crate::url::StoreUrl;

/// A store whose operations wait.
#[derive(Debug, Clone)]
pub struct Blocking {
    store: Arc<dyn Store>,
    runtime: Arc<Runtime>,
    clock: Clock,
    budget: Duration,
}

impl Blocking {
    /// Opens the store that a URL names.
    ///
    /// # Errors
    /// As [`open`]; [`StoreError::Unavailable`] if the system gives no thread.
    pub fn open(url: &StoreUrl, clock: Clock, budget: Duration) -> Result<Self> {
        let mut builder = Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("ibex-store").enable_all().build();
        let runtime = runtime.map_err(|_| StoreError::Unavailable { retry_after: Duration::ZERO })?;
        let store = runtime.block_on(async { open(url, clock.clone()) })?;
        Ok(Self { store, runtime: Arc::new(runtime), clock, budget })
    }

    /// The store itself, for tasks on [`Blocking::spawn`].
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The clock from which guards count.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Runs a task on the store's thread, for as long as this store is kept.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    fn wait<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(within(self.budget, operation))
    }

    /// See [`Store::claim`].
    ///
    /// # Errors
    /// As there.
    pub fn claim(&self, claim: &Claim) -> Result<Hold> {
        self.wait(self.store.claim(claim))
    }

    /// See [`Keeper::claim`]. What keeps the name runs on the store's thread.
    ///
    /// # Errors
    /// As there.
    pub fn keep(&self, claim: &Claim, grace: Duration) -> Result<Keeper> {
        self.wait(Keeper::claim(&self.store, claim, &self.clock, grace))
    }

    /// Waits for the loss of a kept name, at most this long; `None`: it is still kept.
    #[must_use]
    pub fn lost(&self, keeper: &Keeper, patience: Duration) -> Option<StoreError> {
        let lost = within(patience, async { Ok(keeper.lost().await) });
        self.runtime.block_on(lost).ok()
    }

    /// See [`Keeper::release`].
    ///
    /// # Errors
    /// As there.
    pub fn release_kept(&self, keeper: Keeper) -> Result<()> {
        self.wait(keeper.release())
    }

    /// Resolves a name for a request. See [`ResolveScope::resolve`].
    ///
    /// # Errors
    /// As there.
    pub fn resolve<'s>(&self, scope: &'s ResolveScope<'_>, name: &RecordName) -> Result<Guard<'s>> {
        self.wait(scope.resolve(name))
    }

    /// Publishes a change of a record. See [`Publisher::update`].
    ///
    /// # Errors
    /// As there.
    pub fn update(&self, publisher: &Publisher, change: impl FnOnce(&mut PeerRecord)) -> Result<Stamp> {
        self.wait(publisher.update(change))
    }

    /// Keeps what is known of peers fresh, on the store's thread. See [`Refresher::spawn`].
    #[must_use]
    pub fn refresh(&self, prefix: Prefix, observer: Arc<dyn Observer>, reader: Option<Reader>) -> Refresher {
        let _inside = self.runtime.enter();
        Refresher::spawn(&self.store, &self.clock, prefix, observer, reader)
    }

    /// Begins to take buffers back, on the store's thread. See [`drain::deregister`].
    ///
    /// # Errors
    /// As there.
    pub fn deregister(
        &self,
        publisher: &Arc<Publisher>,
        buffers: Vec<Box<dyn Pinned>>,
        quarantine: &Arc<Quarantine>,
        budget: Duration,
    ) -> Result<Deregistration, (StoreError, Vec<Box<dyn Pinned>>)> {
        let begun = drain::deregister(publisher, buffers, quarantine, &self.clock, budget);
        self.runtime.block_on(begun)
    }

    /// The end of a deregistration, or how far it is after so long.
    #[must_use]
    pub fn deregistered(&self, deregistration: &Deregistration, patience: Duration) -> Stage {
        let done = within(patience, async { Ok(deregistration.done().await) });
        self.runtime.block_on(done).unwrap_or_else(|_| deregistration.stage())
    }

    /// See [`Store::publish`].
    ///
    /// # Errors
    /// As there.
    pub fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        self.wait(self.store.publish(hold, expect, record))
    }

    /// See [`Store::renew`].
    ///
    /// # Errors
    /// As there.
    pub fn renew(&self, hold: &Hold) -> Result<()> {
        self.wait(self.store.renew(hold))
    }

    /// See [`Store::release`].
    ///
    /// # Errors
    /// As there.
    pub fn release(&self, hold: &Hold) -> Result<()> {
        self.wait(self.store.release(hold))
    }

    /// See [`Store::get`].
    ///
    /// # Errors
    /// As there.
    pub fn get(&self, name: &RecordName) -> Result<Leased<Arc<Snapshot>>> {
        self.wait(self.store.get(name))
    }

    /// See [`Store::batch_get`].
    ///
    /// # Errors
    /// As there.
    pub fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        self.wait(self.store.batch_get(names))
    }

    /// See [`Store::list`].
    ///
    /// # Errors
    /// As there.
    pub fn list(&self, filter: &Filter) -> Result<Page> {
        self.wait(self.store.list(filter))
    }

    /// See [`Store::watch`].
    ///
    /// # Errors
    /// As there.
    pub fn watch(&self, prefix: &Prefix, from: Revision) -> Result<BlockingWatch> {
        let watch = self.wait(self.store.watch(prefix, from))?;
        Ok(BlockingWatch { watch, runtime: Arc::clone(&self.runtime) })
    }

    /// See [`Store::ack`].
    ///
    /// # Errors
    /// As there.
    pub fn ack(&self, ack: &Ack) -> Result<()> {
        self.wait(self.store.ack(ack))
    }

    /// See [`Store::readers`].
    ///
    /// # Errors
    /// As there.
    pub fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        self.wait(self.store.readers(name))
    }

    /// See [`Store::read_cell`].
    ///
    /// # Errors
    /// As there.
    pub fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        self.wait(self.store.read_cell(name))
    }

    /// See [`Store::swap_cell`].
    ///
    /// # Errors
    /// As there.
    pub fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        self.wait(self.store.swap_cell(name, expect, value))
    }

    /// See [`Store::health`].
    ///
    /// # Errors
    /// As there.
    pub fn health(&self) -> Result<Health> {
        self.wait(self.store.health())
    }
}

/// A watch whose next event is waited for.
#[derive(Debug)]
pub struct BlockingWatch {
    watch: Watch,
    runtime: Arc<Runtime>,
}

impl BlockingWatch {
    /// The next event, or `None` if there was none for so long.
    ///
    /// # Errors
    /// Whatever ended the watch.
    pub fn next(&mut self, patience: Duration) -> Result<Option<Event>> {
        match self.runtime.block_on(within(patience, self.watch.next())) {
            Ok(event) => Ok(Some(event)),
            Err(StoreError::Deadline { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::InstanceId;
    use crate::store::Change;

    #[test]
    fn a_thread_without_a_runtime_uses_a_store() {
        let budget = Duration::from_secs(60);
        let store = Blocking::open(&StoreUrl::Memory, Clock::system(), budget).unwrap();
        let mut watch = store.watch(&Prefix::all(), Revision(0)).unwrap();
        assert_eq!(watch.next(Duration::from_millis(1)), Ok(None));
        let name = RecordName::parse("a/b/c").unwrap();
        let instance = InstanceId::new(7).unwrap();
        let claim = Claim { name: name.clone(), instance, ttl: budget, takeover: false };
        let hold = store.claim(&claim).unwrap();
        assert!(store.get(&name).unwrap().check(store.clock().now()).is_ok());
        let event = watch.next(budget).unwrap().unwrap();
        assert!(matches!(event.change, Change::Put(_)));
        store.release(&hold).unwrap();
        assert_eq!(store.get(&name), Err(StoreError::NotFound));
        let keeper = store.keep(&claim, budget).unwrap();
        assert_eq!(store.lost(&keeper, Duration::from_millis(1)), None);
        store.release_kept(keeper).unwrap();
        assert_eq!(store.get(&name), Err(StoreError::NotFound));
    }
}
