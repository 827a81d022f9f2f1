//! Bytes of a port's memory: where things stand, and what an entry of a ring says.
//!
//! ```text
//!  0        head: magic, version, peers, nonce | sleepers
//!  4096     regions: where payload is, besides the port memory itself
//!  12288    generations: one word per queue pair, by the low bits of its number
//!  28672    owners: which peer each slot is for
//!  32768    slot 0, slot 1, ..: counters | requests | replies | READ parts | copies of payload
//! ```
//!
//! All numbers are little-endian. The owner of the memory writes; its peers read, and believe nothing:
//! [`RequestEntry::parse`] and [`ReplyEntry::parse`] let through only what can be.

use ibex_abi::types::{Psn, QpNum};
use ibex_abi::wqe::AtomicOp;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::emulated::memory::Span;
use crate::emulated::message::{Nak, Piece, Reply, Request, RequestOp, Target};
use crate::emulated::requester::answers::ReadPart;

/// First word of a port's memory: "IBXPORT" and the version of this layout.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"IBXPORT\x01");

pub(super) mod head {
    pub(in super::super) const MAGIC: u64 = 0;
    pub(in super::super) const PEERS: u64 = 8;
    pub(in super::super) const NONCE: u64 = 16;
    /// Threads of the owner that sleep and want to be woken; on a line of its own.
    pub(in super::super) const SLEEPERS: u64 = 64;
}

/// Regions that one port may name at a time.
pub(super) const REGIONS_MAX: u32 = 256;
/// Words in the table of generations; queue pairs whose numbers agree in the low bits share one.
const GENERATIONS: u32 = 4096;
/// Most peers of one port: their owners fill a page.
pub(super) const PEERS_MAX: u16 = 512;

const REGIONS_AT: u64 = 4096;
const REGION_LEN: u64 = 32;
const GENERATIONS_AT: u64 = REGIONS_AT + REGIONS_MAX as u64 * REGION_LEN;
const OWNERS_AT: u64 = GENERATIONS_AT + GENERATIONS as u64 * 4;
const SLOTS_AT: u64 = OWNERS_AT + PEERS_MAX as u64 * 8;

/// Requests that one peer has not taken yet.
pub(super) const REQUESTS: u32 = 512;
/// Replies that one peer has not taken yet.
pub(super) const REPLIES: u32 = 512;
/// Parts of READ responses that one peer has not taken yet.
pub(super) const PARTS: u32 = 4;
/// Bytes of such a part.
pub(super) const PART_LEN: u64 = 64 << 10;
/// Bytes of payload copies that one peer has not taken yet.
pub(super) const COPIES_LEN: u64 = 1 << 20;

/// Positions within a slot. Counters have a line each, because their readers spin on them.
pub(super) mod slot {
    use super::{COPIES_LEN, PART_LEN, PARTS, REPLIES, REPLY_LEN, REQUEST_LEN, REQUESTS};

    /// Requests written, modulo 2^32.
    pub(in super::super) const REQUESTS_WRITTEN: u64 = 0;
    /// Replies written.
    pub(in super::super) const REPLIES_WRITTEN: u64 = 64;
    /// Requests of the peer taken.
    pub(in super::super) const REQUESTS_TAKEN: u64 = 128;
    /// Replies of the peer taken.
    pub(in super::super) const REPLIES_TAKEN: u64 = 192;
    /// Changes whenever one of the above does; peers sleep on it.
    pub(in super::super) const ACTIVITY: u64 = 256;
    pub(in super::super) const REQUESTS_AT: u64 = 4096;
    pub(in super::super) const REPLIES_AT: u64 = REQUESTS_AT + REQUESTS as u64 * REQUEST_LEN;
    pub(in super::super) const PARTS_AT: u64 = REPLIES_AT + REPLIES as u64 * REPLY_LEN;
    pub(in super::super) const COPIES_AT: u64 = PARTS_AT + PARTS as u64 * PART_LEN;
    pub(in super::super) const LEN: u64 = COPIES_AT + COPIES_LEN;
}

/// Length of the memory of a port with this many slots.
pub(super) const fn port_len(peers: u16) -> u64 {
    SLOTS_AT + peers as u64 * slot::LEN
}

/// Where a slot begins.
pub(super) const fn slot_at(slot: u16) -> u64 {
    SLOTS_AT + slot as u64 * slot::LEN
}

/// Where the nonce of a slot's peer stands; zero if the slot is free.
pub(super) const fn owner_at(slot: u16) -> u64 {
    OWNERS_AT + slot as u64 * 8
}

