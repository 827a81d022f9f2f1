//! What a peer wrote: its requests, which our queue pairs execute, and its answers to ours.
//!
//! *Who owns what.* Everything read here is the peer's and may be anything. An entry is copied out once and
//! checked ([`RequestEntry::parse`]); the memory that it names is looked up among mappings that this side
//! owns, with the bounds of those. A peer can make itself be refused; it cannot make us wait, loop, or touch
//! memory that our keys do not give it.
//!
//! INVARIANT: an entry is taken at most once, and one pass takes a bounded number of them.

use std::sync::atomic::Ordering;

use ibex_abi::types::{QpNum, QpState};
use zerocopy::{FromBytes, IntoBytes};

use super::layout::{
    INLINE_MAX, PART_LEN, PARTS, Parsed, ParsedReply, REPLIES, REPLY_LEN, REQUEST_LEN, REQUESTS, ReplyEntry,
    RequestEntry, STRETCHES, answer, slot, slot_at,
};
use super::link::Link;
use super::memory::{Mapped, PeerMemory};
use crate::Nanos;
use crate::emulated::counters::add;
use crate::emulated::fabric::Placement;
use crate::emulated::memory::{PeerSpan, Span};
use crate::emulated::message::{Content, Piece, Reply, Request};
use crate::emulated::mkeys::MkeyTable;
use crate::emulated::qp::Qp;
use crate::emulated::requester::fetch::Local;
use crate::emulated::requester::send::Turn;
use crate::emulated::responder::Surroundings;
use crate::emulated::{EmulatedHca, QpTable};

/// Requests of one peer that one pass executes at most.
const PASS_REQUESTS: usize = 128;
/// Payload bytes after which a pass ends.
const PASS_BYTES: u64 = 1 << 20;

/// How far we have come with what the peer wrote.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    requests_taken: u32,
    replies_taken: u32,
    replies_written: u32,
    /// The last unpublished reply is an acknowledgement, which a later one may replace.
    open_ack: Option<(QpNum, u32)>,
    /// Per part of the reply area in use: free once the peer took so many replies.
    parts: [Option<u32>; PARTS as usize],
    next_part: u32,
    /// A READ whose response is not written completely; nothing is executed before it is.
    reading: Option<Reading>,
    regions: Vec<Option<Mapped>>,
    /// Something was left for the next pass.
    backlog: bool,
}

/// A READ that is being answered.
#[derive(Debug, Clone, Copy)]
struct Reading {
    at: QpNum,
    to: QpNum,
    generation: u32,
    request: Request,
    offset: u64,
}

/// What one pass works on besides the inbox.
struct Pass<'a> {
    link: &'a Link,
    device: &'a EmulatedHca,
    qps: &'a QpTable,
    theirs: PeerSpan,
    now: Nanos,
}

impl Link {
    /// Executes what the peer asked for and takes in what it answered.
    pub(super) fn take_arrivals(&self, device: &EmulatedHca, now: Nanos) -> Turn {
        let Some(mut inbox) = self.inbox.try_lock() else {
            return Turn::default();
        };
        let at = self.their_slot_at();
        let Some(theirs) = at.and_then(|at| self.theirs.span().slice(at, slot::LEN)) else {
            return Turn::default();
        };
        let activity = theirs.load32(slot::ACTIVITY, Ordering::Acquire);
        if !inbox.backlog && activity == self.seen.load(Ordering::Relaxed) {
            return Turn::default();
        }
        self.seen.store(activity, Ordering::Relaxed);
        let qps = device.qp_table();
        let pass = Pass { link: self, device, qps: &qps, theirs, now };
        inbox.backlog = false;
        let before = (inbox.requests_taken, inbox.replies_taken, inbox.replies_written);
        inbox.take_replies(&pass);
        inbox.take_requests(&pass);
        if before == (inbox.requests_taken, inbox.replies_taken, inbox.replies_written) {
            return Turn::default();
        }
        inbox.publish(&pass);
        Turn { did_work: true, deadline: None }
    }
}

impl Pass<'_> {
    fn ours(&self) -> Span {
        let all = self.link.memory.span().slice(slot_at(self.link.slot), slot::LEN);
        all.unwrap_or(Span::EMPTY)
    }

    fn drop_request(&self) {
        add(&self.device.counters.dropped_requests, 1);
    }

    fn qp(&self, num: QpNum) -> Option<&Qp> {
        self.qps.by_number.get(&num.get()).map(|qp| &**qp)
    }
}

