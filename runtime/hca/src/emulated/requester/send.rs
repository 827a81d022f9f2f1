//! Sending: from the doorbell to the wire, and what the answer leads to.

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::QpState;
use ibex_abi::wqe::{DataSeg, FenceMode};

use super::complete::{Failure, complete};
use super::fetch::{Fetch, Fetched, Local, WqeBuf};
use super::{OUTSTANDING_MAX, Outstanding, Progress, Requester, Settled, Work};
use crate::emulated::counters::add;
use crate::emulated::fabric::{Carried, Wire};
use crate::emulated::message::{Payload, Piece, Reply, RequestOp};
use crate::emulated::qp::{Qp, WQE_BYTES_MAX};
use crate::emulated::{EmulatedHca, Nanos};

/// WQEs of one queue pair that one turn executes at most, so that queue pairs take turns.
const TURN_WQES_MAX: usize = 64;
/// Payload bytes after which a turn ends.
const TURN_BYTES_MAX: u64 = 1 << 19;

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(in crate::emulated) struct Turn {
    pub(in crate::emulated) did_work: bool,
    pub(in crate::emulated) deadline: Option<Nanos>,
}

/// What sending one message led to.
pub(in crate::emulated) enum Sent {
    /// Its payload, if it had any, is on its way or there.
    Bytes(u64),
    /// Nothing more can be sent in this turn.
    Stop,
}

impl Requester {
    /// Whether a turn could do anything.
    pub(in crate::emulated) fn has_work(&self, device: &EmulatedHca, qp: &Qp, now: Nanos) -> bool {
        if self.not_ready_until.is_some_and(|until| now < until) {
            return false;
        }
        let waits = |e: &Outstanding| matches!(e.progress, Progress::Unsent | Progress::Done);
        self.outstanding.iter().any(waits)
            || self.ack_deadline.is_some_and(|deadline| deadline <= now)
            || qp.covered(self.next, device.is_strict()) != 0
    }

    /// When a timer next runs out.
    pub(in crate::emulated) fn deadline(&self) -> Option<Nanos> {
        self.not_ready_until.or(self.ack_deadline)
    }

    /// Tells steppers whether they need to ask this half at all.
    pub(in crate::emulated) fn note_idleness(&self, qp: &Qp) {
        match self.outstanding.is_empty() && self.deadline().is_none() {
            true => qp.note_idle(self.next),
            false => qp.note_busy(),
        }
    }

    /// Handles timers; false if the queue pair failed.
    pub(in crate::emulated) fn check_timers(&mut self, local: &Local<'_>) -> bool {
        if self.not_ready_until.is_some_and(|until| until <= local.now) {
            self.not_ready_until = None;
        }
        if self.ack_deadline.is_none_or(|deadline| deadline > local.now) {
            return true;
        }
        if self.timeouts >= self.patience.retry_count {
            let failure = Failure::new(Syndrome::TRANSPORT_RETRY_EXC);
            let oldest = self.outstanding.iter().position(|entry| !entry.is_done()).unwrap_or(0);
            self.fail(local.device, local.qp, oldest, failure, local.now);
            return false;
        }
        self.timeouts += 1;
        self.ack_deadline = self.patience.ack_nanos().map(|nanos| local.now.plus(nanos));
        self.go_back(0);
        true
    }

    /// Starts the timer of an unanswered message, unless it runs.
    pub(in crate::emulated) fn await_answer(&mut self, now: Nanos) {
        let limit = self.patience.ack_nanos().map(|nanos| now.plus(nanos));
        self.ack_deadline = self.ack_deadline.or(limit);
    }

    /// Sends what may be sent, message by message, and completes what is answered.
    pub(in crate::emulated) fn turn(&mut self, local: &Local<'_>, wire: &mut impl Wire) -> Turn {
        let mut did = Tally::default();
        if self.check_timers(local) {
            self.send_all(local, wire, &mut did);
        }
        let retired = self.retire_unless_failed(local);
        did.publish(local.device);
        if self.outstanding.is_empty() {
            self.ack_deadline = None;
        }
        self.note_idleness(local.qp);
        let failed = local.qp.state() == QpState::Err;
        Turn { did_work: failed || did.sent + retired != 0, deadline: self.deadline() }
    }

