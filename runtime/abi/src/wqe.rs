//! Work queue entries: the segments they are made of, and how many bytes and blocks they take.
//!
//! A send queue is memory that the driver or a kernel owns and the HCA reads. A WQE starts at a
//! [`WQEBB`] boundary, is a whole number of [`SEG`]-byte segments long (`ds` of them), and its
//! control segment names the index of its first WQEBB. This module owns no memory: segments are
//! views of a caller's slice, [`WqeView`] a checked view of a whole entry, [`Wqe`] its owned form.
//!
//! Invariants: `ds` counts the control segment; the next WQE starts at the next free WQEBB;
//! segments may wrap at the end of the queue, so a device linearises an entry before it parses it.
//!
//! ```text
//!        00              10              20              30
//! WRITE  | ctrl          | raddr         | data          |             ds = 3
//! inline | ctrl          | raddr         |len| bytes, padded to 16 B   ds = 2 + ceil((4+n)/16)
//! READ   | ctrl          | raddr         | data          |
//! ATOMIC | ctrl          | raddr         | operands      | data        ds = 4 (masked CS, 8 B: 5)
//! SEND   | ctrl          | data or inline|
//! NOP    | ctrl          | ignored
//! ```

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::QpNum;

mod owned;
mod view;

pub use owned::{Ctrl, Remote, Request, SegmentBuf, Wqe};
pub use view::{
    AtomicOp, Payload, RequestView, Segment, Segments, WqeError, WqeView, recv_segments,
};

/// Size of a basic block: WQEs start at multiples of it and queue depths count it.
pub const WQEBB: usize = 64;
/// Size of a segment slot; `ds` counts these.
pub const SEG: usize = 16;
/// The largest `ds` that the control segment's 6-bit field can carry.
pub const DS_MAX: usize = 63;
/// Local key that ends a list of scatter entries in a receive WQE.
///
/// SPEC: mlx5dv.h `MLX5_INVALID_LKEY`.
pub const INVALID_LKEY: u32 = 0x100;

/// Number of basic blocks that a WQE of `ds` segments takes.
#[must_use]
pub const fn num_wqebbs(ds: u8) -> u16 {
    // CAST: widening in a const fn.
    (ds as u16).div_ceil(4)
}

/// What a work queue entry asks for.
///
/// SPEC: mlx5dv.h `MLX5_OPCODE_*`; WAIT and DUMP as the DOCA GPUNetIO and NVSHMEM headers name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Does nothing; completes like any other.
    Nop = 0x00,
    /// Send that invalidates a remote key.
    SendInval = 0x01,
    /// RDMA write.
    RdmaWrite = 0x08,
    /// RDMA write that consumes a receive at the remote end and delivers 32 bits with it.
    RdmaWriteImm = 0x09,
    /// Send.
    Send = 0x0a,
    /// Send that delivers 32 bits with it.
    SendImm = 0x0b,
    /// Segmentation offload of an Ethernet send.
    Tso = 0x0e,
    /// Waits for another queue.
    Wait = 0x0f,
    /// RDMA read.
    RdmaRead = 0x10,
    /// 8-byte compare and swap.
    AtomicCs = 0x11,
    /// 8-byte fetch and add.
    AtomicFa = 0x12,
    /// Compare and swap with masks.
    AtomicMaskedCs = 0x14,
    /// Fetch and add with field boundaries.
    AtomicMaskedFa = 0x15,
    /// Fast memory registration.
    Fmr = 0x19,
    /// Invalidates a local key.
    LocalInval = 0x1b,
    /// Device configuration.
    ConfigCmd = 0x1f,
    /// Sets protection information.
    SetPsv = 0x20,
    /// Local read that orders earlier reads.
    Dump = 0x23,
    /// Modifies a memory key.
    Umr = 0x25,
    /// Tag matching.
    TagMatching = 0x28,
    /// Flow table access.
    FlowTableAccess = 0x2c,
    /// Memory-to-memory operation.
    Mmo = 0x2f,
}

