//! What this rank has made of its peers' records, stamped, and retired when a record changes.
//!
//! Every rank of a group over a store says in its record at which port it is and which queue pair it has for each
//! peer. A side counts as connected only while the peer's newest record names the very queue pairs that it connected
//! to, of the very instance: so both sides have seen each other's numbers before anything is posted, and what was made
//! for a process that is gone is out of use with the first look at its successor's record.
//!
//! Owns a [`Registry`] of what was made; queue pairs, keys and slots themselves are the session's, which is told to
//! mask or fence them. Without records, as in simulation, everything counts as agreed.
//!
//! | made of a peer's record | kind | part |
//! |---|---|---|
//! | queue pairs that kernels drive | `QueuePair` | the path |
//! | keys to its region and combine slab, which its queue pairs come with | `Rkey` | the path |
//! | the way to it: local memory, mapped, queue pairs | `Rail` | the path |
//! | the slots that kernels read | `GpuSlot` | the path |
//!
//! So its other buffers may come and go, and nothing of this is touched.

use std::collections::BTreeMap;
use std::sync::Arc;

use ibex_abi::types::QpNum;
use ibex_hca::PortInfo;
use ibex_metadata::derived::{Kind, Part, Provenance, Registry, RegistryCounters};
use ibex_metadata::ids::InstanceId;
use ibex_metadata::name::RecordName;
use ibex_metadata::record::{Identity, PeerRecord, RecordState, Way};
use ibex_metadata::store::Snapshot;

use super::Session;
use crate::ids::Rank;
use crate::membership::Instance;
use crate::recovery::{Offer, RouteReport};
use crate::transfer::describe_port;

/// What is made for one peer.
const KINDS_PER_PEER: u32 = 4;

/// What a rank's own record says of how it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    rank: Rank,
    port: PortInfo,
    /// By peer, 0 for none.
    qpns: Vec<u32>,
    state: RecordState,
}

impl Whereabouts {
    /// Writes it into the record; whatever else stands there stays.
    pub fn describe(&self, record: &mut PeerRecord) {
        record.rank = Some(self.rank.0.into());
        // CAST: at most 512 ranks.
        record.world_hint = self.qpns.len() as u32;
        record.state = self.state;
        describe_port(&self.port, self.qpns.clone(), record);
    }
}

/// Where records are read and written.
pub trait Records: Send {
    /// From now on the own record is to say this.
    fn put_whereabouts(&mut self, whereabouts: Whereabouts);
    /// A peer's record that was seen since the last call; of several of one peer the newest.
    fn poll_record(&mut self) -> Option<(Rank, Arc<Snapshot>)>;
}

/// One thing that was made.
#[derive(Debug)]
#[expect(dead_code, reason = "what it is shows in reports of the registry; the things are the session's")]
enum Made {
    QueuePairs(Vec<QpNum>),
    Keys(Vec<u32>),
    Way(RouteReport),
    Slots(u32),
}

/// See the module documentation.
pub(super) struct Derived {
    records: Option<Box<dyn Records>>,
    registry: Registry<Made>,
    names: BTreeMap<Rank, RecordName>,
    whereabouts: Whereabouts,
    is_said: bool,
}

impl Derived {
    pub(super) fn new(records: Option<Box<dyn Records>>, me: Rank, num_ranks: u32, port: PortInfo) -> Self {
        Self {
            records,
            registry: Registry::new(num_ranks * KINDS_PER_PEER),
            names: BTreeMap::new(),
            // CAST: at most 512 ranks.
            whereabouts: Whereabouts {
                rank: me,
                port,
                qpns: vec![0; num_ranks as usize],
                state: RecordState::Joining,
            },
            is_said: false,
        }
    }

    fn part(&self) -> Part {
        Part::Path { slot: self.whereabouts.rank.0.into() }
    }

    /// Whether what was made for a peer still stands.
    pub(super) fn stands(&self, peer: Rank) -> bool {
        self.records.is_none() || self.names.get(&peer).is_some_and(|name| self.has(name, Kind::QueuePair))
    }

    fn has(&self, name: &RecordName, kind: Kind) -> bool {
        self.registry.find(name, self.part(), kind).is_some()
    }

