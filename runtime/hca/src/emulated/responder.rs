//! The responder half: checks what arrives, executes it, answers.
//!
//! *Who owns what.* The half owns the sequence state and the position in the receive queue. The memory
//! that requests touch is reached through the key table, whose guard the caller holds.
//!
//! Requests execute in the order of their sequence numbers. One before the expected number was executed
//! already: it is acknowledged again and not executed again (a READ is, an atomic is answered from
//! memory). One after it makes the half ask for what is missing, once.
//!
//! INVARIANT: a request is executed at most once, READs excepted.

use std::collections::VecDeque;

use ibex_abi::cqe::{Cqe64, CqeOpcode, ErrorCqe, OpOwn, Syndrome, VendorSyndrome};
use ibex_abi::types::{PathMtu, Psn, QpNum, QpState};
use ibex_abi::wqe::{AtomicOp, recv_segments};
use zerocopy::byteorder::big_endian::U32;

use super::atomics;
use super::counters::{FirstError, add};
use super::fabric::Placement;
use super::frames::PacketResponder;
use super::memory::Span;
use super::message::{Content, Nak, Piece, Reply, Request, RequestOp, Target};
use super::mkeys::{MkeyTable, Want};
use super::qp::Qp;
use super::requester::plain::Source;
use super::{EmulatedHca, Nanos};
use crate::{Access, AsyncEvent, PathAddress};

/// Largest receive WQE.
pub(super) const RECV_WQE_MAX: usize = 512;

/// A receive WQE that a message is filling.
#[derive(Debug)]
struct Receive {
    idx: u16,
    wqe: [u8; RECV_WQE_MAX],
    len: usize,
}

/// State of the half; all zero in RST.
#[derive(Debug)]
pub(super) struct Responder {
    /// The remote end, from INIT2RTR.
    pub(super) from: Option<(PathAddress, QpNum)>,
    pub(super) rights: Access,
    pub(super) min_rnr_nak: u8,
    pub(super) log_max_reads: u8,
    pub(super) expected: Psn,
    /// Messages executed, modulo 2^24.
    pub(super) msn: u32,
    recv_next: u16,
    receive: Option<Box<Receive>>,
    atomics: VecDeque<(Psn, u64)>,
    asked_again: bool,
    /// MTU of the path, from INIT2RTR.
    pub(super) mtu: Option<PathMtu>,
    /// The state machine on packets, where the fabric carries them.
    pub(super) packets: Option<Box<PacketResponder>>,
}

impl Default for Responder {
    fn default() -> Self {
        Self {
            from: None,
            rights: Access::default(),
            min_rnr_nak: 0,
            log_max_reads: 0,
            expected: Psn::new(0),
            msn: 0,
            recv_next: 0,
            receive: None,
            atomics: VecDeque::new(),
            asked_again: false,
            mtu: None,
            packets: None,
        }
    }
}

/// What a responder works on besides its own state.
pub(super) struct Surroundings<'a> {
    pub(super) device: &'a EmulatedHca,
    pub(super) qp: &'a Qp,
    pub(super) keys: &'a MkeyTable,
    pub(super) placement: Placement,
    pub(super) now: Nanos,
}

/// Why a message cannot be executed now, or ever.
pub(super) enum Stop {
    NotReady,
    /// The requester took its payload back while it was read: nobody waits for an answer.
    Withdrawn,
    Refuse(Nak),
}

impl Responder {
    /// Takes one piece of a request; `None` if nobody hears about it.
    pub(super) fn take(
        &mut self,
        around: &Surroundings<'_>,
        request: &Request,
        payload: impl Content,
        piece: Piece,
    ) -> Option<Reply> {
        if !around.qp.state().responds() {
            return None;
        }
        let early = request.psn.distance_from(self.expected);
        if early < 0 {
            return self.take_again(around, request, piece);
        }
        if early > 0 && Self::may_overtake(around.placement, request, piece) {
            // What is wrong with it is said in its turn, when the message ends.
            let _ = self.execute(around, request, payload, piece);
            return Some(Reply::Ack { next: self.expected });
        }
        if early > 0 {
            let first = !std::mem::replace(&mut self.asked_again, true);
            return first.then_some(Reply::OutOfSequence { expected: self.expected });
        }
        match self.execute(around, request, payload, piece) {
            Ok(reply) => Some(reply),
            Err(Stop::NotReady) => Some(Reply::NotReady { timer: self.min_rnr_nak }),
            Err(Stop::Withdrawn) => None,
            Err(Stop::Refuse(nak)) => {
                self.fail(around, nak);
                Some(Reply::Refused(nak))
            }
        }
    }