impl Opcode {
    /// Every opcode, in numerical order.
    pub const ALL: [Self; 22] = [
        Self::Nop,
        Self::SendInval,
        Self::RdmaWrite,
        Self::RdmaWriteImm,
        Self::Send,
        Self::SendImm,
        Self::Tso,
        Self::Wait,
        Self::RdmaRead,
        Self::AtomicCs,
        Self::AtomicFa,
        Self::AtomicMaskedCs,
        Self::AtomicMaskedFa,
        Self::Fmr,
        Self::LocalInval,
        Self::ConfigCmd,
        Self::SetPsv,
        Self::Dump,
        Self::Umr,
        Self::TagMatching,
        Self::FlowTableAccess,
        Self::Mmo,
    ];

    /// The byte that the control segment carries.
    #[must_use]
    pub const fn byte(self) -> u8 {
        // CAST: a fieldless enum of representation u8.
        self as u8
    }

    /// The opcode with this byte.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0x00 => Self::Nop,
            0x01 => Self::SendInval,
            0x08 => Self::RdmaWrite,
            0x09 => Self::RdmaWriteImm,
            0x0a => Self::Send,
            0x0b => Self::SendImm,
            0x0e => Self::Tso,
            0x0f => Self::Wait,
            0x10 => Self::RdmaRead,
            0x11 => Self::AtomicCs,
            0x12 => Self::AtomicFa,
            0x14 => Self::AtomicMaskedCs,
            0x15 => Self::AtomicMaskedFa,
            0x19 => Self::Fmr,
            0x1b => Self::LocalInval,
            0x1f => Self::ConfigCmd,
            0x20 => Self::SetPsv,
            0x23 => Self::Dump,
            0x25 => Self::Umr,
            0x28 => Self::TagMatching,
            0x2c => Self::FlowTableAccess,
            0x2f => Self::Mmo,
            _ => return None,
        })
    }
}

/// What a WQE waits for before it executes (`fm`, bits 7:5 of the control segment's flags).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FenceMode {
    /// Nothing beyond queue order.
    None = 0,
    /// Earlier local invalidations and memory key updates.
    InitiatorSmall = 1,
    /// Earlier reads and atomics.
    Fence = 2,
    /// Everything earlier.
    StrongOrdering = 3,
    /// Earlier reads, atomics and memory key updates: what `IBV_SEND_FENCE` becomes.
    SmallAndFence = 4,
}

impl FenceMode {
    /// Whether earlier reads and atomics must have completed first.
    #[must_use]
    pub const fn waits_for_reads(self) -> bool {
        matches!(
            self,
            Self::Fence | Self::StrongOrdering | Self::SmallAndFence
        )
    }
}

/// When a WQE writes a completion (`ce`, bits 3:2 of the control segment's flags).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CqUpdate {
    /// Only if it fails: an unsignalled request.
    OnError = 0,
    /// Only if it is the first to fail.
    OnFirstError = 1,
    /// Always: a signalled request.
    Always = 2,
    /// Always, and an event queue entry with it.
    AlwaysWithEqe = 3,
}

/// The flags byte `fm_ce_se` of a control segment.
///
/// ```text
///   7   5   4    3  2    1     0
/// | fence |rsvd| cq upd| sol |rsvd|
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CtrlFlags(pub u8);

impl CtrlFlags {
    /// An unsignalled request without fence.
    pub const UNSIGNALED: Self = Self(0);
    /// A signalled request without fence: 0x08.
    pub const SIGNALED: Self = Self::new(FenceMode::None, CqUpdate::Always, false);

    /// The flags for these three choices.
    #[must_use]
    pub const fn new(fence: FenceMode, completion: CqUpdate, solicited: bool) -> Self {
        // CAST: fieldless enums of representation u8, and a bool.
        Self(((fence as u8) << 5) | ((completion as u8) << 2) | ((solicited as u8) << 1))
    }

    /// The fence mode, or `None` for the three codes that mean nothing.
    #[must_use]
    pub const fn fence(self) -> Option<FenceMode> {
        Some(match self.0 >> 5 {
            0 => FenceMode::None,
            1 => FenceMode::InitiatorSmall,
            2 => FenceMode::Fence,
            3 => FenceMode::StrongOrdering,
            4 => FenceMode::SmallAndFence,
            _ => return None,
        })
    }

