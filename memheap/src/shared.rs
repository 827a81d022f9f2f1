//! One heap for many threads, and blocks that free themselves.
//!
//! Every clone of a [`SharedHeap`] and every [`Block`] keeps the heap's books alive; the bytes belong to
//! whoever provides the range, which must outlive the blocks. A call holds the lock for one allocation or
//! one free and calls nothing else meanwhile, so it cannot deadlock with a caller's locks.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{Allocation, Heap, HeapError, HeapOffset, StorageReport};

/// A cloneable handle of one [`Heap`] behind a lock.
#[derive(Clone, Debug)]
pub struct SharedHeap {
    heap: Arc<Mutex<Heap>>,
}

impl SharedHeap {
    /// A shared heap over `0..capacity`.
    ///
    /// # Errors
    /// As [`Heap::new`].
    pub fn new(capacity: u64) -> Result<Self, HeapError> {
        Heap::new(capacity).map(Self::from)
    }

    /// Takes `len` bytes at a multiple of `align`, for as long as the guard lives.
    ///
    /// # Errors
    /// As [`Heap::alloc`].
    pub fn alloc(&self, len: u64, align: u64) -> Result<Block, HeapError> {
        let allocation = self.alloc_raw(len, align)?;
        Ok(Block { heap: self.clone(), allocation })
    }

    /// Takes `len` bytes at a multiple of `align` until [`SharedHeap::free_raw`].
    ///
    /// # Errors
    /// As [`Heap::alloc`].
    pub fn alloc_raw(&self, len: u64, align: u64) -> Result<Allocation, HeapError> {
        self.heap.lock().alloc(len, align)
    }

    /// Gives back what [`SharedHeap::alloc_raw`] took.
    ///
    /// # Errors
    /// As [`Heap::free`].
    pub fn free_raw(&self, allocation: Allocation) -> Result<(), HeapError> {
        self.heap.lock().free(allocation)
    }

    /// Counts what is free and what is live at one moment.
    pub fn storage_report(&self) -> StorageReport {
        self.heap.lock().storage_report()
    }

    /// Checks every invariant of the books; see [`Heap::assert_consistent`].
    ///
    /// # Panics
    /// If one does not hold.
    pub fn assert_consistent(&self) {
        self.heap.lock().assert_consistent();
    }
}

impl From<Heap> for SharedHeap {
    fn from(heap: Heap) -> Self {
        SharedHeap { heap: Arc::new(Mutex::new(heap)) }
    }
}

/// A live block that is freed when the guard is dropped.
///
/// Keeping the guard *is* quarantine: bytes that a device may still write, such as the rings of a queue
/// pair that has not reached RST, stay out of use for exactly as long as someone holds their block. The
/// heap needs no state for it, and the guard can be moved to whoever waits for the device.
///
/// # Examples
///
/// ```
/// # use ibex_memheap::{HeapError, SharedHeap};
/// let heap = SharedHeap::new(1 << 20)?;
/// let old_ring = heap.alloc(8192, 4096)?;
/// // The new ring is carved while the device may still write the old one ...
/// let new_ring = heap.alloc(16384, 4096)?;
/// assert!(new_ring.offset().get() >= 8192);
/// // ... and only a queue pair seen in RST lets go of it.
/// drop(old_ring);
/// # Ok::<(), HeapError>(())
/// ```
#[must_use = "dropping the guard frees the block"]
pub struct Block {
    heap: SharedHeap,
    allocation: Allocation,
}

impl Block {
    /// First byte of the block.
    pub fn offset(&self) -> HeapOffset {
        self.allocation.offset()
    }

    /// Bytes in the block: exactly what was asked for.
    pub fn len(&self) -> u64 {
        self.allocation.len()
    }

    /// Always false: a block has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("offset", &self.offset()).field("len", &self.len()).finish()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let freed = self.heap.free_raw(self.allocation);
        // PANIC: the guard is the only holder of its allocation, so a refusal means broken books. While
        // another panic unwinds, a second one would hide it behind an abort.
        assert!(freed.is_ok() || std::thread::panicking(), "{freed:?}");
    }
}