    /// Executes a whole RDMA WRITE that is next in sequence and covered by its key; otherwise does
    /// nothing.
    #[inline]
    pub(super) fn write_plain(
        &mut self,
        around: &Surroundings<'_>,
        psn: Psn,
        packets: u32,
        to: Target,
        source: Source<'_>,
    ) -> bool {
        if psn != self.expected || !self.rights.remote_write || !around.qp.state().responds() {
            return false;
        }
        let pd = around.qp.layout.pd;
        let reached = around.keys.reach(pd, to.rkey, to.va, source.len(), Want::RemoteWrite);
        let Ok(memory) = reached else { return false };
        source.place(memory);
        self.advance(psn.plus(packets));
        true
    }

    /// Whether this piece may be placed although earlier messages are incomplete.
    fn may_overtake(placement: Placement, request: &Request, piece: Piece) -> bool {
        let is_write = matches!(request.op, RequestOp::Write { .. });
        placement == Placement::WritesAnyOrder && is_write && matches!(piece, Piece::Part { .. })
    }

    /// A request that was executed before, or a part of a READ that was accepted before.
    fn take_again(&mut self, around: &Surroundings<'_>, request: &Request, piece: Piece) -> Option<Reply> {
        let next = request.end();
        if request.resent && matches!(piece, Piece::Whole | Piece::End) {
            add(&around.device.counters.duplicates, 1);
        }
        match request.op {
            RequestOp::Write { .. } | RequestOp::Send { .. } => Some(Reply::Ack { next: self.expected }),
            RequestOp::Read { .. } if piece == Piece::End => Some(Reply::Ack { next }),
            RequestOp::Read { from } => match self.readable(around, from, request.len, piece) {
                Ok(memory) => Some(Reply::Data { next, memory }),
                Err(Stop::Refuse(nak)) => {
                    self.fail(around, nak);
                    Some(Reply::Refused(nak))
                }
                Err(Stop::NotReady | Stop::Withdrawn) => None,
            },
            RequestOp::Atomic { .. } => {
                let known = self.atomics.iter().find(|(psn, _)| *psn == request.psn)?;
                Some(Reply::Atomic { next, original: known.1 })
            }
        }
    }

    fn execute(
        &mut self,
        around: &Surroundings<'_>,
        request: &Request,
        payload: impl Content,
        piece: Piece,
    ) -> Result<Reply, Stop> {
        match request.op {
            RequestOp::Write { to, imm } => {
                if imm.is_some() && piece == Piece::Whole {
                    self.open_receive(around)?;
                }
                self.write(around, request, to, payload, piece)?;
                if matches!(piece, Piece::Part { .. }) {
                    return Ok(Reply::Ack { next: self.expected });
                }
                if let Some(imm) = imm {
                    self.open_receive(around)?;
                    let kind = CqeOpcode::RespWriteImm;
                    // CAST: a message is at most 2^31 bytes.
                    let len = request.len as u32;
                    self.complete_receive(around, len, request.solicited, kind, Some(imm))?;
                }
            }
            RequestOp::Send { imm } => {
                self.open_receive(around)?;
                self.fill_receive(around, request, payload, piece)?;
                if matches!(piece, Piece::Part { .. }) {
                    return Ok(Reply::Ack { next: self.expected });
                }
                let kind = if imm.is_some() { CqeOpcode::RespSendImm } else { CqeOpcode::RespSend };
                // CAST: as above.
                self.complete_receive(around, request.len as u32, request.solicited, kind, imm)?;
            }
            RequestOp::Read { from } => {
                let memory = self.readable(around, from, request.len, piece)?;
                self.advance(request.end());
                return Ok(match piece {
                    Piece::End => Reply::Ack { next: self.expected },
                    _ => Reply::Data { next: self.expected, memory },
                });
            }
            RequestOp::Atomic { on, op } => {
                let original = self.atomic(around, on, op)?;
                self.remember(request.psn, original);
                self.advance(request.end());
                return Ok(Reply::Atomic { next: self.expected, original });
            }
        }
        self.advance(request.end());
        Ok(Reply::Ack { next: self.expected })
    }

    fn advance(&mut self, next: Psn) {
        self.expected = next;
        self.msn = (self.msn + 1) & 0xff_ffff;
        self.asked_again = false;
    }