/// Where a region is described.
pub(super) const fn region_at(idx: u32) -> u64 {
    REGIONS_AT + idx as u64 * REGION_LEN
}

/// Where the generation of a queue pair stands.
pub(super) const fn generation_at(qpn: QpNum) -> u64 {
    GENERATIONS_AT + (qpn.get() % GENERATIONS) as u64 * 4
}

/// A file that payload may lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RegionEntry {
    /// Zero in a free entry; written last.
    pub(super) nonce: U64,
    pub(super) file_len: U64,
    pub(super) fd: U32,
    pub(super) zero: [u8; 12],
}

/// A stretch of payload. Region 0 is the port memory itself; region `n` is entry `n - 1` of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Stretch {
    pub(super) region: U32,
    pub(super) len: U32,
    pub(super) offset: U64,
}

/// Most stretches of one entry.
pub(super) const STRETCHES: usize = 4;
/// Most bytes that stand in an entry themselves.
pub(super) const INLINE_MAX: usize = 64;
/// Longest message.
const LEN_MAX: u32 = 1 << 30;

/// A request, or a piece of one.
///
/// ```text
///  0 to   4 from  8 generation  12 psn  16 packets  20 len  24 imm  28 rkey  32 va
///  40 offset  44 part_len  48 kind  49 flags  50 piece  51 stretches  52 inline_len  53 atomic  54 zero
///  64 body: inline bytes | stretches | operands of an atomic
/// ```
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RequestEntry {
    /// Queue pair of the responder, and of the requester.
    pub(super) to: U32,
    pub(super) from: U32,
    /// Valid only while the requester's generation word says the same.
    pub(super) generation: U32,
    psn: U32,
    packets: U32,
    len: U32,
    imm: U32,
    rkey: U32,
    va: U64,
    offset: U32,
    part_len: U32,
    kind: u8,
    flags: u8,
    piece: u8,
    pub(super) stretches: u8,
    pub(super) inline_len: u8,
    atomic: u8,
    zero: [u8; 10],
    pub(super) body: [u8; INLINE_MAX],
}

pub(super) const REQUEST_LEN: u64 = size_of::<RequestEntry>() as u64;
const _: () = assert!(REQUEST_LEN == 128 && size_of::<RegionEntry>() as u64 == REGION_LEN);
const _: () = assert!(size_of::<[Stretch; STRETCHES]>() == INLINE_MAX);

mod kind {
    pub(super) const WRITE: u8 = 1;
    pub(super) const WRITE_IMM: u8 = 2;
    pub(super) const READ: u8 = 3;
    pub(super) const SEND: u8 = 4;
    pub(super) const SEND_IMM: u8 = 5;
    pub(super) const ATOMIC: u8 = 6;
}

const SOLICITED: u8 = 1;
const RESENT: u8 = 2;

/// A request entry that can be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parsed {
    pub(super) to: QpNum,
    pub(super) from: QpNum,
    pub(super) generation: u32,
    pub(super) request: Request,
    pub(super) piece: Piece,
    /// First payload byte that comes with the entry, and how many do.
    pub(super) offset: u64,
    pub(super) part_len: u64,
}

impl RequestEntry {
    /// An entry without payload.
    pub(super) fn new(to: QpNum, from: QpNum, generation: u32, request: &Request, piece: Piece) -> Self {
        let mut entry = Self::new_zeroed();
        (entry.to, entry.from) = (U32::new(to.get()), U32::new(from.get()));
        entry.generation = U32::new(generation);
        (entry.psn, entry.packets) = (U32::new(request.psn.get()), U32::new(request.packets));
        // CAST: a message is at most LEN_MAX bytes, so lengths and offsets fit 32 bits.
        entry.len = U32::new(request.len as u32);
        entry.flags = if request.solicited { SOLICITED } else { 0 } | if request.resent { RESENT } else { 0 };
        let (piece, offset, part_len) = match piece {
            Piece::Whole => (0, 0, request.len),
            Piece::Part { offset, len } => (1, offset, len),
            Piece::End => (2, 0, 0),
        };
        entry.piece = piece;
        (entry.offset, entry.part_len) = (U32::new(offset as u32), U32::new(part_len as u32));
        let mut target = None;
        entry.kind = match request.op {
            RequestOp::Write { to, imm } => {
                target = Some(to);
                entry.imm = U32::new(imm.unwrap_or(0));
                if imm.is_some() { kind::WRITE_IMM } else { kind::WRITE }
            }
            RequestOp::Read { from } => {
                target = Some(from);
                kind::READ
            }
            RequestOp::Send { imm } => {
                entry.imm = U32::new(imm.unwrap_or(0));
                if imm.is_some() { kind::SEND_IMM } else { kind::SEND }
            }
            RequestOp::Atomic { on, op } => {
                target = Some(on);
                entry.put_atomic(op);
                kind::ATOMIC
            }
        };
        if let Some(Target { va, rkey }) = target {
            (entry.va, entry.rkey) = (U64::new(va), U32::new(rkey));
        }
        entry
    }

