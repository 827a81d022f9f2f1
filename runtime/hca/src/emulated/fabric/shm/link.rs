//! A pair of a local port and a peer's, and the sending side of it.
//!
//! *Who owns what.* A [`Link`] owns our slot for the peer: the counters and rings that this side writes. The
//! [`Outbox`] is what senders share; an [`Outlet`] holds it for one turn of a queue pair and publishes at
//! the end of the turn what it wrote.
//!
//! Payload stays where it is, if that is shared memory; other payload is copied into our slot. The copy is
//! kept until the peer has taken the entry that names it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ibex_abi::types::{Psn, QpNum};
use parking_lot::{Mutex, MutexGuard};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U32, U64};

use super::inbox::Inbox;
use super::layout::{
    COPIES_LEN, INLINE_MAX, REQUEST_LEN, REQUESTS, RequestEntry, STRETCHES, Stretch, slot, slot_at,
};
use super::memory::{PeerMemory, PortMemory, TheirSlot};
use crate::HcaError;
use crate::emulated::fabric::{Carried, Port, Wire};
use crate::emulated::memory::Span;
use crate::emulated::message::{Payload, Piece, Request, Target};
use crate::emulated::requester::plain::Source;

/// Longest piece of payload that is copied in one go.
const COPY_MAX: u64 = COPIES_LEN / 4;

/// One local port and one peer.
#[derive(Debug)]
pub(in crate::emulated) struct Link {
    pub(super) local: Arc<Port>,
    pub(super) memory: Arc<PortMemory>,
    pub(super) peer: Arc<Port>,
    pub(super) theirs: Arc<PeerMemory>,
    /// Ours for the peer.
    pub(super) slot: u16,
    /// The peer's for us.
    pub(super) their_slot: TheirSlot,
    /// The peer's activity word when we last looked.
    pub(super) seen: AtomicU32,
    outbox: Mutex<Outbox>,
    pub(super) inbox: Mutex<Inbox>,
}

/// Requests on their way to the peer.
#[derive(Debug, Default)]
struct Outbox {
    written: u32,
    announced: u32,
    taken: u32,
    copies: Copies,
}

/// Copies of payload in the slot, oldest first; positions count bytes and never wrap.
#[derive(Debug, Default)]
struct Copies {
    begin: u64,
    end: u64,
    /// The number of requests taken at which a copy is free, and where it ends.
    live: VecDeque<(u32, u64)>,
}

impl Copies {
    /// Room for `len` contiguous bytes that request number `entry` names: where it begins.
    fn take(&mut self, len: u64, entry: u32) -> Option<u64> {
        let at = self.end % COPIES_LEN;
        let skip = if at + len > COPIES_LEN { COPIES_LEN - at } else { 0 };
        let end = self.end + skip + len;
        if end - self.begin > COPIES_LEN {
            return None;
        }
        self.live.push_back((entry.wrapping_add(1), end));
        self.end = end;
        Some((end - len) % COPIES_LEN)
    }

    fn free(&mut self, taken: u32) {
        while let Some((at, end)) = self.live.front().copied()
            && taken.wrapping_sub(at).cast_signed() >= 0
        {
            self.begin = end;
            self.live.pop_front();
        }
    }
}

impl Link {
    pub(super) fn new(
        local: Arc<Port>,
        memory: Arc<PortMemory>,
        peer: Arc<Port>,
        theirs: Arc<PeerMemory>,
    ) -> Result<Self, HcaError> {
        let slot = memory.take_slot(theirs.file_id().nonce)?;
        Ok(Self {
            local,
            memory,
            peer,
            theirs,
            slot,
            their_slot: TheirSlot::default(),
            seen: AtomicU32::new(0),
            outbox: Mutex::default(),
            inbox: Mutex::default(),
        })
    }

    /// Where the peer's slot for us begins in its memory, once it has one.
    #[inline]
    pub(super) fn their_slot_at(&self) -> Option<u64> {
        self.their_slot.find(&self.theirs, self.memory.nonce())
    }

