//! The owned form of a work queue entry: what tests build, what traces keep, what hosts post.
//!
//! Invariant: `Wqe::parse(&emitted)` gives back the value that was emitted, and emitting what was
//! parsed gives back the bytes, except for reserved bits and a modifier that the opcode has no use
//! for, which become zero.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U16, U32, U64};

use super::view::inline_size;
use super::{
    AtomicOp, AtomicSeg, CtrlFlags, CtrlSeg, DS_MAX, DataSeg, InlineHeader, MaskedCs32Seg, MaskedCs64Seg,
    MaskedFa32Seg, MaskedFa64Seg, Opcode, Payload, RaddrSeg, RequestView, SEG, Segment, WqeError, WqeView,
    num_wqebbs,
};
use crate::types::{Iova, QpNum, Rkey};

/// What every entry carries, whatever it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ctrl {
    /// Index of the first basic block, modulo 2^16.
    pub wqe_idx: u16,
    /// The queue pair.
    pub qpn: QpNum,
    /// Fence, completion and solicited flags.
    pub flags: CtrlFlags,
    /// Immediate data, or the key that a send invalidates; 0 if unused.
    pub imm: u32,
    /// Signature; 0 if unused.
    pub signature: u8,
    /// Stream of a dynamically connected initiator; 0 if unused.
    pub dci_stream: u16,
}

impl Ctrl {
    /// A signalled entry without fence and immediate.
    #[must_use]
    pub const fn signaled(wqe_idx: u16, qpn: QpNum) -> Self {
        let flags = CtrlFlags::SIGNALED;
        Self { wqe_idx, qpn, flags, imm: 0, signature: 0, dci_stream: 0 }
    }
}

/// Where at the remote end a request acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remote {
    /// Address in the key's range.
    pub addr: Iova,
    /// Remote key.
    pub rkey: Rkey,
}

/// One segment of a payload, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SegmentBuf {
    /// The bytes themselves.
    Inline(Vec<u8>),
    /// Where the bytes are, or go.
    Data(DataSeg),
}

/// What an entry asks for, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Nothing. A request that was cancelled in the queue keeps its body.
    Nop {
        /// The segments after the control segment, uninterpreted.
        body: Vec<[u8; SEG]>,
    },
    /// `SEND`.
    Send {
        /// What is sent.
        payload: Vec<SegmentBuf>,
    },
    /// `SEND_IMM`.
    SendImm {
        /// What is sent.
        payload: Vec<SegmentBuf>,
    },
    /// `SEND_INVAL`.
    SendInval {
        /// What is sent.
        payload: Vec<SegmentBuf>,
    },
    /// `RDMA_WRITE`.
    Write {
        /// Where it goes.
        remote: Remote,
        /// What is written.
        payload: Vec<SegmentBuf>,
    },
    /// `RDMA_WRITE_IMM`.
    WriteImm {
        /// Where it goes.
        remote: Remote,
        /// What is written.
        payload: Vec<SegmentBuf>,
    },
    /// `RDMA_READ`.
    Read {
        /// Where it comes from.
        remote: Remote,
        /// Where it goes.
        scatter: Vec<DataSeg>,
    },
    /// Any atomic.
    Atomic {
        /// What it acts on.
        remote: Remote,
        /// What it does.
        op: AtomicOp,
        /// Where the old value goes.
        result: DataSeg,
    },
    /// `DUMP`.
    Dump {
        /// What is read.
        payload: Vec<SegmentBuf>,
    },
}

/// A work queue entry, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wqe {
    /// What every entry carries.
    pub ctrl: Ctrl,
    /// What this one asks for.
    pub request: Request,
}

