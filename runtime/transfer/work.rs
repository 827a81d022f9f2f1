//! Registered memory, requests, and the state of each until no device can touch its memory.

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ibex_hca::host_memory::{Registered, View};
use ibex_hca::{Access, Hca, HcaError};
use ibex_metadata::drain::Pinned;
use ibex_metadata::ids::{BufferId, Fence};
use ibex_metadata::lease::Moment;
use ibex_metadata::name::RecordName;
use ibex_metadata::record::{self, Buffer, BufferKind, BufferState, Identity};
use ibex_metadata::segments::SegmentHandle;
use parking_lot::Mutex;

use super::TransferError;
use super::requester::Segment;
use crate::buffer::OwnedPd;

/// Memory of this process that its device may reach, and its peers' as far as `access` goes.
#[derive(Debug)]
pub struct Region(Arc<RegionMemory>);

struct RegionMemory {
    id: BufferId,
    len: u64,
    access: Access,
    registered: Registered,
    in_flight: AtomicU64,
    /// Given back after the key.
    _pd: Arc<OwnedPd>,
}

impl std::fmt::Debug for RegionMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (id, key) = (self.id, self.registered.key());
        f.debug_struct("RegionMemory").field("id", &id).field("key", key).finish_non_exhaustive()
    }
}

impl Region {
    /// Allocates and registers `len` bytes.
    pub(super) fn new(
        hca: &Arc<dyn Hca>,
        pd: &Arc<OwnedPd>,
        id: BufferId,
        len: u64,
        access: Access,
    ) -> Result<Self, HcaError> {
        let registered = Registered::new(hca, pd.get(), len, access)?;
        let (in_flight, pd) = (AtomicU64::new(0), Arc::clone(pd));
        Ok(Self(Arc::new(RegionMemory { id, len, access, registered, in_flight, _pd: pd })))
    }

    /// Its identity in the record of this process.
    #[must_use]
    pub fn id(&self) -> BufferId {
        self.0.id
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len
    }

    /// Whether there are no bytes; there always are.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Access to the bytes, which devices may touch at the same time.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        self.0.registered.view()
    }

    /// What the record of this process says of it.
    #[must_use]
    pub fn describe(&self, kind: BufferKind) -> Buffer {
        let Access { remote_read, remote_write, remote_atomic, .. } = self.0.access;
        let rights = [
            (remote_read, record::Access::REMOTE_READ),
            (remote_write, record::Access::REMOTE_WRITE),
            (remote_atomic, record::Access::REMOTE_ATOMIC),
        ];
        let given = rights.iter().filter(|(given, _)| *given);
        Buffer {
            buffer_id: self.0.id,
            addr: self.0.registered.iova(0),
            len: self.0.len,
            location: "cpu".into(),
            kind,
            access: given.fold(record::Access::default(), |all, (_, right)| all.and(*right)),
            state: BufferState::Ready,
            keys: vec![self.0.registered.key().rkey.get()],
            ..Buffer::default()
        }
    }

    /// A share of it for one request.
    pub(super) fn share(&self) -> Share {
        self.0.in_flight.fetch_add(1, Ordering::AcqRel);
        Share(Arc::clone(&self.0))
    }
}

impl Pinned for Region {
    fn id(&self) -> BufferId {
        self.0.id
    }

    fn in_flight(&self) -> u64 {
        self.0.in_flight.load(Ordering::Acquire)
    }

    fn revoke(&self) -> bool {
        self.0.registered.revoke().is_ok()
    }
}

/// A request's share of a region: the memory stays as long as there is one.
#[derive(Debug)]
pub(super) struct Share(Arc<RegionMemory>);

impl Share {
    pub(super) fn lkey(&self) -> u32 {
        self.0.registered.key().lkey.get()
    }

    pub(super) fn addr(&self, offset: u64) -> u64 {
        self.0.registered.iova(offset)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Local bytes go to the peer.
    Write,
    /// The peer's bytes come here.
    Read,
}

impl Verb {
    pub(super) const fn right(self) -> (record::Access, &'static str) {
        match self {
            Self::Write => (record::Access::REMOTE_WRITE, "WRITE"),
            Self::Read => (record::Access::REMOTE_READ, "READ"),
        }
    }
}

/// One READ or WRITE.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Which.
    pub verb: Verb,
    /// Memory here.
    pub local: &'a Region,
    /// Where in it.
    pub local_offset: u64,
    /// Memory there.
    pub segment: &'a Segment,
    /// Where in it.
    pub remote_offset: u64,
    /// Bytes.
    pub len: u32,
}

/// How a request stands.
#[derive(Debug, Default)]
pub(super) struct Status {
    /// The first outcome; kept.
    pub(super) outcome: Option<Result<u32, TransferError>>,
    /// No device can touch its memory on its behalf.
    pub(super) is_quiescent: bool,
}

/// What submitter and device side share about one request.
#[derive(Debug, Default)]
pub(super) struct Op(Mutex<Status>);

impl Op {
    pub(super) fn look<T>(&self, look: impl FnOnce(&Status) -> T) -> T {
        look(&self.0.lock())
    }

    /// Gives it an outcome, unless it has one.
    pub(super) fn decide(&self, outcome: Result<u32, TransferError>) {
        self.0.lock().outcome.get_or_insert(outcome);
    }

    fn settle(&self) {
        self.0.lock().is_quiescent = true;
    }
}

/// One request on its way.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) op: Arc<Op>,
    pub(super) verb: Verb,
    pub(super) name: RecordName,
    /// Whom it is meant for.
    pub(super) owner: (Identity, Fence),
    pub(super) buffer: BufferId,
    /// The key it was made with; another one may have taken its place when it is posted.
    pub(super) handle: SegmentHandle,
    pub(super) remote_offset: u64,
    pub(super) share: Share,
    pub(super) local_offset: u64,
    pub(super) len: u32,
    pub(super) deadline: Moment,
    /// From when it was submitted to the deadline.
    pub(super) budget: Duration,
    /// Where in the send queue, once posted.
    pub(super) wqe_idx: u16,
}

impl Work {
    /// Ends it: nothing touches its memory any more.
    pub(super) fn end(self, outcome: Result<u32, TransferError>) {
        let Self { op, share, .. } = self;
        op.decide(outcome);
        // The share goes first: who sees the request quiescent may count on the region.
        drop(share);
        op.settle();
    }
}