    /// When a completion is written.
    #[must_use]
    pub const fn completion(self) -> CqUpdate {
        match (self.0 >> 2) & 3 {
            0 => CqUpdate::OnError,
            1 => CqUpdate::OnFirstError,
            2 => CqUpdate::Always,
            _ => CqUpdate::AlwaysWithEqe,
        }
    }

    /// Whether a successful request writes a completion.
    #[must_use]
    pub const fn is_signaled(self) -> bool {
        self.0 & 0b1000 != 0
    }

    /// Whether the remote end's completion raises a solicited event.
    #[must_use]
    pub const fn is_solicited(self) -> bool {
        self.0 & 0b10 != 0
    }
}

/// Control segment: the first 16 bytes of every send WQE.
///
/// ```text
///  00            01            02            03
/// | opmod       | wqe_idx                   | opcode      |
/// | qpn                                     |rsvd|   ds   |
/// | signature   | dci_stream                | fm_ce_se    |
/// | imm                                                   |
/// ```
///
/// The signature and the immediate of a WQE that uses neither may hold anything: they are never
/// validated.
///
/// SPEC: mlx5dv.h `mlx5_wqe_ctrl_seg`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct CtrlSeg {
    /// `opmod:8, wqe_idx:16, opcode:8`.
    pub opmod_idx_opcode: U32,
    /// `qpn:24, reserved:2, ds:6`.
    pub qpn_ds: U32,
    /// Exclusive-or checksum, used only where the QP was created with signatures.
    pub signature: u8,
    /// Stream of a dynamically connected initiator.
    pub dci_stream: U16,
    /// Fence, completion and solicited flags, see [`CtrlFlags`].
    pub fm_ce_se: u8,
    /// Immediate data, or the key that a send invalidates.
    pub imm: U32,
}

const _: () = {
    assert!(size_of::<CtrlSeg>() == SEG);
    assert!(offset_of!(CtrlSeg, opmod_idx_opcode) == 0x0);
    assert!(offset_of!(CtrlSeg, qpn_ds) == 0x4);
    assert!(offset_of!(CtrlSeg, signature) == 0x8);
    assert!(offset_of!(CtrlSeg, dci_stream) == 0x9);
    assert!(offset_of!(CtrlSeg, fm_ce_se) == 0xb);
    assert!(offset_of!(CtrlSeg, imm) == 0xc);
};

impl CtrlSeg {
    /// A control segment without signature, stream and immediate.
    ///
    /// # Panics
    /// PANIC: if `ds` is above [`DS_MAX`].
    #[must_use]
    pub fn new(
        opmod: u8,
        wqe_idx: u16,
        opcode: Opcode,
        qpn: QpNum,
        ds: u8,
        flags: CtrlFlags,
    ) -> Self {
        assert!(usize::from(ds) <= DS_MAX, "ds is a 6-bit field");
        let [idx_hi, idx_lo] = wqe_idx.to_be_bytes();
        Self {
            opmod_idx_opcode: U32::from_bytes([opmod, idx_hi, idx_lo, opcode.byte()]),
            qpn_ds: U32::new(qpn.get() << 8 | u32::from(ds)),
            signature: 0,
            dci_stream: U16::ZERO,
            fm_ce_se: flags.0,
            imm: U32::ZERO,
        }
    }

    /// Modifier of the opcode; selects the operand size of masked atomics.
    #[must_use]
    pub fn opmod(&self) -> u8 {
        self.opmod_idx_opcode.to_bytes()[0]
    }

    /// Index of the WQE's first basic block, modulo 2^16.
    #[must_use]
    pub fn wqe_idx(&self) -> u16 {
        let [_, hi, lo, _] = self.opmod_idx_opcode.to_bytes();
        u16::from_be_bytes([hi, lo])
    }

    /// The opcode's byte, known or not.
    #[must_use]
    pub fn opcode_byte(&self) -> u8 {
        self.opmod_idx_opcode.to_bytes()[3]
    }

    /// The opcode, if it is a known one.
    #[must_use]
    pub fn opcode(&self) -> Option<Opcode> {
        Opcode::from_byte(self.opcode_byte())
    }

