//! Fetching: a WQE is read from the send queue, checked, and becomes a message.
//!
//! Every local check happens here, in the order in which hardware would find the fault: the entry is the
//! one expected, it is whole, it makes sense, its local keys cover its segments, it is not too long.

use ibex_abi::cqe::{Syndrome, VendorSyndrome};
use ibex_abi::wqe::{CtrlSeg, DataSeg, FenceMode, Opcode, RaddrSeg, RequestView, WQEBB, WqeView};
use zerocopy::FromBytes;

use super::complete::Failure;
use super::{Connection, Work};
use crate::emulated::memory::Span;
use crate::emulated::message::{Payload, Request, RequestOp, Target};
use crate::emulated::mkeys::{KeyFault, MkeyTable, Want};
use crate::emulated::qp::{Qp, WQE_BYTES_MAX};
use crate::emulated::{EmulatedHca, Nanos};
use ibex_abi::types::Psn;

/// What a requester works on besides its own state.
pub(in crate::emulated) struct Local<'a> {
    pub(in crate::emulated) device: &'a EmulatedHca,
    pub(in crate::emulated) qp: &'a Qp,
    pub(in crate::emulated) keys: &'a MkeyTable,
    pub(in crate::emulated) now: Nanos,
}

/// A fetched and checked WQE.
pub(in crate::emulated) struct Fetched<'a> {
    pub(in crate::emulated) work: Work,
    pub(in crate::emulated) fence: FenceMode,
    pub(in crate::emulated) what: Fetch<'a>,
}

/// What a fetched WQE leads to.
pub(in crate::emulated) enum Fetch<'a> {
    /// Nothing on the wire.
    Nothing,
    /// A message, and where the old value of an atomic goes.
    Message { request: Request, payload: Payload<'a>, result: Option<&'a DataSeg> },
}

/// A linear copy of one WQE.
pub(in crate::emulated) type WqeBuf = [u8; WQE_BYTES_MAX];

/// What a WQE's segments say, before the message is put together.
struct Parts<'a> {
    op: RequestOp,
    payload: Payload<'a>,
    result: Option<&'a DataSeg>,
    len: u64,
}

