//! Everything that was derived from peers' records, stamped, and retired when its record changes.
//!
//! Pure. A [`Registry`] owns the derived values (queue pairs, keys, handles; it does not look inside) and the
//! newest snapshot of every peer they came from. [`Registry::observe`] compares each snapshot that anybody
//! saw with the newest known one and hands out what is to be taken down; [`Registry::derive`] takes in what
//! was made from a snapshot, and refuses one that is not the newest. So there is no moment at which a value
//! of an older record can be found beside those of a newer one.
//!
//! | change seen | verdict | retired |
//! |---|---|---|
//! | another instance, or another fence | `Replaced` | everything of that peer |
//! | devices or transports | `Updated { paths }` | what came from a path that changed |
//! | buffers | `Updated { buffers }` | keys of the buffers that changed; queue pairs stay |
//! | nothing that anything came from | `Updated` | nothing |
//! | an older stamp | `Stale` | nothing; the snapshot is ignored |
//! | the same stamp, other content | `ConcurrentPublisher` | nothing; refused, an alarm |
//!
//! INVARIANT: a value is handed out once, by the call that retires it, and is not found afterwards.

use std::collections::HashMap;
use std::sync::Arc;

use crate::change::{self, Fingerprint, Fingerprints, Origin, Verdict};
use crate::ids::{BufferId, Stamp};
use crate::name::RecordName;
use crate::record::{BufferState, Identity, PeerRecord, Way};
use crate::segments::{SegmentHandle, Segments, StaleSegment};
use crate::store::Snapshot;

/// What kind of thing was derived: retirements are counted by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A connected queue pair.
    QueuePair,
    /// A remote key with the range it covers.
    Rkey,
    /// The choice of a local device and a way to the peer.
    Rail,
    /// An open segment, or anything else that a caller holds by a handle.
    Handle,
    /// A slot that kernels read.
    GpuSlot,
}

impl Kind {
    /// All kinds, in the order of [`Retired::of`].
    pub const ALL: [Self; 5] = [Self::QueuePair, Self::Rkey, Self::Rail, Self::Handle, Self::GpuSlot];
}

/// Which part of a record something came from: it goes when that part changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Who the peer is, nothing else.
    Owner,
    /// The devices, and what the transports say to the peer with this slot: of a list of queue pairs per
    /// peer only one's own entry counts, so that a neighbour's reconnection disturbs nobody.
    Path {
        /// One's own position in the peer's lists.
        slot: u32,
    },
    /// One registered buffer, as long as it is `Ready`.
    Buffer(BufferId),
}

impl Part {
    /// The fingerprint of this part; `None` if the record does not have it, or does not offer it any more.
    #[must_use]
    pub fn fingerprint(self, record: &PeerRecord) -> Option<Fingerprint> {
        match self {
            Self::Owner => Some(Fingerprint::default()),
            Self::Path { slot } => Some(Fingerprints::of(&seen_from(record, slot)).paths),
            Self::Buffer(id) => {
                let buffer = record.buffers.iter().find(|buffer| buffer.buffer_id == id)?;
                let only = PeerRecord { buffers: vec![buffer.clone()], ..PeerRecord::default() };
                (buffer.state == BufferState::Ready).then(|| Fingerprints::of(&only).buffers)
            }
        }
    }
}

/// The record's ways, reduced to what concerns the peer with this slot.
fn seen_from(record: &PeerRecord, slot: u32) -> PeerRecord {
    let mut transports = record.transports.clone();
    for transport in &mut transports {
        if let Way::EpIbgda(way) = &mut transport.way {
            let own = usize::try_from(slot).ok().and_then(|slot| way.qpns.get(slot));
            way.qpns = own.copied().into_iter().collect();
        }
    }
    PeerRecord { devices: record.devices.clone(), transports, ..PeerRecord::default() }
}

/// Where a derived value came from. Work that uses the value carries this, and shows it again when posted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// Whose record.
    pub name: RecordName,
    /// Which process.
    pub identity: Identity,
    /// Which ownership and version.
    pub stamp: Stamp,
    /// Which part.
    pub part: Part,
    /// What that part was: for a buffer its generation.
    pub fingerprint: Fingerprint,
    /// What was made of it.
    pub kind: Kind,
}

/// A derived value that has been taken out; whoever receives it takes it down.
#[derive(Debug, PartialEq, Eq)]
pub struct Retiree<T> {
    /// Where it came from.
    pub from: Provenance,
    /// It.
    pub value: T,
}

