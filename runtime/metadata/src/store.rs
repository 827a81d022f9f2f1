//! What every store can do: [`Store`], and the values that go in and out.
//!
//! The trait is asynchronous, because most stores are a network away; the runtime, which is not, uses
//! [`crate::blocking::Blocking`]. Time is the store's business: leases are granted and counted by the
//! store's own clock, clients only ever see what remains.

use core::time::Duration;
use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;

use crate::error::{Bounded, InputError, Result, StoreError};
use crate::ids::{Fence, InstanceId, LeaseId, Revision, Stamp, Version};
use crate::lease::Leased;
use crate::limits::{BATCH_LEN_MAX, PAGE_LEN_MAX, TTL_MAX, TTL_MIN};
use crate::name::{Prefix, RecordName};
use crate::record::{Identity, PeerRecord};

/// A record as the store holds it, with what stands beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Where it is stored.
    pub name: RecordName,
    /// Which ownership, and which version under it; version 0: claimed, nothing published yet.
    pub stamp: Stamp,
    /// Who owns the name.
    pub identity: Identity,
    /// What the owner published; at version 0 [`PeerRecord::empty`].
    pub record: PeerRecord,
    /// The published bytes, verbatim; empty at version 0.
    pub encoded: Vec<u8>,
}

impl Snapshot {
    /// What a name holds right after a claim.
    #[must_use]
    pub fn claimed(name: &RecordName, fence: Fence, instance: InstanceId) -> Self {
        let identity = Identity::Instance(instance);
        let record = PeerRecord::empty(name, identity);
        let stamp = Stamp::new(fence, Version(0));
        Self { name: name.clone(), stamp, identity, record, encoded: Vec::new() }
    }

    /// A published snapshot from its bytes.
    ///
    /// # Errors
    /// As [`PeerRecord::decode`].
    pub fn decode(name: &RecordName, stamp: Stamp, identity: Identity, encoded: Vec<u8>) -> Result<Self> {
        let record = if encoded.is_empty() {
            PeerRecord::empty(name, identity)
        } else {
            PeerRecord::decode(&encoded)?
        };
        Ok(Self { name: name.clone(), stamp, identity, record, encoded })
    }
}

/// A wish to own a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The name.
    pub name: RecordName,
    /// Who claims it.
    pub instance: InstanceId,
    /// How long the owner may stay silent.
    pub ttl: Duration,
    /// Take the name even from an owner whose lease is alive.
    pub takeover: bool,
}

/// The ownership of a name, to be presented with every write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The name.
    pub name: RecordName,
    /// Who owns it.
    pub instance: InstanceId,
    /// Under which fence.
    pub fence: Fence,
    /// Which lease.
    pub lease: LeaseId,
    /// The lease's length; every renewal grants it anew.
    pub ttl: Duration,
}

/// Which names to list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Names under this prefix.
    pub prefix: Prefix,
    /// Only names after this one: [`Page::next`] of the page before.
    pub after: Option<RecordName>,
    /// Entries at most, up to [`PAGE_LEN_MAX`].
    pub limit: usize,
}

impl Filter {
    /// The first page under a prefix.
    #[must_use]
    pub fn under(prefix: Prefix) -> Self {
        Self { prefix, after: None, limit: PAGE_LEN_MAX }
    }
}

/// One entry of a listing. Listings show owned names, alive or not; they grant nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// What the store holds.
    pub snapshot: Arc<Snapshot>,
    /// What is left of the owner's lease; `None`: it ran out, the record is stale.
    pub remaining: Option<Duration>,
}

/// Part of a listing, in order of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// The entries.
    pub entries: Vec<Listed>,
    /// Where the next page starts; `None` at the end.
    pub next: Option<RecordName>,
    /// A watch from here misses nothing that happened after this page.
    pub revision: Revision,
}