    /// Whether the peer did something that was not looked at yet.
    pub(super) fn has_news(&self) -> bool {
        let at = self.their_slot_at().map(|at| at + slot::ACTIVITY);
        let now = at.map(|at| self.theirs.span().load32(at, Ordering::Acquire));
        now.is_some_and(|now| now != self.seen.load(Ordering::Relaxed))
    }

    /// The way of queue pair `from` to queue pair `to` of the peer.
    pub(in crate::emulated) fn open(&self, from: QpNum, to: QpNum) -> Outlet<'_> {
        let generation = self.memory.generation(from);
        Outlet { link: self, outbox: self.outbox.lock(), from, to, generation }
    }

    /// Whether packets reach the peer now, as far as this side knows.
    #[inline]
    pub(super) fn sends(&self) -> bool {
        self.local.passes(&self.peer)
    }

    /// Whether packets of the peer arrive now, as far as this side knows.
    #[inline]
    pub(super) fn hears(&self) -> bool {
        self.peer.passes(&self.local)
    }
}

/// One queue pair's way to its responder in another process, for one turn.
pub(in crate::emulated) struct Outlet<'a> {
    link: &'a Link,
    outbox: MutexGuard<'a, Outbox>,
    from: QpNum,
    to: QpNum,
    generation: u32,
}

impl Outlet<'_> {
    fn slot(&self) -> Span {
        let all = self.link.memory.span().slice(slot_at(self.link.slot), slot::LEN);
        all.unwrap_or(Span::EMPTY)
    }

    /// Whether the ring has room, by what the peer says it took.
    fn has_room(&mut self) -> bool {
        let outbox = &mut *self.outbox;
        if outbox.written.wrapping_sub(outbox.taken) < REQUESTS && outbox.copies.live.is_empty() {
            return true;
        }
        if let Some(at) = self.link.their_slot_at() {
            let taken = self.link.theirs.span().load32(at + slot::REQUESTS_TAKEN, Ordering::Acquire);
            // A peer that says it took what was never written took nothing.
            if taken.wrapping_sub(outbox.taken) <= outbox.written.wrapping_sub(outbox.taken) {
                outbox.taken = taken;
                outbox.copies.free(taken);
            }
        }
        outbox.written.wrapping_sub(outbox.taken) < REQUESTS
    }

    fn push(&mut self, entry: &RequestEntry) {
        let nth = self.outbox.written;
        let at = slot::REQUESTS_AT + u64::from(nth % REQUESTS) * REQUEST_LEN;
        self.slot().write(at, entry.as_bytes());
        self.outbox.written = nth.wrapping_add(1);
    }

    fn entry(&self, request: &Request, piece: Piece) -> RequestEntry {
        RequestEntry::new(self.to, self.from, self.generation, request, piece)
    }

    /// The request as one entry, if its payload fits the entry or lies in shared memory.
    fn direct(&self, request: &Request, payload: Payload<'_>) -> Option<RequestEntry> {
        let mut entry = self.entry(request, Piece::Whole);
        if request.op.has_response() {
            return Some(entry);
        }
        let (mut inline, mut stretches, mut fits, mut total) = (0, 0, true, 0);
        payload.visit(0, request.len, |source| {
            total += source.len();
            fits &= match source {
                Source::Inline(bytes) => {
                    let room = entry.body.get_mut(inline..inline + bytes.len());
                    inline += bytes.len();
                    stretches == 0 && room.map(|room| room.copy_from_slice(bytes)).is_some()
                }
                Source::Memory(span) if inline == 0 && stretches < STRETCHES => {
                    let found = self.link.memory.locate(span);
                    if let Some((region, offset)) = found {
                        entry.put_stretch(stretches, stretch(region, offset, span.len()));
                    }
                    stretches += 1;
                    found.is_some()
                }
                Source::Memory(_) => false,
            };
        });
        // CAST: at most INLINE_MAX bytes and STRETCHES stretches.
        (entry.inline_len, entry.stretches) = (inline as u8, stretches as u8);
        (fits && inline <= INLINE_MAX && total == request.len).then_some(entry)
    }

    /// Carries payload from `start` on by copies, as far as there is room; then the end of the message.
    fn by_copies(&mut self, request: &Request, payload: Payload<'_>, start: u64) -> Carried {
        let mut at = start;
        while at < request.len {
            let len = (request.len - at).min(COPY_MAX);
            if !self.has_room() {
                return Carried::Upto(at);
            }
            let nth = self.outbox.written;
            let Some(place) = self.outbox.copies.take(len, nth) else {
                return Carried::Upto(at);
            };
            let whole = len == request.len;
            let piece = if whole { Piece::Whole } else { Piece::Part { offset: at, len } };
            let mut entry = self.entry(request, piece);
            let place = slot::COPIES_AT + place;
            if let Some(target) = self.slot().slice(place, len) {
                copy(payload, at, target);
            }
            entry.put_stretch(0, stretch(0, slot_at(self.link.slot) + place, len));
            entry.stretches = 1;
            self.push(&entry);
            at += len;
            if whole {
                return Carried::Whole(None);
            }
        }
        if !self.has_room() {
            return Carried::Upto(at);
        }
        let end = self.entry(request, Piece::End);
        self.push(&end);
        Carried::Whole(None)
    }
}