/// What an observation found.
#[derive(Debug, PartialEq, Eq)]
pub struct Observed<T> {
    /// How the snapshot compares with what was known; `None`: nothing was.
    pub verdict: Option<Verdict>,
    /// What is to be taken down before anything else is done with this peer.
    pub retired: Vec<Retiree<T>>,
}

/// Counts of retirements, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retired([u64; 5]);

impl Retired {
    /// So many of this kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> u64 {
        Kind::ALL.iter().zip(self.0).find(|(other, _)| **other == kind).map_or(0, |(_, count)| count)
    }

    /// Of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    fn add(&mut self, kind: Kind) {
        for (count, other) in self.0.iter_mut().zip(Kind::ALL) {
            *count += u64::from(other == kind);
        }
    }
}

/// What a registry has seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RegistryCounters {
    /// Values taken out.
    pub retired: Retired,
    /// Peers replaced by another process, or by another ownership.
    pub replaced: u64,
    /// Snapshots that were older than what was known.
    pub stale_snapshots: u64,
    /// Alarms: two contents under one stamp.
    pub concurrent_publishers: u64,
}

/// Why something cannot be derived from a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeriveError {
    /// The snapshot is not the newest known one of its name.
    #[error("the snapshot {seen} is not the newest known one, {known}")]
    Outdated {
        /// The snapshot's.
        seen: Stamp,
        /// The newest known.
        known: Stamp,
    },
    /// The name has not been observed.
    #[error("nothing is known of the name")]
    Unknown,
    /// The record does not have the part, or does not offer it.
    #[error("the record of {stamp} does not offer {part:?}")]
    NotOffered {
        /// Which record.
        stamp: Stamp,
        /// Which part.
        part: Part,
    },
    /// The registry is full.
    #[error("no room for another derived value: the limit is {limit}")]
    Full {
        /// Values at most.
        limit: u32,
    },
}

#[derive(Debug)]
struct Entry<T> {
    from: Provenance,
    value: T,
}

#[derive(Debug)]
struct Peer {
    origin: Origin,
    snapshot: Arc<Snapshot>,
    derived: Vec<SegmentHandle>,
}

/// Derived values by handle, and the newest snapshot of each peer. See the module's documentation.
#[derive(Debug)]
pub struct Registry<T> {
    peers: HashMap<RecordName, Peer>,
    entries: Segments<Entry<T>>,
    limit: u32,
    counters: RegistryCounters,
}

