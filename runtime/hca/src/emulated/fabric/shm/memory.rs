//! The memory of a local port, which peers read, and the memory of a peer's, which we read.
//!
//! *Who owns what.* [`PortMemory`] owns a sealed file that only this process writes: rings, counters, the
//! tables that say where payload lies, copies of payload that does not lie in shared memory. [`PeerMemory`]
//! owns a read-only mapping of the same thing of another process, which outlives that process.

use std::sync::atomic::{AtomicU32, Ordering, fence};

use ibex_abi::types::QpNum;
use parking_lot::Mutex;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::layout::{
    MAGIC, PEERS_MAX, REGIONS_MAX, RegionEntry, generation_at, head, owner_at, port_len, region_at, slot,
    slot_at,
};
use crate::HcaError;
use crate::emulated::memory::{PeerSpan, Span};
use crate::emulated::{AdvertError, futex};
use crate::shared_memory::{self, FileId, Known, PeerAccess, PeerRegion, SharedMemoryError, SharedRegion};

/// Marks a peer whose slot for us was not found yet.
const NO_SLOT: u32 = u32::MAX;

/// A region of this process that was named in the port's table.
#[derive(Debug, Clone, Copy)]
struct Named {
    known: Known,
    idx: u32,
}

/// Regions that peers may pull payload from.
#[derive(Debug, Default)]
struct Names {
    /// [`shared_memory::drops`] when the list was last compared with what there is.
    drops: u64,
    named: Vec<Named>,
    /// The next entry to use, so that one is used again as late as possible.
    next: u32,
}

/// What other processes read of a port of this one.
#[derive(Debug)]
pub(in crate::emulated) struct PortMemory {
    region: SharedRegion,
    span: Span,
    nonce: u64,
    peers: u16,
    names: Mutex<Names>,
    owners: Mutex<()>,
}

impl PortMemory {
    /// Memory with room for this many peers.
    pub(super) fn new(peers: u16) -> Result<Self, SharedMemoryError> {
        let region = SharedRegion::new(port_len(peers), 1)?;
        let (span, nonce) = (Span::of_region(&region), region.file_id().nonce);
        span.store32(head::PEERS, peers.into(), Ordering::Relaxed);
        span.store64(head::NONCE, nonce, Ordering::Relaxed);
        span.store64(head::MAGIC, MAGIC, Ordering::Release);
        Ok(Self { region, span, nonce, peers, names: Mutex::default(), owners: Mutex::default() })
    }

    pub(super) const fn nonce(&self) -> u64 {
        self.nonce
    }

    pub(super) const fn peers(&self) -> u16 {
        self.peers
    }

    pub(super) const fn file_id(&self) -> FileId {
        self.region.file_id()
    }

    pub(super) const fn span(&self) -> Span {
        self.span
    }

    /// Takes a slot for the peer with this nonce.
    pub(super) fn take_slot(&self, nonce: u64) -> Result<u16, HcaError> {
        let _owners = self.owners.lock();
        let free = |slot: &u16| self.span.load64(owner_at(*slot), Ordering::Relaxed) == 0;
        let limit = u64::from(self.peers);
        let full = HcaError::Exhausted { what: "slots for peers", requested: 1, limit };
        let taken = (0..self.peers).find(free).ok_or(full)?;
        let at = slot_at(taken);
        for counter in [
            slot::REQUESTS_WRITTEN,
            slot::REPLIES_WRITTEN,
            slot::REQUESTS_TAKEN,
            slot::REPLIES_TAKEN,
            slot::ACTIVITY,
        ] {
            self.span.store32(at + counter, 0, Ordering::Relaxed);
        }
        self.span.store64(owner_at(taken), nonce, Ordering::Release);
        Ok(taken)
    }

    /// Gives a slot back; its peer finds nothing there from now on.
    pub(super) fn free_slot(&self, slot: u16) {
        let _owners = self.owners.lock();
        self.span.store64(owner_at(slot), 0, Ordering::Release);
    }

    /// How peers can get at `memory`: number of the file, and the position in it.
    ///
    /// `None` if it does not lie in shared memory, or in one file too many.
    pub(super) fn locate(&self, memory: Span) -> Option<(u32, u64)> {
        let mut names = self.names.lock();
        let drops = shared_memory::drops();
        if names.drops != drops {
            self.forget_dropped(&mut names);
            names.drops = drops;
        }
        let (addr, len) = (memory.addr(), memory.len());
        let holds = |known: &Known| {
            let offset = addr.wrapping_sub(known.addr);
            (offset <= known.len && len <= known.len - offset).then_some(known.lead + offset)
        };
        for Named { known, idx } in &names.named {
            if let Some(offset) = holds(known) {
                return Some((idx + 1, offset));
            }
        }
        let known = shared_memory::find(addr, len)?;
        let idx = self.name(&mut names, known)?;
        Some((idx + 1, holds(&known)?))
    }

    fn name(&self, names: &mut Names, known: Known) -> Option<u32> {
        let taken = |idx: &u32| names.named.iter().any(|named| named.idx == *idx);
        let mut after = (0..REGIONS_MAX).map(|step| (names.next + step) % REGIONS_MAX);
        let idx = after.find(|idx| !taken(idx))?;
        names.next = idx + 1;
        let mut entry = RegionEntry::new_zeroed();
        entry.file_len = U64::new(known.file.file_len);
        entry.fd = U32::new(known.file.fd.cast_unsigned());
        self.span.write(region_at(idx), entry.as_bytes());
        self.span.store64(region_at(idx), known.file.nonce.to_le(), Ordering::Release);
        names.named.push(Named { known, idx });
        Some(idx)
    }