fn stretch(region: u32, offset: u64, len: u64) -> Stretch {
    // CAST: a stretch is part of a message of at most 2^30 bytes.
    Stretch { region: U32::new(region), len: U32::new(len as u32), offset: U64::new(offset) }
}

/// Copies payload from `offset` on until `to` is full.
fn copy(payload: Payload<'_>, offset: u64, to: Span) {
    let mut at = 0;
    payload.visit(offset, to.len(), |source| {
        if let Some(target) = to.slice(at, source.len()) {
            source.place(target);
        }
        at += source.len();
    });
}

impl Wire for Outlet<'_> {
    fn carry(&mut self, request: &Request, payload: Payload<'_>, piece: Piece) -> Carried {
        if !self.link.sends() {
            return Carried::Whole(None);
        }
        let start = match piece {
            Piece::Whole => 0,
            Piece::Part { offset, .. } => offset,
            Piece::End => request.len,
        };
        if !self.has_room() {
            return Carried::Upto(start);
        }
        if start == 0
            && let Some(entry) = self.direct(request, payload)
        {
            self.push(&entry);
            return Carried::Whole(None);
        }
        self.by_copies(request, payload, start)
    }

    #[inline]
    fn write_plain(&mut self, _: Psn, _: u32, _: Target, _: Source<'_>) -> bool {
        // Its acknowledgement cannot be here at once.
        false
    }
}

impl Drop for Outlet<'_> {
    fn drop(&mut self) {
        if self.outbox.written == self.outbox.announced {
            return;
        }
        self.outbox.announced = self.outbox.written;
        self.slot().store32(slot::REQUESTS_WRITTEN, self.outbox.written, Ordering::Release);
        self.link.memory.announce(self.link.slot, &self.link.theirs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_never_overlap_and_come_back_in_order() {
        let mut copies = Copies::default();
        let mut taken = 0_u32;
        for nth in 0..10_000_u32 {
            let len = 1 + u64::from(nth.wrapping_mul(2_654_435_761) >> 14);
            while copies.take(len, nth).is_none() {
                taken += 1;
                assert!(taken <= nth, "an empty area has room for the longest copy");
                copies.free(taken);
            }
            let (_, end) = *copies.live.back().unwrap();
            let at = (end - len) % COPIES_LEN;
            assert!(at + len <= COPIES_LEN, "contiguous");
            assert!(copies.end - copies.begin <= COPIES_LEN, "nothing is overwritten");
        }
        copies.free(10_000);
        assert!(copies.live.is_empty());
    }
}