    /// Number of the queue pair that this WQE says it belongs to.
    #[must_use]
    pub fn qpn(&self) -> QpNum {
        QpNum::new(self.qpn_ds.get() >> 8)
    }

    /// Size of the WQE in 16-byte segments, this one included.
    #[must_use]
    pub fn ds(&self) -> u8 {
        self.qpn_ds.to_bytes()[3] & 0x3f
    }

    /// Number of basic blocks that the WQE takes.
    #[must_use]
    pub fn num_wqebbs(&self) -> u16 {
        num_wqebbs(self.ds())
    }

    /// Fence, completion and solicited flags.
    #[must_use]
    pub fn flags(&self) -> CtrlFlags {
        CtrlFlags(self.fm_ce_se)
    }
}

/// Remote address segment: where at the remote end an RDMA or atomic operation acts.
///
/// ```text
///  00                                          08            0c
/// | virtual address at the remote end         | rkey        | reserved    |
/// ```
///
/// SPEC: mlx5dv.h `mlx5_wqe_raddr_seg`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct RaddrSeg {
    /// Address in the remote key's range.
    pub raddr: U64,
    /// Remote key.
    pub rkey: U32,
    /// Reserved.
    pub reserved: U32,
}

const _: () = {
    assert!(size_of::<RaddrSeg>() == SEG);
    assert!(offset_of!(RaddrSeg, raddr) == 0x0);
    assert!(offset_of!(RaddrSeg, rkey) == 0x8);
    assert!(offset_of!(RaddrSeg, reserved) == 0xc);
};

impl RaddrSeg {
    /// A segment that names `raddr` under `rkey`.
    #[must_use]
    pub fn new(raddr: u64, rkey: u32) -> Self {
        Self {
            raddr: U64::new(raddr),
            rkey: U32::new(rkey),
            reserved: U32::ZERO,
        }
    }
}

/// Data segment: a piece of local memory to gather from or scatter to.
///
/// ```text
///  00            04            08
/// |0| byte_count | lkey        | virtual address                           |
/// ```
///
/// SPEC: mlx5dv.h `mlx5_wqe_data_seg`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DataSeg {
    /// Length in bytes; bit 31 is zero, or the segment is an [`InlineHeader`].
    pub byte_count: U32,
    /// Local key.
    pub lkey: U32,
    /// Address in the local key's range.
    pub addr: U64,
}

const _: () = {
    assert!(size_of::<DataSeg>() == SEG);
    assert!(offset_of!(DataSeg, byte_count) == 0x0);
    assert!(offset_of!(DataSeg, lkey) == 0x4);
    assert!(offset_of!(DataSeg, addr) == 0x8);
};

impl DataSeg {
    /// Largest length that a data segment's field can carry.
    pub const BYTE_COUNT_MAX: u32 = 0x7fff_ffff;

    /// A segment over `byte_count` bytes at `addr` under `lkey`.
    ///
    /// # Panics
    /// PANIC: if `byte_count` is above [`Self::BYTE_COUNT_MAX`].
    #[must_use]
    pub fn new(byte_count: u32, lkey: u32, addr: u64) -> Self {
        assert!(
            byte_count <= Self::BYTE_COUNT_MAX,
            "byte_count is a 31-bit field"
        );
        Self {
            byte_count: U32::new(byte_count),
            lkey: U32::new(lkey),
            addr: U64::new(addr),
        }
    }

    /// Length in bytes. Zero stands for 2^31 on hardware, which is why drivers skip empty
    /// entries [inferred from libmlx5].
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        match self.byte_count.get() {
            0 => 1 << 31,
            count => u64::from(count & Self::BYTE_COUNT_MAX),
        }
    }
}

/// Header of an inline segment; the payload follows at once, the whole padded to 16 bytes.
///
/// ```text
///  00            04 ...
/// |1| byte_count | payload
/// ```
///
/// SPEC: mlx5dv.h `mlx5_wqe_inl_data_seg`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct InlineHeader {
    /// Length of the payload, with bit 31 set.
    pub byte_count: U32,
}

const _: () = assert!(size_of::<InlineHeader>() == 4);