    fn send_all(&mut self, local: &Local<'_>, wire: &mut impl Wire, did: &mut Tally) {
        let mut buf: WqeBuf = [0; WQE_BYTES_MAX];
        let (mut bytes, mut available) = (0, 0);
        while did.sent < TURN_WQES_MAX && bytes < TURN_BYTES_MAX && self.not_ready_until.is_none() {
            let sent = match self.first_unsent() {
                Some(pos) => self.send_again(local, wire, &mut buf, pos, did),
                None if self.outstanding.len() >= OUTSTANDING_MAX => return,
                None => {
                    if available == 0 {
                        available = local.qp.covered(self.next, local.device.is_strict());
                    }
                    let next = self.next;
                    let sent = self.send_next(local, wire, &mut buf, available, did);
                    available = available.saturating_sub(self.next.wrapping_sub(next));
                    sent
                }
            };
            match sent {
                Sent::Bytes(len) => bytes += len,
                Sent::Stop => return,
            }
            did.sent += 1;
        }
    }

    /// Fetches and sends the next WQE, of which `available` blocks are covered by the doorbell.
    #[inline]
    fn send_next(
        &mut self,
        local: &Local<'_>,
        wire: &mut impl Wire,
        buf: &mut WqeBuf,
        available: u16,
        did: &mut Tally,
    ) -> Sent {
        if available == 0 {
            return Sent::Stop;
        }
        if self.outstanding.is_empty()
            && let Some(len) = self.send_plain(local, wire)
        {
            did.wqes += 1;
            did.written += len;
            return Sent::Bytes(len);
        }
        let connection = self.connection.as_ref();
        let fetched = match local.fetch(connection, self.psn, buf, self.next, available) {
            Ok(fetched) => fetched,
            Err((work, failure)) => return self.fail_fetched(local, &work, failure),
        };
        if self.must_wait(fetched.fence, fetched.work.has_response) {
            return Sent::Stop;
        }
        self.next = self.next.wrapping_add(fetched.work.blocks);
        self.psn = fetched.work.end();
        local.qp.prefetch_block(self.next);
        did.count(&fetched);
        self.send_fetched(local, wire, &fetched)
    }

    /// Sends a message again: its WQE and payload are read anew.
    fn send_again(
        &mut self,
        local: &Local<'_>,
        wire: &mut impl Wire,
        buf: &mut WqeBuf,
        pos: usize,
        did: &mut Tally,
    ) -> Sent {
        let Work { idx, blocks, psn, .. } = self.outstanding[pos].work;
        let fetched = match local.fetch(self.connection.as_ref(), psn, buf, idx, blocks) {
            Ok(fetched) => fetched,
            Err((_, failure)) => return self.fail_at(local, pos, failure),
        };
        let entry = &mut self.outstanding[pos];
        let Fetch::Message { mut request, payload, result } = fetched.what else {
            entry.progress = Progress::Done;
            return Sent::Bytes(0);
        };
        request.resent = entry.resent;
        let piece = match entry.moved {
            0 => Piece::Whole,
            offset => Piece::Part { offset, len: request.len.saturating_sub(offset) },
        };
        match wire.carry(&request, payload, piece) {
            Carried::Upto(moved) => self.take_rest_later(pos, moved, local.now),
            Carried::Whole(reply) => {
                did.resent += u64::from(entry.resent);
                (entry.progress, entry.resent, entry.moved) = (Progress::Unanswered, true, 0);
                self.after_carry(local, pos, reply, payload, result)
            }
        }
    }

    /// A WQE that fails its checks fails after everything before it.
    pub(in crate::emulated) fn fail_fetched(
        &mut self,
        local: &Local<'_>,
        work: &Work,
        failure: Failure,
    ) -> Sent {
        self.retire(local.device, local.qp, local.now);
        if self.outstanding.is_empty() {
            self.next = self.next.wrapping_add(work.blocks.max(1));
            add(&local.device.counters.wqes, 1);
            self.fail_work(local.device, local.qp, work, failure);
        }
        // Otherwise it is fetched again once its predecessors are through.
        Sent::Stop
    }

    /// Whether a new message may not be sent before earlier ones are through.
    #[inline]
    pub(in crate::emulated) fn must_wait(&self, fence: FenceMode, has_response: bool) -> bool {
        if self.outstanding.is_empty() {
            return false;
        }
        let pending = || self.outstanding.iter().filter(|entry| !entry.is_done());
        if fence == FenceMode::StrongOrdering && pending().next().is_some() {
            return true;
        }
        let reads = pending().filter(|entry| entry.work.has_response).count();
        (fence.waits_for_reads() && reads != 0)
            || (has_response && reads >= 1 << self.patience.log_max_reads.min(7))
    }

