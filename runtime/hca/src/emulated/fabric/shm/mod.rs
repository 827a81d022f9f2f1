//! The fabric between processes of one host: every process writes only its own memory.
//!
//! Each port has a *port memory*, a sealed file that its process writes and all peers map for reading. A
//! requester puts what a request's headers would carry into a ring there, and where its payload lies. The
//! *responder's* device takes the entry, checks queue pair, sequence number, key and range, pulls the payload
//! into its own memory, and puts the answer into a ring of its own, where the requester takes it.
//!
//! ```text
//!  process A writes                          process B writes
//!   requests A->B  ---- taken by ---->        responder: checks, pulls payload, executes
//!   payload        ---- pulled by --->        its own registered memory
//!   requester  <------- taken by -----        replies B->A, parts of READ responses
//! ```
//!
//! So a process that was stopped and wakes up can write nothing that belongs to another: not even while it
//! is being replaced. What it queued is void once its queue pair is in ERR or RST (see
//! [`PortMemory::withdraw`]), and dropped once the responder's queue pair is gone.
//!
//! *Who owns what.* The [`Shm`] owns links, one per local port and peer; links own their end's slots and
//! mappings. A peer that vanished is a peer that is silent: its memory stays mapped, nothing moves in it, and
//! timers do the rest. Ports of the same process talk as on the fabric within one process.

mod inbox;
mod layout;
mod link;
mod memory;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::RwLock;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::advert::{AdvertError, AdvertKind, open, seal};
use super::{FabricConfig, Port, PortId, next_id};
use crate::emulated::futex::{self, Waited};
use crate::emulated::requester::send::Turn;
use crate::emulated::{EmulatedHca, thread};
use crate::shared_memory::FileId;
use crate::{HcaError, Nanos, PathAddress};
pub(crate) use layout::parse_arbitrary;
use layout::{PEERS_MAX, slot};
pub(in crate::emulated) use link::Link;
use memory::PeerMemory;
pub(in crate::emulated) use memory::PortMemory;

/// What a fabric between processes is made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShmConfig {
    /// What every fabric is made with; the same in all processes.
    pub fabric: FabricConfig,
    /// Number of this process's first port, which makes its addresses: different in each process.
    pub first_port: u16,
    /// Most peers of one port, 1..=512. Each takes 1.4 MiB of address space, and memory as it is used.
    pub peers_max: u16,
}

impl Default for ShmConfig {
    fn default() -> Self {
        Self { fabric: FabricConfig::default(), first_port: 0, peers_max: 64 }
    }
}

/// The body of an advert: where the port memory is.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Body {
    pid: U32,
    fd: U32,
    nonce: U64,
    file_len: U64,
    peers: U16,
    zero: [u8; 6],
}

/// A peer that was admitted.
#[derive(Debug, Clone)]
struct Peer {
    port: Arc<Port>,
    memory: Arc<PeerMemory>,
}

/// Ports of this process, ports of others, and the links between.
#[derive(Debug, Default)]
struct Members {
    locals: Vec<Arc<Port>>,
    peers: Vec<Peer>,
    links: Vec<Arc<Link>>,
}

/// Requests between processes through shared memory.
#[derive(Debug)]
pub(in crate::emulated) struct Shm {
    config: ShmConfig,
    members: RwLock<Members>,
}

impl Shm {
    pub(super) fn new(config: ShmConfig) -> Result<Self, HcaError> {
        if config.peers_max == 0 || config.peers_max > PEERS_MAX {
            return Err(HcaError::OutOfRange {
                field: "peers_max",
                value: config.peers_max.into(),
                min: 1,
                max: PEERS_MAX.into(),
            });
        }
        Ok(Self { config, members: RwLock::default() })
    }

    /// The number that makes the addresses of the next port of this process.
    pub(super) fn next_number(&self) -> Result<PortId, HcaError> {
        let more = self.members.read().locals.len();
        let number = u16::try_from(more).ok().and_then(|more| self.config.first_port.checked_add(more));
        // The address of a port is its number and one.
        number.filter(|number| *number < u16::MAX).map(PortId).ok_or(HcaError::OutOfRange {
            field: "number of a port",
            value: u64::from(self.config.first_port) + more as u64,
            min: 0,
            max: u64::from(u16::MAX) - 1,
        })
    }

    /// Memory for a new port of this process.
    pub(super) fn new_memory(&self) -> Result<Arc<PortMemory>, HcaError> {
        Ok(Arc::new(PortMemory::new(self.config.peers_max)?))
    }

    /// Links a new port of this process to all peers.
    pub(super) fn add_local(&self, port: &Arc<Port>) -> Result<(), HcaError> {
        let mut members = self.members.write();
        let link = |peer: &Peer| new_link(port, peer);
        let links: Vec<_> = members.peers.iter().map(link).collect::<Result<_, _>>()?;
        members.locals.push(Arc::clone(port));
        members.links.extend(links.into_iter().flatten());
        Ok(())
    }

    pub(super) fn advert(&self, port: &Port) -> Result<Vec<u8>, HcaError> {
        // What was admitted is the other process's to advertise.
        let memory =
            port.memory().ok_or(HcaError::Unknown { what: "local port", number: port.id.0.into() })?;
        let FileId { pid, fd, nonce, file_len } = memory.file_id();
        let mut body = Body::new_zeroed();
        (body.pid, body.fd) = (U32::new(pid), U32::new(fd.cast_unsigned()));
        (body.nonce, body.file_len) = (U64::new(nonce), U64::new(file_len));
        body.peers = U16::new(memory.peers());
        Ok(seal(AdvertKind::Shm, port.info(), body.as_bytes()))
    }