impl Local<'_> {
    /// Reads and checks the WQE at `idx`, of which `available` blocks are covered by the doorbell.
    #[inline]
    pub(in crate::emulated) fn fetch<'a>(
        &'a self,
        connection: Option<&Connection>,
        psn: Psn,
        buf: &'a mut WqeBuf,
        idx: u16,
        available: u16,
    ) -> Result<Fetched<'a>, (Work, Failure)> {
        let (blocks, _) = buf.as_chunks_mut::<WQEBB>();
        self.qp.read_block(idx, &mut blocks[0]);
        let Ok(ctrl) = CtrlSeg::read_from_bytes(&blocks[0][..size_of::<CtrlSeg>()]) else {
            unreachable!("a basic block holds a control segment")
        };
        let mut work = Work::new(&ctrl, psn);
        let bad_op = Failure::new(Syndrome::LOCAL_QP_OP);
        if work.idx != idx || ctrl.qpn_ds.get() >> 8 != self.qp.num().get() {
            work.idx = idx;
            return Err((work, Failure::BAD_INDEX));
        }
        if work.blocks == 0 || work.blocks > available || work.blocks > self.qp.num_blocks() {
            return Err((work, bad_op));
        }
        for extra in 1..work.blocks {
            self.qp.read_block(idx.wrapping_add(extra), &mut blocks[usize::from(extra)]);
        }
        let Some(fence) = ctrl.flags().fence() else {
            return Err((work, bad_op));
        };
        let Ok(view) = WqeView::parse(buf.as_slice()) else {
            return Err((work, bad_op));
        };
        match self.prepare(connection, &view, &mut work) {
            Ok(what) => Ok(Fetched { work, fence, what }),
            Err(failure) => Err((work, failure)),
        }
    }

    /// Turns a parsed WQE into a message.
    #[inline]
    fn prepare<'a>(
        &'a self,
        connection: Option<&Connection>,
        view: &WqeView<'a>,
        work: &mut Work,
    ) -> Result<Fetch<'a>, Failure> {
        let Some(Parts { op, payload, result, len }) = self.parts(view)? else {
            return Ok(Fetch::Nothing);
        };
        let Some(connection) = connection else {
            return Err(Failure::new(Syndrome::LOCAL_QP_OP));
        };
        if len > 1 << connection.log_msg_max {
            return Err(Failure::new(Syndrome::LOCAL_LENGTH));
        }
        // CAST: at most 2^30 bytes, so length and packets fit 32 bits.
        work.len = len as u32;
        work.packets = connection.mtu.packets(work.len);
        work.has_response = op.has_response();
        let (psn, packets) = (work.psn, work.packets);
        let solicited = view.ctrl.flags().is_solicited();
        let request = Request { psn, packets, len, op, solicited, resent: false };
        Ok(Fetch::Message { request, payload, result })
    }

    /// Reads the segments and checks their local keys; `None` if nothing goes on the wire.
    #[inline]
    fn parts<'a>(&'a self, view: &WqeView<'a>) -> Result<Option<Parts<'a>>, Failure> {
        let (keys, pd) = (self.keys, self.qp.layout.pd);
        let payload_of = |segments| Payload { segments: Some(segments), keys, pd };
        let imm = view.ctrl.imm.get();
        let (op, payload, want) = match view.request {
            RequestView::Nop => return Ok(None),
            RequestView::Dump { payload } => {
                payload_of(payload).check(Want::LocalRead).map_err(local)?;
                return Ok(None);
            }
            RequestView::Write { remote, payload } => {
                let imm = (view.opcode == Opcode::RdmaWriteImm).then_some(imm);
                (RequestOp::Write { to: target(remote), imm }, payload_of(payload), Want::LocalRead)
            }
            RequestView::Send { payload } => {
                if view.opcode == Opcode::SendInval {
                    return Err(Failure::new(Syndrome::LOCAL_QP_OP));
                }
                let imm = (view.opcode == Opcode::SendImm).then_some(imm);
                (RequestOp::Send { imm }, payload_of(payload), Want::LocalRead)
            }
            RequestView::Read { remote, scatter } => {
                (RequestOp::Read { from: target(remote) }, payload_of(scatter), Want::LocalWrite)
            }
            RequestView::Atomic { remote, op, result } => {
                let len = u64::from(op.operand_len());
                if result.byte_len() != len {
                    return Err(Failure::new(Syndrome::LOCAL_LENGTH));
                }
                self.result_memory(result).map_err(local)?;
                let (op, result) = (RequestOp::Atomic { on: target(remote), op }, Some(result));
                return Ok(Some(Parts { op, payload: Payload { segments: None, keys, pd }, result, len }));
            }
        };
        let len = payload.check(want).map_err(local)?;
        Ok(Some(Parts { op, payload, result: None, len }))
    }

    /// Where an atomic's old value goes.
    pub(in crate::emulated) fn result_memory(&self, seg: &DataSeg) -> Result<Span, KeyFault> {
        let (key, va) = (seg.lkey.get(), seg.addr.get());
        self.keys.reach(self.qp.layout.pd, key, va, seg.byte_len(), Want::LocalWrite)
    }
}

const fn local(fault: KeyFault) -> Failure {
    let vendor = match fault {
        KeyFault::OutOfRange => VendorSyndrome::LOCAL_PROT,
        KeyFault::Unknown | KeyFault::WrongPd | KeyFault::Denied => VendorSyndrome::LOCAL_PROT_KEY,
    };
    Failure { syndrome: Syndrome::LOCAL_PROT, vendor }
}

fn target(remote: &RaddrSeg) -> Target {
    Target { va: remote.raddr.get(), rkey: remote.rkey.get() }
}
