//! A [`Board`] on a metadata store: one task on the store's thread reads and writes, the keeper never waits.
//!
//! ```text
//!  cluster/group/view           the view                        changed by compare-and-set alone
//!  cluster/group/row-3          the row of rank 3               written by the holder of rank-3 alone
//!  cluster/group/offers-3       the offers of rank 3            likewise
//!  cluster/group/placement-2    a placement of version 2 mod 4  its version stands in front of it
//!  cluster/group/rank-3         the name that rank 3 claims     leased, fenced; its record: port, queue pairs
//! ```
//!
//! The task lives in one of two states. Away: it asks for the store's health, ever less often. There: it began a watch
//! before it listed, so nothing falls between; it writes what is pinned and tells what changed. Whatever fails leads
//! back to away, and to [`BoardEvent::Unavailable`]; nothing that was pinned is lost by it.
//!
//! INVARIANT: the answer to a compare-and-set is told only if the store gave one. A row is written again if somebody
//! else wrote it: an older incarnation that does not know yet that it is fenced.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ibex_metadata::blocking::Blocking;
use ibex_metadata::error::{Result, StoreError};
use ibex_metadata::ids::InstanceId;
use ibex_metadata::keeper::Keeper as LeaseKeeper;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::publisher::Publisher;
use ibex_metadata::store::{Claim, Snapshot};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use super::{Records, Whereabouts};
use crate::ids::Rank;
use crate::membership::{Board, BoardEvent, Claimed, Instance};

mod task;

use task::Task;

/// Where a group keeps what it agrees on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupName {
    /// The first part of every name: who shares the store.
    pub cluster: String,
    /// The second part: one group of ranks.
    pub group: String,
}

impl GroupName {
    fn name(&self, last: &str) -> Result<RecordName> {
        Ok(RecordName::new(&self.cluster, &self.group, last)?)
    }
}

/// What is to be written.
#[derive(Default)]
struct Wishes {
    row: Pinned,
    offers: Pinned,
    placements: Vec<(u32, Vec<u8>)>,
    cas: Option<(u64, Vec<u8>)>,
    /// What the own record is to say, until it does.
    whereabouts: Option<Whereabouts>,
}

/// A cell of which only the newest content matters.
#[derive(Default)]
struct Pinned {
    bytes: Option<Vec<u8>>,
    is_written: bool,
}

impl Pinned {
    fn set(&mut self, bytes: Vec<u8>) {
        if self.bytes.as_ref() != Some(&bytes) {
            *self = Self { bytes: Some(bytes), is_written: false };
        }
    }

    fn to_write(&self) -> Option<Vec<u8>> {
        self.bytes.as_ref().filter(|_| !self.is_written).cloned()
    }

    fn written(&mut self, bytes: &[u8]) {
        self.is_written = self.bytes.as_deref() == Some(bytes);
    }
}

/// What the board and its task share.
#[derive(Default)]
struct Shared {
    wishes: Mutex<Wishes>,
    wished: Notify,
    is_over: AtomicBool,
    is_rung: AtomicBool,
    events: Mutex<VecDeque<BoardEvent>>,
    /// The newest records of peers that nobody has taken.
    records: Mutex<BTreeMap<Rank, Arc<Snapshot>>>,
    happened: Condvar,
    /// Why the store counts as away.
    trouble: Mutex<Option<StoreError>>,
}

impl Shared {
    fn wish(&self, change: impl FnOnce(&mut Wishes)) {
        change(&mut self.wishes.lock());
        self.wished.notify_one();
    }

    fn tell(&self, event: BoardEvent) {
        self.events.lock().push_back(event);
        self.happened.notify_all();
    }
}

/// Waits for what a board, or somebody else, has to tell. See [`StoreBoard::bell`].
#[derive(Clone)]
pub struct Bell(Arc<Shared>);

impl Bell {
    /// Wakes who waits, or who waits next.
    pub fn ring(&self) {
        self.0.is_rung.store(true, Ordering::Release);
        drop(self.0.events.lock());
        self.0.happened.notify_all();
    }

    /// Returns once the board has something to tell, or after `patience`.
    pub fn wait(&self, patience: Duration) {
        let mut events = self.0.events.lock();
        let is_rung = self.0.is_rung.swap(false, Ordering::AcqRel);
        if events.is_empty() && !is_rung {
            self.0.happened.wait_for(&mut events, patience);
        }
    }
}

/// A board on a metadata store. See the module documentation.
pub struct StoreBoard {
    shared: Arc<Shared>,
    claimed: Claimed,
    store: Blocking,
    publisher: Arc<Publisher>,
    lease: Option<LeaseKeeper>,
}