impl Inbox {
    fn publish(&mut self, pass: &Pass<'_>) {
        let ours = pass.ours();
        ours.store32(slot::REPLIES_WRITTEN, self.replies_written, Ordering::Release);
        ours.store32(slot::REQUESTS_TAKEN, self.requests_taken, Ordering::Release);
        ours.store32(slot::REPLIES_TAKEN, self.replies_taken, Ordering::Release);
        pass.link.memory.announce(pass.link.slot, &pass.link.theirs);
        self.open_ack = None;
    }

    /// Takes in the peer's answers.
    fn take_replies(&mut self, pass: &Pass<'_>) {
        let written = pass.theirs.load32(slot::REPLIES_WRITTEN, Ordering::Acquire);
        let waiting = written.wrapping_sub(self.replies_taken);
        if waiting > REPLIES {
            // It cannot have written so many: nothing it says makes sense.
            return;
        }
        for _ in 0..waiting {
            let mut bytes = [0; REPLY_LEN as usize];
            let at = slot::REPLIES_AT + u64::from(self.replies_taken % REPLIES) * REPLY_LEN;
            pass.theirs.read(at, &mut bytes);
            self.replies_taken = self.replies_taken.wrapping_add(1);
            let parsed = ReplyEntry::read_from_bytes(&bytes).ok().and_then(|entry| entry.parse());
            if let Some(parsed) = parsed.filter(|_| pass.link.hears()) {
                deliver(pass, &parsed);
            }
        }
    }

    /// Executes the peer's requests, until none is left or the pass has done enough.
    fn take_requests(&mut self, pass: &Pass<'_>) {
        let written = pass.theirs.load32(slot::REQUESTS_WRITTEN, Ordering::Acquire);
        if written == self.requests_taken && self.reading.is_none() {
            return;
        }
        if written.wrapping_sub(self.requests_taken) > REQUESTS {
            return;
        }
        let keys = pass.device.keys.read();
        let (mut executed, mut bytes) = (0, 0);
        loop {
            if !self.has_reply_room(pass) || !self.go_on_reading(pass, &keys) {
                // The peer's next activity is what makes room.
                return;
            }
            if written == self.requests_taken {
                return;
            }
            if executed == PASS_REQUESTS || bytes >= PASS_BYTES {
                self.backlog = true;
                return;
            }
            let mut entry = [0; REQUEST_LEN as usize];
            let at = slot::REQUESTS_AT + u64::from(self.requests_taken % REQUESTS) * REQUEST_LEN;
            pass.theirs.read(at, &mut entry);
            self.requests_taken = self.requests_taken.wrapping_add(1);
            executed += 1;
            if !pass.link.hears() {
                continue;
            }
            let parsed = RequestEntry::read_from_bytes(&entry).ok();
            match parsed.and_then(|entry| Some((entry, entry.parse()?))) {
                Some((entry, parsed)) => {
                    bytes += parsed.part_len;
                    self.execute(pass, &keys, &entry, &parsed);
                }
                None => pass.drop_request(),
            }
        }
    }

    /// Whether one more reply fits, by what the peer says it took; frees parts of the reply area.
    fn has_reply_room(&mut self, pass: &Pass<'_>) -> bool {
        let taken = pass.theirs.load32(slot::REPLIES_TAKEN, Ordering::Acquire);
        for part in &mut self.parts {
            // Circular: what was taken is less than 2^31 ahead or behind.
            *part = part.filter(|at| taken.wrapping_sub(*at).cast_signed() < 0);
        }
        self.replies_written.wrapping_sub(taken) < REPLIES
    }

