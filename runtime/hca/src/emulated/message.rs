//! Request messages and replies: what a requester and a responder say to each other.
//!
//! A request carries what its packets' headers would carry; its payload stays in the requester's memory
//! (or in the WQE, when inline) until a wire asks for it. Nothing here owns memory.

use ibex_abi::types::{Pd, Psn};
use ibex_abi::wqe::{self, AtomicOp, DataSeg, Segment};

use super::memory::Span;
use super::mkeys::{KeyFault, MkeyTable, Want};
use super::requester::plain::Source;

/// A request message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// Sequence number of its first packet.
    pub(super) psn: Psn,
    /// Sequence numbers it takes: its packets, or for a READ those of the response.
    pub(super) packets: u32,
    /// Payload bytes.
    pub(super) len: u64,
    /// What is asked for.
    pub(super) op: RequestOp,
    /// Ask for an event at the responder.
    pub(super) solicited: bool,
    /// Sent before: the responder may have executed it.
    pub(super) resent: bool,
}

impl Request {
    /// Sequence number after its last packet.
    pub(super) const fn end(&self) -> Psn {
        self.psn.plus(self.packets)
    }
}

/// Bytes at the remote end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) va: u64,
    pub(super) rkey: u32,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy)]
pub(super) enum RequestOp {
    Write { to: Target, imm: Option<u32> },
    Read { from: Target },
    Send { imm: Option<u32> },
    Atomic { on: Target, op: AtomicOp },
}

impl RequestOp {
    /// Whether the requester waits for a response with content.
    pub(super) const fn has_response(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Atomic { .. })
    }
}

/// How much of a message a wire carries in one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece {
    /// All of it.
    Whole,
    /// Some of its payload; `last` if none is missing after it.
    Part { offset: u64, len: u64 },
    /// The end of the message, all payload being placed: completion and acknowledgement.
    End,
}

/// Negative acknowledgements that end a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nak {
    InvalidRequest,
    RemoteAccess,
    RemoteOperation,
}

/// What a responder answers.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reply {
    /// Everything before `next` is executed.
    Ack { next: Psn },
    /// An atomic executed; the word was `original` before.
    Atomic { next: Psn, original: u64 },
    /// A READ executed, and this is the memory; good while the wire holds its key guards.
    Data { next: Psn, memory: Span },
    /// No receive is posted; try again after the time of this timer code.
    NotReady { timer: u8 },
    /// A request before this one is missing; the responder expects this sequence number.
    OutOfSequence { expected: Psn },
    /// The message failed.
    Refused(Nak),
}

/// The local side of a message's payload: its segments and the keys that give them meaning.
#[derive(Clone, Copy)]
pub(super) struct Payload<'a> {
    /// None in a message without local memory, such as an atomic.
    pub(super) segments: Option<wqe::Payload<'a>>,
    pub(super) keys: &'a MkeyTable,
    pub(super) pd: Pd,
}

/// The payload of a request, as its responder gets at it.
pub(super) trait Content: Copy {
    /// Gathers payload bytes `[offset, offset + to.len())` into `to`.
    ///
    /// False if the requester withdrew them meanwhile: what is in `to` then means nothing.
    fn gather(&self, offset: u64, to: Span) -> bool;
}

impl Content for Payload<'_> {
    #[inline]
    fn gather(&self, offset: u64, to: Span) -> bool {
        self.gather_span(offset, to);
        true
    }
}

