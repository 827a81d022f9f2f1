//! Sending: from the doorbell to the wire, and what the answer leads to.

use ibex_abi::cqe::{Syndrome, VendorSyndrome};
use ibex_abi::types::QpState;
use ibex_abi::wqe::{CtrlSeg, DataSeg, FenceMode, Opcode, RaddrSeg, RequestView, WQEBB, WqeView};
use zerocopy::FromBytes;

use super::complete::{Failure, complete};
use super::{OUTSTANDING_MAX, Outstanding, Progress, Requester, Settled};
use crate::emulated::counters::add;
use crate::emulated::fabric::{Carried, Wire};
use crate::emulated::memory::Span;
use crate::emulated::message::{Payload, Piece, Reply, Request, RequestOp, Target};
use crate::emulated::mkeys::{KeyFault, MkeyTable, Want};
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

/// What a requester works on besides its own state.
pub(in crate::emulated) struct Local<'a> {
    pub(in crate::emulated) device: &'a EmulatedHca,
    pub(in crate::emulated) qp: &'a Qp,
    pub(in crate::emulated) keys: &'a MkeyTable,
    pub(in crate::emulated) now: Nanos,
}

/// A fetched and checked WQE.
pub(in crate::emulated) struct Fetched<'a> {
    pub(in crate::emulated) entry: Outstanding,
    pub(in crate::emulated) fence: FenceMode,
    pub(in crate::emulated) what: Fetch<'a>,
}

/// What a fetched WQE leads to.
pub(in crate::emulated) enum Fetch<'a> {
    /// Nothing on the wire.
    Nothing,
    Message {
        request: Request,
        payload: Payload<'a>,
        result: Option<&'a DataSeg>,
    },
}

/// A linear copy of one WQE.
pub(in crate::emulated) type WqeBuf = [u8; WQE_BYTES_MAX];