/// One change that a watch saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// When, in the store's history. A watch resumed from here continues after it.
    pub revision: Revision,
    /// What.
    pub change: Change,
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A name has a new owner, or an owner published.
    Put(Arc<Snapshot>),
    /// The owner's lease ran out. The record is stale, not gone.
    Expired {
        /// The name.
        name: RecordName,
        /// Under which fence.
        fence: Fence,
    },
    /// The owner gave the name back.
    Released {
        /// The name.
        name: RecordName,
        /// Under which fence.
        fence: Fence,
    },
    /// A shared cell has another content.
    Cell {
        /// Its name.
        name: RecordName,
        /// Its new version.
        version: Version,
    },
    /// Changes up to here were lost to this watch: list again, then go on.
    Gap,
}

impl Change {
    /// The name that changed; none for a gap.
    #[must_use]
    pub fn name(&self) -> Option<&RecordName> {
        match self {
            Self::Put(snapshot) => Some(&snapshot.name),
            Self::Expired { name, .. } | Self::Released { name, .. } | Self::Cell { name, .. } => Some(name),
            Self::Gap => None,
        }
    }
}

/// Where a watch gets its events.
#[async_trait]
pub trait WatchSource: Send {
    /// The next event; never ends by itself. After an error the watch is over: resume from the last
    /// revision with a new one.
    async fn next(&mut self) -> Result<Event>;
}

/// A running watch.
pub struct Watch(Box<dyn WatchSource>);

impl Watch {
    /// A watch over this source.
    #[must_use]
    pub fn new(source: impl WatchSource + 'static) -> Self {
        Self(Box::new(source))
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// Whatever ended the watch, [`StoreError::Unavailable`] for a lost store.
    pub async fn next(&mut self) -> Result<Event> {
        self.0.next().await
    }
}

impl Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

/// "I use nothing of this name that is older than this stamp", for as long as `ttl`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// Whose snapshots are used.
    pub name: RecordName,
    /// Who uses them.
    pub reader: InstanceId,
    /// The oldest snapshot in use.
    pub stamp: Stamp,
    /// How long the reader may stay silent before it counts as gone.
    pub ttl: Duration,
}

/// A registered reader of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderState {
    /// Who.
    pub reader: InstanceId,
    /// The oldest snapshot it may be using.
    pub stamp: Stamp,
    /// What is left of its registration.
    pub remaining: Duration,
}

/// A value that a group shares and nobody owns: changed by compare-and-set alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    /// From 1.
    pub version: Version,
    /// Opaque to the store.
    pub value: Vec<u8>,
}

/// How a store is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// For how long it has been up without interruption. An expiry seen earlier than one TTL after a
    /// start is no evidence against an owner.
    pub up_for: Duration,
    /// Its newest change.
    pub revision: Revision,
    /// Owned names.
    pub num_names: u64,
}

impl Health {
    /// Whether the expiry of a lease of this length says anything about its owner: only if the owner had
    /// the chance to renew it all along.
    #[must_use]
    pub fn can_judge(&self, ttl: Duration) -> bool {
        self.up_for >= ttl
    }
}

/// A store of records.
///
/// All backends keep the same promises (see `contract`): an acknowledged write is durable to the degree
/// that the backend promises; a write under an old fence never succeeds; only one of several claims or
/// writes with the same expectation does; a lease expires by the store's clock, whatever clients' clocks say;
/// an outage expires nobody's lease.
#[async_trait]
pub trait Store: Send + Sync + Debug {
    /// Makes an instance the owner of a name, with an empty record at version 0 and a fence above all
    /// earlier ones. The instance that already holds it, alive, gets the same hold again, renewed: a
    /// claim whose answer was lost can be repeated.
    ///
    /// # Errors
    /// [`StoreError::Held`] while another instance's lease is alive, unless `takeover`.
    async fn claim(&self, claim: &Claim) -> Result<Hold>;