    fn write(
        &self,
        around: &Surroundings<'_>,
        request: &Request,
        to: Target,
        payload: impl Content,
        piece: Piece,
    ) -> Result<(), Stop> {
        if !self.rights.remote_write {
            return Err(Stop::Refuse(Nak::InvalidRequest));
        }
        if request.len == 0 {
            // SPEC: IBTA C9-88: the key of a zero-length request is not checked.
            return Ok(());
        }
        let memory = reach(around, to, request.len, Want::RemoteWrite)?;
        let complete = match piece {
            Piece::Whole => payload.gather(0, memory),
            Piece::Part { offset, len } => match memory.slice(offset, len) {
                Some(part) => payload.gather(offset, part),
                None => true,
            },
            Piece::End => true,
        };
        if complete { Ok(()) } else { Err(Stop::Withdrawn) }
    }

    fn readable(
        &self,
        around: &Surroundings<'_>,
        from: Target,
        len: u64,
        piece: Piece,
    ) -> Result<Span, Stop> {
        if !self.rights.remote_read || self.log_max_reads > 7 {
            return Err(Stop::Refuse(Nak::InvalidRequest));
        }
        if len == 0 {
            return Ok(Span::EMPTY);
        }
        let memory = reach(around, from, len, Want::RemoteRead)?;
        match piece {
            Piece::Part { offset, len } => memory.slice(offset, len).ok_or(Stop::Refuse(Nak::RemoteAccess)),
            Piece::Whole | Piece::End => Ok(memory),
        }
    }

    fn atomic(&self, around: &Surroundings<'_>, on: Target, op: AtomicOp) -> Result<u64, Stop> {
        let len = u64::from(op.operand_len());
        if !self.rights.remote_atomic || !on.va.is_multiple_of(len) {
            return Err(Stop::Refuse(Nak::InvalidRequest));
        }
        let word = reach(around, on, len, Want::RemoteAtomic)?;
        if !word.is_aligned(0, len) {
            return Err(Stop::Refuse(Nak::InvalidRequest));
        }
        Ok(atomics::execute(op, word))
    }

    /// Keeps the answer to an atomic for as long as the requester may ask again.
    fn remember(&mut self, psn: Psn, original: u64) {
        if self.atomics.len() >= 1 << self.log_max_reads.min(7) {
            self.atomics.pop_front();
        }
        self.atomics.push_back((psn, original));
    }

    /// Takes the next receive WQE for the current message, unless it has one.
    pub(super) fn open_receive(&mut self, around: &Surroundings<'_>) -> Result<(), Stop> {
        if self.receive.is_some() {
            return Ok(());
        }
        // SPEC: a queue pair without a receive queue answers sends as if nothing were ever posted.
        let ring = around.qp.layout.rq.as_ref().ok_or(Stop::NotReady)?;
        if around.qp.recv_idx() == self.recv_next {
            return Err(Stop::NotReady);
        }
        let slot = u64::from(self.recv_next) & ((1 << ring.log_size) - 1);
        let mut receive = Box::new(Receive { idx: self.recv_next, wqe: [0; RECV_WQE_MAX], len: 0 });
        // CAST: strides are at most RECV_WQE_MAX, as CREATE_QP checked.
        receive.len = ring.stride as usize;
        ring.memory.read(slot * ring.stride, &mut receive.wqe[..receive.len]);
        self.recv_next = self.recv_next.wrapping_add(1);
        self.receive = Some(receive);
        Ok(())
    }

    /// Scatters (part of) a message over the receive WQE's segments.
    fn fill_receive(
        &mut self,
        around: &Surroundings<'_>,
        request: &Request,
        payload: impl Content,
        piece: Piece,
    ) -> Result<(), Stop> {
        let (start, end) = match piece {
            Piece::Whole => (0, request.len),
            Piece::Part { offset, len } => (offset, offset + len),
            Piece::End => return Ok(()),
        };
        self.scatter_receive(around, start, end, request.len, |from, memory| payload.gather(from, memory))
    }