    fn execute(&mut self, pass: &Pass<'_>, keys: &MkeyTable, entry: &RequestEntry, parsed: &Parsed) {
        let peer = &pass.link.theirs;
        let Some(qp) = pass.qp(parsed.to).filter(|_| peer.still_says(parsed.from, parsed.generation)) else {
            return pass.drop_request();
        };
        let Some(content) = self.pull(peer, entry, parsed) else {
            return pass.drop_request();
        };
        let mut responder = qp.responder.lock();
        let from = responder.from.as_ref();
        let answers = match from.filter(|(to, _)| pass.link.peer.answers_to(to)) {
            None => return pass.drop_request(),
            // As on a wire, a request of another queue pair of the peer executes; who is connected hears.
            Some((_, remote)) => *remote == parsed.from,
        };
        let around = surroundings(pass, qp, keys);
        let reply = responder.take(&around, &parsed.request, content, parsed.piece);
        drop(responder);
        let placed = matches!(parsed.piece, Piece::Part { .. });
        match reply {
            Some(Reply::Ack { .. }) if placed => {}
            Some(reply) if answers => self.answer(pass, keys, parsed, &reply),
            _ => {}
        }
    }

    fn answer(&mut self, pass: &Pass<'_>, keys: &MkeyTable, parsed: &Parsed, reply: &Reply) {
        let Parsed { to, from, generation, request, .. } = *parsed;
        if let Reply::Data { .. } = reply {
            self.reading = Some(Reading { at: to, to: from, generation, request, offset: 0 });
            // What does not fit now goes on in the next pass.
            self.go_on_reading(pass, keys);
            return;
        }
        self.reply(pass, ReplyEntry::new(from, generation, request.psn, reply));
    }

    /// Writes a reply, unless the path to the peer is cut.
    ///
    /// INVARIANT: there is room, as every pass checks before it executes a request.
    fn reply(&mut self, pass: &Pass<'_>, entry: ReplyEntry) {
        if !pass.link.sends() {
            return;
        }
        let to = QpNum::try_from(entry.to.get()).ok().map(|to| (to, entry.generation.get()));
        let ack = to.filter(|_| entry.kind == answer::ACK);
        // An acknowledgement covers those before it.
        if ack.is_none() || ack != self.open_ack {
            self.replies_written = self.replies_written.wrapping_add(1);
        }
        self.open_ack = ack;
        let nth = self.replies_written.wrapping_sub(1);
        let at = slot::REPLIES_AT + u64::from(nth % REPLIES) * REPLY_LEN;
        pass.ours().write(at, entry.as_bytes());
    }

    /// Writes what fits of the response that is under way; true if none is under way any more.
    fn go_on_reading(&mut self, pass: &Pass<'_>, keys: &MkeyTable) -> bool {
        while let Some(reading) = self.reading {
            let part = self.next_part % PARTS;
            // CAST: below PARTS.
            if !self.has_reply_room(pass) || self.parts[part as usize].is_some() {
                return false;
            }
            let len = (reading.request.len - reading.offset).min(PART_LEN);
            let Some(reply) = read_part(pass, keys, &reading, len) else {
                self.reading = None;
                return true;
            };
            let is_last = reading.offset + len == reading.request.len;
            let mut entry = ReplyEntry::new(reading.to, reading.generation, reading.request.psn, &reply);
            if let Reply::Data { memory, .. } = reply {
                let area = slot::PARTS_AT + u64::from(part) * PART_LEN;
                pass.ours().copy_from(area, memory, 0, memory.len().min(PART_LEN));
                entry = entry.with_data(reading.offset, len, part, is_last);
            }
            self.reply(pass, entry);
            self.parts[part as usize] = Some(self.replies_written);
            self.next_part = self.next_part.wrapping_add(1);
            let refused = !matches!(reply, Reply::Data { .. });
            let rest = Reading { offset: reading.offset + len, ..reading };
            self.reading = (!is_last && !refused).then_some(rest);
        }
        true
    }