    /// Replaces the record, if the hold is the present one, its lease is alive, and the version is
    /// `expect`. The new version is `expect + 1`.
    ///
    /// # Errors
    /// [`StoreError::Fenced`], [`StoreError::LeaseExpired`], [`StoreError::Conflict`], in this order of
    /// precedence; [`StoreError::NotFound`]; a record that breaks a rule.
    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version>;

    /// Grants the lease anew, for its whole length.
    ///
    /// # Errors
    /// [`StoreError::Fenced`]; [`StoreError::LeaseExpired`]: it ran out first, claim again.
    async fn renew(&self, hold: &Hold) -> Result<()>;

    /// Gives the name back: the record is gone, the next claim needs no takeover.
    ///
    /// # Errors
    /// [`StoreError::Fenced`]; [`StoreError::LeaseExpired`] if it was given back, or ran out, before.
    async fn release(&self, hold: &Hold) -> Result<()>;

    /// Reads many names: as many outcomes, in the same order. An owner whose lease ran out gives
    /// [`StoreError::LeaseExpired`] for its name.
    ///
    /// # Errors
    /// Only what concerns the whole batch.
    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>>;

    /// Reads one name.
    ///
    /// # Errors
    /// As one outcome of [`Store::batch_get`].
    async fn get(&self, name: &RecordName) -> Result<Leased<Arc<Snapshot>>> {
        let mut outcomes = self.batch_get(std::slice::from_ref(name)).await?;
        let got = outcomes.len() as u64;
        match (outcomes.pop(), got) {
            (Some(outcome), 1) => outcome,
            _ => Err(StoreError::Corrupt(crate::error::Corruption::BatchLength { asked: 1, got })),
        }
    }

    /// Lists owned names in order, alive and stale.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] rather than an empty page.
    async fn list(&self, filter: &Filter) -> Result<Page>;

    /// Follows changes under a prefix, from after `from`. If the store does not remember that far back,
    /// the first event is [`Change::Gap`].
    ///
    /// # Errors
    /// If the watch cannot begin.
    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch>;

    /// Registers, or renews, a reader.
    ///
    /// # Errors
    /// [`StoreError::NotFound`]; [`StoreError::Conflict`] for a stamp that does not exist yet.
    async fn ack(&self, ack: &Ack) -> Result<()>;

    /// Readers whose registration runs. Those that ran out are gone.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>>;

    /// Reads a shared cell.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] before its first swap.
    async fn read_cell(&self, name: &RecordName) -> Result<Cell>;

    /// Replaces a shared cell's content if its version is `expect`; 0 stands for "does not exist".
    ///
    /// # Errors
    /// [`StoreError::Conflict`] with the present version.
    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version>;

    /// Asks the store how it is.
    ///
    /// # Errors
    /// If it does not answer.
    async fn health(&self) -> Result<Health>;
}

/// Refuses a lease length outside [`TTL_MIN`]..=[`TTL_MAX`].
pub(crate) fn check_ttl(ttl: Duration) -> Result<()> {
    if (TTL_MIN..=TTL_MAX).contains(&ttl) {
        return Ok(());
    }
    let value = format!("{} ms", ttl.as_millis());
    Err(InputError::new("ttl", &value, "between 50 ms and 24 h").into())
}

/// Refuses a batch of more than [`BATCH_LEN_MAX`] names.
pub(crate) fn check_batch(len: usize) -> Result<()> {
    check_count(Bounded::Batch, len, BATCH_LEN_MAX)
}

/// Refuses a page of more than [`PAGE_LEN_MAX`] entries.
pub(crate) fn check_page(filter: &Filter) -> Result<()> {
    if filter.limit == 0 {
        return Err(InputError::new("limit", "0", "between 1 and 1024").into());
    }
    check_count(Bounded::Page, filter.limit, PAGE_LEN_MAX)
}

pub(crate) fn check_count(what: Bounded, len: usize, limit: usize) -> Result<()> {
    if len <= limit {
        return Ok(());
    }
    Err(StoreError::TooLarge { what, len: len as u64, limit: limit as u64 })
}
