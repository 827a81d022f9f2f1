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

mod owned;
mod segments;
mod view;

pub use owned::{Ctrl, Remote, Request, SegmentBuf, Wqe};
pub use segments::{
    AtomicSeg, CtrlSeg, DataSeg, InlineHeader, MASKED_ATOMIC_OPMOD_4B, MASKED_ATOMIC_OPMOD_8B, MaskedCs32Seg,
    MaskedCs64Seg, MaskedFa32Seg, MaskedFa64Seg, RaddrSeg,
};
pub use view::{AtomicOp, Payload, RequestView, Segment, Segments, WqeError, WqeView, recv_segments};

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
        matches!(self, Self::Fence | Self::StrongOrdering | Self::SmallAndFence)
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
        assert_eq!([0, 1, 2, 3, 4, 5, 8, 9, 63].map(num_wqebbs), [0, 1, 1, 1, 1, 2, 2, 3, 16]);
    }
}
