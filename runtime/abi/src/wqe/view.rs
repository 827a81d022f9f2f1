//! A checked view of one work queue entry in a caller's memory: no copies, no allocation.
//!
//! The device reads entries on its fast path, so a [`WqeView`] does each check once: after
//! [`WqeView::parse`] the segments walk without failing.
//!
//! Invariant: a [`Payload`] holds whole segments only, each inside the entry.

use zerocopy::FromBytes;

use super::{
    AtomicSeg, CtrlSeg, DataSeg, INVALID_LKEY, InlineHeader, MASKED_ATOMIC_OPMOD_4B, MASKED_ATOMIC_OPMOD_8B,
    MaskedCs32Seg, MaskedCs64Seg, MaskedFa32Seg, MaskedFa64Seg, Opcode, RaddrSeg, SEG,
};

/// Why bytes are not a work queue entry that this crate can describe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WqeError {
    /// The slice ends before the entry does.
    #[error("entry needs {needed} bytes, slice has {len}")]
    Truncated {
        /// Bytes that `ds`, or the control segment itself, asks for.
        needed: usize,
        /// Bytes in the slice.
        len: usize,
    },
    /// `ds` does not count the control segment.
    #[error("ds is 0, an entry has at least its control segment")]
    Empty,
    /// The opcode byte means nothing.
    #[error("opcode {0:#04x} is unknown")]
    UnknownOpcode(u8),
    /// The opcode is known, but this crate has no body for it.
    #[error("opcode {0:?} is not supported")]
    UnsupportedOpcode(Opcode),
    /// A segment that the opcode requires lies beyond `ds`.
    #[error("{opcode:?} with ds {ds} lacks its {segment} segment")]
    MissingSegment {
        /// The entry's opcode.
        opcode: Opcode,
        /// The entry's size.
        ds: u8,
        /// Which segment is missing.
        segment: &'static str,
    },
    /// An inline payload reaches beyond `ds`.
    #[error("inline payload of {len} bytes at {offset:#x} passes the entry's end at {end:#x}")]
    InlineOverrun {
        /// Offset of the inline header in the entry.
        offset: usize,
        /// Length that the header claims.
        len: u32,
        /// Size of the entry in bytes.
        end: usize,
    },
    /// A request that scatters names inline data.
    #[error("{0:?} scatters and cannot carry inline data")]
    InlineScatter(Opcode),
    /// An atomic has more than one result segment.
    #[error("{opcode:?} with ds {ds} has segments after its result")]
    TrailingSegments {
        /// The entry's opcode.
        opcode: Opcode,
        /// The entry's size.
        ds: u8,
    },
    /// A masked atomic's modifier names no operand size.
    #[error("{opcode:?} has opmod {opmod:#04x}; 0x08 (4 bytes) and 0x09 (8 bytes) are known")]
    OperandSize {
        /// The entry's opcode.
        opcode: Opcode,
        /// Its modifier.
        opmod: u8,
    },
    /// Too many segments to emit.
    #[error("entry needs ds {ds}, the field's limit is 63")]
    TooLong {
        /// Segments needed.
        ds: usize,
    },
}

/// One segment of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment<'a> {
    /// The bytes themselves.
    Inline(&'a [u8]),
    /// Where the bytes are, or go.
    Data(&'a DataSeg),
}

impl Segment<'_> {
    /// Length of the data in bytes.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        match self {
            // CAST: a slice length fits 64 bits.
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Data(seg) => seg.byte_len(),
        }
    }
}

/// The checked data and inline segments of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload<'a> {
    bytes: &'a [u8],
}

impl<'a> Payload<'a> {
    /// Checks that `wqe[start..]` is a list of whole segments.
    #[inline]
    fn parse(wqe: &'a [u8], start: usize) -> Result<Self, WqeError> {
        let mut at = start;
        while at < wqe.len() {
            let Ok((header, _)) = InlineHeader::ref_from_prefix(&wqe[at..]) else {
                break;
            };
            if !header.is_inline() {
                at += SEG;
                continue;
            }
            // CAST: 31 bits fit usize on the 64-bit targets this crate supports.
            let len = header.byte_len() as usize;
            if len > wqe.len() - at - size_of::<InlineHeader>() {
                let (len, end) = (header.byte_len(), wqe.len());
                return Err(WqeError::InlineOverrun { offset: at, len, end });
            }
            at += inline_size(len);
        }
        Ok(Self { bytes: &wqe[start..] })
    }