    fn put_atomic(&mut self, op: AtomicOp) {
        let (code, operands): (u8, [u64; 4]) = match op {
            AtomicOp::FetchAdd { add } => (0, [add, 0, 0, 0]),
            AtomicOp::CmpSwap { swap, compare } => (1, [swap, compare, 0, 0]),
            AtomicOp::MaskedFetchAdd32 { add, field_boundary } => {
                (2, [add.into(), field_boundary.into(), 0, 0])
            }
            AtomicOp::MaskedFetchAdd64 { add, field_boundary } => (3, [add, field_boundary, 0, 0]),
            AtomicOp::MaskedCmpSwap32 { swap, compare, swap_mask, compare_mask } => {
                (4, [swap, compare, swap_mask, compare_mask].map(u64::from))
            }
            AtomicOp::MaskedCmpSwap64 { swap, compare, swap_mask, compare_mask } => {
                (5, [swap, compare, swap_mask, compare_mask])
            }
        };
        self.atomic = code;
        for (at, operand) in self.body.chunks_exact_mut(8).zip(operands) {
            at.copy_from_slice(&operand.to_le_bytes());
        }
    }

    fn operand(&self, nth: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.body[nth * 8..][..8]);
        u64::from_le_bytes(bytes)
    }

    fn atomic_op(&self) -> Option<AtomicOp> {
        let [a, b, c, d] = [0, 1, 2, 3].map(|nth| self.operand(nth));
        // CAST: 32-bit operands stand in the low half.
        let low = |value: u64| value as u32;
        Some(match self.atomic {
            0 => AtomicOp::FetchAdd { add: a },
            1 => AtomicOp::CmpSwap { swap: a, compare: b },
            2 => AtomicOp::MaskedFetchAdd32 { add: low(a), field_boundary: low(b) },
            3 => AtomicOp::MaskedFetchAdd64 { add: a, field_boundary: b },
            4 => AtomicOp::MaskedCmpSwap32 {
                swap: low(a),
                compare: low(b),
                swap_mask: low(c),
                compare_mask: low(d),
            },
            5 => AtomicOp::MaskedCmpSwap64 { swap: a, compare: b, swap_mask: c, compare_mask: d },
            _ => return None,
        })
    }

    /// The entry's stretches; what it does not use is zero.
    pub(super) fn stretch(&self, nth: usize) -> Option<Stretch> {
        let bytes = self.body.get(nth * size_of::<Stretch>()..)?;
        Stretch::read_from_prefix(bytes).ok().map(|(stretch, _)| stretch)
    }

    pub(super) fn put_stretch(&mut self, nth: usize, stretch: Stretch) {
        let at = nth * size_of::<Stretch>();
        self.body[at..at + size_of::<Stretch>()].copy_from_slice(stretch.as_bytes());
    }

    /// What the entry says, if it can be.
    pub(super) fn parse(&self) -> Option<Parsed> {
        let (to, from) = (QpNum::try_from(self.to.get()).ok()?, QpNum::try_from(self.from.get()).ok()?);
        let psn = psn(self.psn)?;
        let (packets, len, imm) = (self.packets.get(), self.len.get(), self.imm.get());
        if packets == 0 || packets > 1 << 23 || len > LEN_MAX {
            return None;
        }
        let target = Target { va: self.va.get(), rkey: self.rkey.get() };
        let op = match self.kind {
            kind::WRITE => RequestOp::Write { to: target, imm: None },
            kind::WRITE_IMM => RequestOp::Write { to: target, imm: Some(imm) },
            kind::READ => RequestOp::Read { from: target },
            kind::SEND => RequestOp::Send { imm: None },
            kind::SEND_IMM => RequestOp::Send { imm: Some(imm) },
            kind::ATOMIC => RequestOp::Atomic { on: target, op: self.atomic_op()? },
            _ => return None,
        };
        let (offset, part_len) = (self.offset.get(), self.part_len.get());
        let piece = match self.piece {
            0 if offset == 0 && part_len == len => Piece::Whole,
            1 if offset <= len && part_len <= len - offset => {
                Piece::Part { offset: offset.into(), len: part_len.into() }
            }
            2 if offset == 0 && part_len == 0 => Piece::End,
            _ => return None,
        };
        if op.has_response() && piece != Piece::Whole {
            return None;
        }
        let (solicited, resent) = (self.flags & SOLICITED != 0, self.flags & RESENT != 0);
        let request = Request { psn, packets, len: len.into(), op, solicited, resent };
        let (offset, part_len) = (offset.into(), part_len.into());
        Some(Parsed { to, from, generation: self.generation.get(), request, piece, offset, part_len })
    }
}