impl Local<'_> {
    /// Reads and checks the WQE at `idx`, of which `available` blocks are covered by the doorbell.
    #[inline]
    pub(in crate::emulated) fn fetch<'a>(
        &'a self,
        requester: &Requester,
        buf: &'a mut WqeBuf,
        idx: u16,
        available: u16,
    ) -> Result<Fetched<'a>, (Outstanding, Failure)> {
        let (blocks, _) = buf.as_chunks_mut::<WQEBB>();
        self.qp.read_block(idx, &mut blocks[0]);
        let Ok((ctrl, _)) = CtrlSeg::read_from_prefix(&blocks[0]) else {
            unreachable!("a basic block holds a control segment")
        };
        let mut entry = Outstanding::new(&ctrl, requester.psn);
        let bad_op = Failure::new(Syndrome::LOCAL_QP_OP);
        if ctrl.wqe_idx() != idx || ctrl.qpn() != self.qp.num() {
            entry.idx = idx;
            return Err((entry, Failure::BAD_INDEX));
        }
        let count = ctrl.num_wqebbs();
        let ring_blocks = self.qp.layout.sq.len() / WQEBB as u64;
        if count == 0 || count > available || u64::from(count) > ring_blocks {
            return Err((entry, bad_op));
        }
        for extra in 1..count {
            self.qp
                .read_block(idx.wrapping_add(extra), &mut blocks[usize::from(extra)]);
        }
        let Some(fence) = ctrl.flags().fence() else {
            return Err((entry, bad_op));
        };
        let Ok(view) = WqeView::parse(buf.as_slice()) else {
            return Err((entry, bad_op));
        };
        match self.prepare(requester, &view, &mut entry) {
            Ok(what) => Ok(Fetched { entry, fence, what }),
            Err(failure) => Err((entry, failure)),
        }
    }

    /// Turns a parsed WQE into a message, checking everything that is checked locally.
    #[inline]
    fn prepare<'a>(
        &'a self,
        requester: &Requester,
        view: &WqeView<'a>,
        entry: &mut Outstanding,
    ) -> Result<Fetch<'a>, Failure> {
        let (keys, pd) = (self.keys, self.qp.layout.pd);
        let imm = view.ctrl.imm.get();
        let (op, segments, result, len) = match view.request {
            RequestView::Nop => return Ok(Fetch::Nothing),
            RequestView::Dump { payload } => {
                Payload {
                    segments: Some(payload),
                    keys,
                    pd,
                }
                .check(Want::LocalRead)
                .map_err(local)?;
                return Ok(Fetch::Nothing);
            }
            RequestView::Write { remote, payload } => {
                let imm = (view.opcode == Opcode::RdmaWriteImm).then_some(imm);
                let len = Payload {
                    segments: Some(payload),
                    keys,
                    pd,
                }
                .check(Want::LocalRead)
                .map_err(local)?;
                (
                    RequestOp::Write {
                        to: target(remote),
                        imm,
                    },
                    Some(payload),
                    None,
                    len,
                )
            }
            RequestView::Send { payload } => {
                if view.opcode == Opcode::SendInval {
                    return Err(Failure::new(Syndrome::LOCAL_QP_OP));
                }
                let imm = (view.opcode == Opcode::SendImm).then_some(imm);
                let len = Payload {
                    segments: Some(payload),
                    keys,
                    pd,
                }
                .check(Want::LocalRead)
                .map_err(local)?;
                (RequestOp::Send { imm }, Some(payload), None, len)
            }
            RequestView::Read { remote, scatter } => {
                let len = Payload {
                    segments: Some(scatter),
                    keys,
                    pd,
                }
                .check(Want::LocalWrite)
                .map_err(local)?;
                (
                    RequestOp::Read {
                        from: target(remote),
                    },
                    Some(scatter),
                    None,
                    len,
                )
            }
            RequestView::Atomic { remote, op, result } => {
                let len = u64::from(op.operand_len());
                if result.byte_len() != len {
                    return Err(Failure::new(Syndrome::LOCAL_LENGTH));
                }
                self.result_memory(result).map_err(local)?;
                (
                    RequestOp::Atomic {
                        on: target(remote),
                        op,
                    },
                    None,
                    Some(result),
                    len,
                )
            }
        };
        let Some(connection) = &requester.connection else {
            return Err(Failure::new(Syndrome::LOCAL_QP_OP));
        };
        if len > 1 << connection.log_msg_max {
            return Err(Failure::new(Syndrome::LOCAL_LENGTH));
        }
        // CAST: at most 2^31 bytes, so packets and length fit 32 bits.
        (entry.len, entry.packets) = (
            len as u32,
            len.div_ceil(connection.mtu.bytes().into()).max(1) as u32,
        );
        entry.has_response = op.has_response();
        let (psn, packets) = (entry.psn, entry.packets);
        let solicited = view.ctrl.flags().is_solicited();
        let request = Request {
            psn,
            packets,
            len,
            op,
            solicited,
            resent: false,
        };
        Ok(Fetch::Message {
            request,
            payload: Payload { segments, keys, pd },
            result,
        })
    }

    /// Where an atomic's old value goes.
    pub(in crate::emulated) fn result_memory(&self, seg: &DataSeg) -> Result<Span, KeyFault> {
        let (key, va) = (seg.lkey.get(), seg.addr.get());
        self.keys
            .reach(self.qp.layout.pd, key, va, seg.byte_len(), Want::LocalWrite)
    }
}

const fn local(fault: KeyFault) -> Failure {
    let vendor = match fault {
        KeyFault::OutOfRange => VendorSyndrome::LOCAL_PROT,
        KeyFault::Unknown | KeyFault::WrongPd | KeyFault::Denied => VendorSyndrome::LOCAL_PROT_KEY,
    };
    Failure {
        syndrome: Syndrome::LOCAL_PROT,
        vendor,
    }
}

fn target(remote: &RaddrSeg) -> Target {
    Target {
        va: remote.raddr.get(),
        rkey: remote.rkey.get(),
    }
}

/// What sending one message led to.
enum Sent {
    /// Completed at once, without ever being outstanding.
    Completed(u64),
    /// In the list of outstanding messages.
    Listed(u64),
    /// Must wait for earlier messages.
    Fenced,
    /// Nothing more can be sent in this turn.
    Stop,
}

impl Requester {
    /// Whether a turn could do anything.
    pub(in crate::emulated) fn has_work(&self, device: &EmulatedHca, qp: &Qp, now: Nanos) -> bool {
        if self.not_ready_until.is_some_and(|until| now < until) {
            return false;
        }
        self.outstanding
            .iter()
            .any(|e| matches!(e.progress, Progress::Unsent | Progress::Done))
            || self.ack_deadline.is_some_and(|deadline| deadline <= now)
            || qp.covered(self.next, device.is_strict()) != 0
    }