    /// The segments in order.
    #[inline]
    #[must_use]
    pub fn segments(&self) -> Segments<'a> {
        Segments { rest: self.bytes }
    }

    /// Length of all segments' data in bytes.
    #[inline]
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.segments().map(|segment| segment.byte_len()).sum()
    }

    /// Whether there is no segment.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl<'a> IntoIterator for Payload<'a> {
    type Item = Segment<'a>;
    type IntoIter = Segments<'a>;

    fn into_iter(self) -> Segments<'a> {
        self.segments()
    }
}

/// Iterator over the segments of a [`Payload`].
#[derive(Debug, Clone)]
pub struct Segments<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    #[inline]
    fn next(&mut self) -> Option<Segment<'a>> {
        let (data, after) = DataSeg::ref_from_prefix(self.rest).ok()?;
        if data.byte_count.get() & InlineHeader::FLAG == 0 {
            self.rest = after;
            return Some(Segment::Data(data));
        }
        // CAST: 31 bits fit usize on the 64-bit targets this crate supports.
        let len = (data.byte_count.get() & !InlineHeader::FLAG) as usize;
        let inline = self.rest.get(size_of::<InlineHeader>()..size_of::<InlineHeader>() + len)?;
        self.rest = self.rest.get(inline_size(len)..)?;
        Some(Segment::Inline(inline))
    }
}

/// Bytes that an inline segment of `len` bytes takes, header and padding included.
pub(super) const fn inline_size(len: usize) -> usize {
    (size_of::<InlineHeader>() + len).next_multiple_of(SEG)
}

/// An atomic operation with its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtomicOp {
    /// Adds 64 bits.
    FetchAdd {
        /// Value to add.
        add: u64,
    },
    /// Stores 64 bits if they compare equal.
    CmpSwap {
        /// Value to store.
        swap: u64,
        /// Value to compare with.
        compare: u64,
    },
    /// Adds 32 bits field by field.
    MaskedFetchAdd32 {
        /// Value to add.
        add: u32,
        /// Top bits of the fields.
        field_boundary: u32,
    },
    /// Adds 64 bits field by field.
    MaskedFetchAdd64 {
        /// Value to add.
        add: u64,
        /// Top bits of the fields.
        field_boundary: u64,
    },
    /// Stores masked bits of 32 if masked bits compare equal.
    MaskedCmpSwap32 {
        /// Value to store.
        swap: u32,
        /// Value to compare with.
        compare: u32,
        /// Bits that are stored.
        swap_mask: u32,
        /// Bits that are compared.
        compare_mask: u32,
    },
    /// Stores masked bits of 64 if masked bits compare equal.
    MaskedCmpSwap64 {
        /// Value to store.
        swap: u64,
        /// Value to compare with.
        compare: u64,
        /// Bits that are stored.
        swap_mask: u64,
        /// Bits that are compared.
        compare_mask: u64,
    },
}

impl AtomicOp {
    /// The opcode and modifier that carry this operation.
    #[must_use]
    pub const fn opcode(&self) -> (Opcode, u8) {
        match self {
            Self::FetchAdd { .. } => (Opcode::AtomicFa, 0),
            Self::CmpSwap { .. } => (Opcode::AtomicCs, 0),
            Self::MaskedFetchAdd32 { .. } => (Opcode::AtomicMaskedFa, MASKED_ATOMIC_OPMOD_4B),
            Self::MaskedFetchAdd64 { .. } => (Opcode::AtomicMaskedFa, MASKED_ATOMIC_OPMOD_8B),
            Self::MaskedCmpSwap32 { .. } => (Opcode::AtomicMaskedCs, MASKED_ATOMIC_OPMOD_4B),
            Self::MaskedCmpSwap64 { .. } => (Opcode::AtomicMaskedCs, MASKED_ATOMIC_OPMOD_8B),
        }
    }

    /// Bytes of remote memory that the operation acts on, which is also the size of its result.
    #[must_use]
    pub const fn operand_len(&self) -> u32 {
        match self {
            Self::MaskedFetchAdd32 { .. } | Self::MaskedCmpSwap32 { .. } => 4,
            _ => 8,
        }
    }

