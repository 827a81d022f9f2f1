//! The segments themselves, byte by byte.
//!
//! Each is a view of a caller's slice or a value to copy into one; none owns memory. All integers
//! are big-endian types, all alignments 1, so a segment may lie at any offset.

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CtrlFlags, DS_MAX, Opcode, SEG, num_wqebbs};
use crate::types::QpNum;

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
    pub fn new(opmod: u8, wqe_idx: u16, opcode: Opcode, qpn: QpNum, ds: u8, flags: CtrlFlags) -> Self {
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
        Self { raddr: U64::new(raddr), rkey: U32::new(rkey), reserved: U32::ZERO }
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
        assert!(byte_count <= Self::BYTE_COUNT_MAX, "byte_count is a 31-bit field");
        Self { byte_count: U32::new(byte_count), lkey: U32::new(lkey), addr: U64::new(addr) }
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
        Self { byte_count: U32::new(Self::FLAG | len) }
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
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
    fn control_fields_survive_at_their_extremes() {
        let qpn = QpNum::MAX;
        let ctrl = CtrlSeg::new(0xff, 0xffff, Opcode::Mmo, qpn, 63, CtrlFlags(0xff));
        assert_eq!((ctrl.opmod(), ctrl.wqe_idx(), ctrl.opcode()), (0xff, 0xffff, Some(Opcode::Mmo)));
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
