//! What can go wrong with a heap, and what would have been right.
//!
//! Values only; nothing here owns memory. Every variant is one that a test can provoke.

use crate::HeapOffset;

/// Why a heap refused a call; the heap is as it was before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeapError {
    /// The heap was to span no bytes, or more than the bins reach.
    #[error("heap capacity is {capacity} bytes; it must be 1..={max}")]
    BadCapacity {
        /// Bytes asked for.
        capacity: u64,
        /// Largest capacity, [`crate::CAPACITY_MAX`].
        max: u64,
    },
    /// The limit on extents was zero, or above what the books can number.
    #[error("extents_max is {extents_max}; it must be 1..={max}")]
    BadExtentsMax {
        /// Limit asked for.
        extents_max: u32,
        /// Largest limit, [`crate::EXTENTS_MAX`].
        max: u32,
    },
    /// A block of no bytes was asked for.
    #[error("block length is 0; it must be at least 1 byte")]
    ZeroSize,
    /// The alignment is not a power of two.
    #[error("alignment is {align}; it must be a power of two")]
    BadAlign {
        /// Alignment asked for.
        align: u64,
    },
    /// No free extent holds the block at that alignment.
    #[error(
        "heap exhausted: {requested} bytes aligned to {align} requested, largest free extent {largest_free}, \
         {live} live; it needs a larger heap or fewer live blocks"
    )]
    Exhausted {
        /// Bytes asked for.
        requested: u64,
        /// Alignment asked for.
        align: u64,
        /// Longest free extent; not below `requested` where only the alignment was in the way.
        largest_free: u64,
        /// Bytes in live blocks.
        live: u64,
    },
    /// The books are full: the block would need more extents than the heap may keep.
    #[error("heap has {in_use} of {limit} extents in use and needs {needed} more for this block")]
    ExtentsExhausted {
        /// Most extents, free and live, that the heap may keep.
        limit: u32,
        /// Extents in use.
        in_use: u32,
        /// Extents the block would add.
        needed: u32,
    },
    /// The allocation was not made by this heap.
    #[error("no block of this heap was allocated at offset {}", offset.get())]
    UnknownOffset {
        /// Offset named by the allocation.
        offset: HeapOffset,
    },
    /// The allocation was freed before; its bytes may belong to another block by now.
    #[error("block at offset {} was already freed", offset.get())]
    DoubleFree {
        /// Offset named by the allocation.
        offset: HeapOffset,
    },
}