    /// Reads the operand segments; gives the operation and their size in bytes.
    fn parse(ctrl: &CtrlSeg, opcode: Opcode, bytes: &[u8]) -> Result<(Self, usize), WqeError> {
        let missing = WqeError::MissingSegment { opcode, ds: ctrl.ds(), segment: "operand" };
        let opmod = ctrl.opmod();
        let op = match (opcode, opmod) {
            (Opcode::AtomicFa | Opcode::AtomicCs, _) => {
                let seg = view::<AtomicSeg>(bytes).ok_or(missing)?;
                let (swap_add, compare) = (seg.swap_add.get(), seg.compare.get());
                match opcode {
                    Opcode::AtomicFa => Self::FetchAdd { add: swap_add },
                    _ => Self::CmpSwap { swap: swap_add, compare },
                }
            }
            (Opcode::AtomicMaskedFa, MASKED_ATOMIC_OPMOD_4B) => {
                let seg = view::<MaskedFa32Seg>(bytes).ok_or(missing)?;
                let field_boundary = seg.field_boundary.get();
                Self::MaskedFetchAdd32 { add: seg.add.get(), field_boundary }
            }
            (Opcode::AtomicMaskedFa, MASKED_ATOMIC_OPMOD_8B) => {
                let seg = view::<MaskedFa64Seg>(bytes).ok_or(missing)?;
                let field_boundary = seg.field_boundary.get();
                Self::MaskedFetchAdd64 { add: seg.add.get(), field_boundary }
            }
            (Opcode::AtomicMaskedCs, MASKED_ATOMIC_OPMOD_4B) => {
                let seg = view::<MaskedCs32Seg>(bytes).ok_or(missing)?;
                Self::MaskedCmpSwap32 {
                    swap: seg.swap.get(),
                    compare: seg.compare.get(),
                    swap_mask: seg.swap_mask.get(),
                    compare_mask: seg.compare_mask.get(),
                }
            }
            (Opcode::AtomicMaskedCs, MASKED_ATOMIC_OPMOD_8B) => {
                let seg = view::<MaskedCs64Seg>(bytes).ok_or(missing)?;
                Self::MaskedCmpSwap64 {
                    swap: seg.swap.get(),
                    compare: seg.compare.get(),
                    swap_mask: seg.swap_mask.get(),
                    compare_mask: seg.compare_mask.get(),
                }
            }
            _ => return Err(WqeError::OperandSize { opcode, opmod }),
        };
        Ok((op, op.operands_size()))
    }

    /// Size of the operand segments in bytes.
    pub(super) const fn operands_size(&self) -> usize {
        match self {
            Self::MaskedCmpSwap64 { .. } => 2 * SEG,
            _ => SEG,
        }
    }
}

/// The segment at the start of `bytes`, if they are enough.
#[inline]
fn view<T>(bytes: &[u8]) -> Option<&T>
where
    T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
{
    T::ref_from_prefix(bytes).ok().map(|(seg, _)| seg)
}

/// What an entry asks for, borrowed from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestView<'a> {
    /// Nothing; whatever follows the control segment is ignored.
    Nop,
    /// `SEND`, `SEND_IMM` or `SEND_INVAL`; the control segment's `imm` holds what goes with it.
    Send {
        /// What is sent.
        payload: Payload<'a>,
    },
    /// `RDMA_WRITE` or `RDMA_WRITE_IMM`.
    Write {
        /// Where it goes.
        remote: &'a RaddrSeg,
        /// What is written.
        payload: Payload<'a>,
    },
    /// `RDMA_READ`.
    Read {
        /// Where it comes from.
        remote: &'a RaddrSeg,
        /// Where it goes; data segments only.
        scatter: Payload<'a>,
    },
    /// Any atomic.
    Atomic {
        /// What it acts on.
        remote: &'a RaddrSeg,
        /// What it does.
        op: AtomicOp,
        /// Where the old value goes.
        result: &'a DataSeg,
    },
    /// `DUMP`: reads local memory and forgets it.
    Dump {
        /// What is read.
        payload: Payload<'a>,
    },
}

