//! Stores inside this process: in memory, or in memory and in a redb file.
//!
//! [`LocalStore`] owns the table of rows and, for `redb:`, the file. Reads take a shared lock and see only
//! what is durable; writes go one at a time: plan, write down, apply. Once begun, a write runs to its end
//! even if whoever asked for it has stopped waiting.

use core::time::Duration;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::RwLock;
use tokio::sync::{Mutex, watch};

use crate::clock::Clock;
use crate::error::{Result, StoreError};
use crate::ids::{Revision, Version};
#[cfg(feature = "redb")]
use crate::journal::Journal;
use crate::lease::{Leased, Moment};
use crate::limits::WATCH_QUEUE_LEN;
use crate::name::{Prefix, RecordName};
use crate::record::PeerRecord;
use crate::store::{
    Ack, Cell, Claim, Event, Filter, Health, Hold, Page, ReaderState, Snapshot, Store, Watch, WatchSource,
    check_batch, check_page,
};
use crate::table::rules::{Claimed, check_owner};
use crate::table::{Planned, Table};

/// How often a store gives a sign of life to itself, to tell a stall from idleness.
const BEAT_PERIOD: Duration = Duration::from_millis(200);

/// A store in this process. Clones share it; each may have a clock of its own, as clients do.
#[derive(Debug, Clone)]
pub struct LocalStore {
    shared: Arc<Shared>,
    /// The client's clock, from which guards count.
    clock: Clock,
}

#[derive(Debug)]
struct Shared {
    table: RwLock<Table>,
    writer: Arc<Mutex<()>>,
    #[cfg(feature = "redb")]
    journal: Option<Journal>,
    /// The store's clock, by which leases run.
    clock: Clock,
    opened_at: Moment,
    /// Sends the newest revision.
    changed: watch::Sender<Revision>,
}

/// Keeps a store's sign of life going; dropping it stops that.
#[derive(Debug)]
pub struct Heartbeat(tokio::task::JoinHandle<()>);

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl LocalStore {
    /// An empty store that lives as long as the process.
    #[must_use]
    pub fn memory(clock: Clock) -> Self {
        let shared = Shared {
            table: RwLock::default(),
            writer: Arc::default(),
            #[cfg(feature = "redb")]
            journal: None,
            opened_at: clock.now(),
            clock: clock.clone(),
            changed: watch::Sender::default(),
        };
        Self { shared: Arc::new(shared), clock }
    }

    /// The store in this file, which is created if it is not there. Leases start anew.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] if another process has the file or the disk fails;
    /// [`StoreError::Corrupt`] for a file with other contents, of which nothing is then used.
    #[cfg(feature = "redb")]
    pub fn redb(path: &Path, clock: Clock) -> Result<Self> {
        let opened_at = clock.now();
        let (journal, table) = Journal::open(path, opened_at)?;
        let shared = Shared {
            changed: watch::Sender::new(table.revision()),
            table: RwLock::new(table),
            writer: Arc::default(),
            journal: Some(journal),
            opened_at,
            clock: clock.clone(),
        };
        Ok(Self { shared: Arc::new(shared), clock })
    }

    /// The same store as another client sees it, whose clock shows something else.
    #[must_use]
    pub fn with_client_clock(&self, clock: Clock) -> Self {
        Self { shared: Arc::clone(&self.shared), clock }
    }

    /// Gives signs of life as long as the answer is kept, so that leases get the time back during which
    /// this process, and with it the store, was stopped. For servers; must run inside tokio.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        let shared = Arc::clone(&self.shared);
        Heartbeat(tokio::spawn(async move {
            loop {
                let now = shared.clock.now();
                shared.table.write().beat(now);
                shared.clock.sleep_until(now.after(BEAT_PERIOD)).await;
            }
        }))
    }

    /// Plans and carries out one change. `plan` answers what the caller gets, and what is to be done.
    async fn write<R: Send + 'static>(
        &self,
        plan: impl FnOnce(&Table, Moment) -> Result<(R, Step)> + Send + 'static,
    ) -> Result<R> {
        let shared = Arc::clone(&self.shared);
        let turn = Arc::clone(&shared.writer).lock_owned().await;
        #[cfg(feature = "redb")]
        if shared.journal.is_some() {
            // On a thread that may wait for the disk; the turn goes along, so that it ends with the write.
            let work = tokio::task::spawn_blocking(move || {
                let result = shared.write(plan);
                drop(turn);
                result
            });
            // The runtime is shutting down: nothing was, or will be, acknowledged.
            let gone = StoreError::Unavailable { retry_after: Duration::ZERO };
            return work.await.map_err(|_| gone)?;
        }
        let result = shared.write(plan);
        drop(turn);
        result
    }
}

/// What a legal request needs.
enum Step {
    /// A lease started anew: in memory only.
    Renew(Hold),
    /// A change in memory only.
    Apply(Planned),
    /// A change that is written down first.
    Record(Planned),
}

impl Shared {
    fn now(&self) -> Moment {
        self.clock.now()
    }