    /// When a timer next runs out.
    pub(in crate::emulated) fn deadline(&self) -> Option<Nanos> {
        self.not_ready_until.or(self.ack_deadline)
    }

    /// Handles timers; false if the queue pair failed.
    pub(in crate::emulated) fn check_timers(&mut self, local: &Local<'_>) -> bool {
        if self.not_ready_until.is_some_and(|until| until <= local.now) {
            self.not_ready_until = None;
        }
        if self
            .ack_deadline
            .is_none_or(|deadline| deadline > local.now)
        {
            return true;
        }
        if self.timeouts >= self.patience.retry_count {
            let failure = Failure::new(Syndrome::TRANSPORT_RETRY_EXC);
            let oldest = self
                .outstanding
                .iter()
                .position(|entry| !entry.is_done())
                .unwrap_or(0);
            self.fail(local.device, local.qp, oldest, failure, local.now);
            return false;
        }
        self.timeouts += 1;
        self.ack_deadline = self.patience.ack_nanos().map(|nanos| local.now.plus(nanos));
        self.go_back(0);
        true
    }

    /// Sends what may be sent, message by message, and completes what is answered.
    pub(in crate::emulated) fn turn(&mut self, local: &Local<'_>, wire: &mut impl Wire) -> Turn {
        let mut buf: WqeBuf = [0; WQE_BYTES_MAX];
        let mut did = Tally::default();
        if self.check_timers(local) {
            self.send_all(local, wire, &mut buf, &mut did);
        }
        did.retired += self.retire(local.device, local.qp, local.now);
        did.publish(local.device);
        if self.outstanding.is_empty() {
            self.ack_deadline = None;
        }
        let failed = local.qp.state() == QpState::Err;
        Turn {
            did_work: failed || did.sent + did.retired != 0,
            deadline: self.deadline(),
        }
    }

    fn send_all(
        &mut self,
        local: &Local<'_>,
        wire: &mut impl Wire,
        buf: &mut WqeBuf,
        did: &mut Tally,
    ) {
        let mut bytes = 0;
        while did.sent < TURN_WQES_MAX && bytes < TURN_BYTES_MAX && self.not_ready_until.is_none() {
            let sent = match self.first_unsent() {
                Some(pos) => self.send_again(local, wire, buf, pos, did),
                None => self.send_next(local, wire, buf, did),
            };
            match sent {
                Some(Sent::Completed(len) | Sent::Listed(len)) => bytes += len,
                Some(Sent::Fenced | Sent::Stop) | None => return,
            }
            did.sent += 1;
        }
    }

    /// Fetches and sends the next WQE; `None` if no doorbell covers one.
    #[inline]
    fn send_next(
        &mut self,
        local: &Local<'_>,
        wire: &mut impl Wire,
        buf: &mut WqeBuf,
        did: &mut Tally,
    ) -> Option<Sent> {
        let available = local.qp.covered(self.next, local.device.is_strict());
        if available == 0 || self.outstanding.len() >= OUTSTANDING_MAX {
            return None;
        }
        let fetched = match local.fetch(self, buf, self.next, available) {
            Ok(fetched) => fetched,
            Err((entry, failure)) => return Some(self.fail_fetched(local, entry, failure)),
        };
        if self.must_wait(fetched.fence, fetched.entry.has_response) {
            return Some(Sent::Fenced);
        }
        self.next = self.next.wrapping_add(fetched.entry.blocks);
        self.psn = fetched.entry.end();
        did.count(&fetched);
        Some(self.send_fetched(local, wire, fetched))
    }