/// Whose board it is.
#[derive(Clone, Debug)]
pub struct BoardClaim {
    /// Where the group keeps what it agrees on.
    pub group: GroupName,
    /// Which of its names to claim.
    pub rank: Rank,
    /// Names in the group.
    pub num_ranks: u32,
    /// For which process.
    pub instance: Instance,
    /// How long a lease lives without renewal.
    pub lease_ttl: Duration,
    /// Take the name from a holder whose lease still runs: for those who know that it is dead.
    pub takeover: bool,
    /// How long an outage of the store may last before the name is given up.
    pub grace: Duration,
}

impl StoreBoard {
    /// Claims the rank's name and begins to read and to write.
    ///
    /// # Errors
    /// As [`ibex_metadata::store::Store::claim`]: [`StoreError::Held`] while another process's lease runs, unless
    /// `takeover`.
    pub fn claim(store: &Blocking, what: &BoardClaim) -> Result<Self> {
        let instance = InstanceId::new(what.instance.0).ok_or(StoreError::NotFound)?;
        let name = what.group.name(&rank_name(what.rank))?;
        let claim = Claim { name, instance, ttl: what.lease_ttl, takeover: what.takeover };
        let lease = store.keep(&claim, what.grace)?;
        let claimed = Claimed { rank: what.rank, instance: what.instance, fence: lease.hold().fence.0 };
        let shared = Arc::new(Shared::default());
        let prefix = Prefix::parse(&format!("{}/{}", what.group.cluster, what.group.group))?;
        let publisher = Arc::new(Publisher::new(store.store(), lease.hold().clone()));
        let task = Task::new(Arc::clone(&shared), store, prefix, what, claimed, Arc::clone(&publisher));
        let lost = lease.subscribe();
        store.spawn(task.run(lost));
        Ok(Self { shared, claimed, store: store.clone(), publisher, lease: Some(lease) })
    }

    /// Under which fence the name was claimed.
    #[must_use]
    pub const fn claimed(&self) -> Claimed {
        self.claimed
    }

    /// Peers' records, and the own one.
    #[must_use]
    pub fn records(&self) -> StoreRecords {
        StoreRecords(Arc::clone(&self.shared))
    }

    /// What publishes the own record, change by change; the board's changes go the same way.
    #[must_use]
    pub fn publisher(&self) -> Arc<Publisher> {
        Arc::clone(&self.publisher)
    }

    /// What to wait on between two looks at the board.
    #[must_use]
    pub fn bell(&self) -> Bell {
        Bell(Arc::clone(&self.shared))
    }

    /// Why the store counts as away; none while it answers.
    #[must_use]
    pub fn trouble(&self) -> Option<StoreError> {
        self.shared.trouble.lock().clone()
    }

    /// Gives the name back: peers see at once that this rank is gone.
    ///
    /// # Errors
    /// As [`ibex_metadata::store::Store::release`].
    pub fn release(mut self) -> Result<()> {
        match self.lease.take() {
            Some(lease) => self.store.release_kept(lease),
            None => Ok(()),
        }
    }
}

impl Board for StoreBoard {
    fn put_row(&mut self, row: Vec<u8>) {
        self.shared.wish(|wishes| wishes.row.set(row));
    }

    fn put_offers(&mut self, offers: Vec<u8>) {
        self.shared.wish(|wishes| wishes.offers.set(offers));
    }

    fn put_placement(&mut self, version: u32, placement: Vec<u8>) {
        self.shared.wish(|wishes| wishes.placements.push((version, placement)));
    }

    fn cas_view(&mut self, expect: u64, view: Vec<u8>) {
        self.shared.wish(|wishes| wishes.cas = Some((expect, view)));
    }

    fn poll(&mut self) -> Option<BoardEvent> {
        self.shared.events.lock().pop_front()
    }
}

/// The records of a [`StoreBoard`]'s group.
pub struct StoreRecords(Arc<Shared>);

impl Records for StoreRecords {
    fn put_whereabouts(&mut self, whereabouts: Whereabouts) {
        self.0.wish(|wishes| wishes.whereabouts = Some(whereabouts));
    }

    fn poll_record(&mut self) -> Option<(Rank, Arc<Snapshot>)> {
        self.0.records.lock().pop_first()
    }
}

impl Drop for StoreBoard {
    fn drop(&mut self) {
        // Neither waits nor tells the store anything: the lease runs out.
        self.shared.is_over.store(true, Ordering::Release);
        self.shared.wished.notify_one();
    }
}

fn rank_name(rank: Rank) -> String {
    format!("rank-{}", rank.0)
}