/// A checked view of one linear work queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WqeView<'a> {
    /// The control segment.
    pub ctrl: &'a CtrlSeg,
    /// The opcode, known.
    pub opcode: Opcode,
    /// What the entry asks for.
    pub request: RequestView<'a>,
}

impl<'a> WqeView<'a> {
    /// Parses the entry at the start of `bytes`, which may be longer than the entry.
    ///
    /// # Errors
    /// [`WqeError`], whatever the bytes are.
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, WqeError> {
        let len = bytes.len();
        let Ok((ctrl, _)) = CtrlSeg::ref_from_prefix(bytes) else {
            return Err(WqeError::Truncated { needed: SEG, len });
        };
        let needed = usize::from(ctrl.ds()) * SEG;
        if needed == 0 {
            return Err(WqeError::Empty);
        }
        let wqe = bytes.get(..needed).ok_or(WqeError::Truncated { needed, len })?;
        let opcode = ctrl.opcode().ok_or(WqeError::UnknownOpcode(ctrl.opcode_byte()))?;
        let request = match opcode {
            Opcode::Nop => RequestView::Nop,
            Opcode::Send | Opcode::SendImm | Opcode::SendInval => {
                RequestView::Send { payload: Payload::parse(wqe, SEG)? }
            }
            Opcode::RdmaWrite | Opcode::RdmaWriteImm => RequestView::Write {
                remote: remote(ctrl, opcode, wqe)?,
                payload: Payload::parse(wqe, 2 * SEG)?,
            },
            Opcode::RdmaRead => {
                RequestView::Read { remote: remote(ctrl, opcode, wqe)?, scatter: scatter(opcode, wqe)? }
            }
            Opcode::AtomicCs | Opcode::AtomicFa | Opcode::AtomicMaskedCs | Opcode::AtomicMaskedFa => {
                atomic(ctrl, opcode, wqe)?
            }
            Opcode::Dump => RequestView::Dump { payload: Payload::parse(wqe, SEG)? },
            other => return Err(WqeError::UnsupportedOpcode(other)),
        };
        Ok(Self { ctrl, opcode, request })
    }
}

/// The remote address segment, second in every RDMA and atomic entry.
#[inline]
fn remote<'a>(ctrl: &CtrlSeg, opcode: Opcode, wqe: &'a [u8]) -> Result<&'a RaddrSeg, WqeError> {
    let missing = WqeError::MissingSegment { opcode, ds: ctrl.ds(), segment: "remote address" };
    view::<RaddrSeg>(&wqe[SEG..]).ok_or(missing)
}

/// The scatter list of a read: data segments only.
fn scatter(opcode: Opcode, wqe: &[u8]) -> Result<Payload<'_>, WqeError> {
    let list = Payload::parse(wqe, 2 * SEG)?;
    match list.segments().all(|segment| matches!(segment, Segment::Data(_))) {
        true => Ok(list),
        false => Err(WqeError::InlineScatter(opcode)),
    }
}

/// The body of an atomic: remote address, operands, one result segment.
fn atomic<'a>(ctrl: &CtrlSeg, opcode: Opcode, wqe: &'a [u8]) -> Result<RequestView<'a>, WqeError> {
    let remote = remote(ctrl, opcode, wqe)?;
    let ds = ctrl.ds();
    let (op, operands) = AtomicOp::parse(ctrl, opcode, &wqe[2 * SEG..])?;
    let rest = &wqe[2 * SEG + operands..];
    let missing = WqeError::MissingSegment { opcode, ds, segment: "result" };
    let result = view::<DataSeg>(rest).ok_or(missing)?;
    if result.byte_count.get() & InlineHeader::FLAG != 0 {
        return Err(WqeError::InlineScatter(opcode));
    }
    if rest.len() > SEG {
        return Err(WqeError::TrailingSegments { opcode, ds });
    }
    Ok(RequestView::Atomic { remote, op, result })
}

/// The scatter entries of a receive WQE: up to the end of its stride or an invalid key.
///
/// A receive WQE has no control segment. SPEC: mlx5dv.h `MLX5_INVALID_LKEY`.
pub fn recv_segments(stride: &[u8]) -> impl Iterator<Item = &DataSeg> {
    stride.chunks_exact(SEG).filter_map(view::<DataSeg>).take_while(|seg| seg.lkey.get() != INVALID_LKEY)
}
