//! The one structure that bindgen cannot express.

use crate::bindings::__be32;

/// `mlx5_wqe_ctrl_seg`: packed and aligned to 4 at once in C.
///
/// The stream number lies at the odd offset 9; as two bytes in wire order it needs no packing.
#[repr(C, align(4))]
#[derive(Debug, Copy, Clone)]
pub struct mlx5_wqe_ctrl_seg {
    /// Modifier, index of the first basic block, opcode.
    pub opmod_idx_opcode: __be32,
    /// Queue pair number and size in segments.
    pub qpn_ds: __be32,
    /// Signature.
    pub signature: u8,
    /// Stream of a dynamically connected initiator, in wire order.
    pub dci_stream_channel_id: [u8; 2],
    /// Fence, completion and solicited flags.
    pub fm_ce_se: u8,
    /// Immediate data.
    pub imm: __be32,
}