impl<T> Registry<T> {
    /// Room for so many derived values.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        let counters = RegistryCounters::default();
        Self { peers: HashMap::new(), entries: Segments::new(limit), limit, counters }
    }

    /// What happened so far.
    #[must_use]
    pub const fn counters(&self) -> RegistryCounters {
        self.counters
    }

    /// Values held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The newest known snapshot of a name.
    #[must_use]
    pub fn known(&self, name: &RecordName) -> Option<&Arc<Snapshot>> {
        self.peers.get(name).map(|peer| &peer.snapshot)
    }

    /// Compares a snapshot with what is known, takes it in if it is newer, and takes out what it retires.
    #[must_use = "what is retired must be taken down"]
    pub fn observe(&mut self, snapshot: &Arc<Snapshot>) -> Observed<T> {
        let origin = match self.peers.get(&snapshot.name) {
            // The common case costs no digest: the very snapshot that is known.
            Some(peer) if Arc::ptr_eq(&peer.snapshot, snapshot) => {
                return Observed { verdict: Some(Verdict::Same), retired: Vec::new() };
            }
            _ => Origin::from(&**snapshot),
        };
        let Some(peer) = self.peers.get_mut(&snapshot.name) else {
            let peer = Peer { origin, snapshot: Arc::clone(snapshot), derived: Vec::new() };
            self.peers.insert(snapshot.name.clone(), peer);
            return Observed { verdict: None, retired: Vec::new() };
        };
        let verdict = change::judge(&peer.origin, &origin);
        match verdict {
            // The same content; the next look at this very snapshot then costs no digest.
            Verdict::Same => peer.snapshot = Arc::clone(snapshot),
            Verdict::Stale => self.counters.stale_snapshots += 1,
            Verdict::ConcurrentPublisher => self.counters.concurrent_publishers += 1,
            Verdict::Replaced | Verdict::Updated { .. } => {
                (peer.origin, peer.snapshot) = (origin, Arc::clone(snapshot));
            }
        }
        let retired = match verdict {
            Verdict::Replaced => {
                self.counters.replaced += 1;
                self.take(&snapshot.name, |_| true)
            }
            Verdict::Updated { paths: false, buffers: false } => Vec::new(),
            Verdict::Updated { .. } => {
                let record = &snapshot.record;
                self.take(&snapshot.name, |from| from.part.fingerprint(record) != Some(from.fingerprint))
            }
            _ => Vec::new(),
        };
        Observed { verdict: Some(verdict), retired }
    }

    /// Takes in a value that was made from a part of a snapshot. The value comes back with a refusal, and
    /// must then be taken down.
    ///
    /// # Errors
    /// [`DeriveError`].
    pub fn derive(
        &mut self,
        snapshot: &Snapshot,
        part: Part,
        kind: Kind,
        value: T,
    ) -> Result<SegmentHandle, (DeriveError, T)> {
        let from = match self.provenance(snapshot, part, kind) {
            Ok(from) => from,
            Err(refusal) => return Err((refusal, value)),
        };
        // Looked at before the value is given away.
        if self.entries.len() >= usize::try_from(self.limit).unwrap_or(usize::MAX) {
            return Err((DeriveError::Full { limit: self.limit }, value));
        }
        let name = from.name.clone();
        // PANIC: there is room, as was just seen.
        let handle = self.entries.insert(Entry { from, value }).expect("the registry has room");
        if let Some(peer) = self.peers.get_mut(&name) {
            peer.derived.push(handle);
        }
        Ok(handle)
    }

    fn provenance(&self, snapshot: &Snapshot, part: Part, kind: Kind) -> Result<Provenance, DeriveError> {
        let peer = self.peers.get(&snapshot.name).ok_or(DeriveError::Unknown)?;
        let (seen, known) = (snapshot.stamp, peer.origin.stamp);
        if seen != known || snapshot.identity != peer.origin.identity {
            return Err(DeriveError::Outdated { seen, known });
        }
        let fingerprint = part.fingerprint(&snapshot.record);
        let fingerprint = fingerprint.ok_or(DeriveError::NotOffered { stamp: seen, part })?;
        let (name, identity) = (snapshot.name.clone(), snapshot.identity);
        Ok(Provenance { name, identity, stamp: seen, part, fingerprint, kind })
    }

    /// A value, and where it came from.
    ///
    /// # Errors
    /// [`StaleSegment`]: it was retired.
    pub fn get(&self, handle: SegmentHandle) -> Result<(&Provenance, &T), StaleSegment> {
        self.entries.get(handle).map(|entry| (&entry.from, &entry.value))
    }

    /// The value of this kind that came from this part of a name's record.
    #[must_use]
    pub fn find(&self, name: &RecordName, part: Part, kind: Kind) -> Option<(SegmentHandle, &T)> {
        self.peers.get(name)?.derived.iter().find_map(|handle| {
            let entry = self.entries.get(*handle).ok()?;
            (entry.from.part == part && entry.from.kind == kind).then_some((*handle, &entry.value))
        })
    }

    /// Takes out one value, after a failure of it for example.
    ///
    /// # Errors
    /// [`StaleSegment`]: it was retired before.
    pub fn retire(&mut self, handle: SegmentHandle) -> Result<Retiree<T>, StaleSegment> {
        let entry = self.entries.remove(handle)?;
        if let Some(peer) = self.peers.get_mut(&entry.from.name) {
            peer.derived.retain(|other| *other != handle);
        }
        self.counters.retired.add(entry.from.kind);
        Ok(Retiree { from: entry.from, value: entry.value })
    }

    /// Takes out everything of a name whose owner gave it back. The stamp stays known, so that a late answer
    /// with an older one is still told from news.
    #[must_use = "what is retired must be taken down"]
    pub fn end(&mut self, name: &RecordName) -> Vec<Retiree<T>> {
        self.take(name, |_| true)
    }

    fn take(&mut self, name: &RecordName, goes: impl Fn(&Provenance) -> bool) -> Vec<Retiree<T>> {
        let derived = self.peers.get(name).map(|peer| peer.derived.clone()).unwrap_or_default();
        let gone = |handle: &SegmentHandle| self.entries.get(*handle).is_ok_and(|entry| goes(&entry.from));
        let gone: Vec<SegmentHandle> = derived.into_iter().filter(gone).collect();
        gone.into_iter().filter_map(|handle| self.retire(handle).ok()).collect()
    }
}