fn psn(value: U32) -> Option<Psn> {
    (value.get() <= 0xff_ffff).then(|| Psn::new(value.get()))
}

/// A reply.
///
/// ```text
///  0 to  4 generation  8 psn  12 next  16 original  24 offset  28 len  32 part  36 kind  37 code  38 last
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ReplyEntry {
    /// Queue pair of the requester.
    pub(super) to: U32,
    /// As the request said.
    pub(super) generation: U32,
    psn: U32,
    next: U32,
    original: U64,
    offset: U32,
    len: U32,
    part: U32,
    pub(super) kind: u8,
    code: u8,
    last: u8,
    zero: [u8; 25],
}

pub(super) const REPLY_LEN: u64 = size_of::<ReplyEntry>() as u64;
const _: () = assert!(REPLY_LEN == 64);

pub(super) mod answer {
    pub(in super::super) const ACK: u8 = 1;
    pub(super) const ATOMIC: u8 = 2;
    pub(super) const DATA: u8 = 3;
    pub(super) const NOT_READY: u8 = 4;
    pub(super) const OUT_OF_SEQUENCE: u8 = 5;
    pub(super) const REFUSED: u8 = 6;
}

/// A reply that can be; the memory of [`Reply::Data`] is still to be found.
#[derive(Debug, Clone, Copy)]
pub(super) struct ParsedReply {
    pub(super) to: QpNum,
    pub(super) generation: u32,
    pub(super) psn: Psn,
    pub(super) reply: Reply,
    pub(super) read: ReadPart,
    /// Which part of the reply area holds the data, and how much of it.
    pub(super) part: u32,
    pub(super) len: u64,
}

impl ReplyEntry {
    /// An entry that answers `request`.
    pub(super) fn new(to: QpNum, generation: u32, request: Psn, reply: &Reply) -> Self {
        let mut entry = Self::new_zeroed();
        (entry.to, entry.generation) = (U32::new(to.get()), U32::new(generation));
        entry.psn = U32::new(request.get());
        entry.kind = match *reply {
            Reply::Ack { next } => {
                entry.next = U32::new(next.get());
                answer::ACK
            }
            Reply::Atomic { next, original } => {
                (entry.next, entry.original) = (U32::new(next.get()), U64::new(original));
                answer::ATOMIC
            }
            Reply::Data { next, .. } => {
                entry.next = U32::new(next.get());
                answer::DATA
            }
            Reply::NotReady { timer } => {
                entry.code = timer;
                answer::NOT_READY
            }
            Reply::OutOfSequence { expected } => {
                entry.next = U32::new(expected.get());
                answer::OUT_OF_SEQUENCE
            }
            Reply::Refused(nak) => {
                entry.code = match nak {
                    Nak::InvalidRequest => 0,
                    Nak::RemoteAccess => 1,
                    Nak::RemoteOperation => 2,
                };
                answer::REFUSED
            }
        };
        entry
    }

    /// Says where the data of a READ's answer is.
    pub(super) fn with_data(mut self, offset: u64, len: u64, part: u32, is_last: bool) -> Self {
        // CAST: positions within a message of at most LEN_MAX bytes.
        (self.offset, self.len) = (U32::new(offset as u32), U32::new(len as u32));
        (self.part, self.last) = (U32::new(part), is_last.into());
        self
    }