impl InlineHeader {
    /// The bit that tells an inline segment from a data segment.
    pub const FLAG: u32 = 0x8000_0000;
    /// The longest payload that fits a WQE of [`DS_MAX`] segments beside a control segment.
    pub const LEN_MAX: u32 = 61 * 16 + 12;

    /// A header for `len` bytes of payload.
    ///
    /// # Panics
    /// PANIC: if `len` is above [`Self::LEN_MAX`].
    #[must_use]
    pub fn new(len: u32) -> Self {
        assert!(len <= Self::LEN_MAX, "an inline payload must fit a WQE");
        Self {
            byte_count: U32::new(Self::FLAG | len),
        }
    }

    /// Whether this is the header of an inline segment.
    #[must_use]
    pub fn is_inline(&self) -> bool {
        self.byte_count.get() & Self::FLAG != 0
    }

    /// Length of the payload in bytes.
    #[must_use]
    pub fn byte_len(&self) -> u32 {
        self.byte_count.get() & !Self::FLAG
    }
}

/// Operands of an 8-byte atomic.
///
/// ```text
///  00                          08
/// | swap or add               | compare; unused in fetch and add |
/// ```
///
/// SPEC: mlx5dv.h `mlx5_wqe_atomic_seg`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct AtomicSeg {
    /// Value to store if the comparison holds, or value to add.
    pub swap_add: U64,
    /// Value to compare with.
    pub compare: U64,
}

/// Operands of a masked 4-byte fetch and add (opmod 0x08).
///
/// ```text
///  00            04               08
/// | add         | field_boundary | reserved                  |
/// ```
///
/// SPEC: NVSHMEM `ibgda_atomic_32_masked_fa_seg_t`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MaskedFa32Seg {
    /// Value to add.
    pub add: U32,
    /// Each set bit is the top bit of a field: no carry leaves it.
    pub field_boundary: U32,
    /// Reserved.
    pub reserved: U64,
}

/// Operands of a masked 8-byte fetch and add (opmod 0x09).
///
/// ```text
///  00                          08
/// | add                       | field_boundary            |
/// ```
///
/// SPEC: NVSHMEM `ibgda_atomic_64_masked_fa_seg_t`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MaskedFa64Seg {
    /// Value to add.
    pub add: U64,
    /// Each set bit is the top bit of a field: no carry leaves it.
    pub field_boundary: U64,
}

/// Operands of a masked 4-byte compare and swap (opmod 0x08).
///
/// ```text
///  00            04            08            0c
/// | swap        | compare     | swap_mask   | compare_mask |
/// ```
///
/// SPEC: NVSHMEM `ibgda_atomic_32_masked_cs_seg_t`.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MaskedCs32Seg {
    /// Value whose masked bits are stored if the comparison holds.
    pub swap: U32,
    /// Value whose masked bits are compared.
    pub compare: U32,
    /// Bits that are stored.
    pub swap_mask: U32,
    /// Bits that are compared.
    pub compare_mask: U32,
}

/// Operands of a masked 8-byte compare and swap (opmod 0x09): two segments.
///
/// ```text
///  00                          08
/// | swap                      | compare                   |
/// | swap_mask                 | compare_mask              |
/// ```
///
/// SPEC: NVSHMEM `ibgda_atomic_64_masked_cs_seg_t`, twice.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct MaskedCs64Seg {
    /// Value whose masked bits are stored if the comparison holds.
    pub swap: U64,
    /// Value whose masked bits are compared.
    pub compare: U64,
    /// Bits that are stored.
    pub swap_mask: U64,
    /// Bits that are compared.
    pub compare_mask: U64,
}

/// `opmod` of a masked atomic on 4 bytes.
pub const MASKED_ATOMIC_OPMOD_4B: u8 = 0x08;
/// `opmod` of a masked atomic on 8 bytes.
pub const MASKED_ATOMIC_OPMOD_8B: u8 = 0x09;

