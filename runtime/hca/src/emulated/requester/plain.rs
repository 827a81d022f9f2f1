//! The plain case: an RDMA WRITE of one segment, in one basic block, with nothing in its way.
//!
//! Most WQEs that kernels post are of this kind, so it is executed without putting a message together.
//! It is an optimisation and nothing else: at the first doubt nothing has happened yet and `None` sends
//! the WQE the general way, which finds the same result or the fault.

use ibex_abi::wqe::{CqUpdate, CtrlFlags, InlineHeader, Opcode, SEG, WQEBB};

use super::complete::complete;
use super::fetch::Local;
use super::{Requester, Work};
use crate::emulated::fabric::Wire;
use crate::emulated::memory::Span;
use crate::emulated::message::Target;
use crate::emulated::mkeys::Want;

/// Where the bytes of a plain write are.
#[derive(Clone, Copy)]
pub(in crate::emulated) enum Source<'a> {
    Inline(&'a [u8]),
    Memory(Span),
}

impl Source<'_> {
    #[inline]
    pub(in crate::emulated) fn len(&self) -> u64 {
        match self {
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Memory(span) => span.len(),
        }
    }

    /// Places all bytes at the start of `to`, which is as long.
    #[inline]
    pub(in crate::emulated) fn place(&self, to: Span) {
        match self {
            Self::Inline(bytes) => to.write(0, bytes),
            Self::Memory(span) => to.copy_from(0, *span, 0, span.len()),
        }
    }
}

/// Flags other than the completion mode: fence, solicited, reserved.
const OTHER_FLAGS: u8 = 0b1111_0011;
/// Bytes before the inline payload: control, remote address, inline header.
const INLINE_AT: usize = 2 * SEG + size_of::<InlineHeader>();

#[inline]
fn be32(block: &[u8; WQEBB], at: usize) -> u32 {
    let bytes = [block[at], block[at + 1], block[at + 2], block[at + 3]];
    u32::from_be_bytes(bytes)
}

#[inline]
fn be64(block: &[u8; WQEBB], at: usize) -> u64 {
    u64::from(be32(block, at)) << 32 | u64::from(be32(block, at + 4))
}

impl Requester {
    /// Executes the next WQE, which a doorbell covers, if it is plain; its payload's length.
    ///
    /// Nothing may be outstanding.
    #[inline]
    pub(in crate::emulated) fn send_plain(&mut self, local: &Local<'_>, wire: &mut impl Wire) -> Option<u64> {
        let mut block = [0; WQEBB];
        local.qp.read_block(self.next, &mut block);
        let flags = block[0x0b];
        if be32(&block, 0) != u32::from(self.next) << 8 | u32::from(Opcode::RdmaWrite.byte())
            || be32(&block, 4) >> 8 != local.qp.num().get()
            || flags & OTHER_FLAGS != 0
        {
            return None;
        }
        let (ds, first) = (usize::from(block[7] & 0x3f), be32(&block, 2 * SEG));
        let source = if first & InlineHeader::FLAG == 0 {
            let (key, va) = (be32(&block, 2 * SEG + 4), be64(&block, 2 * SEG + 8));
            if ds != 3 || first == 0 {
                return None;
            }
            let pd = local.qp.layout.pd;
            Source::Memory(local.keys.reach(pd, key, va, first.into(), Want::LocalRead).ok()?)
        } else {
            // CAST: 31 bits fit usize on 64-bit hosts.
            let len = (first & !InlineHeader::FLAG) as usize;
            if ds > WQEBB / SEG || ds != (INLINE_AT + len).div_ceil(SEG) || len == 0 {
                return None;
            }
            Source::Inline(block.get(INLINE_AT..INLINE_AT + len)?)
        };
        let connection = self.connection.as_ref()?;
        let len = source.len();
        if len > 1 << connection.log_msg_max {
            return None;
        }
        let to = Target { va: be64(&block, SEG), rkey: be32(&block, SEG + 8) };
        // CAST: at most 2^30 bytes.
        let packets = connection.mtu.packets(len as u32);
        if !wire.write_plain(self.psn, packets, to, source) {
            return None;
        }
        let (idx, update) = (self.next, CtrlFlags(flags).completion());
        if !matches!(update, CqUpdate::OnError | CqUpdate::OnFirstError) {
            let opcode = Opcode::RdmaWrite.byte();
            let (psn, len, has_response) = (self.psn, len as u32, false);
            let work = Work { idx, blocks: 1, opcode, update, has_response, psn, packets, len };
            complete(local.device, local.qp, &work, local.now);
        }
        self.next = idx.wrapping_add(1);
        self.psn = self.psn.plus(packets);
        local.qp.prefetch_block(self.next.wrapping_add(1));
        (self.timeouts, self.not_readies) = (0, 0);
        Some(len)
    }
}