    /// Sends a message again: its WQE and payload are read anew.
    fn send_again(
        &mut self,
        local: &Local<'_>,
        wire: &mut impl Wire,
        buf: &mut WqeBuf,
        pos: usize,
        did: &mut Tally,
    ) -> Option<Sent> {
        let (idx, blocks) = (self.outstanding[pos].idx, self.outstanding[pos].blocks);
        let fetched = match local.fetch(self, buf, idx, blocks) {
            Ok(fetched) => fetched,
            Err((_, failure)) => {
                self.fail(local.device, local.qp, pos, failure, local.now);
                return Some(Sent::Stop);
            }
        };
        let Fetch::Message {
            mut request,
            payload,
            result,
        } = fetched.what
        else {
            self.outstanding[pos].progress = Progress::Done;
            return Some(Sent::Listed(0));
        };
        let entry = &mut self.outstanding[pos];
        (request.psn, request.resent) = (entry.psn, entry.resent);
        did.resent += u64::from(entry.resent);
        (entry.progress, entry.resent) = (Progress::Unanswered, true);
        let carried = wire.carry(&request, payload, Piece::Whole);
        Some(self.after_carry(local, pos, carried, payload, result, request.len))
    }

    /// A WQE that fails its checks fails after everything before it.
    fn fail_fetched(&mut self, local: &Local<'_>, entry: Outstanding, failure: Failure) -> Sent {
        self.retire(local.device, local.qp, local.now);
        if self.outstanding.is_empty() {
            self.next = self.next.wrapping_add(entry.blocks.max(1));
            add(&local.device.counters.wqes, 1);
            self.fail_entry(local.device, local.qp, &entry, failure);
        }
        // Otherwise it is fetched again once its predecessors are through.
        Sent::Stop
    }

    /// Whether a new message may not be sent before earlier ones are through.
    pub(in crate::emulated) fn must_wait(&self, fence: FenceMode, has_response: bool) -> bool {
        let pending = |e: &&Outstanding| !e.is_done();
        if fence == FenceMode::StrongOrdering && self.outstanding.iter().any(|e| pending(&e)) {
            return true;
        }
        let reads = self
            .outstanding
            .iter()
            .filter(pending)
            .filter(|e| e.has_response)
            .count();
        (fence.waits_for_reads() && reads != 0)
            || (has_response && reads >= 1 << self.patience.log_max_reads.min(7))
    }

    #[inline]
    fn send_fetched(
        &mut self,
        local: &Local<'_>,
        wire: &mut impl Wire,
        fetched: Fetched<'_>,
    ) -> Sent {
        let mut entry = fetched.entry;
        let Fetch::Message {
            request,
            payload,
            result,
        } = fetched.what
        else {
            entry.progress = Progress::Done;
            self.outstanding.push_back(entry);
            return Sent::Listed(0);
        };
        entry.resent = true;
        let carried = wire.carry(&request, payload, Piece::Whole);
        // The common case: nothing is outstanding and the answer is here.
        if self.outstanding.is_empty()
            && !entry.has_response
            && let Carried::Replied(Reply::Ack { next }) = carried
            && next == entry.end()
        {
            complete(local.device, local.qp, &entry, local.now);
            (self.timeouts, self.not_readies) = (0, 0);
            return Sent::Completed(request.len);
        }
        entry.progress = Progress::Unanswered;
        self.outstanding.push_back(entry);
        let pos = self.outstanding.len() - 1;
        self.after_carry(local, pos, carried, payload, result, request.len)
    }

    /// Takes in the answer to the message at `pos`.
    fn after_carry(
        &mut self,
        local: &Local<'_>,
        pos: usize,
        carried: Carried,
        payload: Payload<'_>,
        result: Option<&DataSeg>,
        len: u64,
    ) -> Sent {
        let Carried::Replied(reply) = carried else {
            let limit = self.patience.ack_nanos().map(|nanos| local.now.plus(nanos));
            self.ack_deadline = self.ack_deadline.or(limit);
            return Sent::Listed(len);
        };
        take_response(local, reply, payload, 0, result);
        match self.settle(pos, reply, local.now) {
            Settled::GoOn => {
                self.retire(local.device, local.qp, local.now);
                Sent::Listed(len)
            }
            Settled::NotReady => Sent::Stop,
            Settled::Wait => {
                let limit = self.patience.ack_nanos().map(|nanos| local.now.plus(nanos));
                self.ack_deadline = self.ack_deadline.or(limit);
                Sent::Stop
            }
            Settled::NotReadyTooOften => {
                let failure = Failure::new(Syndrome::RNR_RETRY_EXC);
                self.fail_at(local, pos, failure)
            }
            Settled::Refused(nak) => self.fail_at(local, pos, Failure::of_nak(nak)),
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
    sent: usize,
    retired: usize,
    wqes: u64,
    resent: u64,
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
