//! Posting: entries, then the doorbell record, then the doorbell.

use std::sync::atomic::Ordering;

use ibex_abi::doorbell::Doorbell;
use ibex_abi::types::QpNum;
use ibex_abi::wqe::{Ctrl, CtrlFlags, DataSeg, Request, SEG, WQEBB, Wqe, WqeError};
use zerocopy::IntoBytes;

use super::{Completion, HostQp, Rts};
use crate::host_memory::View;

/// Largest WQE.
const WQE_MAX: usize = 1024;

/// Why a request was not written; nothing of it is in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PostError {
    /// The queue has no room until something completes.
    #[error("send queue has {free} free basic blocks, the request needs {needed}")]
    QueueFull {
        /// Basic blocks that the request needs.
        needed: u16,
        /// Basic blocks that are free.
        free: u16,
    },
    /// The request does not fit a WQE.
    #[error(transparent)]
    Wqe(#[from] WqeError),
    /// The host does not see the control region.
    #[error("the control region is not mapped into this process")]
    NotMapped,
    /// The receive queue has no room, or there is none.
    #[error("receive queue holds {posted} of {size} entries")]
    RecvQueueFull {
        /// Entries posted and not completed.
        posted: u32,
        /// Entries it has.
        size: u32,
    },
    /// A receive WQE has fewer scatter entries.
    #[error("a receive has {given} scatter entries, the queue's stride holds {limit}")]
    TooManySegments {
        /// Entries given.
        given: usize,
        /// Entries that fit.
        limit: usize,
    },
}

/// Position of the host in a send queue.
#[derive(Debug)]
pub(super) struct SendState {
    pub(super) qpn: QpNum,
    /// Where the send ring begins in the rings.
    start: u64,
    blocks: u16,
    /// The next block to write.
    head: u16,
    /// The oldest block that no completion covers.
    tail: u16,
    /// Blocks of the WQE that begins at each block of the ring.
    sizes: Vec<u8>,
}

impl SendState {
    pub(super) fn new(log_size: u8, start: u64) -> Self {
        let blocks = 1_u16.checked_shl(log_size.into()).unwrap_or(0);
        let sizes = vec![0; usize::from(blocks)];
        Self { qpn: QpNum::new(0), start, blocks, head: 0, tail: 0, sizes }
    }

    pub(super) fn clear(&mut self) {
        (self.head, self.tail) = (0, 0);
    }

    fn slot(&self, idx: u16) -> usize {
        usize::from(idx & (self.blocks - 1))
    }

    /// A completion covers its WQE and everything before it.
    pub(super) fn completed(&mut self, completion: &Completion) {
        let idx = completion.wqe_counter;
        let end = idx.wrapping_add(self.sizes[self.slot(idx)].into());
        if end.wrapping_sub(self.tail) <= self.head.wrapping_sub(self.tail) {
            self.tail = end;
        }
    }

    fn free(&self, ahead: u16) -> u16 {
        self.blocks - self.head.wrapping_add(ahead).wrapping_sub(self.tail)
    }
}

impl HostQp<Rts> {
    /// Begins a batch; nothing is visible to the device before [`Batch::commit`].
    pub fn batch(&mut self) -> Batch<'_> {
        Batch { qp: self, written: 0, last: None }
    }

    /// Posts one request and rings for it.
    ///
    /// # Errors
    /// As [`Batch::push`].
    pub fn post(&mut self, flags: CtrlFlags, request: Request) -> Result<u16, PostError> {
        self.post_imm(flags, 0, request)
    }

    /// Posts one request that carries `imm`, and rings for it.
    ///
    /// # Errors
    /// As [`Batch::push`].
    pub fn post_imm(&mut self, flags: CtrlFlags, imm: u32, request: Request) -> Result<u16, PostError> {
        let mut batch = self.batch();
        let idx = batch.push_imm(flags, imm, request)?;
        batch.commit().ring();
        Ok(idx)
    }

    /// Free basic blocks in the send queue.
    #[must_use]
    pub fn free_blocks(&self) -> u16 {
        self.core().send.free(0)
    }

    /// The next block that will be written, modulo 2^16.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.core().send.head
    }
}