    /// What was made for a peer, and of which record.
    pub(super) fn of(&self, peer: Rank) -> Vec<Provenance> {
        let Some(name) = self.names.get(&peer) else { return Vec::new() };
        let found = Kind::ALL.iter().filter_map(|kind| self.registry.find(name, self.part(), *kind));
        found.filter_map(|(handle, _)| Some(self.registry.get(handle).ok()?.0.clone())).collect()
    }

    pub(super) fn counters(&self) -> RegistryCounters {
        self.registry.counters()
    }

    /// Queue pairs for a peer exist, or, with none, do no more.
    pub(super) fn offered(&mut self, peer: Rank, offer: Option<&Offer>) {
        let qpn = offer.and_then(first_qpn).unwrap_or_default();
        if let Some(said) = self.whereabouts.qpns.get_mut(peer.index()) {
            self.is_said &= *said == qpn;
            *said = qpn;
        }
        // What they were connected to goes with them.
        if offer.is_none()
            && let Some(name) = self.names.get(&peer)
        {
            drop(self.registry.end(name));
        }
    }

    pub(super) fn set_state(&mut self, state: RecordState) {
        self.is_said &= self.whereabouts.state == state;
        self.whereabouts.state = state;
    }

    /// Says what is new of the own record.
    pub(super) fn say(&mut self) {
        if let Some(records) = self.records.as_mut().filter(|_| !self.is_said) {
            records.put_whereabouts(self.whereabouts.clone());
            self.is_said = true;
        }
    }

    /// Takes in what was seen of peers' records; whose connection does not stand any more.
    pub(super) fn look(&mut self) -> Vec<Rank> {
        let mut retired = Vec::new();
        while let Some((peer, snapshot)) = self.records.as_mut().and_then(|records| records.poll_record()) {
            self.names.insert(peer, snapshot.name.clone());
            if !self.registry.observe(&snapshot).retired.is_empty() {
                retired.push(peer);
            }
        }
        retired
    }

    /// Whether the newest record of a peer is this instance's and names the queue pairs of this offer.
    pub(super) fn agrees(&self, peer: Rank, instance: Instance, offer: &Offer) -> bool {
        if self.records.is_none() {
            return true;
        }
        let known = self.names.get(&peer).and_then(|name| self.registry.known(name));
        known.is_some_and(|snapshot| {
            let is_its = InstanceId::new(instance.0).map(Identity::Instance) == Some(snapshot.identity);
            let said = said_qpn(&snapshot.record, self.whereabouts.rank);
            is_its && said.is_some() && said == first_qpn(offer)
        })
    }

    /// Takes note of what the session has made of an offer that agrees; whether it stands.
    pub(super) fn connected(&mut self, session: &Session, peer: Rank, offer: &Offer) -> bool {
        let Some(name) = self.names.get(&peer) else { return self.records.is_none() };
        let Some(snapshot) = self.registry.known(name).cloned() else { return false };
        let keys = offer.lanes.iter().flat_map(|lane| [lane.region_rkey, lane.combine_rkey]);
        let slots = offer.lanes.iter().map(|lane| lane.queues.len()).sum::<usize>();
        let made = [
            (Kind::QueuePair, Made::QueuePairs(session.queue_pairs(peer))),
            (Kind::Rkey, Made::Keys(keys.collect())),
            (Kind::Rail, Made::Way(session.route(peer))),
            // CAST: lanes times channels.
            (Kind::GpuSlot, Made::Slots(slots as u32)),
        ];
        let part = self.part();
        made.into_iter().all(|(kind, made)| self.registry.derive(&snapshot, part, kind, made).is_ok())
    }
}

/// The queue pair that stands for all of an offer: they are made and destroyed together.
fn first_qpn(offer: &Offer) -> Option<u32> {
    Some(offer.lanes.first()?.queues.first()?.qpn.get()).filter(|qpn| *qpn != 0)
}

/// The queue pair that a record names for the rank that reads it.
fn said_qpn(record: &PeerRecord, me: Rank) -> Option<u32> {
    let mut ways = record.transports.iter().filter_map(|transport| match &transport.way {
        Way::EpIbgda(way) => Some(way),
        _ => None,
    });
    ways.next_back()?.qpns.get(me.index()).copied().filter(|qpn| *qpn != 0)
}