    fn forget_dropped(&self, names: &mut Names) {
        names.named.retain(|Named { known, idx }| {
            let still = shared_memory::find(known.addr, known.len);
            let lives = still.is_some_and(|found| found.file == known.file);
            if !lives {
                self.span.store64(region_at(*idx), 0, Ordering::Release);
            }
            lives
        });
    }

    /// The number that requests of this queue pair carry now.
    pub(super) fn generation(&self, qpn: QpNum) -> u32 {
        self.span.load32(generation_at(qpn), Ordering::Acquire)
    }

    /// Makes void what this queue pair sent and its peer did not execute yet.
    ///
    /// A responder compares the number before and after it pulls payload. The fence keeps whatever
    /// overwrites the payload later behind the new number: who saw such bytes sees the number too.
    pub(in crate::emulated) fn withdraw(&self, qpn: QpNum) {
        self.span.update32(generation_at(qpn), |old| old.wrapping_add(1));
        fence(Ordering::SeqCst);
    }

    /// Tells the peer of a slot that a counter moved, and wakes it if it sleeps.
    pub(super) fn announce(&self, slot: u16, peer: &PeerMemory) {
        let at = slot_at(slot) + slot::ACTIVITY;
        self.span.update32(at, |old| old.wrapping_add(1));
        // Either the peer's going to sleep is seen here, or it sees the new number before it sleeps.
        fence(Ordering::SeqCst);
        if peer.span.load32(head::SLEEPERS, Ordering::Relaxed) != 0 {
            futex::wake_all(self.span.slice(at, 4).map_or(0, |word| word.addr()));
        }
    }

    /// Says that a thread is about to sleep, or woke up.
    pub(super) fn note_sleeper(&self, sleeps: bool) {
        let step = if sleeps { 1 } else { u32::MAX };
        self.span.update32(head::SLEEPERS, |count| count.wrapping_add(step));
        fence(Ordering::SeqCst);
    }
}

/// A peer's port memory.
#[derive(Debug)]
pub(super) struct PeerMemory {
    _region: PeerRegion,
    span: PeerSpan,
    file: FileId,
    peers: u16,
}

impl PeerMemory {
    /// Maps the port memory that an advert names.
    pub(super) fn map(file: FileId, peers: u16) -> Result<Self, HcaError> {
        let malformed = |what| AdvertError::Malformed { what, len: 0 };
        if peers == 0 || peers > PEERS_MAX {
            return Err(malformed("its number of slots cannot be").into());
        }
        let region = PeerRegion::map(file, 0, port_len(peers), PeerAccess::ReadOnly)?;
        let span = PeerSpan::of_region(&region);
        let same = span.load64(head::MAGIC, Ordering::Acquire) == MAGIC
            && span.load32(head::PEERS, Ordering::Relaxed) == u32::from(peers)
            && span.load64(head::NONCE, Ordering::Relaxed) == file.nonce;
        match same {
            true => Ok(Self { _region: region, span, file, peers }),
            false => Err(malformed("the memory it names is not a port's").into()),
        }
    }

    pub(super) const fn span(&self) -> PeerSpan {
        self.span
    }

    pub(super) const fn file_id(&self) -> FileId {
        self.file
    }

    /// Whether a request with this generation was not withdrawn.
    ///
    /// Orders what was read of the request's payload before the check.
    #[inline]
    pub(super) fn still_says(&self, qpn: QpNum, generation: u32) -> bool {
        fence(Ordering::Acquire);
        self.span.load32(generation_at(qpn), Ordering::Acquire) == generation
    }

    /// Maps a file that an entry of the peer's table names.
    pub(super) fn open_region(&self, idx: u32) -> Option<Mapped> {
        let mut bytes = [0; size_of::<RegionEntry>()];
        let nonce = self.region_nonce(idx)?;
        self.span.read(region_at(idx), &mut bytes);
        let entry = RegionEntry::read_from_bytes(&bytes).ok()?;
        let (fd, file_len) = (entry.fd.get().cast_signed(), entry.file_len.get());
        let file = FileId { pid: self.file.pid, fd, nonce, file_len };
        let len = file_len.checked_sub(PAGE)?;
        let region = PeerRegion::map(file, 0, len, PeerAccess::ReadOnly).ok()?;
        Some(Mapped { nonce, span: PeerSpan::of_region(&region), _region: region })
    }

    /// The nonce of a file that the peer's table names now.
    #[inline]
    pub(super) fn region_nonce(&self, idx: u32) -> Option<u64> {
        if idx >= REGIONS_MAX {
            return None;
        }
        match u64::from_le(self.span.load64(region_at(idx), Ordering::Acquire)) {
            0 => None,
            nonce => Some(nonce),
        }
    }
}

/// The last page of a shared file holds no data.
const PAGE: u64 = 4096;

/// A file of the peer that payload is pulled from.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) nonce: u64,
    pub(super) span: PeerSpan,
    _region: PeerRegion,
}

/// Where the peer keeps what it says to us.
#[derive(Debug)]
pub(super) struct TheirSlot(AtomicU32);

impl Default for TheirSlot {
    fn default() -> Self {
        Self(AtomicU32::new(NO_SLOT))
    }
}

impl TheirSlot {
    /// The start of the peer's slot for the port with this nonce, once the peer made one.
    #[inline]
    pub(super) fn find(&self, peer: &PeerMemory, nonce: u64) -> Option<u64> {
        let owned = |slot: u16| peer.span.load64(owner_at(slot), Ordering::Acquire) == nonce;
        let known = u16::try_from(self.0.load(Ordering::Relaxed)).ok();
        if let Some(known) = known.filter(|known| owned(*known)) {
            return Some(slot_at(known));
        }
        let found = (0..peer.peers).find(|slot| owned(*slot))?;
        self.0.store(found.into(), Ordering::Relaxed);
        Some(slot_at(found))
    }
}