impl<S> HostQp<S> {
    /// Posts a receive that scatters over `segments`.
    ///
    /// # Errors
    /// The queue is full or absent, or its stride too short.
    pub fn post_recv(&mut self, segments: &[DataSeg]) -> Result<(), PostError> {
        let core = self.core_mut();
        let Some(recv) = core.spec.recv else {
            return Err(PostError::RecvQueueFull { posted: 0, size: 0 });
        };
        let limit = 1 << recv.log_segs;
        if segments.len() > limit {
            return Err(PostError::TooManySegments { given: segments.len(), limit });
        }
        let consumed = core.recv_cq.as_ref().map_or(0, super::HostCq::consumed);
        // CAST: the low 16 bits of both counters; a ring has at most 2^15 entries.
        let posted = u32::from(core.recv_posted.wrapping_sub(consumed as u16));
        let size = 1 << recv.log_size;
        if posted >= size {
            return Err(PostError::RecvQueueFull { posted, size });
        }
        let (rings, record) = core.rings.view().zip(core.record.view()).ok_or(PostError::NotMapped)?;
        let at = (u64::from(core.recv_posted) & u64::from(size - 1)) * (limit * SEG) as u64;
        let end = DataSeg::new(0, ibex_abi::wqe::INVALID_LKEY, 0);
        for (idx, seg) in segments.iter().chain(std::iter::once(&end)).take(limit).enumerate() {
            rings.write(at + (idx * SEG) as u64, seg.as_bytes());
        }
        core.recv_posted = core.recv_posted.wrapping_add(1);
        // ORDER(2): WQE -> doorbell record.
        record.word32(0).store(u32::from(core.recv_posted).to_be(), Ordering::Release);
        Ok(())
    }
}

/// Requests that are being written; dropping it forgets them.
pub struct Batch<'a> {
    qp: &'a mut HostQp<Rts>,
    written: u16,
    /// First 8 bytes of the last WQE, which make the doorbell.
    last: Option<[u8; 8]>,
}

impl<'a> Batch<'a> {
    /// Writes one request; gives the index of its first basic block.
    ///
    /// # Errors
    /// No room, or a request that does not fit a WQE.
    pub fn push(&mut self, flags: CtrlFlags, request: Request) -> Result<u16, PostError> {
        self.push_imm(flags, 0, request)
    }

    /// Writes one request that carries `imm`.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn push_imm(&mut self, flags: CtrlFlags, imm: u32, request: Request) -> Result<u16, PostError> {
        let core = self.qp.core_mut();
        let idx = core.send.head.wrapping_add(self.written);
        let ctrl = Ctrl { flags, imm, ..Ctrl::signaled(idx, core.qpn) };
        let wqe = Wqe { ctrl, request };
        let (needed, free) = (wqe.num_wqebbs()?, core.send.free(self.written));
        if needed > free {
            return Err(PostError::QueueFull { needed, free });
        }
        let mut bytes = [0; WQE_MAX];
        let len = wqe.emit(&mut bytes)?;
        let rings = core.rings.view().ok_or(PostError::NotMapped)?;
        store_wqe(rings, &core.send, idx, &bytes[..len.next_multiple_of(WQEBB)]);
        let slot = core.send.slot(idx);
        // CAST: at most 16 basic blocks.
        core.send.sizes[slot] = needed as u8;
        self.written += needed;
        self.last = bytes.first_chunk().copied();
        Ok(idx)
    }

    /// Publishes the batch in the doorbell record; the doorbell is still to be rung.
    ///
    /// ORDER(2): WQE -> doorbell record: a release store after all entries.
    pub fn commit(self) -> Unrung<'a> {
        let core = self.qp.core_mut();
        core.send.head = core.send.head.wrapping_add(self.written);
        if let Some(record) = core.record.view() {
            record.word32(4).store(u32::from(core.send.head).to_be(), Ordering::Release);
        }
        Unrung { qp: self.qp, last: self.last }
    }
}

/// Published requests whose doorbell was not rung.
#[must_use = "the device does not look before its doorbell is rung"]
pub struct Unrung<'a> {
    qp: &'a mut HostQp<Rts>,
    last: Option<[u8; 8]>,
}

impl Unrung<'_> {
    /// Rings the doorbell; does nothing for an empty batch.
    pub fn ring(self) {
        if let Some(last) = self.last {
            self.qp.store_doorbell(Doorbell::from_bytes(last));
        }
    }
}

/// Stores a WQE by 8-byte words, wrapping at the end of the ring.
fn store_wqe(rings: View<'_>, send: &SendState, idx: u16, bytes: &[u8]) {
    for (block, extra) in bytes.chunks_exact(WQEBB).zip(0..) {
        let slot = send.slot(idx.wrapping_add(extra));
        let at = send.start + (slot * WQEBB) as u64;
        for (word, offset) in block.as_chunks::<8>().0.iter().zip((at..).step_by(8)) {
            rings.word64(offset).store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
    }
}