    #[inline]
    fn send_fetched(&mut self, local: &Local<'_>, wire: &mut impl Wire, fetched: &Fetched<'_>) -> Sent {
        let work = &fetched.work;
        let Fetch::Message { request, payload, result } = &fetched.what else {
            self.outstanding.push_back(Outstanding::new(*work, Progress::Done));
            return Sent::Bytes(0);
        };
        let reply = match wire.carry(request, *payload, Piece::Whole) {
            Carried::Whole(reply) => reply,
            Carried::Upto(moved) => {
                self.outstanding.push_back(Outstanding::new(*work, Progress::Unsent));
                return self.take_rest_later(self.outstanding.len() - 1, moved, local.now);
            }
        };
        // The common case: nothing is outstanding and the answer is here.
        if self.outstanding.is_empty()
            && !work.has_response
            && let Some(Reply::Ack { next }) = reply
            && next == work.end()
        {
            complete(local.device, local.qp, work, local.now);
            (self.timeouts, self.not_readies) = (0, 0);
            return Sent::Bytes(request.len);
        }
        let mut entry = Outstanding::new(*work, Progress::Unanswered);
        entry.resent = true;
        self.outstanding.push_back(entry);
        let pos = self.outstanding.len() - 1;
        self.after_carry(local, pos, reply, *payload, *result)
    }

    /// The wire has no room: the message stays unsent, and so does everything after it.
    ///
    /// Its timer runs all the same, because a wire whose other end is dead never has room again.
    fn take_rest_later(&mut self, pos: usize, moved: u64, now: Nanos) -> Sent {
        self.outstanding[pos].moved = moved;
        self.await_answer(now);
        Sent::Stop
    }

    /// Takes in the answer to the message at `pos`.
    pub(super) fn after_carry(
        &mut self,
        local: &Local<'_>,
        pos: usize,
        reply: Option<Reply>,
        payload: Payload<'_>,
        result: Option<&DataSeg>,
    ) -> Sent {
        let len = self.outstanding[pos].work.len.into();
        let Some(reply) = reply else {
            self.await_answer(local.now);
            return Sent::Bytes(len);
        };
        take_response(local, reply, payload, 0, result);
        match self.settle(pos, reply, local.now) {
            Settled::GoOn => {
                self.retire(local.device, local.qp, local.now);
                Sent::Bytes(len)
            }
            Settled::NotReady => Sent::Stop,
            Settled::Wait => {
                self.await_answer(local.now);
                Sent::Stop
            }
            Settled::Failed(failure) => self.fail_at(local, pos, failure),
        }
    }

    fn fail_at(&mut self, local: &Local<'_>, pos: usize, failure: Failure) -> Sent {
        self.fail(local.device, local.qp, pos, failure, local.now);
        Sent::Stop
    }
}

/// Puts what a READ or an atomic brought back where the WQE says.
pub(in crate::emulated) fn take_response(
    local: &Local<'_>,
    reply: Reply,
    payload: Payload<'_>,
    offset: u64,
    result: Option<&DataSeg>,
) {
    match reply {
        Reply::Data { memory, .. } => {
            payload.scatter(offset, memory);
            add(&local.device.counters.bytes_read, memory.len());
        }
        Reply::Atomic { original, .. } => {
            if let Some(seg) = result
                && let Ok(memory) = local.result_memory(seg)
            {
                // CAST: the operand is 4 or 8 bytes.
                memory.write(0, &original.to_le_bytes()[..memory.len() as usize]);
            }
        }
        _ => {}
    }
}

/// What one turn did, added to the device's counters once at its end.
#[derive(Debug, Default)]
pub(in crate::emulated) struct Tally {
    pub(in crate::emulated) sent: usize,
    pub(in crate::emulated) resent: u64,
    wqes: u64,
    written: u64,
    sends: u64,
    atomics: u64,
}

impl Tally {
    #[inline]
    pub(in crate::emulated) fn count(&mut self, fetched: &Fetched<'_>) {
        self.wqes += 1;
        if let Fetch::Message { request, .. } = &fetched.what {
            match request.op {
                RequestOp::Write { .. } => self.written += request.len,
                RequestOp::Send { .. } => self.sends += request.len,
                RequestOp::Atomic { .. } => self.atomics += request.len,
                RequestOp::Read { .. } => {}
            }
        }
    }

    pub(in crate::emulated) fn publish(&self, device: &EmulatedHca) {
        let counters = &device.counters;
        add(&counters.wqes, self.wqes);
        add(&counters.retransmissions, self.resent);
        add(&counters.bytes_written, self.written);
        add(&counters.bytes_sent, self.sends);
        add(&counters.bytes_atomic, self.atomics);
    }
}