const _: () = {
    assert!(size_of::<AtomicSeg>() == SEG);
    assert!(offset_of!(AtomicSeg, swap_add) == 0x0);
    assert!(offset_of!(AtomicSeg, compare) == 0x8);
    assert!(size_of::<MaskedFa32Seg>() == SEG);
    assert!(offset_of!(MaskedFa32Seg, field_boundary) == 0x4);
    assert!(size_of::<MaskedFa64Seg>() == SEG);
    assert!(offset_of!(MaskedFa64Seg, field_boundary) == 0x8);
    assert!(size_of::<MaskedCs32Seg>() == SEG);
    assert!(offset_of!(MaskedCs32Seg, compare) == 0x4);
    assert!(offset_of!(MaskedCs32Seg, swap_mask) == 0x8);
    assert!(offset_of!(MaskedCs32Seg, compare_mask) == 0xc);
    assert!(size_of::<MaskedCs64Seg>() == 2 * SEG);
    assert!(offset_of!(MaskedCs64Seg, compare) == 0x08);
    assert!(offset_of!(MaskedCs64Seg, swap_mask) == 0x10);
    assert!(offset_of!(MaskedCs64Seg, compare_mask) == 0x18);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_opcode_byte_decodes_to_itself_and_no_other_byte_decodes() {
        let mut known = 0;
        for byte in 0..=u8::MAX {
            if let Some(opcode) = Opcode::from_byte(byte) {
                assert_eq!(opcode.byte(), byte);
                assert!(Opcode::ALL.contains(&opcode));
                known += 1;
            }
        }
        assert_eq!(known, Opcode::ALL.len());
    }

    #[test]
    fn flags_match_the_bytes_that_libmlx5_writes() {
        assert_eq!(CtrlFlags::SIGNALED.0, 0x08);
        let all = CtrlFlags::new(FenceMode::SmallAndFence, CqUpdate::Always, true);
        assert_eq!(all.0, 0x8a);
        assert_eq!(all.fence(), Some(FenceMode::SmallAndFence));
        assert!(all.is_signaled() && all.is_solicited());
        assert_eq!(CtrlFlags(0x60).fence(), Some(FenceMode::StrongOrdering));
        assert_eq!(CtrlFlags(0xa0).fence(), None);
        assert!(!CtrlFlags(0x04).is_signaled());
        assert_eq!(CtrlFlags(0x04).completion(), CqUpdate::OnFirstError);
        assert_eq!(CtrlFlags(0x0c).completion(), CqUpdate::AlwaysWithEqe);
        assert!(CtrlFlags(0x0c).is_signaled());
    }

    #[test]
    fn a_wqe_takes_one_block_per_four_segments_begun() {
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 8, 9, 63].map(num_wqebbs),
            [0, 1, 1, 1, 1, 2, 2, 3, 16]
        );
    }

    #[test]
    fn control_fields_survive_at_their_extremes() {
        let qpn = QpNum::MAX;
        let ctrl = CtrlSeg::new(0xff, 0xffff, Opcode::Mmo, qpn, 63, CtrlFlags(0xff));
        assert_eq!(
            (ctrl.opmod(), ctrl.wqe_idx(), ctrl.opcode()),
            (0xff, 0xffff, Some(Opcode::Mmo))
        );
        assert_eq!((ctrl.qpn(), ctrl.ds(), ctrl.num_wqebbs()), (qpn, 63, 16));
    }

    #[test]
    fn reserved_bits_beside_ds_are_ignored() {
        let mut ctrl = CtrlSeg::new(0, 0, Opcode::Nop, QpNum::new(1), 3, CtrlFlags::SIGNALED);
        ctrl.qpn_ds = U32::new(ctrl.qpn_ds.get() | 0xc0);
        assert_eq!((ctrl.ds(), ctrl.qpn()), (3, QpNum::new(1)));
    }

    #[test]
    #[should_panic(expected = "6-bit field")]
    fn a_control_segment_refuses_a_size_that_does_not_fit() {
        let _ = CtrlSeg::new(0, 0, Opcode::Nop, QpNum::new(1), 64, CtrlFlags::SIGNALED);
    }

    #[test]
    fn an_empty_data_segment_means_two_gibibytes() {
        assert_eq!(DataSeg::new(0, 0, 0).byte_len(), 1 << 31);
        assert_eq!(DataSeg::new(1, 0, 0).byte_len(), 1);
    }
}