impl Wqe {
    /// Parses the entry at the start of `bytes`, which may be longer than the entry.
    ///
    /// # Errors
    /// [`WqeError`], whatever the bytes are.
    pub fn parse(bytes: &[u8]) -> Result<Self, WqeError> {
        let view = WqeView::parse(bytes)?;
        let seg = view.ctrl;
        let ctrl = Ctrl {
            wqe_idx: seg.wqe_idx(),
            qpn: seg.qpn(),
            flags: seg.flags(),
            imm: seg.imm.get(),
            signature: seg.signature,
            dci_stream: seg.dci_stream.get(),
        };
        let request = match (view.request, view.opcode) {
            (RequestView::Nop, _) => {
                let body = &bytes[SEG..usize::from(seg.ds()) * SEG];
                Request::Nop { body: body.as_chunks().0.to_vec() }
            }
            (RequestView::Send { payload }, Opcode::SendImm) => {
                Request::SendImm { payload: to_owned(payload) }
            }
            (RequestView::Send { payload }, Opcode::SendInval) => {
                Request::SendInval { payload: to_owned(payload) }
            }
            (RequestView::Send { payload }, _) => Request::Send { payload: to_owned(payload) },
            (RequestView::Write { remote, payload }, Opcode::RdmaWriteImm) => {
                Request::WriteImm { remote: remote.into(), payload: to_owned(payload) }
            }
            (RequestView::Write { remote, payload }, _) => {
                Request::Write { remote: remote.into(), payload: to_owned(payload) }
            }
            (RequestView::Read { remote, scatter }, _) => {
                let data = |segment| match segment {
                    Segment::Data(data) => Some(*data),
                    Segment::Inline(_) => None,
                };
                let scatter = scatter.segments().filter_map(data).collect();
                Request::Read { remote: remote.into(), scatter }
            }
            (RequestView::Atomic { remote, op, result }, _) => {
                Request::Atomic { remote: remote.into(), op, result: *result }
            }
            (RequestView::Dump { payload }, _) => Request::Dump { payload: to_owned(payload) },
        };
        Ok(Self { ctrl, request })
    }

    /// Opcode and modifier that the control segment carries.
    #[must_use]
    pub fn opcode(&self) -> (Opcode, u8) {
        match &self.request {
            Request::Nop { .. } => (Opcode::Nop, 0),
            Request::Send { .. } => (Opcode::Send, 0),
            Request::SendImm { .. } => (Opcode::SendImm, 0),
            Request::SendInval { .. } => (Opcode::SendInval, 0),
            Request::Write { .. } => (Opcode::RdmaWrite, 0),
            Request::WriteImm { .. } => (Opcode::RdmaWriteImm, 0),
            Request::Read { .. } => (Opcode::RdmaRead, 0),
            Request::Atomic { op, .. } => op.opcode(),
            Request::Dump { .. } => (Opcode::Dump, 0),
        }
    }

    /// Size in 16-byte segments, control segment included.
    ///
    /// # Errors
    /// [`WqeError::TooLong`] above [`DS_MAX`].
    pub fn ds(&self) -> Result<u8, WqeError> {
        let body = match &self.request {
            Request::Nop { body } => body.len(),
            Request::Send { payload }
            | Request::SendImm { payload }
            | Request::SendInval { payload }
            | Request::Dump { payload } => num_segs(payload),
            Request::Write { payload, .. } | Request::WriteImm { payload, .. } => 1 + num_segs(payload),
            Request::Read { scatter, .. } => 1 + scatter.len(),
            Request::Atomic { op, .. } => 1 + op.operands_size() / SEG + 1,
        };
        let ds = 1 + body;
        match u8::try_from(ds) {
            Ok(small) if ds <= DS_MAX => Ok(small),
            _ => Err(WqeError::TooLong { ds }),
        }
    }

    /// Number of basic blocks that the entry takes.
    ///
    /// # Errors
    /// [`WqeError::TooLong`] above [`DS_MAX`].
    pub fn num_wqebbs(&self) -> Result<u16, WqeError> {
        self.ds().map(num_wqebbs)
    }

    /// Writes the entry to the start of `out` and gives its size in bytes; touches nothing else.
    ///
    /// # Errors
    /// [`WqeError::TooLong`], or [`WqeError::Truncated`] if `out` is too short; `out` is then
    /// unchanged.
    pub fn emit(&self, out: &mut [u8]) -> Result<usize, WqeError> {
        let ds = self.ds()?;
        let (needed, len) = (usize::from(ds) * SEG, out.len());
        let out = out.get_mut(..needed).ok_or(WqeError::Truncated { needed, len })?;
        let (opcode, opmod) = self.opcode();
        let mut seg = CtrlSeg::new(opmod, self.ctrl.wqe_idx, opcode, self.ctrl.qpn, ds, self.ctrl.flags);
        seg.signature = self.ctrl.signature;
        seg.dci_stream = U16::new(self.ctrl.dci_stream);
        seg.imm = U32::new(self.ctrl.imm);
        let mut cursor = Cursor { rest: out };
        cursor.put(seg.as_bytes());
        self.request.emit(&mut cursor);
        assert!(cursor.rest.is_empty(), "ds() and emit() disagree on the size");
        Ok(needed)
    }
}

