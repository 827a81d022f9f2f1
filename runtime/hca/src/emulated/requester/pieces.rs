//! Sending in pieces: what a simulation may interleave.
//!
//! Hardware gives a WQE no instant of execution. It fetches it some time after the doorbell, reads and
//! places its payload packet by packet, in any order within a message, and writes the completion later.
//! Each of these is a [`Step`] here, to be executed whenever a scheduler likes; what [`Requester::turn`]
//! does at once is one of the possible orders.
//!
//! INVARIANT: a piece that a queue pair offers can be executed, or turns out to be blocked by a fence.

use super::fetch::{Fetch, Local, WqeBuf};
use super::send::{Tally, take_response};
use super::{OUTSTANDING_MAX, Outstanding, Progress, Requester, Work};
use crate::emulated::EmulatedHca;
use crate::emulated::Nanos;
use crate::emulated::counters::add;
use crate::emulated::fabric::{Carried, Placement, Wire};
use crate::emulated::message::{Piece, Reply, RequestOp};
use crate::emulated::qp::{Qp, WQE_BYTES_MAX};

/// One thing that a requester could do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::emulated) enum SendPiece {
    /// A timer ran out.
    Timer,
    /// Fetch the next WQE.
    Fetch,
    /// Place the chunk at this position in the list of missing ones, of the message at this position.
    Place { pos: usize, chunk: usize },
    /// End the message at this position: execution at the responder, and its acknowledgement.
    End { pos: usize },
    /// Take in one chunk of a READ's response.
    Arrive { pos: usize, chunk: usize },
    /// Complete the oldest message.
    Retire,
}

impl Requester {
    /// Whether some message has been placed in part.
    pub(in crate::emulated) fn is_mid_message(&self) -> bool {
        self.outstanding.iter().any(|entry| entry.progress == Progress::Placing)
    }

    /// Calls `offer` for everything this half could do now.
    pub(in crate::emulated) fn pieces(
        &self,
        device: &EmulatedHca,
        qp: &Qp,
        now: Nanos,
        mut offer: impl FnMut(SendPiece),
    ) {
        let due = |at: Option<Nanos>| at.is_some_and(|at| at <= now);
        if due(self.not_ready_until) || (self.not_ready_until.is_none() && due(self.ack_deadline)) {
            offer(SendPiece::Timer);
        }
        if self.outstanding.front().is_some_and(Outstanding::is_done) {
            offer(SendPiece::Retire);
        }
        for (pos, entry) in self.outstanding.iter().enumerate() {
            if entry.progress == Progress::Arriving {
                (0..entry.missing.len()).for_each(|chunk| offer(SendPiece::Arrive { pos, chunk }));
            }
        }
        if self.not_ready_until.is_some() {
            return;
        }
        let room = self.outstanding.len() < OUTSTANDING_MAX;
        if room && qp.covered(self.next, device.is_strict()) != 0 {
            offer(SendPiece::Fetch);
        }
        let any_order = device.fabric().config().placement == Placement::WritesAnyOrder;
        self.placements(any_order, offer);
    }

    /// The chunks that may be placed now, and the message that may end.
    fn placements(&self, any_order: bool, mut offer: impl FnMut(SendPiece)) {
        let mut first = true;
        for (pos, entry) in self.outstanding.iter().enumerate() {
            if !matches!(entry.progress, Progress::Unsent | Progress::Placing) {
                continue;
            }
            // What a READ misses comes back only after it was accepted.
            let to_place = if entry.work.has_response { 0 } else { entry.missing.len() };
            (0..to_place).for_each(|chunk| offer(SendPiece::Place { pos, chunk }));
            if first && to_place == 0 {
                offer(SendPiece::End { pos });
            }
            // Only writes may be overtaken, and only by writes.
            if !any_order || !entry.is_write() {
                return;
            }
            first = false;
            if self.outstanding.get(pos + 1).is_some_and(|next| !next.is_write()) {
                return;
            }
        }
    }

    /// Executes a piece; false if it was blocked and nothing changed.
    pub(in crate::emulated) fn execute(
        &mut self,
        local: &Local<'_>,
        wire: &mut impl Wire,
        piece: SendPiece,
    ) -> bool {
        match piece {
            SendPiece::Timer => {
                self.check_timers(local);
                true
            }
            SendPiece::Retire => self.retire_one(local.device, local.qp, local.now),
            SendPiece::Fetch => self.fetch_one(local),
            SendPiece::Place { pos, chunk } | SendPiece::Arrive { pos, chunk } => {
                self.move_chunk(local, wire, pos, chunk);
                true
            }
            SendPiece::End { pos } => {
                self.end_message(local, wire, pos);
                true
            }
        }
    }