impl Payload<'_> {
    fn reach(&self, seg: &DataSeg, want: Want) -> Result<Span, KeyFault> {
        self.keys.reach(self.pd, seg.lkey.get(), seg.addr.get(), seg.byte_len(), want)
    }

    /// The memory of a payload that is one range, while the keys are held.
    pub(super) fn sole_range(&self, want: Want) -> Option<Span> {
        let mut segments = self.segments?.into_iter();
        match (segments.next(), segments.next()) {
            (Some(Segment::Data(seg)), None) => self.reach(seg, want).ok(),
            _ => None,
        }
    }

    /// Checks every segment and adds up their lengths.
    #[inline]
    pub(super) fn check(&self, want: Want) -> Result<u64, KeyFault> {
        let Some(segments) = self.segments else {
            return Ok(0);
        };
        let mut len = 0;
        for segment in segments {
            if let Segment::Data(seg) = segment {
                self.reach(seg, want)?;
            }
            len += segment.byte_len();
        }
        Ok(len)
    }

    /// Gathers payload bytes `[offset, offset + to.len())` into `to`.
    ///
    /// Segments were checked under the same key guard; one that is refused now is left out.
    #[inline]
    fn gather_span(&self, offset: u64, to: Span) {
        self.walk(offset, to.len(), |segment, from, at, len| match segment {
            // CAST: inline data is shorter than a WQE.
            Segment::Inline(bytes) => to.write(at, &bytes[from as usize..][..len as usize]),
            Segment::Data(seg) => {
                if let Ok(source) = self.reach(seg, Want::LocalRead) {
                    to.copy_from(at, source, from, len);
                }
            }
        });
    }

    /// Calls `each` for every stretch of the payload bytes `[offset, offset + len)`, in order.
    pub(super) fn visit(&self, offset: u64, len: u64, mut each: impl FnMut(Source<'_>)) {
        self.walk(offset, len, |segment, from, _, len| match segment {
            // CAST: inline data is shorter than a WQE.
            Segment::Inline(bytes) => each(Source::Inline(&bytes[from as usize..][..len as usize])),
            Segment::Data(seg) => {
                let found = self.reach(seg, Want::LocalRead).ok();
                if let Some(part) = found.and_then(|span| span.slice(from, len)) {
                    each(Source::Memory(part));
                }
            }
        });
    }

    /// Scatters `from` to the payload bytes that start at `offset`.
    pub(super) fn scatter(&self, offset: u64, from: Span) {
        self.walk(offset, from.len(), |segment, into, at, len| {
            if let Segment::Data(seg) = segment
                && let Ok(target) = self.reach(seg, Want::LocalWrite)
            {
                target.copy_from(into, from, at, len);
            }
        });
    }

    /// As [`gather`](Self::gather), into bytes that the device owns.
    pub(super) fn gather_into(&self, offset: u64, to: &mut [u8]) {
        self.walk(offset, to.len() as u64, |segment, from, at, len| {
            // CAST: positions inside `to` and inside inline data.
            let (from_at, at, len_at) = (from as usize, at as usize, len as usize);
            let into = &mut to[at..at + len_at];
            match segment {
                Segment::Inline(bytes) => into.copy_from_slice(&bytes[from_at..from_at + len_at]),
                Segment::Data(seg) => {
                    if let Ok(source) = self.reach(seg, Want::LocalRead) {
                        source.read(from, into);
                    }
                }
            }
        });
    }

    /// As [`scatter`](Self::scatter), from bytes that the device owns.
    pub(super) fn scatter_from(&self, offset: u64, from: &[u8]) {
        self.walk(offset, from.len() as u64, |segment, into, at, len| {
            if let Segment::Data(seg) = segment
                && let Ok(target) = self.reach(seg, Want::LocalWrite)
            {
                // CAST: positions inside `from`.
                target.write(into, &from[at as usize..(at + len) as usize]);
            }
        });
    }

    /// Calls `each(segment, offset in segment, offset in range, length)` over a range of the payload.
    #[inline]
    fn walk(&self, offset: u64, len: u64, mut each: impl FnMut(Segment<'_>, u64, u64, u64)) {
        let Some(segments) = self.segments else {
            return;
        };
        let (mut skip, mut at) = (offset, 0);
        for segment in segments {
            let size = segment.byte_len();
            if skip >= size && size != 0 {
                skip -= size;
                continue;
            }
            let part = (size - skip).min(len - at);
            if part != 0 {
                each(segment, skip, at, part);
            }
            (skip, at) = (0, at + part);
            if at == len {
                return;
            }
        }
    }
}