    /// What the entry says, if it can be.
    pub(super) fn parse(&self) -> Option<ParsedReply> {
        let to = QpNum::try_from(self.to.get()).ok()?;
        let (request, next) = (psn(self.psn)?, psn(self.next)?);
        let reply = match self.kind {
            answer::ACK => Reply::Ack { next },
            answer::ATOMIC => Reply::Atomic { next, original: self.original.get() },
            answer::DATA => Reply::Data { next, memory: Span::EMPTY },
            answer::NOT_READY => Reply::NotReady { timer: self.code & 31 },
            answer::OUT_OF_SEQUENCE => Reply::OutOfSequence { expected: next },
            answer::REFUSED => Reply::Refused(match self.code {
                0 => Nak::InvalidRequest,
                1 => Nak::RemoteAccess,
                2 => Nak::RemoteOperation,
                _ => return None,
            }),
            _ => return None,
        };
        let (part, len) = (self.part.get(), u64::from(self.len.get()));
        if part >= PARTS || len > PART_LEN {
            return None;
        }
        let read = ReadPart { offset: self.offset.get().into(), is_last: self.last != 0 };
        Some(ParsedReply { to, generation: self.generation.get(), psn: request, reply, read, part, len })
    }
}

/// Body of a fuzz target and of a property test: entries that parse stay within their message and their slot.
pub(crate) fn parse_arbitrary(bytes: &[u8]) {
    if let Ok((entry, _)) = RequestEntry::ref_from_prefix(bytes)
        && let Some(parsed) = entry.parse()
    {
        assert!(parsed.offset + parsed.part_len <= parsed.request.len);
        assert!(parsed.request.len <= LEN_MAX.into() && parsed.request.packets != 0);
    }
    if let Ok((entry, _)) = ReplyEntry::ref_from_prefix(bytes)
        && let Some(parsed) = entry.parse()
    {
        assert!(parsed.part < PARTS && parsed.len <= PART_LEN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(op: RequestOp, len: u64) -> Request {
        Request { psn: Psn::new(0xff_fffe), packets: 3, len, op, solicited: true, resent: false }
    }

    #[test]
    fn requests_come_out_as_they_went_in() {
        let at = Target { va: 0x1122_3344_5566_7788, rkey: 0xaabb_ccdd };
        let swap = AtomicOp::MaskedCmpSwap32 { swap: 1, compare: 2, swap_mask: u32::MAX, compare_mask: 0xf0 };
        for (op, len, piece) in [
            (RequestOp::Write { to: at, imm: None }, 7168, Piece::Whole),
            (RequestOp::Write { to: at, imm: Some(9) }, 7168, Piece::Part { offset: 100, len: 28 }),
            (RequestOp::Send { imm: Some(7) }, 0, Piece::End),
            (RequestOp::Read { from: at }, 1 << 30, Piece::Whole),
            (RequestOp::Atomic { on: at, op: swap }, 4, Piece::Whole),
        ] {
            let sent = request(op, len);
            let entry = RequestEntry::new(QpNum::new(5), QpNum::new(6), 77, &sent, piece);
            let parsed = entry.parse().unwrap();
            assert_eq!((parsed.to, parsed.from, parsed.generation), (QpNum::new(5), QpNum::new(6), 77));
            assert_eq!(format!("{:?}", parsed.request), format!("{sent:?}"));
            assert_eq!(parsed.piece, piece);
        }
    }

    #[test]
    fn replies_come_out_as_they_went_in() {
        let next = Psn::new(0x12_3456);
        for reply in [
            Reply::Ack { next },
            Reply::Atomic { next, original: u64::MAX },
            Reply::Data { next, memory: Span::EMPTY },
            Reply::NotReady { timer: 31 },
            Reply::OutOfSequence { expected: next },
            Reply::Refused(Nak::RemoteOperation),
        ] {
            let entry = ReplyEntry::new(QpNum::new(9), 3, Psn::new(1), &reply).with_data(64, 32, 3, true);
            let parsed = entry.parse().unwrap();
            assert_eq!(format!("{:?}", parsed.reply), format!("{reply:?}"));
            assert_eq!(parsed.read, ReadPart { offset: 64, is_last: true });
            assert_eq!((parsed.part, parsed.len, parsed.generation), (3, 32, 3));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: [u8; 32], rest: [u8; 32], kind in 0..8_u8) {
            let mut raw = [bytes, rest, bytes, rest].concat();
            parse_arbitrary(&raw);
            // Numbers of 24 bits, lengths and parts around their limits let some through to the later checks.
            for high in [3, 7, 11, 15, 19, 22, 23, 43, 47] {
                raw[high] = 0;
            }
            for (at, mask) in [(30, 1), (32, 7), (50, 3), (51, 7), (53, 3)] {
                raw[at] &= mask;
            }
            for high in [31, 33, 34, 35, 42, 46] {
                raw[high] = 0;
            }
            (raw[36], raw[48]) = (kind, kind);
            parse_arbitrary(&raw);
        }
    }
}