impl Request {
    fn emit(&self, cursor: &mut Cursor<'_>) {
        match self {
            Self::Nop { body } => body.iter().for_each(|seg| cursor.put(seg)),
            Self::Send { payload }
            | Self::SendImm { payload }
            | Self::SendInval { payload }
            | Self::Dump { payload } => cursor.put_payload(payload),
            Self::Write { remote, payload } | Self::WriteImm { remote, payload } => {
                cursor.put_remote(remote);
                cursor.put_payload(payload);
            }
            Self::Read { remote, scatter } => {
                cursor.put_remote(remote);
                scatter.iter().for_each(|seg| cursor.put(seg.as_bytes()));
            }
            Self::Atomic { remote, op, result } => {
                cursor.put_remote(remote);
                cursor.put_operands(*op);
                cursor.put(result.as_bytes());
            }
        }
    }
}

impl From<&RaddrSeg> for Remote {
    fn from(seg: &RaddrSeg) -> Self {
        Self { addr: Iova(seg.raddr.get()), rkey: Rkey(seg.rkey.get()) }
    }
}

fn to_owned(payload: Payload<'_>) -> Vec<SegmentBuf> {
    let own = |segment| match segment {
        Segment::Inline(bytes) => SegmentBuf::Inline(bytes.to_vec()),
        Segment::Data(data) => SegmentBuf::Data(*data),
    };
    payload.segments().map(own).collect()
}

fn num_segs(payload: &[SegmentBuf]) -> usize {
    let one = |segment: &SegmentBuf| match segment {
        SegmentBuf::Inline(bytes) => inline_size(bytes.len()) / SEG,
        SegmentBuf::Data(_) => 1,
    };
    payload.iter().map(one).sum()
}

/// The part of the output that is not written yet; `Wqe::emit` sized it.
struct Cursor<'a> {
    rest: &'a mut [u8],
}

impl Cursor<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let rest = std::mem::take(&mut self.rest);
        let (head, tail) = rest.split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.rest = tail;
    }

    fn put_remote(&mut self, remote: &Remote) {
        self.put(RaddrSeg::new(remote.addr.get(), remote.rkey.get()).as_bytes());
    }

    fn put_payload(&mut self, payload: &[SegmentBuf]) {
        for segment in payload {
            match segment {
                SegmentBuf::Data(data) => self.put(data.as_bytes()),
                SegmentBuf::Inline(bytes) => {
                    // CAST: ds() bounded the payload to less than 1 KiB.
                    self.put(InlineHeader::new(bytes.len() as u32).as_bytes());
                    self.put(bytes);
                    let padding = inline_size(bytes.len()) - size_of::<InlineHeader>() - bytes.len();
                    self.put(&[0; SEG][..padding]);
                }
            }
        }
    }

    fn put_operands(&mut self, op: AtomicOp) {
        match op {
            AtomicOp::FetchAdd { add } => {
                let seg = AtomicSeg { swap_add: U64::new(add), compare: U64::ZERO };
                self.put(seg.as_bytes());
            }
            AtomicOp::CmpSwap { swap, compare } => {
                let seg = AtomicSeg { swap_add: U64::new(swap), compare: U64::new(compare) };
                self.put(seg.as_bytes());
            }
            AtomicOp::MaskedFetchAdd32 { add, field_boundary } => {
                let (add, field_boundary) = (U32::new(add), U32::new(field_boundary));
                self.put(MaskedFa32Seg { add, field_boundary, reserved: U64::ZERO }.as_bytes());
            }
            AtomicOp::MaskedFetchAdd64 { add, field_boundary } => {
                let (add, field_boundary) = (U64::new(add), U64::new(field_boundary));
                self.put(MaskedFa64Seg { add, field_boundary }.as_bytes());
            }
            AtomicOp::MaskedCmpSwap32 { swap, compare, swap_mask, compare_mask } => {
                let seg = MaskedCs32Seg {
                    swap: U32::new(swap),
                    compare: U32::new(compare),
                    swap_mask: U32::new(swap_mask),
                    compare_mask: U32::new(compare_mask),
                };
                self.put(seg.as_bytes());
            }
            AtomicOp::MaskedCmpSwap64 { swap, compare, swap_mask, compare_mask } => {
                let seg = MaskedCs64Seg {
                    swap: U64::new(swap),
                    compare: U64::new(compare),
                    swap_mask: U64::new(swap_mask),
                    compare_mask: U64::new(compare_mask),
                };
                self.put(seg.as_bytes());
            }
        }
    }
}