    /// Finds the payload that comes with an entry; `None` if the entry lies about it.
    fn pull<'a>(
        &mut self,
        peer: &'a PeerMemory,
        entry: &'a RequestEntry,
        parsed: &Parsed,
    ) -> Option<Pulled<'a>> {
        let &Parsed { from, generation, offset, part_len, .. } = parsed;
        let mut pulled = Pulled { peer, from, generation, offset, inline: &[], parts: [None; STRETCHES] };
        if parsed.request.op.has_response() || part_len == 0 {
            return Some(pulled);
        }
        let inline = usize::from(entry.inline_len);
        if inline != 0 {
            pulled.inline = entry.body.get(..inline.min(INLINE_MAX))?;
            return (inline as u64 == part_len && entry.stretches == 0).then_some(pulled);
        }
        let mut total = 0;
        for nth in 0..usize::from(entry.stretches) {
            let stretch = entry.stretch(nth)?;
            let len = u64::from(stretch.len.get());
            let memory = self.region(peer, stretch.region.get())?;
            *pulled.parts.get_mut(nth)? = Some(memory.slice(stretch.offset.get(), len)?);
            total += len;
        }
        (total == part_len).then_some(pulled)
    }

    /// The memory of the peer that entries call by this number; mapped at its first use.
    fn region(&mut self, peer: &PeerMemory, number: u32) -> Option<PeerSpan> {
        let Some(idx) = number.checked_sub(1) else {
            return Some(peer.span());
        };
        let nonce = peer.region_nonce(idx)?;
        // CAST: below REGIONS_MAX, as `region_nonce` checked.
        let slot = idx as usize;
        if self.regions.len() <= slot {
            self.regions.resize_with(slot + 1, || None);
        }
        let place = &mut self.regions[slot];
        if place.as_ref().is_none_or(|mapped| mapped.nonce != nonce) {
            *place = peer.open_region(idx);
        }
        place.as_ref().map(|mapped| mapped.span)
    }
}

fn surroundings<'a>(pass: &Pass<'a>, qp: &'a Qp, keys: &'a MkeyTable) -> Surroundings<'a> {
    Surroundings { device: pass.device, qp, keys, placement: Placement::InOrder, now: pass.now }
}

/// The next part of a READ's response, or what became of it.
fn read_part(pass: &Pass<'_>, keys: &MkeyTable, reading: &Reading, len: u64) -> Option<Reply> {
    let qp = pass.qp(reading.at)?;
    let piece = Piece::Part { offset: reading.offset, len };
    let nothing = Pulled {
        peer: &pass.link.theirs,
        from: reading.to,
        generation: reading.generation,
        offset: 0,
        inline: &[],
        parts: [None; STRETCHES],
    };
    // The READ is executed: this is a part of an accepted one, checked again.
    let mut responder = qp.responder.lock();
    responder.take(&surroundings(pass, qp, keys), &reading.request, nothing, piece)
}

/// Hands an answer to the queue pair that waits for it.
fn deliver(pass: &Pass<'_>, parsed: &ParsedReply) {
    let Some(qp) = pass.qp(parsed.to) else { return };
    let area = slot::PARTS_AT + u64::from(parsed.part) * PART_LEN;
    let reply = match parsed.reply {
        Reply::Data { next, .. } => match pass.theirs.slice(area, parsed.len) {
            Some(data) => Reply::Data { next, memory: data.source() },
            None => return,
        },
        reply => reply,
    };
    let mut requester = qp.requester.lock();
    let ours = |to| pass.link.peer.answers_to(to);
    let connected = requester.connection.as_ref().is_some_and(|connection| ours(&connection.to));
    let sends = matches!(qp.state(), QpState::Rts | QpState::SqDraining);
    if !connected || !sends || parsed.generation != pass.link.memory.generation(parsed.to) {
        return;
    }
    // Locked after the half, as everywhere.
    let keys = pass.device.keys.read();
    let local = Local { device: pass.device, qp, keys: &keys, now: pass.now };
    requester.take_late(&local, parsed.psn, reply, parsed.read);
}

/// Payload of a request in the peer's memory, or in the entry.
#[derive(Clone, Copy)]
struct Pulled<'a> {
    peer: &'a PeerMemory,
    from: QpNum,
    generation: u32,
    /// Position of the first byte in the message.
    offset: u64,
    inline: &'a [u8],
    parts: [Option<PeerSpan>; STRETCHES],
}

impl Content for Pulled<'_> {
    fn gather(&self, offset: u64, to: Span) -> bool {
        let mut skip = offset.saturating_sub(self.offset);
        if !self.inline.is_empty() {
            // CAST: at most INLINE_MAX bytes; what lies outside is not there.
            let range = skip as usize..(skip + to.len()) as usize;
            if let Some(bytes) = self.inline.get(range) {
                to.write(0, bytes);
            }
            return true;
        }
        let mut at = 0;
        for part in self.parts.iter().flatten() {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            let len = (part.len() - skip).min(to.len() - at);
            to.copy_from(at, part.source(), skip, len);
            (skip, at) = (0, at + len);
            if at == to.len() {
                break;
            }
        }
        self.peer.still_says(self.from, self.generation)
    }
}
