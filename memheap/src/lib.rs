//! Free-list heap over a range of offsets that it never touches.
//!
//! A [`Heap`] hands out pieces of `0..capacity` and takes them back. The range may be GPU memory, a
//! registered umem or nothing at all: every book is kept beside it, in the heap's own vectors, so that a
//! kernel or a device that scribbles over the range cannot damage the allocator, and so that memory the
//! host cannot reach is managed like any other.
//!
//! *Who owns what.* The heap owns its books and nothing else. Whoever holds an [`Allocation`] or a
//! [`Block`] owns the bytes it names; the heap promises only that no two live ones overlap.
//!
//! Free extents stand in lists by size: one row of bins per power of two, 32 bins in a row, a bitmap over
//! rows and bins. Extents are split exactly, so a block occupies the bytes that were asked for and no more;
//! freeing joins an extent with both neighbours at once.
//!
//! ```text
//!  offsets   0                                                          capacity
//!            | live  | free      | live | live    | free                |
//!  books     extent <-> extent <-> extent <-> extent <-> extent   (linked by position)
//!                       |                                |
//!  bins      [.. 4608..4735 ..]                  [.. 2^20 .. ]    (linked by size, bitmap on top)
//! ```
//!
//! # Cost
//!
//! Freeing is O(1). Allocating is O(1) wherever the first extent of the nearest bin fits, or any bin fits for
//! certain. Otherwise the extents that *may* fit are looked at one by one before [`HeapError::Exhausted`] is
//! returned: a refusal is a fact about the heap, not a guess of the search. `benches/memheap.rs` has the
//! numbers.
//!
//! # Invariants
//!
//! INVARIANT: extents tile `0..capacity` in order, without gap or overlap.
//! INVARIANT: no two neighbours are both free; hence after everything is freed one extent is the heap.
//! INVARIANT: an extent is in a size list if and only if it is free, in the list of its own bin.
//! INVARIANT: a call that fails changes nothing.
//!
//! [`Heap::assert_consistent`] checks all of them.
//!
//! # Alignment
//!
//! Alignment is that of the offset. The owner of the range sees to it that its base address is aligned at
//! least as well as the largest alignment it asks for.
//!
//! # Examples
//!
//! ```
//! use ibex_memheap::{HeapError, SharedHeap};
//!
//! let heap = SharedHeap::new(16 << 20)?;
//! let ring = heap.alloc(64 * 128, 4096)?; // A send queue of 128 WQEBBs.
//! let record = heap.alloc(8, 64)?; // A doorbell record on a line of its own.
//! assert_eq!(ring.offset().get() % 4096, 0);
//! assert_eq!(heap.storage_report().live_bytes, 64 * 128 + 8);
//!
//! drop((ring, record)); // The guards give their bytes back ...
//! let report = heap.storage_report();
//! assert_eq!(report.free_extents, 1); // ... and one extent is the whole heap again.
//! assert_eq!(report.largest_free, 16 << 20);
//!
//! let refused = heap.alloc(32 << 20, 64);
//! assert!(matches!(refused, Err(HeapError::Exhausted { requested: 33554432, .. })));
//! # Ok::<(), HeapError>(())
//! ```
#![forbid(unsafe_code)]

mod bins;
mod error;
mod extents;
mod heap;
mod lists;
mod report;
mod shared;

pub use error::HeapError;
pub use heap::{Allocation, CAPACITY_MAX, EXTENTS_DEFAULT, EXTENTS_MAX, Heap, HeapOffset};
pub use report::{BinReport, StorageReport};
pub use shared::{Block, SharedHeap};