    /// Runs with the turn held: nobody else plans or applies, so the plan still holds when it is applied.
    fn write<R>(&self, plan: impl FnOnce(&Table, Moment) -> Result<(R, Step)>) -> Result<R> {
        let now = self.now();
        self.table.write().observe(now);
        let (reply, step) = plan(&self.table.read(), now)?;
        match step {
            Step::Renew(hold) => self.table.write().renew(&hold, now)?,
            Step::Apply(planned) => self.apply(planned),
            Step::Record(planned) => {
                #[cfg(feature = "redb")]
                if let Some(journal) = &self.journal {
                    journal.write(&self.table.read(), &planned, now)?;
                }
                self.apply(planned);
            }
        }
        Ok(reply)
    }

    /// Time is read again: writing down took some, and a lease counts from when it is granted.
    fn apply(&self, planned: Planned) {
        let revision = self.table.write().apply(planned, self.now());
        self.changed.send_replace(revision);
    }
}

#[async_trait]
impl Store for LocalStore {
    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        let claim = claim.clone();
        self.write(move |table, now| {
            Ok(match table.claim(&claim, now)? {
                Claimed::Again(hold) => (hold.clone(), Step::Renew(hold)),
                Claimed::Anew(hold, planned) => (hold, Step::Record(planned)),
            })
        })
        .await
    }

    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        check_owner(record, hold)?;
        let (hold, encoded) = (hold.clone(), record.encode()?);
        self.write(move |table, now| {
            let (version, planned) = table.publish(&hold, expect, encoded, now)?;
            Ok((version, Step::Record(planned)))
        })
        .await
    }

    async fn renew(&self, hold: &Hold) -> Result<()> {
        let now = self.shared.now();
        let mut table = self.shared.table.write();
        table.observe(now);
        table.renew(hold, now)
    }

    async fn release(&self, hold: &Hold) -> Result<()> {
        let hold = hold.clone();
        self.write(move |table, now| Ok(((), Step::Record(table.release(&hold, now)?)))).await
    }

    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        check_batch(names.len())?;
        let asked_at = self.clock.now();
        let now = self.shared.now();
        let table = self.shared.observed(now);
        let lease = |(snapshot, remaining): (Arc<Snapshot>, Duration)| {
            let stamp = snapshot.stamp;
            Leased::new(snapshot, stamp, asked_at, remaining)
        };
        Ok(names.iter().map(|name| table.get(name, now).map(lease)).collect())
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        check_page(filter)?;
        let now = self.shared.now();
        Ok(self.shared.observed(now).list(filter, now))
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        let shared = Arc::clone(&self.shared);
        Ok(Watch::new(LocalWatch { shared, prefix: prefix.clone(), at: from, ready: VecDeque::new() }))
    }

    async fn ack(&self, ack: &Ack) -> Result<()> {
        let ack = ack.clone();
        self.write(move |table, now| {
            let (planned, is_new) = table.ack(&ack, now)?;
            Ok(((), if is_new { Step::Record(planned) } else { Step::Apply(planned) }))
        })
        .await
    }

    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        let now = self.shared.now();
        self.shared.observed(now).readers(name, now)
    }

    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        self.shared.table.read().cell(name)
    }

    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        let (name, value) = (name.clone(), value.to_vec());
        self.write(move |table, _| {
            let (version, planned) = table.swap(&name, expect, &value)?;
            Ok((version, Step::Record(planned)))
        })
        .await
    }

    async fn health(&self) -> Result<Health> {
        #[cfg(feature = "redb")]
        if let Some(journal) = &self.shared.journal {
            journal.probe()?;
        }
        let now = self.shared.now();
        let table = self.shared.observed(now);
        Ok(Health {
            up_for: now.since(self.shared.opened_at),
            revision: table.revision(),
            num_names: table.num_names() as u64,
        })
    }
}

impl Shared {
    /// The table for reading, after time has passed in it: a stall is forgiven before anybody reads an
    /// expiry out of it.
    fn observed(&self, now: Moment) -> parking_lot::RwLockReadGuard<'_, Table> {
        let is_due = self.table.read().is_due(now);
        if is_due {
            let mut table = self.table.write();
            table.observe(now);
            self.changed.send_replace(table.revision());
        }
        self.table.read()
    }
}

/// A watch on a store of this process: no task, no queue beyond one handful of events.
struct LocalWatch {
    shared: Arc<Shared>,
    prefix: Prefix,
    at: Revision,
    ready: VecDeque<Event>,
}

#[async_trait]
impl WatchSource for LocalWatch {
    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            // Subscribed before looking, so that no change falls between looking and waiting.
            let mut changed = self.shared.changed.subscribe();
            let deadline = {
                let table = self.shared.observed(self.shared.now());
                let (events, at) = table.events(&self.prefix, self.at, WATCH_QUEUE_LEN);
                self.at = at;
                self.ready = events.into();
                table.next_deadline()
            };
            if !self.ready.is_empty() {
                continue;
            }
            let until_deadline = async {
                match deadline {
                    Some(deadline) => self.shared.clock.sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The sender lives in `self.shared`.
                _ = changed.changed() => {}
                () = until_deadline => {}
            }
        }
    }
}