    /// Calls `place` for the memory of each part of bytes `[start, end)` of a message, of which at least
    /// `whole` bytes are known to come; `place` says false if the bytes were withdrawn meanwhile.
    pub(super) fn scatter_receive(
        &mut self,
        around: &Surroundings<'_>,
        start: u64,
        end: u64,
        whole: u64,
        mut place: impl FnMut(u64, Span) -> bool,
    ) -> Result<(), Stop> {
        let Some(receive) = &self.receive else {
            return Err(Stop::NotReady);
        };
        let (mut at, mut outcome) = (0, Ok(()));
        for seg in recv_segments(&receive.wqe[..receive.len]) {
            let size = seg.byte_len();
            let (from, to) = (at.max(start), (at + size).min(end));
            if from < to {
                let va = seg.addr.get().wrapping_add(from - at);
                let lkey = seg.lkey.get();
                match around.keys.reach(around.qp.layout.pd, lkey, va, to - from, Want::LocalWrite) {
                    Ok(memory) if place(from, memory) => {}
                    Ok(_) => return Err(Stop::Withdrawn),
                    Err(_) => outcome = Err((Syndrome::LOCAL_PROT, Nak::RemoteOperation)),
                }
            }
            at += size;
        }
        if whole > at {
            outcome = Err((Syndrome::LOCAL_LENGTH, Nak::InvalidRequest));
        }
        outcome.map_err(|(syndrome, nak)| {
            self.fail_receive(around, syndrome);
            Stop::Refuse(nak)
        })
    }

    /// Completes the open receive with a message of `len` bytes.
    pub(super) fn complete_receive(
        &mut self,
        around: &Surroundings<'_>,
        len: u32,
        solicited: bool,
        kind: CqeOpcode,
        imm: Option<u32>,
    ) -> Result<(), Stop> {
        let Some(receive) = self.receive.take() else {
            return Ok(());
        };
        let layout = &around.qp.layout;
        let mut cqe = Cqe64::new(0, layout.num, len, receive.idx, OpOwn::new(kind, false));
        cqe.word.op_own |= u8::from(solicited) << 1;
        cqe.srqn_uidx = U32::new(layout.user_index);
        cqe.imm_inval_pkey = U32::new(imm.unwrap_or(0));
        cqe.timestamp = around.now.0.into();
        match around.device.complete(around.qp, &layout.recv_cq, cqe) {
            true => Ok(()),
            false => Err(Stop::Refuse(Nak::RemoteOperation)),
        }
    }

    fn fail_receive(&mut self, around: &Surroundings<'_>, syndrome: Syndrome) {
        if let Some(receive) = self.receive.take() {
            let vendor = syndrome.usual_vendor().unwrap_or(VendorSyndrome::NONE);
            receive_error(around.device, around.qp, receive.idx, syndrome, vendor);
        }
    }

    /// Moves the queue pair to ERR and says why.
    pub(super) fn fail(&mut self, around: &Surroundings<'_>, nak: Nak) {
        let qpn = around.qp.num();
        around.qp.set_state(QpState::Err);
        add(&around.device.counters.refused_requests, 1);
        around.device.post_event(match nak {
            Nak::InvalidRequest => AsyncEvent::QpRequestError { qpn },
            Nak::RemoteAccess => AsyncEvent::QpAccessError { qpn },
            Nak::RemoteOperation => AsyncEvent::QpFatal { qpn },
        });
    }

    /// Whether receives wait to be flushed.
    pub(super) fn has_receives(&self, qp: &Qp) -> bool {
        self.receive.is_some() || (qp.layout.rq.is_some() && qp.recv_idx() != self.recv_next)
    }

    /// Flushes up to `limit` posted receives of a queue pair in ERR; how many it flushed.
    pub(super) fn flush(&mut self, device: &EmulatedHca, qp: &Qp, limit: usize) -> usize {
        let mut flushed = 0;
        while flushed < limit && self.has_receives(qp) {
            let idx = match self.receive.take() {
                Some(receive) => receive.idx,
                None => {
                    let idx = self.recv_next;
                    self.recv_next = idx.wrapping_add(1);
                    idx
                }
            };
            receive_error(device, qp, idx, Syndrome::WR_FLUSH, VendorSyndrome::FLUSHED);
            flushed += 1;
        }
        flushed
    }
}

fn reach(around: &Surroundings<'_>, at: Target, len: u64, want: Want) -> Result<Span, Stop> {
    let found = around.keys.reach(around.qp.layout.pd, at.rkey, at.va, len, want);
    found.map_err(|_| Stop::Refuse(Nak::RemoteAccess))
}

fn receive_error(device: &EmulatedHca, qp: &Qp, idx: u16, syndrome: Syndrome, vendor: VendorSyndrome) {
    let op_own = OpOwn::new(CqeOpcode::RespErr, false);
    let mut cqe = ErrorCqe::new(syndrome, vendor, 0, qp.num(), idx, op_own);
    cqe.srqn_uidx = U32::new(qp.layout.user_index);
    let (syndrome, vendor) = (syndrome.0, vendor.0);
    device.note_error(qp, FirstError { qpn: qp.num(), wqe_counter: idx, syndrome, vendor });
    device.complete(qp, &qp.layout.recv_cq, cqe);
}