    /// Admits a port of another process; one that is known already keeps its number.
    ///
    /// An address that belonged to another process's port is taken over: the old port is off the fabric, as
    /// when a member was replaced.
    pub(super) fn admit(&self, ports: &RwLock<Vec<Arc<Port>>>, bytes: &[u8]) -> Result<PortId, HcaError> {
        let (info, body) = open(AdvertKind::Shm, bytes)?;
        let malformed =
            AdvertError::Malformed { what: "its body is no port memory", len: bytes.len() as u64 };
        let body = Body::read_from_bytes(body).map_err(|_| malformed)?;
        let (pid, fd) = (body.pid.get(), body.fd.get().cast_signed());
        let file = FileId { pid, fd, nonce: body.nonce.get(), file_len: body.file_len.get() };
        // The list of ports first, as when a device attaches.
        let mut ports = ports.write();
        let mut members = self.members.write();
        let own = members.locals.iter().find(|port| port.memory().is_some_and(|m| m.file_id() == file));
        let known = members.peers.iter().find(|peer| peer.memory.file_id() == file).map(|peer| &peer.port);
        if let Some(port) = own.or(known) {
            return Ok(port.id);
        }
        if let Some(port) = members.locals.iter().find(|port| port.has_address_of(&info)) {
            return Err(AdvertError::AddressTaken { port: port.id.0 }.into());
        }
        let memory = Arc::new(PeerMemory::map(file, body.peers.get())?);
        let replaced = members.peers.iter().find(|peer| peer.port.has_address_of(&info)).cloned();
        let port = Arc::new(Port::new(next_id(&ports)?, std::sync::Weak::new(), info));
        let peer = Peer { port: Arc::clone(&port), memory };
        let link = |local: &Arc<Port>| new_link(local, &peer);
        let links: Vec<_> = members.locals.iter().map(link).collect::<Result<_, _>>()?;
        members.links.extend(links.into_iter().flatten());
        members.peers.push(peer);
        ports.push(Arc::clone(&port));
        if let Some(old) = replaced {
            old.port.kill();
            members.forget(old.port.id);
        }
        Ok(port.id)
    }

    /// Frees what a port that was killed held.
    pub(super) fn forget(&self, port: PortId) {
        self.members.write().forget(port);
    }

    /// The link from a local port to the peer with this address.
    #[inline]
    pub(in crate::emulated) fn link(&self, from: &Port, to: &PathAddress) -> Option<Arc<Link>> {
        let members = self.members.read();
        let leads = |link: &&Arc<Link>| link.local.id == from.id && link.peer.answers_to(to);
        members.links.iter().find(leads).cloned()
    }

    /// Lets a device execute and take in what arrived at its port.
    #[inline]
    pub(super) fn take_arrivals(&self, device: &EmulatedHca, now: Nanos) -> Turn {
        let mut turn = Turn::default();
        let port = device.port_id();
        let members = self.members.read();
        for link in members.links.iter().filter(|link| link.local.id == port) {
            turn.did_work |= link.take_arrivals(device, now).did_work;
        }
        turn
    }

    /// Sleeps until a peer did something for a port of this process, at most `limit`; whether one did.
    pub(super) fn wait(&self, limit: Nanos) -> bool {
        let members = self.members.read();
        let links: Vec<_> = members.links.iter().filter(|link| !link.peer.is_dead()).cloned().collect();
        // The guard is not held in sleep: somebody may want to admit a peer.
        drop(members);
        let word = |link: &Arc<Link>| {
            let at = link.their_slot_at()? + slot::ACTIVITY;
            let seen = link.seen.load(Ordering::Relaxed);
            Some(futex::Waiter::new(link.theirs.span().word_addr(at), seen))
        };
        let words: Vec<_> = links.iter().filter_map(word).collect();
        // A peer that did not admit us yet has no word to wait for: look again soon.
        let limit = if words.len() == links.len() { limit } else { limit.min(ADMISSION_POLL) };
        let mut ports: Vec<_> = links.iter().map(|link| &link.memory).collect();
        ports.dedup_by(|one, other| Arc::ptr_eq(one, other));
        ports.iter().for_each(|port| port.note_sleeper(true));
        let waited = futex::wait_any(&words, limit);
        ports.iter().for_each(|port| port.note_sleeper(false));
        match waited {
            Waited::Over => {}
            Waited::Changed => return true,
            Waited::CouldNot => thread::sleep(limit.min(ADMISSION_POLL)),
        }
        links.iter().any(|link| link.has_news())
    }
}

/// How long to sleep at most where a wake-up may be missed.
const ADMISSION_POLL: Nanos = Nanos(1_000_000);

fn new_link(local: &Arc<Port>, peer: &Peer) -> Result<Option<Arc<Link>>, HcaError> {
    let Some(memory) = local.memory().filter(|_| !peer.port.is_dead() && !local.is_dead()) else {
        return Ok(None);
    };
    let (port, memory) = (Arc::clone(local), Arc::clone(memory));
    let link = Link::new(port, memory, Arc::clone(&peer.port), Arc::clone(&peer.memory))?;
    Ok(Some(Arc::new(link)))
}

impl Members {
    fn forget(&mut self, port: PortId) {
        self.links.retain(|link| link.local.id != port && link.peer.id != port);
        self.peers.retain(|peer| peer.port.id != port);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.memory.free_slot(self.slot);
    }
}