    /// Fetches the next WQE and lists its chunks.
    fn fetch_one(&mut self, local: &Local<'_>) -> bool {
        let mut buf: WqeBuf = [0; WQE_BYTES_MAX];
        let available = local.qp.covered(self.next, local.device.is_strict());
        let connection = self.connection.as_ref();
        let fetched = match local.fetch(connection, self.psn, &mut buf, self.next, available) {
            Ok(fetched) => fetched,
            Err((work, failure)) => {
                let ready = self.outstanding.is_empty();
                self.fail_fetched(local, &work, failure);
                return ready;
            }
        };
        if self.must_wait(fetched.fence, fetched.work.has_response) {
            return false;
        }
        let mut did = Tally::default();
        did.count(&fetched);
        did.publish(local.device);
        let mut entry = Outstanding::new(fetched.work, Progress::Done);
        if let Fetch::Message { request, .. } = &fetched.what {
            entry.progress = Progress::Unsent;
            if !matches!(request.op, RequestOp::Atomic { .. }) {
                entry.missing = chunks(&fetched.work);
            }
        }
        self.next = self.next.wrapping_add(fetched.work.blocks);
        self.psn = fetched.work.end();
        self.outstanding.push_back(entry);
        true
    }

    /// Reads the WQE at `pos` again and calls `then` with the message.
    pub(super) fn with_message(
        &mut self,
        local: &Local<'_>,
        pos: usize,
        then: impl FnOnce(&mut Self, &Fetch<'_>),
    ) {
        let mut buf: WqeBuf = [0; WQE_BYTES_MAX];
        let Work { idx, blocks, psn, .. } = self.outstanding[pos].work;
        let connection = self.connection.clone();
        match local.fetch(connection.as_ref(), psn, &mut buf, idx, blocks) {
            Ok(fetched) => then(self, &fetched.what),
            Err((_, failure)) => self.fail(local.device, local.qp, pos, failure, local.now),
        }
    }

    /// Places one chunk of a write or send, or takes in one of a READ's response.
    fn move_chunk(&mut self, local: &Local<'_>, wire: &mut impl Wire, pos: usize, chunk: usize) {
        let Some(connection) = &self.connection else {
            return;
        };
        let mtu = u64::from(connection.mtu.0.bytes());
        self.with_message(local, pos, |this, message| {
            let Fetch::Message { request, payload, result } = message else {
                return;
            };
            let entry = &mut this.outstanding[pos];
            let offset = u64::from(entry.missing[chunk]) * mtu;
            let len = mtu.min(request.len - offset);
            let arriving = entry.progress == Progress::Arriving;
            if !arriving {
                entry.progress = Progress::Placing;
            }
            match answer(wire.carry(request, *payload, Piece::Part { offset, len })) {
                None => this.lose(pos, local.now),
                Some(Reply::Data { next, memory }) => {
                    take_response(local, Reply::Data { next, memory }, *payload, offset, None);
                    this.chunk_moved(pos, chunk);
                }
                Some(Reply::Ack { .. }) => this.chunk_moved(pos, chunk),
                Some(reply) => {
                    this.outstanding[pos].progress = Progress::Unanswered;
                    this.after_carry(local, pos, Some(reply), *payload, *result);
                }
            }
        });
    }

    fn chunk_moved(&mut self, pos: usize, chunk: usize) {
        let entry = &mut self.outstanding[pos];
        entry.missing.swap_remove(chunk);
        if entry.missing.is_empty() && entry.progress == Progress::Arriving {
            entry.progress = Progress::Done;
        }
    }

    /// A piece was lost: the message waits for its timer.
    fn lose(&mut self, pos: usize, now: Nanos) {
        self.outstanding[pos].progress = Progress::Unanswered;
        self.outstanding[pos].resent = true;
        self.await_answer(now);
    }

    /// Lets the responder execute the message; its chunks have been placed.
    fn end_message(&mut self, local: &Local<'_>, wire: &mut impl Wire, pos: usize) {
        self.with_message(local, pos, |this, message| {
            let Fetch::Message { mut request, payload, result } = *message else {
                return;
            };
            let entry = &mut this.outstanding[pos];
            request.resent = entry.resent;
            add(&local.device.counters.retransmissions, entry.resent.into());
            (entry.resent, entry.progress) = (true, Progress::Unanswered);
            let reply = answer(wire.carry(&request, payload, Piece::End));
            match (request.op, reply) {
                (RequestOp::Read { .. }, Some(Reply::Ack { .. })) => this.accept_read(pos),
                _ => {
                    this.after_carry(local, pos, reply, payload, result);
                }
            }
        });
    }

    /// A READ was accepted: its response may arrive from now on.
    fn accept_read(&mut self, pos: usize) {
        let entry = &mut self.outstanding[pos];
        entry.progress = match entry.missing.is_empty() {
            true => Progress::Done,
            false => Progress::Arriving,
        };
    }
}

impl Outstanding {
    /// Whether this is an RDMA WRITE, with or without immediate.
    fn is_write(&self) -> bool {
        use ibex_abi::wqe::Opcode;
        matches!(Opcode::from_byte(self.work.opcode), Some(Opcode::RdmaWrite | Opcode::RdmaWriteImm))
    }
}

/// Pieces go over wires that answer at once or lose them; such a wire takes all or nothing.
fn answer(carried: Carried) -> Option<Reply> {
    match carried {
        Carried::Whole(reply) => reply,
        Carried::Upto(_) => None,
    }
}

/// The packets of a message that carry payload.
fn chunks(work: &Work) -> Vec<u32> {
    if work.len == 0 { Vec::new() } else { (0..work.packets).collect() }
}
